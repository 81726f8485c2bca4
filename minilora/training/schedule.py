"""The learning-rate schedule: warmup, then constant, linear or cosine."""

import math

from minilora.training.config import TrainConfig


def learning_rate_factor(config: TrainConfig, step: int, total_steps: int) -> float:
    """What the learning rate is multiplied by after `step` steps: transformers' schedules of the same names."""
    warmup = config.warmup_steps if config.warmup_steps >= 1 else math.ceil(config.warmup_steps * total_steps)
    if step < warmup:
        return step / warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "linear":
        return max(0.0, 1 - done)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * done)))
