"""The training loop, and what stands beside it.

Read train.py first: the loop in one function; then loss.py. config.py has the settings; rows.py, mode.py and
optimizer.py make rows, model and optimizer ready, schedule.py has the learning rate. checkpoint.py (with fingerprint.py
and random_states.py) makes a run resume exactly; log.py is what it tells meanwhile, result.py in the end. Rare cases
are in transformers_loss.py, loss_scale.py (float16) and interrupt.py (Ctrl-C); lora_plus.py and lora_fa.py are variants
of the optimizer.
"""

from minilora.training import lora_plus
from minilora.training.checkpoint import checkpoint_to_resume
from minilora.training.config import TrainConfig
from minilora.training.interrupt import TrainingInterrupted
from minilora.training.lora_fa import LoRAFA
from minilora.training.loss import label_tokens, language_model_loss, loss_of_labels, summed_loss
from minilora.training.random_states import seed_everything
from minilora.training.result import DivergedError, TrainResult
from minilora.training.train import train

__all__ = [
    "DivergedError",
    "LoRAFA",
    "TrainConfig",
    "TrainResult",
    "TrainingInterrupted",
    "checkpoint_to_resume",
    "label_tokens",
    "language_model_loss",
    "lora_plus",
    "loss_of_labels",
    "seed_everything",
    "summed_loss",
    "train",
]
