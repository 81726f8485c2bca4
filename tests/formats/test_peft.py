"""PEFT's adapter folder: PEFT reads ours, we read PEFT's, and everything wrong with a folder is named."""

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.adapters import logits, peft_model, randomize, tiny_llama
from helpers.peft import tiny_gpt2
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from minilora.adapters.adapter import config_class
from minilora.adapters.attach import adapter_names, add_adapter, set_adapter
from minilora.adapters.for_training import adapter_parameters
from minilora.adapters.lora_config import LoRAConfig
from minilora.errors import InputError
from minilora.formats import peft as peft_format
from minilora.formats.peft import load_adapter, save_adapter
from minilora.models.config import ModelConfig
from minilora.models.transformer import Transformer
from minilora.nf4.linear import NF4Linear

FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}  # two layers of sums over dozens of terms, in another order than PEFT's

CONFIGS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    {"r": 4, "target_modules": "all-linear", "use_rslora": True, "lora_dropout": 0.1},
    {"r": 2, "target_modules": r".*layers\.1\..*(up|down)_proj", "init_lora_weights": "gaussian"},
    {
        "target_modules": ["up_proj", "k_proj"],
        "exclude_modules": ["layers.0.mlp.up_proj"],
        "rank_pattern": {"k_proj": 3, r"layers\.1\.mlp\..*": 2},
        "alpha_pattern": {"k_proj": 32},
    },
]


def saved_by_peft(folder: Path, **config: Any) -> peft.PeftModel:
    model = peft_model(tiny_llama(), **config)
    randomize(model)
    model.save_pretrained(folder)
    return model


def saved_by_us(folder: Path, **config: Any) -> nn.Module:
    model = tiny_llama()
    add_adapter(model, LoRAConfig(**config))
    randomize(model)
    save_adapter(model.eval(), folder)
    return model


# --- both ways -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_peft_loads_what_we_save(tmp_path: Path, config: dict[str, Any]) -> None:
    ours = saved_by_us(tmp_path, **config)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), **FLOAT32)
    assert not torch.allclose(logits(ours), logits(tiny_llama()), **FLOAT32)


@pytest.mark.parametrize("config", CONFIGS)
def test_we_load_what_peft_saves(tmp_path: Path, config: dict[str, Any]) -> None:
    theirs = saved_by_peft(tmp_path, **config)
    ours = tiny_llama()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours.eval()), logits(theirs), **FLOAT32)


def test_files_have_the_keys_shapes_and_metadata_of_peft(tmp_path: Path) -> None:
    saved_by_us(tmp_path / "ours", **CONFIGS[3])
    saved_by_peft(tmp_path / "theirs", **CONFIGS[3])
    shapes, metadata, configs = [], [], []
    for folder in ("ours", "theirs"):
        with safe_open(tmp_path / folder / "adapter_model.safetensors", "pt") as file:
            shapes.append({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})  # noqa: SIM118
            metadata.append(file.metadata())
        configs.append(json.loads((tmp_path / folder / "adapter_config.json").read_text()))
    assert shapes[0] == shapes[1]
    assert metadata[0] == metadata[1]
    ours, theirs = configs
    for key, value in ours.items():  # all that we write is a key of PEFT's, with PEFT's value
        assert value == theirs[key] or sorted(value) == sorted(theirs[key]), key


def test_minilora_model_and_nf4_base(tmp_path: Path) -> None:
    """An adapter trained on minilora's model over 4 bits is one for the transformers model of the same weights."""
    source = tiny_llama()
    ours = Transformer(ModelConfig.from_hf(source.config.to_dict())).eval()
    ours.load_state_dict(source.state_dict())
    for block, twin in zip(ours.model.layers, source.model.layers, strict=True):
        block.mlp.up_proj = NF4Linear.from_linear(block.mlp.up_proj)
        twin.mlp.up_proj.weight.data = block.mlp.up_proj.dequantize(torch.float32)
    add_adapter(ours, LoRAConfig(r=4, target_modules="all-linear"))
    randomize(ours)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(source, tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), **FLOAT32)
    again = Transformer(ours.config)
    load_adapter(again, tmp_path, "again")
    for key, parameter in adapter_parameters(again, "again").items():
        assert torch.equal(parameter, adapter_parameters(ours)[key])


def test_all_linear_is_written_as_names_that_servers_understand(tmp_path: Path) -> None:
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    saved_by_us(tmp_path, target_modules="all-linear")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == names
    # "0" would match the inner ReLU too: only whole paths will do
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
    add_adapter(model, LoRAConfig(target_modules="all-linear"))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["0", "1.1"]


def test_names_that_match_nothing_in_peft_s_own_config_are_let_be(tmp_path: Path) -> None:
    theirs = saved_by_peft(tmp_path, target_modules=["q_proj", "query_key_value"])
    ours = tiny_llama()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), **FLOAT32)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "data parallel"])
def test_the_names_of_wrappers_are_in_no_file(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = saved_by_us(tmp_path / "plain", r=4, target_modules=["q_proj"])
    save_adapter(wrap(model), tmp_path / "wrapped")
    plain, wrapped = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "wrapped"))
    assert plain.keys() == wrapped.keys()
    loaded = tiny_llama()
    load_adapter(wrap(loaded), tmp_path / "plain")
    assert torch.equal(logits(loaded), logits(model))


def test_sets_of_names_are_taken_and_saved(tmp_path: Path) -> None:
    model = saved_by_us(tmp_path, r=4, target_modules={"q_proj", "v_proj"}, modules_to_save=("lm_head",))
    loaded = tiny_llama()
    load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    read = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (read["target_modules"], read["modules_to_save"]) == (["q_proj", "v_proj"], ["lm_head"])


def test_a_file_of_the_folder_is_not_the_folder(tmp_path: Path) -> None:
    saved_by_us(tmp_path, r=4, target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"adapter_model.safetensors is a file: give the folder that it is in"):
        load_adapter(tiny_llama(), tmp_path / "adapter_model.safetensors")


def test_a_second_adapter_beside_the_first_and_16_bit_files(tmp_path: Path) -> None:
    theirs = saved_by_peft(tmp_path, r=4, target_modules=["q_proj"])
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path)
    model = tiny_llama()
    add_adapter(model, LoRAConfig(target_modules=["up_proj"]))
    load_adapter(model, tmp_path, name="other")
    assert adapter_names(model) == ["default", "other"]
    assert all(parameter.dtype == torch.float32 for parameter in adapter_parameters(model, "other").values())
    # rounding A and B to 8 bits moves the logits by some 2^-9 of what the adapter does to them, which is of order 1
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=2**-5)
    set_adapter(model, "default")
    torch.testing.assert_close(logits(model), logits(tiny_llama()), **FLOAT32)
    with pytest.raises(InputError, match="already has an adapter named 'other'"):
        load_adapter(model, tmp_path, name="other")


# --- folders that are not as they must be ----------------------------------------------------------------------------


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


def truncate(folder: Path, name: str = "adapter_model.safetensors") -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-100])


def only_a_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_tensors(lambda t: t.pop(KEY)), rf"adapter_model\.safetensors lacks {KEY}$"),
        (edit_tensors(lambda t: t.update(extra=torch.ones(1))), "has the unexpected extra"),
        (edit_tensors(lambda t: t.update(x=t.pop(KEY))), f"lacks {KEY} and has the unexpected x"),
        (edit_tensors(lambda t: t.clear()), "lacks .* and 2 more"),
        (edit_tensors(lambda t: t.update({KEY: torch.ones(8, 5)})), rf"{KEY} has shape \(8, 5\).*needs \(8, 32\)"),
        (edit_tensors(lambda t: t.update({KEY: torch.ones(8, 32, dtype=torch.int8)})), f"{KEY} holds torch.int8"),
        (edit_config(r=4), r"has shape \(8, 32\), the model needs \(4, 32\)"),
        (truncate, "not a readable safetensors file"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""), "not a readable safetensors file"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "does not exist"),
        (only_a_pickle, "pickle.*save_pretrained"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "does not exist"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "not readable JSON"),
        (lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff\xfe"), "not readable JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("[1]"), "holds no JSON object"),
        (edit_config(peft_type="BOFT"), "peft_type is 'BOFT'"),
        (edit_config(use_dora=True), "lacks .*lora_magnitude_vector"),
        (edit_config(lora_bias=True), r"lacks .*lora_B\.bias"),
        (edit_config(layers_to_transform=7), "does not fit the model: .*q_proj.* in the blocks 7"),
        (edit_config(init_lora_weights="pizza"), "init_lora_weights='pizza'"),
        (edit_config(bias="some"), "bias='some'"),
        (edit_config(r="8"), "rank must be a whole number"),
        (edit_config(lora_dropout="some"), "adapter_config.json: "),
        (edit_config(rank_pattern=[1]), r"adapter_config.json: LoRAConfig: rank_pattern must be a dict, not \[1\]"),
        (edit_config(target_modules=["c_attn"]), "does not fit the model: .*c_attn"),
        (edit_config(target_modules=None), "does not fit the model: .*target_modules"),
    ],
)
def test_every_fault_is_one_line_that_names_it(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    saved_by_peft(tmp_path, target_modules=["q_proj", "v_proj"])
    damage(tmp_path)
    model = tiny_llama()
    with pytest.raises(InputError, match=message) as caught:
        load_adapter(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert not adapter_names(model), "the model is left as it was"


def test_the_folder_of_a_run_leads_to_its_adapter(tmp_path: Path) -> None:
    saved_by_us(tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(InputError, match=f"{tmp_path} is no adapter folder of PEFT's form; {tmp_path}/adapter is one"):
        load_adapter(tiny_llama(), tmp_path)


def test_saving_what_is_not_there_or_to_where_one_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapter named 'default'"):
        save_adapter(tiny_llama(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write the adapter to"):
        saved_by_us(tmp_path / "file", target_modules=["q_proj"])


@pytest.mark.parametrize("failing", ["save_file", "_model_card"])
def test_a_failing_save_leaves_the_earlier_adapter_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    before = logits(saved_by_us(tmp_path, r=4, target_modules=["q_proj"]))
    (tmp_path / "notes.txt").write_text("mine")

    def disk_full(*args: Any, **kwargs: Any) -> None:
        if failing == "save_file":
            Path(args[1]).write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(peft_format, failing, disk_full)
    with pytest.raises(InputError, match="no space left"):
        saved_by_us(tmp_path, r=2, target_modules=["up_proj"])
    assert sorted(os.listdir(tmp_path)) == [  # noqa: PTH208
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "notes.txt",
    ]
    again = tiny_llama()
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), before)


def test_the_model_card_names_the_base_model(tmp_path: Path) -> None:
    saved_by_us(tmp_path, target_modules=["q_proj"], base_model_name_or_path="org/a-model")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith('---\nbase_model: "org/a-model"\n')
    assert peft.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == "org/a-model"
    model = tiny_llama()
    model.name_or_path = "org/from-the-model"  # where transformers keeps it
    add_adapter(model, LoRAConfig(target_modules=["q_proj"]))
    save_adapter(model, tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == "org/from-the-model"


# --- shards, odd configurations, and what is of the base model --------------------------------------------------------


def in_two_files(folder: Path) -> dict[str, str]:
    """Divide the weights as large models are divided; returns the index's weight_map."""
    tensors = load_file(folder / "adapter_model.safetensors")
    place = {}
    for number, keys in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        name = f"adapter_model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in keys}, folder / name)
        place |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": place}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "adapter_model.safetensors").unlink()
    return place


def test_weights_in_several_files_are_read_as_one(tmp_path: Path) -> None:
    theirs = saved_by_peft(tmp_path, target_modules=["q_proj", "v_proj"])
    in_two_files(tmp_path)
    ours = tiny_llama()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), **FLOAT32)


def write_index(content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "adapter_model.safetensors.index.json").write_text(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "adapter_model-00002-of-00002.safetensors").unlink(),
            "^[^(]*00002-of-00002.safetensors does not exist$",
        ),
        (lambda folder: truncate(folder, "adapter_model-00001-of-00002.safetensors"), "00001-of.* not a readable"),
        (write_index("{}"), "index.json is not the index"),
        (write_index("[]"), "index.json is not the index"),
        (write_index('{"weight_map": {"a": 1}}'), "index.json is not the index"),
        (
            write_index('{"weight_map": {"a": "adapter_model-00001-of-00002.safetensors"}}'),
            "00001-of-00002.safetensors lacks a, which adapter_model.safetensors.index.json says",
        ),
    ],
)
def test_a_fault_in_one_of_several_files_is_named(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    saved_by_peft(tmp_path, target_modules=["q_proj", "v_proj"])
    in_two_files(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        load_adapter(tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"a_newer_option": None, "another": False, "a_third": {}, "peft_version": "9.9.9"},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": ["self_attn.q_proj", "v_proj", "not_in_this_model"]},
        dict.fromkeys(["alpha_pattern", "rank_pattern", "exclude_modules", "layers_pattern", "layers_to_transform"]),
        dict.fromkeys(["modules_to_save", "bias", "fan_in_fan_out", "lora_dropout", "use_rslora", "use_dora"]),
        dict.fromkeys(["init_lora_weights", "task_type", "revision", "ensure_weight_tying", "megatron_core"]),
    ],
)
def test_configurations_of_other_versions_and_hands(tmp_path: Path, values: dict[str, Any]) -> None:
    theirs = saved_by_peft(tmp_path, r=8, target_modules=["q_proj", "v_proj"])
    edit_config(**values)(tmp_path)
    ours = tiny_llama()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), **FLOAT32)


def test_a_newer_option_that_is_used_is_named(tmp_path: Path) -> None:
    saved_by_peft(tmp_path, target_modules=["q_proj", "v_proj"])
    edit_config(a_newer_option=2)(tmp_path)
    with pytest.raises(InputError, match="a_newer_option=2 is not supported"):
        load_adapter(tiny_llama(), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens", "lm_head"]])
@pytest.mark.filterwarnings("ignore:.*(save_embedding_layers|tie_word_embeddings|config file|shared)")
def test_embeddings_saved_along_must_be_the_models_own(tmp_path: Path, targets: list[str], tied: bool) -> None:
    theirs = peft_model(tiny_llama(tied=tied), target_modules=targets)
    randomize(theirs) if targets == ["q_proj"] else None
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    ours = tiny_llama(tied=tied)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), **FLOAT32)
    other = tiny_llama(tied=tied)
    other.model.embed_tokens.weight.data[3] += 1
    with pytest.raises(InputError, match=r"weight is not the model's (model\.embed_tokens|lm_head)\.weight"):
        load_adapter(other, tmp_path)
    assert not adapter_names(other)


def test_only_keys_of_pefts_own_configurations_are_written() -> None:
    """PEFT warns of any other; and what it has beyond ours is refused when it is used, so that none is overlooked."""
    classes = {
        "LORA": peft.LoraConfig,
        "ADALORA": peft.AdaLoraConfig,
        "IA3": peft.IA3Config,
        "LOHA": peft.LoHaConfig,
        "LOKR": peft.LoKrConfig,
        "VERA": peft.VeraConfig,
    }
    for peft_type, theirs in classes.items():
        ours = config_class(peft_type)
        written = {field.name for field in fields(ours)} | peft_format.WRITTEN.keys()
        assert written - ours.peft_lacks <= {field.name for field in fields(theirs)}, peft_type


@pytest.mark.parametrize(("target", "is_transposed"), [("c_attn", True), ("lm_head", False)])
def test_how_the_layers_store_their_weight_is_written(tmp_path: Path, target: str, is_transposed: bool) -> None:
    """PEFT warns, and mends it, where fan_in_fan_out is not what the layers are."""
    model = tiny_gpt2()
    add_adapter(model, LoRAConfig(target_modules=[target], fan_in_fan_out=not is_transposed))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is is_transposed
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out")
        peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(tmp_path: Path, value: float) -> None:
    model = tiny_llama()
    add_adapter(model, LoRAConfig(target_modules=["q_proj"]))
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(iter(tensors))
    tensors[key][0, 0] = value
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    other = tiny_llama()
    with pytest.raises(InputError, match=rf"{key} holds NaN or infinity"):
        load_adapter(other, tmp_path)
    assert not adapter_names(other)
