"""The configuration of LoRA, in the names and defaults of PEFT's `LoraConfig`, and its patterns of layers' names."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from minilora.adapters.adapter import AdapterConfig, ends_with
from minilora.adapters.initialization import initialization, initializations, options_by_key, read_options
from minilora.errors import InputError

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """Which layers to adapt and how, in the names and defaults of PEFT's `LoraConfig`.

    Raises:
        InputError: where a value is out of range, naming its key.
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
    lora_bias: bool = False
    """train a bias of B too: minilora/variants/lora_bias.py"""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """rows of the embedding that train, by token id; or {name of an embedding: ids}. A tied head follows."""
    target_parameters: list[str] | None = None
    """parameters that are no layer's weight, the experts of a Mixture-of-Experts: names or ends of names"""
    ensure_weight_tying: bool = False
    """what is trained of one of the layers that share the embedding's weight, by target_modules or modules_to_save, is
    trained of all of them as one"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("use_rslora", "use_dora", "lora_bias"):  # a text "False" would count as true
            self.require(key, isinstance(getattr(self, key), bool), "True or False")
        self.check_ranks()
        self.require("alpha_pattern", isinstance(self.alpha_pattern, Mapping), "a dict")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise InputError(f"LoRAConfig: lora_alpha must be a number, not {alpha!r}")
        is_share = isinstance(self.lora_dropout, int | float) and 0 <= self.lora_dropout < 1
        self.require("lora_dropout", is_share, "at least 0 and below 1")
        if self.bias not in ("none", "lora_only", "all"):
            raise InputError(f"LoRAConfig: bias={self.bias!r} is not one of 'none', 'lora_only', 'all'")
        if str(self.init_lora_weights).lower() in ("olora", "gaussian"):  # of which PEFT does not look at the case
            object.__setattr__(self, "init_lora_weights", self.init_lora_weights.lower())  # type: ignore[union-attr]
        if isinstance(self.target_parameters, str):
            raise InputError(f"LoRAConfig: target_parameters is a list of names: [{self.target_parameters!r}]")
        if initialization(self.init_lora_weights) is None:
            known = ", ".join(["True", "False", *sorted(repr(name) for name in initializations)])
            raise InputError(f"LoRAConfig: init_lora_weights={self.init_lora_weights!r} is not one of {known}")
        plain = isinstance(self.init_lora_weights, bool) and not self.use_dora and not self.target_parameters
        if self.lora_bias and not plain:
            raise InputError(
                "LoRAConfig: lora_bias=True is for init_lora_weights=True or False, without use_dora, target_parameters"
            )
        for key, options in options_by_key.items():
            checked = read_options(key, options, getattr(self, key) or {})
            if key == f"{self.init_lora_weights}_config":
                object.__setattr__(self, key, asdict(checked))  # the defaults are written to PEFT's file too

    def check_ranks(self) -> None:
        """Raise InputError for an r or rank_pattern out of range; AdaLoRA's rank_pattern is another thing."""
        self.require("rank_pattern", isinstance(self.rank_pattern, Mapping), "a dict")
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
