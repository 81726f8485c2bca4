"""Tiny models of many architectures, what each takes, and what is adapted; and the table of them in docs/parity.md."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {"vocab_size": 64, **SMALL, "num_key_value_heads": 2}
SEQ2SEQ = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
SEQ2SEQ |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
IMAGES = {"image_size": 16, "patch_size": 8}


class TiedByHand(nn.Module):
    """A language model of one's own, whose head is the embedding's weight: read, and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.lin = nn.Embedding(64, 32), nn.Linear(32, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.linear(self.lin(self.wte(input_ids)).tanh(), self.wte.weight)


@dataclass
class Architecture:
    """A tiny model of it, what it takes, and what is adapted."""

    build: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    adapted: dict[str, Any] = field(default_factory=lambda: {"target_modules": "all-linear"})


def of(name: str, config: str, **values: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**values))


TEXT = {"input_ids": IDS}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
ARCHITECTURES = {
    "Llama": Architecture(of("LlamaForCausalLM", "LlamaConfig", **DECODER), TEXT),
    "Gemma 3, text and images": Architecture(
        of(
            "Gemma3ForConditionalGeneration", "Gemma3Config", mm_tokens_per_image=4,
            text_config={**DECODER, "head_dim": 8}, vision_config={**SMALL, **IMAGES},
        ),
        TEXT, {"target_modules": r".*language_model.*\.(q_proj|v_proj)|lm_head"},
    ),
    "Qwen2-VL": Architecture(
        of(
            "Qwen2VLForConditionalGeneration", "Qwen2VLConfig", text_config={**DECODER, "rope_parameters": ROPE},
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        ),
        TEXT, {"target_modules": r".*language_model.*_proj"},
    ),
    "T5": Architecture(
        of(
            "T5ForConditionalGeneration", "T5Config", vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2,
            num_heads=4,
        ),
        TEXT | {"decoder_input_ids": IDS},
        {"target_modules": ["q", "v", "wo"], "trainable_token_indices": [5, 7]},
    ),
    "BART": Architecture(
        of(
            "BartForConditionalGeneration", "BartConfig", vocab_size=64, d_model=32, max_position_embeddings=16,
            **SEQ2SEQ,
        ),
        TEXT | {"decoder_input_ids": IDS},
        {"target_modules": ["q_proj", "fc1", "lm_head"]},
    ),
    "Whisper": Architecture(
        of(
            "WhisperForConditionalGeneration", "WhisperConfig", vocab_size=64, d_model=32, num_mel_bins=8,
            max_source_positions=10, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, **SEQ2SEQ,
        ),
        {"input_features": torch.linspace(-1, 1, 2 * 8 * 20).view(2, 8, 20), "decoder_input_ids": IDS},
    ),
    "WavLM": Architecture(
        of(
            "WavLMModel", "WavLMConfig", **SMALL, conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2),
            num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        ),
        {"input_values": torch.linspace(-1, 1, 2 * 400).view(2, 400).sin()},
        {"target_modules": ["q_proj", "v_proj", "intermediate_dense"]},
    ),
    "BERT": Architecture(
        of("BertForSequenceClassification", "BertConfig", vocab_size=64, **SMALL), TEXT,
        {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
    ),
    "ViT": Architecture(
        of("ViTForImageClassification", "ViTConfig", **SMALL, **IMAGES), PIXELS,
        {"target_modules": "all-linear", "modules_to_save": ["classifier"]},
    ),
    "CLIP": Architecture(
        of("CLIPModel", "CLIPConfig", text_config={"vocab_size": 64, **SMALL}, vision_config={**SMALL, **IMAGES}),
        TEXT | PIXELS, {"target_modules": ["q_proj", "v_proj", "text_projection"]},
    ),
    "Mamba": Architecture(
        of("MambaForCausalLM", "MambaConfig", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4), TEXT,
        {"target_modules": ["in_proj", "x_proj", "dt_proj"]},  # PEFT refuses out_proj
    ),
    "GPT-2": Architecture(
        of("GPT2LMHeadModel", "GPT2Config", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16), TEXT,
        {"target_modules": ["c_attn", "wte"], "bias": "lora_only"},
    ),
    "an own model, tied by hand": Architecture(
        TiedByHand, TEXT, {"target_modules": ["lin"], "modules_to_save": ["wte"]}
    ),
}  # fmt: skip
# What PEFT does otherwise, with the reason; the merge and the disk are tried all the same.
READ = "PEFT's LoRA on {}, whose weight the model reads and does not call, does nothing before a merge"
NOT_AS_PEFT = {"Mamba": READ.format("dt_proj"), "WavLM": READ.format("q_proj and v_proj")}


def architectures_table() -> str:
    rows = [
        "| architecture | adapted | three steps, folder, merge, disk | PEFT with the same folder |",
        "|---|---|---|---|",
    ]
    for name, architecture in ARCHITECTURES.items():
        adapted = ", ".join(f"`{key}={value!r}`" for key, value in architecture.adapted.items()).replace("|", "\\|")
        rows.append(f"| {name} | {adapted} | equal outputs | {NOT_AS_PEFT.get(name, 'equal outputs')} |")
    return "\n".join(rows)
