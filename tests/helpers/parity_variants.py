"""The rows of the parity matrix: how minilora and PEFT are asked for a variant, and its equation in plain torch.

Each equation gives W′ from W (out, in, *kernel) and the adapter's parameters, written from the paper and not from
minilora or PEFT: it is what both are judged by, in float64.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import peft
import peft.optimizers
import torch
from peft import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from minilora.adapters.adapter import config_class
from minilora.adapters.attach import add_adapter
from minilora.adapters.for_training import trainable_parameters
from minilora.training.lora_fa import LoRAFA as OurLoRAFA
from minilora.training.lora_plus import parameter_groups
from minilora.variants import eva, lora_ga

Parameters = dict[str, Tensor]  # of one layer: "lora_A" and so on, and "start_A" where the equation needs it
Optimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]  # takes parameters or groups of them, as AdamW does
R, ALPHA = 4, 6
LR = 1e-2
EPS = 1e-12  # of AdamW: so small that it does not matter where it is added


@dataclass(frozen=True, eq=False)
class Variant:
    """One row: the options, which have the same names and meaning in PEFT, and the equation."""

    name: str
    weight: Callable[[Tensor, Parameters], Tensor]  # (W, parameters) -> W′
    peft_type: str = "LORA"
    options: dict[str, Any] = field(default_factory=dict)
    bias: Callable[[Tensor, Parameters], Tensor] = lambda b, p: b
    tied_as_one: bool = False  # the head has the update of the embedding, transposed, and no parameters of its own
    shared: tuple[str, ...] = ()  # what PEFT keeps once for all layers, by name
    dense_groups: bool = True  # its update of a grouped convolution is not block-diagonal
    starts_elsewhere: bool = False  # B₀A₀ ≠ 0: the equation takes start_A and start_B
    up_to_sign: bool = False  # it starts from singular vectors, of which the negative ones are as good
    replaces_base: bool = False  # the adapter puts other weights under itself
    only_float32: bool = False  # what is special about the row does not depend on the dtype

    def add_ours(self, model: nn.Module, targets: list[str], x: Tensor) -> None:
        add_adapter(model, config_class(self.peft_type)(target_modules=targets, **self.options))

    def add_theirs(self, model: nn.Module, targets: list[str], x: Tensor, autocast: bool) -> peft.PeftModel:
        config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(self.peft_type)]
        config = config(target_modules=targets, **self.options)
        return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)

    def our_optimizer(self, model: nn.Module, make: Optimizer) -> torch.optim.Optimizer:
        return make(list(trainable_parameters(model).values()))

    def their_optimizer(self, model: peft.PeftModel, make: Optimizer) -> torch.optim.Optimizer:
        return make([p for p in model.parameters() if p.requires_grad])

    def exact_optimizer(self, parameters: dict[str, nn.Parameter], make: Optimizer) -> torch.optim.Optimizer:
        """parameters: by "<path of the layer>.lora_A" and so on."""
        return make(list(parameters.values()))


# --- the equations ---------------------------------------------------------------------------------------------------


def product(B: Tensor, A: Tensor, W: Tensor) -> Tensor:
    """BA in the shape of W."""
    return (B.flatten(1) @ A.flatten(1)).view(W.shape)


def rows(vector: Tensor, W: Tensor) -> Tensor:
    """A vector (out,) as what multiplies the rows of W."""
    return vector.flatten().view(-1, *[1] * (W.dim() - 1))


def lora(W: Tensor, p: Parameters, s: float = ALPHA / R) -> Tensor:
    """Hu et al. 2021, arXiv 2106.09685, section 4.1."""
    return W + s * product(p["lora_B"], p["lora_A"], W)


def rslora(W: Tensor, p: Parameters) -> Tensor:
    """Kalajdzievski 2023, arXiv 2312.03732."""
    return lora(W, p, s=ALPHA / math.sqrt(R))


def dora(W: Tensor, p: Parameters) -> Tensor:
    """Liu et al. 2024, arXiv 2402.09353, equation 5; section 4.3: the norm is a constant to the gradient."""
    V = lora(W, p)
    return rows(p["lora_magnitude_vector"].flatten() / V.flatten(1).norm(dim=1).detach(), W) * V


def from_start(W: Tensor, p: Parameters) -> Tensor:
    """Meng et al. 2024 (PiSSA), arXiv 2404.02948, equation 5 and its like: W − s·B₀A₀ is frozen, and BA trained."""
    return lora(W, p) - ALPHA / R * product(p["start_B"], p["start_A"], W)


def vera(W: Tensor, p: Parameters) -> Tensor:
    """Kopiczko et al. 2023, arXiv 2310.11454, equation 2: Λ_b B Λ_d A."""
    B, A = p["vera_B"][: W.shape[0]], p["vera_A"][:, : W.shape[1]]
    return W + torch.diag(p["vera_lambda_b"]) @ B @ torch.diag(p["vera_lambda_d"]) @ A


def tucker(T: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """(out, in, *kernel) from a core (r, r, *kernel), A (r, out) and B (r, in): FedPara, proposition 3."""
    return torch.einsum("ab...,ao,bi->oi...", T, A, B)


def loha(W: Tensor, p: Parameters) -> Tensor:
    """Hyeon-Woo et al. 2022 (FedPara), arXiv 2108.06098, equation 2: (B₁A₁) ⊙ (B₂A₂)."""
    factors = [(p.get(f"hada_t{i}"), p[f"hada_w{i}_a"], p[f"hada_w{i}_b"]) for i in (1, 2)]
    first, second = (product(a, b, W) if t is None else tucker(t, a, b).view(W.shape) for t, a, b in factors)
    return W + ALPHA / R * first * second


def lokr(W: Tensor, p: Parameters) -> Tensor:
    """Yeh et al. 2023 (LyCORIS), arXiv 2309.14859, section 3.3: C₁ ⊗ C₂, of which each may be a product."""
    C1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    if "lokr_t2" in p:
        C2 = tucker(p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
    else:
        C2 = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
    inner = (W.shape[0] // C1.shape[0], W.shape[1] // C1.shape[1], *W.shape[2:])
    kron = torch.einsum("ab,cd...->acbd...", C1, C2.reshape(inner)).reshape(W.shape)
    return W + ALPHA / R * kron


def adalora(W: Tensor, p: Parameters) -> Tensor:
    """Zhang et al. 2023, arXiv 2303.10512, equation 3: P Λ Q, scaled by α / (r + 1e-5) as in the authors' code."""
    return W + ALPHA / (R + 1e-5) * product(p["lora_B"], p["lora_E"] * p["lora_A"], W)


def ia3_out(W: Tensor, p: Parameters) -> Tensor:
    """Liu et al. 2022, arXiv 2205.05638, section 3.3: l ⊙ (W x)."""
    return rows(p["ia3_l"], W) * W


def ia3_in(W: Tensor, p: Parameters) -> Tensor:
    """As ia3_out, in a feed-forward block: W (l ⊙ x)."""
    return W * p["ia3_l"].flatten().view(1, -1, *[1] * (W.dim() - 2))


# --- optimizers that go with a variant -------------------------------------------------------------------------------


class LoRAPlus(Variant):
    """Hayou et al. 2024, arXiv 2402.12354: η_B = λ η_A; in an embedding, both learn at a rate of their own."""

    A, ratio, embedding = 1e-2, 4.0, 5e-3  # learning rates

    def our_optimizer(self, model: nn.Module, make: Optimizer) -> torch.optim.Optimizer:
        return make(parameter_groups(model, lr=self.A, lr_ratio=self.ratio, lr_embedding=self.embedding))

    def their_optimizer(self, model: peft.PeftModel, make: Optimizer) -> torch.optim.Optimizer:
        rates = {"lr": self.A, "loraplus_lr_ratio": self.ratio, "loraplus_lr_embedding": self.embedding}
        return peft.optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, eps=EPS, **rates)

    def exact_optimizer(self, parameters: dict[str, nn.Parameter], make: Optimizer) -> torch.optim.Optimizer:
        rate = {"lora_A": self.A, "lora_B": self.A * self.ratio}
        if len(parameters) == 2:  # the embedding is the only adapted layer of its model
            rate = dict.fromkeys(rate, self.embedding)
        return make([{"params": [p], "lr": rate[key.rpartition(".")[2]]} for key, p in parameters.items()])


class LoRAFA(Variant):
    """Zhang et al. 2023, arXiv 2308.03303: A is frozen, and ĝ_B the least-squares fit of s·ĝ_B A to ∂L/∂W."""

    def our_optimizer(self, model: nn.Module, make: Optimizer) -> torch.optim.Optimizer:
        return OurLoRAFA(model, lr=LR, eps=EPS, weight_decay=0.0)

    def their_optimizer(self, model: peft.PeftModel, make: Optimizer) -> torch.optim.Optimizer:
        optimizer = peft.optimizers.create_lorafa_optimizer(model, r=R, lora_alpha=ALPHA, lr=LR)
        optimizer.param_groups[0]["eps"] = EPS  # it is added before the correction for the start, in torch after it
        return optimizer

    def exact_optimizer(self, parameters: dict[str, nn.Parameter], make: Optimizer) -> torch.optim.Optimizer:
        Bs = {key: p for key, p in parameters.items() if key.endswith("lora_B")}
        optimizer = make(list(Bs.values()))

        def project(*_: Any) -> None:
            for key, B in Bs.items():
                A = parameters[key.replace("lora_B", "lora_A")].detach().flatten(1)
                assert B.grad is not None
                groups = len(A) // B.shape[1]
                for rows_of_B, rows_of_A in zip(B.grad.chunk(groups), A.chunk(groups), strict=True):
                    fit = rows_of_B.flatten(1) @ torch.linalg.pinv(rows_of_A @ rows_of_A.T)
                    rows_of_B.copy_((fit * (R / ALPHA) ** 2).view_as(rows_of_B))

        optimizer.register_step_pre_hook(project)
        return optimizer


# --- initialisations that look at data -------------------------------------------------------------------------------


class EVA(Variant):
    """Paischer et al. 2024, arXiv 2410.07170, section 3: A₀ the principal directions of the layer's inputs."""

    def add_ours(self, model: nn.Module, targets: list[str], x: Tensor) -> None:
        super().add_ours(model, targets, x)
        eva.initialize(model, self.batches(x), forward=lambda model, batch: model(batch["x"]))

    def add_theirs(self, model: nn.Module, targets: list[str], x: Tensor, autocast: bool) -> peft.PeftModel:
        model = super().add_theirs(model, targets, x, autocast)
        peft.initialize_lora_eva_weights(
            model,
            self.batches(x),
            forward_fn=lambda model, batch: model(batch["x"]),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=lambda layer_input, batch, name: layer_input[0].flatten(0, -2),
            show_progress_bar=False,
        )
        return model

    def batches(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [{"x": x}]


class LoRAGA(Variant):
    """Wang et al. 2024, arXiv 2407.05000, section 3: A₀ and B₀ from the gradient of W on a batch."""

    def add_ours(self, model: nn.Module, targets: list[str], x: Tensor) -> None:
        super().add_ours(model, targets, x)
        lora_ga.initialize(model, [x], forward=self.loss)

    def add_theirs(self, model: nn.Module, targets: list[str], x: Tensor, autocast: bool) -> peft.PeftModel:
        config = peft.LoraConfig(target_modules=targets, lora_ga_config=LoraGAConfig(), **self.options)
        preprocess_loraga(model, config, lambda: self.loss(model, x).backward())
        return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)

    def loss(self, model: nn.Module, x: Tensor) -> Tensor:
        return model(x).pow(2).mean()


# --- the rows --------------------------------------------------------------------------------------------------------

LORA = {"r": R, "lora_alpha": ALPHA}


def starts_at(name: str, **more: Any) -> Variant:
    options = LORA | {"init_lora_weights": name.lower()}
    return Variant(name, from_start, options=options, starts_elsewhere=True, **more)


VARIANTS = [
    Variant("LoRA", lora, options=LORA),
    Variant("LoRA, tied as one", lora, options=LORA | {"ensure_weight_tying": True}, tied_as_one=True),
    Variant("LoRA, gaussian", lora, options=LORA | {"init_lora_weights": "gaussian"}, only_float32=True),
    Variant("LoRA, random", lora, options=LORA | {"init_lora_weights": False}, only_float32=True),
    Variant("LoRA, orthogonal", lora, options=LORA | {"init_lora_weights": "orthogonal"}, only_float32=True),
    Variant("rsLoRA", rslora, options=LORA | {"use_rslora": True}),
    LoRAPlus("LoRA+", lora, options=LORA, only_float32=True),
    LoRAFA("LoRA-FA", lora, options=LORA, only_float32=True),
    starts_at("PiSSA"),
    starts_at("PiSSA_niter_4", up_to_sign=True),
    starts_at("OLoRA"),
    Variant("LoftQ", lora, options=LORA | {"init_lora_weights": "loftq"}, replaces_base=True),
    EVA("EVA", lora, options=LORA | {"init_lora_weights": "eva"}, up_to_sign=True, only_float32=True),
    LoRAGA(
        "LoRA-GA",
        from_start,
        options=LORA | {"init_lora_weights": "lora_ga"},
        starts_elsewhere=True,
        up_to_sign=True,
        only_float32=True,
    ),
    Variant("DoRA", dora, options=LORA | {"use_dora": True}),
    Variant("VeRA", vera, "VERA", {"r": R}, shared=("vera_A", "vera_B")),
    Variant("AdaLoRA", adalora, "ADALORA", {"init_r": R, "target_r": 2, "lora_alpha": ALPHA, "total_step": 100}),
    Variant("IA3, outputs", ia3_out, "IA3", {"feedforward_modules": []}, bias=lambda b, p: b * p["ia3_l"].flatten()),
    Variant("IA3, inputs", ia3_in, "IA3", {"feedforward_modules": ".*"}),
    Variant("LoHa", loha, "LOHA", {"r": R, "alpha": ALPHA}, dense_groups=False),
    Variant("LoHa, Tucker", loha, "LOHA", {"r": R, "alpha": ALPHA, "use_effective_conv2d": True}, dense_groups=False),
    Variant("LoKr", lokr, "LOKR", {"r": R, "alpha": ALPHA}, dense_groups=False),
    Variant("LoKr, factored", lokr, "LOKR", {"r": R // 2, "alpha": ALPHA / 2, "decompose_both": True}),
    Variant("LoKr, Tucker", lokr, "LOKR", {"r": R // 4, "alpha": ALPHA / 4, "use_effective_conv2d": True}),
]
