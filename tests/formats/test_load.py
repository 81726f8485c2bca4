"""load: Hugging Face folders as transformers wrote them, what they become in NF4, and everything that can be wrong."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from helpers.chat import CHATML, tiny
from helpers.gguf import logits
from helpers.models import CONFIGS, relative_error, transformers_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig

from minilora.errors import InputError
from minilora.formats.load import load
from minilora.nf4.linear import NF4Linear
from minilora.text.tokenizer_files import save_tokenizer

IDS = torch.arange(26).view(2, 13) * 5 % 97
FLOAT32 = 1e-5  # see models/test_transformer.py


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a model as transformers saves it, with a tokenizer; made once for each set of arguments."""
    root = tmp_path_factory.mktemp("folders")

    def folder(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        path = root / f"{name}-{dtype}-{options}".replace(" ", "")
        if not path.exists():
            transformers_model(CONFIGS[name]).to(dtype).save_pretrained(path, **options)
            save_tokenizer(tiny(CHATML), path)
        return path

    return folder


@pytest.fixture
def folder(folders: Callable[..., Path], tmp_path: Path) -> Path:
    """A sharded Llama to spoil."""
    return shutil.copytree(folders("llama", max_shard_size="100KB"), tmp_path / "model")


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(folders: Callable[..., Path], name: str) -> None:
    model, tokenizer = load(folders(name), quantize=None, dtype=torch.float32)
    assert relative_error(logits(model, IDS), logits(transformers_model(CONFIGS[name]), IDS)) < FLOAT32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.encode("the weather") == tiny(CHATML).encode("the weather")


def test_shards_and_one_file_hold_the_same(folders: Callable[..., Path]) -> None:
    sharded, whole = folders("qwen2", max_shard_size="100KB"), folders("qwen2")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert not (whole / "model.safetensors.index.json").exists()
    one, other = (load(path, quantize=None)[0].state_dict() for path in (sharded, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_cast_once(folders: Callable[..., Path], stored: torch.dtype, dtype: torch.dtype) -> None:
    model, _ = load(folders("qwen3", stored), quantize=None, dtype=dtype)
    for name, expected in transformers_model(CONFIGS["qwen3"]).to(stored).state_dict().items():
        assert torch.equal(model.state_dict()[name], expected.to(dtype)), name


@pytest.mark.parametrize(("block_size", "double_quant"), [(64, True), (128, False)])
def test_linear_layers_inside_the_blocks_become_nf4(
    folders: Callable[..., Path], block_size: int, double_quant: bool
) -> None:
    model, _ = load(folders("llama-bias"), dtype="bfloat16", block_size=block_size, double_quant=double_quant)
    whole, _ = load(folders("llama-bias"), quantize=None, dtype=torch.float32)
    for path, layer in whole.named_modules():
        ours = model.get_submodule(path)
        if isinstance(layer, nn.Linear) and path != "lm_head":
            assert isinstance(ours, NF4Linear) and ours.compute_dtype == torch.bfloat16, path
            expected = NF4Linear.from_linear(layer, block_size=block_size, double_quant=double_quant).state_dict()
            expected["bias"] = expected["bias"].bfloat16()
            assert ours.state_dict().keys() == expected.keys()
            assert all(torch.equal(ours.state_dict()[name], expected[name]) for name in expected), path
        elif hasattr(layer, "weight"):
            assert type(ours) is type(layer), path
            assert torch.equal(ours.weight, layer.weight.bfloat16()), path
    assert logits(model, IDS).dtype == torch.bfloat16


def test_a_model_does_not_change_with_the_file_it_came_from(folder: Path) -> None:
    model, _ = load(folder, quantize=None, dtype=torch.float32)
    before = logits(model, IDS)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.model
def test_smollm2_in_nf4_equals_transformers_with_bitsandbytes_weights(smollm2_transformers: Any) -> None:
    model, tokenizer = load("smollm2-135m-instruct", dtype=torch.float32)
    weights = {}
    for name, weight in smollm2_transformers.named_parameters():
        if ".layers." in name and weight.dim() == 2:
            packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            weights[name] = bnb.dequantize_4bit(packed, state)
    ids = torch.tensor([tokenizer.encode("The capital of France is Paris, and that of Italy is")])
    with torch.no_grad():
        theirs = torch.func.functional_call(smollm2_transformers, weights, (ids,)).logits
    assert relative_error(logits(model, ids), theirs) < 2e-5  # as for the whole model in models/test_transformer.py


MEASURE = """
import re, sys
from pathlib import Path
import torch
from minilora.auto_dtype import slower_than_float32
from minilora import load

def peak():  # not ru_maxrss, which a process inherits from the one that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

slower_than_float32(torch.bfloat16)  # load's remark on a slow dtype: what a first product loads is no part of a model
before = peak()
load(sys.argv[1], dtype="bfloat16")
print(peak() - before)
load(sys.argv[1], dtype="bfloat16", quantize=None)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_full_precision_model_is_never_whole_in_memory(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=1024, hidden_size=1024, intermediate_size=4096, num_hidden_layers=5, num_attention_heads=8
    )
    shapes = shapes_of(config)
    weight_map: dict[str, str] = {}
    for layer in range(-1, config.num_hidden_layers):
        state = {name: torch.randn(shape) for name, shape in shapes.items() if layer_of(name) == layer}
        save_file(state, tmp_path / f"model-{layer + 1}.safetensors")
        weight_map |= dict.fromkeys(state, f"model-{layer + 1}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.save_pretrained(tmp_path)
    save_tokenizer(tiny(CHATML), tmp_path)

    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], check=True, capture_output=True, text=True)
    weights = sum(shape.numel() for shape in shapes.values())
    largest = max(shape.numel() for shape in shapes.values())
    for peak, kept in zip(run.stdout.split(), (0.52, 2.0), strict=True):  # bytes a weight, in NF4 and in bfloat16
        # What is kept, the largest tensor as the file has it and once more in work, and 30 MB for the allocator and
        # for code loaded on the way. The whole model in float32 would be 4 bytes for each of its 86 million weights.
        assert int(peak) < kept * weights + 2 * 4 * largest + 30e6 < 4 * weights


def shapes_of(config: LlamaConfig) -> dict[str, torch.Size]:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}


def layer_of(name: str) -> int:
    return int(name.split(".")[2]) if ".layers." in name else -1


# --- tied heads and harmless tensors ----------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Change the tensors of a safetensors file in place."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return path


def shard_with(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def test_a_head_saved_although_it_is_tied(folders: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders("smollm"), tmp_path / "model")
    file = folder / "model.safetensors"
    expected = logits(load(folder, quantize=None)[0], IDS)
    edit(file, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert torch.equal(logits(load(folder, quantize=None)[0], IDS), expected)
    edit(file, lambda tensors: tensors["lm_head.weight"].mul_(2))
    with pytest.raises(InputError, match=r"tensor lm_head\.weight is not the embedding, though config\.json ties them"):
        load(folder, quantize=None)


def test_rotary_frequencies_in_the_file_are_ignored(folders: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders("llama"), tmp_path / "model")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder / "model.safetensors", lambda tensors: tensors.update({name: torch.ones(8)}))
    assert torch.equal(logits(load(folder)[0], IDS), logits(load(folders("llama"))[0], IDS))


# --- everything that can be wrong -------------------------------------------------------------------------------------

NORM = "model.norm.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"


def remove_tensor(folder: Path) -> None:
    edit(shard_with(folder, GATE), lambda tensors: tensors.pop(GATE))


def remove_tensor_and_its_entry(folder: Path) -> None:
    remove_tensor(folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][GATE]
    index.write_text(json.dumps(content))


def set_index(folder: Path, content: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(content if isinstance(content, str) else json.dumps(content))


def list_in_another_shard(folder: Path) -> None:
    content = json.loads((folder / "model.safetensors.index.json").read_text())
    content["weight_map"][GATE] = min(content["weight_map"].values())
    set_index(folder, content)


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def only_pickles(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps("not read"))


def truncate(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


def put(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    edit(shard_with(folder, name), lambda tensors: tensors.update({name: change(tensors[name])}))


def poison(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def only_an_adapter(folder: Path) -> None:
    empty(folder)
    (folder / "adapter_config.json").write_text("{}")


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (remove_tensor_and_its_entry, rf"model: tensor {GATE} is missing"),
    "not where the index says": (
        remove_tensor,
        rf"model-\S+\.safetensors: tensor {GATE} is missing; .*index.* lists it",
    ),
    "listed in another shard": (
        list_in_another_shard,
        rf"model-00001\S+\.safetensors: tensor {GATE} is missing; .*index.* lists it there",
    ),
    "too many": (
        lambda f: edit(shard_with(f, NORM), lambda t: t.update({"model.extra.weight": torch.ones(2)})),
        r"model-\S+\.safetensors: tensor model\.extra\.weight has no place in a llama model",
    ),
    "shape": (
        lambda f: put(f, GATE, lambda t: t[:-1]),
        rf"safetensors: tensor {GATE} has shape \(111, 64\), config\.json means \(112, 64\)",
    ),
    "NaN in a norm": (lambda f: put(f, NORM, poison(float("nan"))), rf"tensor {NORM} holds NaN or infinity"),
    "infinity in a linear layer": (lambda f: put(f, GATE, poison(float("inf"))), rf"safetensors: tensor {GATE} .*inf"),
    "integers": (lambda f: put(f, GATE, lambda t: t.to(torch.int8)), rf"tensor {GATE} is of type torch\.int8"),
    "8-bit floats": (lambda f: put(f, GATE, lambda t: t.to(torch.float8_e4m3fn)), rf"{GATE} is of type torch\.float8"),
    "truncated": (
        lambda f: truncate(shard_with(f, GATE), 0.9),
        r"model-\S+\.safetensors is not a safetensors file, or is truncated",
    ),
    "truncated in its header": (
        lambda f: truncate(shard_with(f, GATE), 0.001),
        r"model-\S+\.safetensors is not a safetensors file, or is truncated",
    ),
    "a pickle by a false name": (
        lambda f: shard_with(f, GATE).write_bytes(pickle.dumps([1, 2])),
        r"model-\S+\.safetensors is not a safetensors file",
    ),
    "pickles only": (only_pickles, r"weights in pytorch_model\.bin only, a pickle, which can run any code .* convert"),
    "shard missing": (
        lambda f: shard_with(f, GATE).unlink(),
        r"model-\S+\.safetensors is missing; .*index\.json lists",
    ),
    "index leaves the folder": (
        lambda f: set_index(f, {"weight_map": {GATE: "../other/model.safetensors"}}),
        r"index\.json names the file '\.\./other/model\.safetensors'; only a safetensors file beside the index",
    ),
    "index names an absolute path": (
        lambda f: set_index(f, {"weight_map": {GATE: "/etc/passwd"}}),
        r"index\.json names the file '/etc/passwd'",
    ),
    "index without a map": (lambda f: set_index(f, {"metadata": {}}), r"index\.json has no weight_map"),
    "index is no JSON": (lambda f: set_index(f, "{"), r"index\.json is not valid JSON"),
    "config is no JSON": (lambda f: truncate(f / "config.json", 0.5), r"config\.json is not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), r"config\.json holds a JSON list, not an"),
    "config is missing": (lambda f: (f / "config.json").unlink(), r"has no config\.json, .*it holds .*model-"),
    "empty": (empty, r"has no config\.json, so it is no Hugging Face model; it holds nothing"),
    "an adapter": (only_an_adapter, r"is an adapter, not a model: load its base model"),
    "no weights": (
        lambda f: [file.unlink() for file in f.glob("model*")],
        r"has neither model\.safetensors nor model\.safetensors\.index\.json",
    ),
    "another architecture": (lambda f: set_config(f, model_type="gpt2"), r"config\.json: model_type 'gpt2' is not"),
    "GPTQ": (
        lambda f: set_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"config\.json: weights quantized by gptq are not supported; take the original model, or one in bitsandbytes'",
    ),
    "bitsandbytes 8-bit": (
        lambda f: set_config(f, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        r"weights quantized by bitsandbytes in 8 bits are not supported",
    ),
    "bitsandbytes fp4": (
        lambda f: set_config(f, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"weights quantized by bitsandbytes' fp4 are not supported",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer\.json"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_folder_is_one_clear_error(what: str, folder: Path) -> None:
    spoil, message = SPOILED[what]
    spoil(folder)
    with pytest.raises(InputError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_names_that_are_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such folder or file; give a folder, a \.gguf file, a Hub id owner/name"):
        load("smollm3")
    with pytest.raises(InputError, match="no such folder or file"):
        load(tmp_path / "absent")
    with pytest.raises(InputError, match=r"absent\.gguf: no such folder or file"):
        load("some/absent.gguf")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(InputError, match=r"is neither a \.gguf file nor a Hugging Face folder"):
        load(file)
    for dtype in ("bf16", torch.int8):
        with pytest.raises(
            InputError, match=f"dtype={dtype!r} is not supported; supported are auto, bfloat16, float32"
        ):
            load(tmp_path, dtype=dtype)
    with pytest.raises(InputError, match="device='gpu' cannot be used here"):
        load(tmp_path, device="gpu")
    with pytest.raises(InputError, match="quantize='int8' is not supported"):
        load(tmp_path, quantize="int8")  # type: ignore[arg-type]
