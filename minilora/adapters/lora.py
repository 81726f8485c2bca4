"""LoRA on one layer: the low-rank update beside the frozen weight.

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

import torch
from torch import Tensor, nn

from minilora.adapters.adapter import Adapter, at_least_float32, register
from minilora.adapters.initialization import draw, initialize
from minilora.adapters.layer_kinds import EmbeddingKind
from minilora.adapters.lora_config import LoRAConfig
from minilora.errors import InputError


@register
class LoRA(Adapter):
    """One adapter of one layer: x ↦ s·B A dropout(x).

    Its parameters lora_A (r, in) and lora_B (out, r) are float32 whatever the model's dtype; for a convolution
    (r, in, *kernel) and (out, r / groups, 1, …). An embedding is a linear layer from one-hot vectors. The same seed
    draws the same numbers as in PEFT.

    Args:
        layer: the layer to adapt.
        config: r, lora_alpha, lora_dropout, and where A and B start.
        path: the layer's path in the model, for the patterns in `config` and for error messages.

    Raises:
        InputError: where the layer cannot take an adapter, or not one that starts as `init_lora_weights` says, and for
            a rank that the groups of a convolution do not divide.

    Source: arXiv 2106.09685, section 4.1.
    """

    config_class = LoRAConfig

    def __init__(self, layer: nn.Module, config: LoRAConfig, path: str = "") -> None:
        super().__init__(layer, config, path)
        self.r, self.lora_alpha = config.rank_and_alpha(path)
        self.scaling = self.lora_alpha / (math.sqrt(self.r) if config.use_rslora else self.r)
        self.dropout = nn.Dropout(config.lora_dropout)
        self.draw()
        for name in ("start_A", "start_B"):  # A₀ and B₀ of a start where s·B₀A₀ ≠ 0, see `start_from`
            self.register_buffer(name, None)
        initialize(self, layer, path)

    def draw(self) -> None:
        """A and B at random, before they start as they should."""
        self.lora_A, self.lora_B = draw(self.kind, self.r)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """s·B A dropout(x) (+ add), the products in the dtype of x; float32 for token ids, which are not dropped."""
        A, B = self.factors()
        kept = self.dropout(x) if x.is_floating_point() else x
        if self.start_A is not None and self.start_B is not None and self.is_dropping():
            # s·(B A dropout(x) − B₀A₀ x): what PEFT takes out of W sees all of x
            add = self._product(x - kept, self.start_A, -self.start_B, add)
        return self._product(kept, A, B, add)

    def _product(self, x: Tensor, A: Tensor, B: Tensor, add: Tensor | None) -> Tensor:
        """s·B(A x) (+ add)."""
        dtype = x.dtype if x.is_floating_point() else A.dtype
        h = self.kind.apply(x, A.to(dtype))
        return self.kind.pointwise(h, (self.scaling * B).to(dtype), add)  # s before the cast: one rounding, not two

    def delta(self) -> Tensor:
        """What a merge adds to W: s·BA (out, in, *kernel), in float32 even where the masters were made bfloat16."""
        self.kind.require_one_group()
        A, B = (at_least_float32(factor).flatten(1) for factor in self.factors())
        return self.scaling * (B @ A).view(self.kind.shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in, *kernel) and B (out, r, *1) with ΔW = s·BA: the parameters; of rank 2r after `start_from`."""
        A, B, A0, B0 = self.lora_A, self.lora_B, self.start_A, self.start_B
        if A0 is None or B0 is None:
            return A, B
        # BA − B₀A₀ = (B − B₀) A + B₀ (A − A₀): small from the start, where the difference of two large products
        # would lose in bfloat16 what has been learnt.
        return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)

    def is_dropping(self) -> bool:
        """True where dropout acts now."""
        return self.training and self.config.lora_dropout > 0

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        if type(self) is not LoRA or self.is_dropping():  # a subclass may compute otherwise
            return None
        return *self.factors(), self.scaling

    # --- a start other than B = 0, of an initialisation in minilora/variants/

    start_A: Tensor | None  # noqa: N815
    start_B: Tensor | None  # noqa: N815
    awaits_data = False  # set by an initialisation that needs data, until it has seen some
    new_base: tuple[nn.Module, ...] = ()  # see base_for; in a tuple, so that it is no part of the adapter's state

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

    def as_plain(self) -> "LoRA":
        """A copy with the same update that starts where LoRA always does: its factors are its parameters."""
        if self.new_base:
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

    # --- in files, and as text

    def peft_name(self, name: str) -> str:
        if name not in ("lora_A", "lora_B"):
            return name
        return name.replace("lora_", "lora_embedding_") if isinstance(self.kind, EmbeddingKind) else f"{name}.weight"

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"
