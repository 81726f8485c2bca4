"""`minilora demo`: a real 135M-parameter model learns to call functions through QLoRA, on two CPU cores, in minutes.

checkpoint -> model (NF4) -> scores before -> adapters -> train -> scores after -> merge -> report
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from minilora import bfcl
from minilora.adapters import add_adapter, disable_adapters, trainable_parameters
from minilora.checkpoint import load, save_pretrained
from minilora.data import Row, encode_rows
from minilora.errors import InputError
from minilora.evaluate import Scores, evaluate, few_shot_prompt
from minilora.general_ability import general_ability
from minilora.lora import LoRAConfig
from minilora.peft_format import save_adapter
from minilora.report import Report, comparison_table, general_table, show_samples, write_html, write_text
from minilora.train import TrainConfig, train

MODEL = "smollm2-135m-instruct"
FEW_SHOT = 4
BASE, FEW, TUNED, MERGED = "base", f"base, {FEW_SHOT} examples in the prompt", "tuned", "tuned and merged"


@dataclass
class DemoConfig:
    """Teach SmolLM2-135M-Instruct to answer with one JSON function call, and show what it learned."""

    output_dir: str = "minilora-demo"
    """where the adapter, the merged model, the log, metrics.json and report.html go"""
    test_rows: int = 128
    """held-out rows to score on, never trained on"""
    max_length: int = 180
    """rows of this many tokens or more are left out"""
    lora: LoRAConfig = field(
        default_factory=lambda: LoRAConfig(r=16, lora_alpha=32, target_modules="all-linear")
    )
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            learning_rate=2e-3,
            schedule="cosine",
            warmup_steps=10,
            max_steps=120,
            batch_size=8,
            group_by_length=True,
        )
    )
