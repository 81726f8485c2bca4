"""LoRA on one layer: the configuration, and the low-rank update.

                 x (…, in)
                 │
         ┌───────┴───────┐
         │               ▼
         │            dropout
         │               │
         ▼          ┌────┴─────┐
  ┌─────────────┐   │ A (r,in) │   random at the start, trained, float32
  │ W (out, in) │   └────┬─────┘
  │ frozen:     │        │  r numbers a token
  │ dense or    │   ┌────┴─────┐
  │ NF4         │   │ B (out,r)│   zero at the start, trained, float32
  └──────┬──────┘   └────┬─────┘
         │               │  · s
         └─────► + ◄─────┘
                 │
                 ▼
                 y = W x + b + s·B A x         s = α/r, or α/√r with rsLoRA

LoRA, the equation, the initialisation and α/r: Hu et al. 2021, arXiv 2106.09685, section 4.1.
rsLoRA, α/√r: Kalajdzievski 2023, arXiv 2312.03732, section 3.
QLoRA, W kept in NF4 and dequantized to use it: Dettmers et al. 2023, arXiv 2305.14314, section 3, equations 5 and 6.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from minilora.adapters.adapter import Adapter, AdapterConfig, ends_with, register
from minilora.adapters.initialization import (
    gaussian,
    initialization,
    initializations,
    kaiming,
    options_by_key,
    read_options,
)
from minilora.adapters.layer_kinds import ConvKind, EmbeddingKind, LayerKind
from minilora.errors import InputError

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """Which layers to adapt and how, in the names and defaults of PEFT's `LoraConfig`.

    Raises InputError for a value out of range.
    """

    peft_type: ClassVar[str] = "LORA"

    r: int = 8
    """rank of the update"""
    lora_alpha: float = 8
    """the update is scaled by lora_alpha / r"""
    lora_dropout: float = 0.0
    """probability with which an input of A is dropped in training"""
    use_rslora: bool = False
    """scale by lora_alpha / sqrt(r) instead"""
    use_dora: bool = False
    """learn the norm of each output's weights apart from their direction: minilora/variants/dora.py"""
    init_lora_weights: bool | str = True
    """True: Kaiming-uniform A; "gaussian": A ~ N(0, 1/r²); both with B = 0. False: A and B random (for tests). Or an
    initialisation of minilora/variants/: "pissa", "pissa_niter_4", "olora", "orthogonal", "loftq"; "eva" and "lora_ga",
    which look at data, each by its `initialize(model, batches)` after `add_adapter`"""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """another r for the layers whose name a pattern ends"""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """another lora_alpha for the layers whose name a pattern ends"""
    loftq_config: dict[str, Any] = field(default_factory=dict)
    """options of init_lora_weights="loftq", see LoftQOptions; as those below, PEFT's keys and defaults"""
    eva_config: dict[str, Any] | None = None
    """options of init_lora_weights="eva", see EVAOptions"""
    lora_ga_config: dict[str, Any] | None = None
    """options of init_lora_weights="lora_ga", see LoRAGAOptions"""
    fan_in_fan_out: bool = False
    """kept for PEFT's adapter_config.json: whether W is stored as (in, out) shows in the layer itself"""
    bias: str = "none"
    """biases that train, each adapter's own: "none", "lora_only" (of the layers with LoRA) or "all" (of the model)"""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """rows of the embedding that train, by token id; or {name of an embedding: ids}. A tied head follows."""
    target_parameters: list[str] | None = None
    """parameters that are no layer's weight, the experts of a Mixture-of-Experts: names or ends of names"""
    ensure_weight_tying: bool = False
    """what is trained of a tied embedding or head, by target_modules or modules_to_save, is trained of both as one"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, key), bool):  # a text "False" would count as true
                raise InputError(f"LoRAConfig: {key} must be True or False, not {getattr(self, key)!r}")
        self.check_ranks()
        if not isinstance(self.alpha_pattern, Mapping):
            raise InputError(f"LoRAConfig: alpha_pattern must be a dict, not {self.alpha_pattern!r}")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise InputError(f"LoRAConfig: lora_alpha must be a number, not {alpha!r}")
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout < 1:
            raise InputError(f"LoRAConfig: lora_dropout must be at least 0 and below 1, not {self.lora_dropout!r}")
        if self.bias not in ("none", "lora_only", "all"):
            raise InputError(f"LoRAConfig: bias={self.bias!r} is not one of 'none', 'lora_only', 'all'")
        if initialization(self.init_lora_weights) is None:
            known = ", ".join(["True", "False", *sorted(repr(name) for name in initializations)])
            raise InputError(f"LoRAConfig: init_lora_weights={self.init_lora_weights!r} is not one of {known}")
        for key, options in options_by_key.items():
            checked = read_options(key, options, getattr(self, key) or {})
            if key == f"{self.init_lora_weights}_config":
                object.__setattr__(self, key, asdict(checked))  # the defaults are written to PEFT's file too

    def check_ranks(self) -> None:
        if not isinstance(self.rank_pattern, Mapping):  # AdaLoRA's is another thing, and may be None
            raise InputError(f"LoRAConfig: rank_pattern must be a dict, not {self.rank_pattern!r}")
        for r in (self.r, *self.rank_pattern.values()):
            if not isinstance(r, int) or r < 1:
                raise InputError(f"LoRAConfig: a rank must be a whole number of at least 1, not {r!r}")

    @property
    def init_options(self) -> Any:
        """The options of init_lora_weights: an EVAOptions for "eva", and so on."""
        key = f"{self.init_lora_weights}_config"
        return read_options(key, options_by_key[key], getattr(self, key))

    def as_plain(self, times: int) -> "LoRAConfig":
        """The configuration of an adapter of `times` the rank, the same scaling and no special start."""
        alpha = math.sqrt(times) if self.use_rslora else times  # s = α/√r or α/r stays
        return replace(
            self,
            init_lora_weights=True,
            r=times * self.r,
            lora_alpha=alpha * self.lora_alpha,
            rank_pattern={key: times * r for key, r in self.rank_pattern.items()},
            alpha_pattern={key: alpha * value for key, value in self.alpha_pattern.items()},
            loftq_config={},
            eva_config=None,
            lora_ga_config=None,
        )

    def rank_and_alpha(self, path: str) -> tuple[int, float]:
        """r and lora_alpha for the layer at `path`: the first pattern that matches its end, else the defaults."""
        return first_match(self.rank_pattern, path, self.r), first_match(self.alpha_pattern, path, self.lora_alpha)


def first_match(patterns: Mapping[str, Value], path: str, default: Value) -> Value:
    """The value of the first pattern that matches the end of the path, by PEFT's rule."""
    return next((value for key, value in patterns.items() if ends_with(key, path)), default)


# --- the adapter -----------------------------------------------------------------------------------------------------


@register
class LoRA(Adapter):
    """One adapter of one layer: x ↦ s·B A dropout(x).

    Parameters, float32 masters whatever the model's dtype, for a linear layer: lora_A (r, in_features) and
    lora_B (out_features, r). For a convolution: lora_A (r, in, *kernel), lora_B (out, r / groups, 1, …). For an
    embedding the same as for a linear layer from one-hot vectors, with the roles changed: A = 0 and B normal.
    Raises InputError for a rank that the groups of a convolution do not divide.
    Source: arXiv 2106.09685, section 4.1; the same seed draws the same A as PEFT does.
    """

    config_class = LoRAConfig
    start_A: Tensor | None  # noqa: N815
    start_B: Tensor | None  # noqa: N815

    def __init__(self, layer: nn.Module, config: LoRAConfig, path: str = "") -> None:
        super().__init__(layer, config, path)
        self.r, self.lora_alpha = config.rank_and_alpha(path)
        self.scaling = self.lora_alpha / (math.sqrt(self.r) if config.use_rslora else self.r)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.lora_A, self.lora_B = draw(self.kind, self.r)
        # Set by an initialisation that starts from B₀A₀ ≠ 0, see `start_from`.
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self.awaits_data = False  # set by an initialisation that needs data, until it has seen some
        self.new_base: list[nn.Module] = []  # see base_for; a list, so that the layer is no part of the adapter's state
        try:
            self.reset_parameters(layer)
        except InputError as error:
            where = path or "the layer"
            raise InputError(f"{where}: init_lora_weights={config.init_lora_weights!r} {error}") from None

    @torch.no_grad()
    def reset_parameters(self, layer: nn.Module) -> None:
        """Set A and B as `init_lora_weights` says, given the layer that they adapt."""
        initialize = initialization(self.config.init_lora_weights)
        assert initialize is not None  # LoRAConfig has checked
        if isinstance(self.kind, EmbeddingKind) and initialize in (kaiming, gaussian):
            nn.init.zeros_(self.lora_A)  # a token's column of A is used for that token only; B is common to all
            nn.init.normal_(self.lora_B)
            return
        initialize(self, layer)

    @torch.no_grad()
    def start_from(self, A: Tensor, B: Tensor) -> None:
        """Start training at A₀, B₀ with s·B₀A₀ ≠ 0, but from the base model itself: ΔW = s·(BA − B₀A₀).

        PEFT subtracts s·B₀A₀ from W. Here W stays what it is, so that switching the adapter off, or to another one,
        gives the base model, and a W in 4 bits need not be quantized again.
        """
        self.lora_A.copy_(A.view_as(self.lora_A))
        self.lora_B.copy_(B.view_as(self.lora_B))
        self.start_A, self.start_B = self.lora_A.clone(), self.lora_B.clone()
        self.awaits_data = False

    def check_before_training(self, name: str, total_steps: int) -> None:
        """Without the data in which its start was to be found it would train as a plain LoRA without a word."""
        if self.awaits_data:
            start = self.config.init_lora_weights
            raise InputError(
                f"adapter {name!r} has init_lora_weights={start!r} and has seen no data:"
                f" call minilora.variants.{start}.initialize(model, batches, {name!r},"
                f" forward=minilora.language_model_loss) before train"
            )

    def base_for(self, layer: nn.Module) -> nn.Module:
        """What LoftQ made to take the place of `layer`, or else `layer` itself."""
        return self.new_base[0] if self.new_base else layer

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in, *kernel) and B (out, r, *1) with ΔW = s·BA: the parameters; of rank 2r after `start_from`."""
        A, B, A0 = self.lora_A, self.lora_B, self.start_A
        if A0 is None:
            return A, B
        B0 = self.start_B
        assert B0 is not None
        # BA − B₀A₀ = (B − B₀) A + B₀ (A − A₀): small from the start, where the difference of two large products
        # would lose in bfloat16 what has been learnt.
        return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)

    def as_plain(self) -> "LoRA":
        """A copy with the same update that starts where LoRA always does: its factors are its parameters.

        Raises InputError for an adapter of LoftQ, whose update is meant for the base that LoftQ made.
        """
        if self.config.init_lora_weights == "loftq":
            raise InputError(
                "an adapter that LoftQ initialized belongs on the 4-bit base that LoftQ made, and is none for another:"
                " merge it, unload(model, merge=True), and save the whole model with save_pretrained"
            )
        plain, A, B = copy.copy(self), *self.factors()
        plain._parameters, plain._buffers = dict(self._parameters), self._buffers | {"start_A": None, "start_B": None}
        plain.lora_A, plain.lora_B = nn.Parameter(A.detach()), nn.Parameter(B.detach())
        plain.config = self.config.as_plain(times=len(A) // self.r)
        plain.r = len(A)
        return plain

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """s·B A dropout(x) (+ add), the products in the dtype of x; float32 for token ids, which are not dropped."""
        A, B = self.factors()
        if not x.is_floating_point():
            return self._product(x, A, B, A.dtype, add)
        kept = self.dropout(x)
        if self.training and self.config.lora_dropout:
            A0, B0 = self.start_A, self.start_B
            if A0 is not None and B0 is not None:
                # s·(B A dropout(x) − B₀A₀ x): what PEFT takes out of W sees all of x
                add = self._product(x - kept, A0, -B0, x.dtype, add)
        return self._product(kept, A, B, x.dtype, add)

    def _product(self, x: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype, add: Tensor | None) -> Tensor:
        sB = (self.scaling * B).to(dtype)  # s before the cast: one rounding, not two
        return self.kind.pointwise(self.kind.apply(x, A.to(dtype)), sB, add)

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        if type(self) is not LoRA or (self.training and self.config.lora_dropout):  # a subclass may compute otherwise
            return None
        return *self.factors(), self.scaling

    def delta(self) -> Tensor:
        """What a merge adds to W: s·BA (out, in, *kernel), in float32 even where the masters were made bfloat16."""
        A, B = self.factors()
        dtype = torch.promote_types(B.dtype, torch.float32)
        BA = B.to(dtype).flatten(1) @ A.to(dtype).flatten(1)
        return self.scaling * BA.view(self.kind.shape)

    def peft_name(self, name: str) -> str:
        if name not in ("lora_A", "lora_B"):
            return name
        return name.replace("lora_", "lora_embedding_") if isinstance(self.kind, EmbeddingKind) else f"{name}.weight"

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


def draw(kind: LayerKind, r: int) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of the shapes that a layer of this kind needs, drawn as PEFT does: same seed, same numbers."""
    if isinstance(kind, EmbeddingKind):
        return nn.Parameter(torch.randn(r, kind.in_features)), nn.Parameter(torch.randn(kind.out_features, r))
    # The layers are made for the numbers that their constructors draw, and dropped.
    if isinstance(kind, ConvKind):
        if r % kind.groups:
            raise InputError(f"r={r} cannot be divided among the groups={kind.groups} of a convolution")
        kernel = kind.shape[2:]
        Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
        A = Conv(kind.in_features, r, kernel, bias=False, dtype=torch.float32)  # type: ignore[arg-type]
        B = Conv(r, kind.out_features, 1, groups=kind.groups, bias=False, dtype=torch.float32)
        return A.weight, B.weight
    return (
        nn.Linear(kind.in_features, r, bias=False, dtype=torch.float32).weight,
        nn.Linear(r, kind.out_features, bias=False, dtype=torch.float32).weight,
    )
