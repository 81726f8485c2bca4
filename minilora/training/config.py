"""The settings of a training run."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_origin

from minilora.errors import InputError

_NUMBERS = (int, float, int | None, float | None)
_AT_LEAST_ZERO = ("warmup_steps", "weight_decay")  # every other number but the seed is above 0
_RESUME_MAY_CHANGE = (
    "output_dir",
    "skip_bad_rows",
    "keep_weights",
    "offload_activations",
    "save_every",
    "keep_last",
    "resume",
    "progress",
    "tensorboard",
    "wandb_project",
)


@dataclass(frozen=True)
class TrainConfig:
    """How to train; every field is a flag of the command line and a key of a recipe.

    Raises:
        InputError: a value is of the wrong kind or out of range, or two settings do not go together.
    """

    output_dir: str = "minilora-output"
    """Folder for checkpoints, the log and the final adapter."""
    learning_rate: float = 2e-4
    """AdamW's learning rate, at its highest."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes down to zero after the warm-up, or stays."""
    warmup_steps: float = 0.05
    """Steps over which the learning rate rises from zero: below 1 a share of all steps, else their number."""
    epochs: float = 1.0
    """How often every row is seen; max_steps takes precedence."""
    max_steps: int | None = None
    """Number of optimizer steps."""
    batch_size: int = 8
    """Rows in one forward and backward pass."""
    gradient_accumulation_steps: int = 1
    """Passes before each optimizer step; their gradients are averaged over all of the step's tokens."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    eps: float = 1e-8
    """AdamW's term in the denominator."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """AdamW; 8bit: its moments in 8 bits, by bitsandbytes; paged: they leave a GPU that is full for the CPU."""
    loraplus_lr_ratio: float | None = None
    """LoRA+: B's learning rate is this times that of A; 16 is usual."""
    lora_fa: bool = False
    """LoRA-FA: A stays as it was drawn, B's gradient makes up for it; fewer activations are saved."""
    max_grad_norm: float | None = 1.0
    """Scale the gradient down to this norm where it is longer."""
    keep_weights: bool = True
    """On a CPU, dequantize each NF4 weight once for all steps: as many as fit in a quarter of the free memory."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of saving them: less memory, a third slower."""
    offload_activations: bool = False
    """With gradient_checkpointing, on a GPU: what that still saves waits in CPU memory. For minilora's own models."""
    packing: bool = True
    """Pack a pass's rows into one sequence, each read by itself; transformers' models with sdpa, flash or flex."""
    group_by_length: bool = True
    """Where rows are padded, put those of similar length into the same step: less padding."""
    max_length: int = 1024
    """Rows of more tokens are skipped, and reported."""
    mask_history: bool = False
    """Learn only the last answer of each conversation."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used, and report them; else one of them is an error."""
    eval_every: int | None = None
    """Steps between two evaluations on the held-out rows; they are also evaluated at the end."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations in a row without a new lowest loss, and take the best parameters back."""
    save_every: int | None = 100
    """Steps between two checkpoints; one is also written at the end, at a new lowest held-out loss, and on Ctrl-C."""
    keep_last: int = 2
    """Checkpoints to keep: the last ones, and the best one beside them."""
    resume: str | None = None
    """A checkpoint to continue from; "auto" takes the last one in output_dir, or starts anew if there is none."""
    seed: int = 0
    """Seeds Python, NumPy and torch: the order of the rows and the dropout; `minilora train` also draws A with it."""
    progress: bool = True
    """Show progress on the standard error stream."""
    tensorboard: bool = False
    """Also log to output_dir/tensorboard."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project."""

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type in _NUMBERS and name != "seed" and not (value is None and field.type not in (int, float)):
                least = "at least 0" if name in _AT_LEAST_ZERO else "above 0"
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise InputError(f"{name} must be a number {least}, not {value!r}")
                if not (value > 0 or (value == 0 and name in _AT_LEAST_ZERO)):  # NaN is neither
                    raise InputError(f"{name} must be {least}, not {value}")
                if value == math.inf:
                    raise InputError(f"{name} must be finite")
                if field.type in (int, int | None) and isinstance(value, float):
                    raise InputError(f"{name} must be a whole number, not {value}")
            if field.type is bool and not isinstance(value, bool):  # a text "False" would count as true
                raise InputError(f"{name} must be True or False, not {value!r}")
            if get_origin(field.type) is Literal and value not in (choices := get_args(field.type)):
                raise InputError(f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}, not {value!r}")
        two = isinstance(self.betas, tuple | list) and len(self.betas) == 2
        if not two or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be two numbers of at least 0 and below 1, not {self.betas!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:  # NumPy's limit
            raise InputError(f"seed must be a whole number from 0 to 2**32 - 1, not {self.seed!r}")
        if not self.output_dir:
            raise InputError("output_dir is empty: name a folder")
        if self.offload_activations and not self.gradient_checkpointing:
            raise InputError("offload_activations moves what gradient_checkpointing keeps: set that too")
        if self.lora_fa and self.optimizer != "adamw":
            raise InputError(f"lora_fa comes with an AdamW of its own: leave out optimizer={self.optimizer!r}")
        if self.lora_fa and self.loraplus_lr_ratio is not None:
            raise InputError("lora_fa leaves A as it is, so that loraplus_lr_ratio has no meaning: choose one of them")
        if self.early_stopping_patience is not None and self.eval_every is None:
            raise InputError("early_stopping_patience counts evaluations: set eval_every too")

    def decisive(self) -> dict[str, Any]:
        """The settings that change what is computed: a resumed run must have the same."""
        return {name: value for name, value in asdict(self).items() if name not in _RESUME_MAY_CHANGE}
