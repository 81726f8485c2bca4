"""A model of two tiny layers and rows of random tokens: a training step takes milliseconds."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from minilora.adapters.attach import add_adapter
from minilora.adapters.lora_config import LoRAConfig
from minilora.data.examples import Example
from minilora.models.config import ModelConfig
from minilora.models.transformer import Transformer
from minilora.nf4.linear import NF4Linear
from minilora.training import train
from minilora.training.config import TrainConfig
from minilora.training.log import read_log
from minilora.training.result import TrainResult

VOCABULARY = 64
PADDING = SimpleNamespace(pad_token_id=0)  # all that `train` asks a tokenizer when the rows are Examples
TIMES = {"seconds", "tokens_per_s", "rss_mb", "eval_seconds"}  # what differs between two equal runs

LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_base(*, nf4: bool = False, seed: int = 0) -> Transformer:
    """The same weights for the same seed, without an adapter."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig.from_hf(LLAMA))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.1)
    return quantized(model) if nf4 else model


def tiny_model(*, dropout: float = 0.0, r: int = 4, nf4: bool = False, seed: int = 0, **lora: Any) -> Transformer:
    """The same weights for the same seed; B is not zero, so that every adapter weight has a gradient."""
    model = tiny_base(nf4=nf4, seed=seed)
    add_adapter(model, LoRAConfig(r=r, target_modules="all-linear", lora_dropout=dropout, **lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def quantized(model: Transformer) -> Transformer:
    """Blocks in NF4 with bfloat16 products, the rest in bfloat16."""
    model = model.to(torch.bfloat16)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                setattr(part, name, NF4Linear.from_linear(linear, compute_dtype=torch.bfloat16))
    return model


def random_rows(n: int, *, seed: int = 0, longest: int = 20) -> list[Example]:
    """Rows of 4 to `longest` tokens, the first few of each without a label."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        length = int(torch.randint(4, longest + 1, (1,), generator=random))
        ids = torch.randint(3, VOCABULARY, (length,), generator=random).tolist()
        unlabelled = int(torch.randint(1, 4, (1,), generator=random))
        rows.append(Example(ids, [-100] * unlabelled + ids[unlabelled:], f"rows.jsonl:{i + 1}"))
    return rows


def run(model: torch.nn.Module, rows: Any, folder: Path, eval_rows: Any = None, **settings: Any) -> TrainResult:
    """`train` with short settings, quiet unless asked."""
    settings = {"learning_rate": 1e-2, "progress": False, "output_dir": str(folder)} | settings
    return train(model, PADDING, rows, TrainConfig(**settings), eval_rows=eval_rows)


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters that are trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def timeless_log(folder: Path) -> list[dict[str, Any]]:
    """The log without what the clock says, and what the machine is."""
    records = [record for record in read_log(folder / "log.jsonl") if "device" not in record]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]
