"""transformers' Trainer with adapters on what is tied: its checkpoints are written, and it resumes from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import tiny_llama
from safetensors.torch import load_file
from transformers import BartConfig, BartForConditionalGeneration, Trainer, TrainingArguments

import minilora as ml

pytest.importorskip("accelerate")


def bart() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    return BartForConditionalGeneration(BartConfig(vocab_size=64, **sizes, **heads))


def llama() -> Any:
    return tiny_llama(tied=True)


BOTH = ["embed_tokens", "lm_head"]
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "LoRA on the head": (llama, {"target_modules": ["lm_head"]}),
    "LoRA on the embedding": (llama, {"target_modules": ["embed_tokens"]}),
    "LoRA on both": (llama, {"target_modules": BOTH}),
    "LoRA on both as one": (llama, {"target_modules": BOTH, "ensure_weight_tying": True}),
    "rows": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
    "a copy": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "one copy for both": (
        llama, {"target_modules": ["q_proj"], "modules_to_save": BOTH, "ensure_weight_tying": True}
    ),
    "more than a pair": (bart, {"target_modules": ["q_proj", "lm_head", "encoder.embed_tokens"]}),
    "rows of more than a pair": (bart, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
}  # fmt: skip


def trained(case: str, folder: Path, resume_from: Path | None = None) -> dict[str, torch.Tensor]:
    build, config = CASES[case]
    model = build()
    torch.manual_seed(1)
    ml.add_adapter(model, ml.LoRAConfig(**config))
    rows = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, save_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train(str(resume_from) if resume_from else None)
    return dict(model.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_the_trainer_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(case: str, tmp_path: Path) -> None:
    through = trained(case, tmp_path / "a")
    written = load_file(tmp_path / "a" / "checkpoint-1" / "model.safetensors")
    assert any(not torch.equal(through[key], written[key]) for key in written), "the second step changed something"
    resumed = trained(case, tmp_path / "b", tmp_path / "a" / "checkpoint-1")
    assert through.keys() == resumed.keys()
    assert [key for key, tensor in through.items() if not torch.equal(tensor, resumed[key])] == []
