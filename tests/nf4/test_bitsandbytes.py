"""Checkpoints that transformers saved with bitsandbytes' 4-bit layers, loaded as they are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from helpers.chat import CHATML, tiny
from helpers.gguf import logits
from helpers.models import SHAPE, relative_error, transformers_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen3Config

from minilora.errors import InputError
from minilora.formats.load import load
from minilora.nf4.linear import NF4Linear
from minilora.text.tokenizer_files import save_tokenizer

IDS = torch.arange(26).view(2, 13) * 5 % 97
LAYER = "model.layers.1.mlp.gate_proj"


# bitsandbytes 0.50.2 dequantizes wrongly on a CPU where a row is no multiple of the block of 64: (64, 112) for one.
WIDE = SHAPE | {"intermediate_size": 128}
TWO_CONFIGS = {
    "bias": LlamaConfig(**WIDE, attention_bias=True, mlp_bias=True),
    "tied": Qwen3Config(**WIDE, head_dim=16, tie_word_embeddings=True),
}


def save_in_4_bits(path: Path, name: str, double_quant: bool, quant_type: str = "nf4") -> Any:
    """A folder as transformers writes it after loading with bitsandbytes; returns the model in 4 bits."""
    transformers_model(TWO_CONFIGS[name]).save_pretrained(path / "whole")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(path / "whole", quantization_config=config, device_map="cpu")
    model.save_pretrained(path / "4bit")
    save_tokenizer(tiny(CHATML), path / "4bit")
    return model.eval()


@pytest.mark.parametrize(("name", "double_quant"), [("bias", True), ("tied", False)])
def test_the_quantized_weights_are_taken_as_they_are(name: str, double_quant: bool, tmp_path: Path) -> None:
    theirs = save_in_4_bits(tmp_path, name, double_quant)
    ours, _ = load(tmp_path / "4bit", dtype=torch.float32, block_size=128)  # block_size is for what is quantized now
    stored = load_file(tmp_path / "4bit" / "model.safetensors")
    layer = ours.get_submodule(LAYER)
    assert isinstance(layer, NF4Linear) and layer.block_size == 64
    assert torch.equal(layer.weight, stored[f"{LAYER}.weight"].flatten())
    assert torch.equal(layer.absmax, stored[f"{LAYER}.weight.absmax"])
    whole = transformers_model(TWO_CONFIGS[name])
    with torch.no_grad():
        for path, module in theirs.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                weight = bitsandbytes.functional.dequantize_4bit(module.weight, module.weight.quant_state)
                whole.get_submodule(path).weight.copy_(weight)
    expected = logits(whole, IDS)
    assert relative_error(logits(ours, IDS), expected) < 1e-5  # float32 rounding, see models/test_transformer.py
    dense, _ = load(tmp_path / "4bit", quantize=None, dtype=torch.float32)
    assert not any(isinstance(module, NF4Linear) for module in dense.modules())
    assert relative_error(logits(dense, IDS), expected) < 1e-5


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("4bit")
    save_in_4_bits(path, "bias", double_quant=True)
    return path / "4bit"


def state(**values: Any) -> Callable[[dict[str, Tensor]], None]:
    """Change values of the JSON beside the weight."""

    def change(tensors: dict[str, Tensor]) -> None:
        key = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
        content = json.loads(bytes(tensors[key].tolist())) | values
        tensors[key] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)

    return change


def put(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.weight{part}"] = change(tensors[f"{LAYER}.weight{part}"])

    return apply


SPOILED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "codes too short": (put("", lambda t: t[:-1]), r"gate_proj\.weight has 4095 torch\.uint8 values, not 4096"),
    "absmax of another type": (
        put(".absmax", lambda t: t.float()),
        r"absmax has 128 torch\.float32 values, not 128 torch",
    ),
    "absmax missing": (lambda t: t.pop(f"{LAYER}.weight.absmax"), r"tensor \S+gate_proj\.weight\.absmax is missing"),
    "another table": (put(".quant_map", lambda t: t.flip(0)), r"quant_map is not the table of NF4"),
    "another 8-bit table": (put(".nested_quant_map", lambda t: t / 2), r"nested_quant_map is not bitsandbytes'"),
    "NaN": (put(".nested_absmax", lambda t: t * float("nan")), r"nested_absmax holds NaN or infinity"),
    "infinite offset": (state(nested_offset=float("inf")), r"quant_state\S+ is not supported: nested_offset inf"),
    "no JSON": (
        put(".quant_state.bitsandbytes__nf4", lambda t: t[1:]),
        r"quant_state\.bitsandbytes__nf4 is not a bitsandbytes quantization state: ",
    ),
    "fp4 inside": (state(quant_type="fp4"), r"quant_state\S+ is not supported: quant_type fp4"),
    "another nested block size": (state(nested_blocksize=128), r"is not supported: .*nested_blocksize 128"),
    "no such dtype": (state(dtype="float3"), r"is not a bitsandbytes quantization state: .*float3"),
    "another shape": (
        state(shape=[64, 128]),
        r"gate_proj\.weight has shape \(64, 128\), config\.json means \(128, 64\)",
    ),
    "no shape": (state(shape="wide"), r"is not supported: shape wide"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_weight_is_one_clear_error(what: str, saved: Path, tmp_path: Path) -> None:
    spoil, message = SPOILED[what]
    folder = shutil.copytree(saved, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_fp4_is_refused(tmp_path: Path) -> None:
    save_in_4_bits(tmp_path, "bias", double_quant=False, quant_type="fp4")
    with pytest.raises(InputError, match="weights quantized by bitsandbytes' fp4 are not supported"):
        load(tmp_path / "4bit")
