"""Merged folders: transformers and PEFT compute the same, nothing in memory changes, nothing on disk is lost."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import tiny_llama
from helpers.chat import CHATML, tiny
from helpers.gguf import logits
from helpers.models import CONFIGS, our_model, relative_error, transformers_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from minilora.adapters.attach import add_adapter, disable_adapters, set_adapter
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.merge import merge, unmerge
from minilora.errors import InputError
from minilora.evaluation.generate import generate
from minilora.formats.load import load
from minilora.formats.peft import save_adapter
from minilora.formats.save_pretrained import save_pretrained
from minilora.models.config import ModelConfig
from minilora.models.transformer import Transformer
from minilora.nf4.linear import NF4Linear

IDS = torch.arange(26).view(2, 13) * 5 % 97
FLOAT32 = 1e-5  # see models/test_transformer.py
TOKENIZER = tiny(CHATML)


def adapted(name: str, *, nf4: bool = False, targets: Any = "all-linear") -> Transformer:
    """A float32 model with a LoRA whose B is not zero, over dense or NF4 layers."""
    model = our_model(transformers_model(CONFIGS[name]))
    if nf4:
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and path != "lm_head":
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, NF4Linear.from_linear(module))
    add_adapter(model, LoRAConfig(r=4, lora_alpha=8, target_modules=targets))
    randomize(model)
    return model


def randomize(model: nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)


def in_transformers(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def stored(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_every_architecture_with_equal_logits(name: str, tmp_path: Path) -> None:
    model = our_model(transformers_model(CONFIGS[name]))
    save_pretrained(model, TOKENIZER, tmp_path / "saved")
    theirs = in_transformers(tmp_path / "saved")
    assert theirs.dtype == torch.float32
    assert relative_error(logits(theirs, IDS), logits(model, IDS)) < FLOAT32
    again, _ = load(tmp_path / "saved", quantize=None, dtype=torch.float32)
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    assert again.config == model.config


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("name", ["llama-bias", "smollm", "qwen3"])
def test_adapters_are_merged_into_the_weights_on_disk_and_only_there(name: str, nf4: bool, tmp_path: Path) -> None:
    model = adapted(name, nf4=nf4)
    before, answer = copy.deepcopy(model.state_dict()), logits(model, IDS)
    save_pretrained(model, TOKENIZER, tmp_path / "saved")
    # W x + s·B A x against (W + s·BA) x: float32 rounding in another order
    assert relative_error(logits(in_transformers(tmp_path / "saved"), IDS), answer) < FLOAT32
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(logits(model, IDS), answer)


def test_the_merged_weights_are_pefts(tmp_path: Path) -> None:
    model = adapted("smollm")
    save_adapter(model, tmp_path / "adapter")
    save_pretrained(model, TOKENIZER, tmp_path / "saved")
    base = transformers_model(CONFIGS["smollm"])
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    for name, tensor in stored(tmp_path / "saved").items():
        # one float32 product of rank 4, summed in another order
        assert torch.allclose(tensor, theirs.get_parameter(name), rtol=0, atol=1e-6), name


def test_bfloat16_is_reached_by_one_rounding(tmp_path: Path) -> None:
    model = adapted("llama", nf4=True)
    save_pretrained(model, TOKENIZER, tmp_path / "saved", dtype=torch.bfloat16)
    save_pretrained(model, TOKENIZER, tmp_path / "exact", dtype=torch.float32)
    saved, exact = stored(tmp_path / "saved"), stored(tmp_path / "exact")
    assert all(torch.equal(saved[name], exact[name].bfloat16()) for name in exact)
    assert in_transformers(tmp_path / "saved").dtype == torch.bfloat16


def test_the_dtype_is_the_embeddings_by_default(tmp_path: Path) -> None:
    save_pretrained(our_model(transformers_model(CONFIGS["llama"])).bfloat16(), TOKENIZER, tmp_path / "saved")
    assert {tensor.dtype for tensor in stored(tmp_path / "saved").values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(tmp_path / "saved").dtype == torch.bfloat16


def test_what_acts_in_memory_is_what_is_saved(tmp_path: Path) -> None:
    model = adapted("llama")
    add_adapter(model, LoRAConfig(r=2, target_modules=["q_proj", "down_proj"]), name="other")
    randomize(model, seed=5)

    def saved_logits() -> Tensor:
        save_pretrained(model, TOKENIZER, tmp_path / "saved")
        return logits(in_transformers(tmp_path / "saved"), IDS)

    answers = []
    for active in ("default", "other", ["default", "other"]):
        set_adapter(model, active)
        answers.append(logits(model, IDS))
        assert relative_error(saved_logits(), answers[-1]) < FLOAT32
    merge(model)
    assert relative_error(saved_logits(), answers[-1]) < FLOAT32
    with disable_adapters(model):
        assert relative_error(saved_logits(), logits(model, IDS)) < FLOAT32
    unmerge(model)
    with disable_adapters(model):
        base = logits(model, IDS)
        assert relative_error(saved_logits(), base) < FLOAT32
    assert all(relative_error(answer, base) > 0.01 for answer in answers)


def test_an_adapter_on_a_tied_head_unties_what_is_saved(tmp_path: Path) -> None:
    model = adapted("smollm", targets=["lm_head", "q_proj"])
    save_pretrained(model, TOKENIZER, tmp_path / "saved")
    theirs = in_transformers(tmp_path / "saved")
    assert not theirs.config.tie_word_embeddings
    assert torch.equal(theirs.get_input_embeddings().weight, model.model.embed_tokens.weight)
    assert relative_error(logits(theirs, IDS), logits(model, IDS)) < FLOAT32


@pytest.mark.parametrize("max_shard_bytes", [1, 40_000, 100_000])
def test_shards_have_an_index_and_keep_to_their_size(max_shard_bytes: int, tmp_path: Path) -> None:
    model = adapted("llama-bias", nf4=True)
    save_pretrained(model, TOKENIZER, tmp_path / "saved", max_shard_bytes=max_shard_bytes)
    save_pretrained(model, TOKENIZER, tmp_path / "whole")
    shards = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))
    ]
    for path in shards:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        layers = {name.rpartition(".")[0] for name in tensors}
        assert sum(tensor.nbytes for tensor in tensors.values()) <= max_shard_bytes or len(layers) == 1
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    one, many = stored(tmp_path / "whole"), stored(tmp_path / "saved")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert index["weight_map"].keys() == many.keys() == one.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert torch.equal(
        logits(in_transformers(tmp_path / "saved"), IDS), logits(in_transformers(tmp_path / "whole"), IDS)
    )


def test_tokenizer_and_generation_config_come_along(tmp_path: Path) -> None:
    config = ModelConfig.from_hf({**CONFIGS["llama"].to_dict(), "eos_token_id": [1, 3], "pad_token_id": 1})
    save_pretrained(Transformer(config), TOKENIZER, tmp_path / "saved")
    generation = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert generation.eos_token_id == [1, 3]  # "</s>" of the tokenizer is 1 already
    assert (generation.bos_token_id, generation.pad_token_id) == (1, 1)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    messages = [{"role": "user", "content": "the weather"}]
    text = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True)
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == text
    assert theirs.encode(text, add_special_tokens=False) == TOKENIZER.encode(text)


# --- what must not be lost --------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saving_again_replaces_the_weights_and_keeps_other_files(tmp_path: Path) -> None:
    folder, model = tmp_path / "saved", our_model(transformers_model(CONFIGS["llama"]))
    save_pretrained(model, TOKENIZER, folder, max_shard_bytes=40_000)
    (folder / "notes.txt").write_text("mine")
    (folder / "runs").mkdir()
    (folder / "runs" / "log.jsonl").write_text("{}")
    save_pretrained(model, TOKENIZER, folder)
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "runs" / "log.jsonl").exists()
    save_pretrained(model, TOKENIZER, folder, max_shard_bytes=40_000)
    assert not (folder / "model.safetensors").exists()
    assert torch.equal(logits(load(folder, quantize=None, dtype=torch.float32)[0], IDS), logits(model, IDS))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]  # nothing temporary stays


def test_saving_again_replaces_files_in_folders_too(tmp_path: Path) -> None:
    """Of a tokenizer with several chat templates all but one lie in a folder of their own."""
    model, tokenizer = our_model(transformers_model(CONFIGS["llama"])), tiny(CHATML)
    for source in ("old", "new"):
        tokenizer.chat_templates["tool_use"] = source
        save_pretrained(model, tokenizer, tmp_path / "saved")
        assert load(tmp_path / "saved", quantize=None)[1].chat_templates["tool_use"] == source


def test_a_failure_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = tmp_path / "saved", adapted("llama")
    save_pretrained(model, TOKENIZER, folder)
    before = files(folder)

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["minilora.formats.save_pretrained"], "save_tokenizer", fail)
        with pytest.raises(InputError, match=r"cannot write the model to .*saved: disk full$"):
            save_pretrained(adapted("llama", nf4=True), TOKENIZER, folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.adapters["default"].lora_B[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj: the weight to save has NaN or infinity"):
        save_pretrained(model, TOKENIZER, folder)
    model = adapted("llama-bias")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.base_layer.bias[0] = float("inf")
    with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn\.q_proj: the bias to save has NaN or infinity"):
        save_pretrained(model, TOKENIZER, folder)
    assert files(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_model_of_transformers_is_told_its_own_way(tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(InputError, match=r"a LlamaForCausalLM is not .*model.save_pretrained\(folder\)"):
        save_pretrained(model, None, tmp_path / "folder")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"a LlamaForCausalLM is not .*model.generate\(input_ids\)"):
        generate(model, None, "text")  # type: ignore[arg-type, call-overload]
    assert not (tmp_path / "folder").exists()


def test_a_file_in_the_folders_place_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "saved").write_text("a file")
    with pytest.raises(InputError, match="saved is a file; give a folder"):
        save_pretrained(our_model(transformers_model(CONFIGS["llama"])), TOKENIZER, tmp_path / "saved")
    with pytest.raises(InputError, match=r"cannot write the model to .*saved/model: .*Not a directory"):
        save_pretrained(our_model(transformers_model(CONFIGS["llama"])), TOKENIZER, tmp_path / "saved" / "model")
