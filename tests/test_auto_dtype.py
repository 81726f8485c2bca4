"""dtype="auto": what it comes to where, that load, the log and the saved folders follow, and what is said."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.chat import CHATML, tiny
from helpers.models import SHAPE, transformers_model
from helpers.training import random_rows, run, tiny_model
from safetensors.torch import load_file
from transformers import LlamaConfig

from minilora import auto_dtype as module
from minilora.auto_dtype import DtypeChoice, auto_dtype, slower_than_float32
from minilora.errors import InputError
from minilora.formats.gguf.save_model import save_gguf
from minilora.formats.load import load
from minilora.formats.save_pretrained import save_pretrained, saved_dtype
from minilora.nf4.linear import NF4Linear
from minilora.text.tokenizer_files import save_tokenizer
from minilora.training.log import read_log

PROBE = "import torch; from minilora.auto_dtype import auto_dtype; print(auto_dtype('cpu').dtype)"
WITHOUT_AVX512 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.fixture
def fresh():
    """Nothing is remembered from before, nor left for later."""
    caches = module.slower_than_float32, module.say_once
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("seconds, expected", [((0.9, 1.0), torch.bfloat16), ((1.1, 1.0), torch.float32)])
def test_a_cpu_takes_bfloat16_where_its_products_are_not_slower(fresh, monkeypatch, seconds, expected):
    times = dict(zip((torch.bfloat16, torch.float32), seconds, strict=True))
    monkeypatch.setattr(module, "_seconds", lambda x, W: times[x.dtype])
    choice = auto_dtype("cpu")
    assert choice.dtype == expected
    assert "CPU" in choice.reason and str(expected).removeprefix("torch.") in str(choice)


def test_without_avx512_a_cpu_takes_float32():
    """A real probe, in a process of its own: the products of a processor without AVX-512 can be had on any other."""
    found = subprocess.run(
        [sys.executable, "-c", PROBE], env=os.environ | WITHOUT_AVX512, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "torch.float32"


def test_the_probe_leaves_the_threads_as_they_were(fresh, monkeypatch):
    used = []
    monkeypatch.setattr(module, "_seconds", lambda x, W: used.append(torch.get_num_threads()) or 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        slower_than_float32(torch.bfloat16)
        assert set(used) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("in_hardware, expected", [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_takes_bfloat16_where_it_is_in_hardware(fresh, monkeypatch, in_hardware, expected):
    def supported(including_emulation=True):
        return in_hardware or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())  # some `with`: there is no such device
    choice = auto_dtype("cuda:0")
    assert choice.dtype == expected
    assert ("scales the loss" in choice.reason) == (not in_hardware)


# --- load, train, save ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in float16, which is never what "auto" comes to on a CPU."""
    transformers_model(LlamaConfig(**SHAPE | {"vocab_size": 320, "intermediate_size": 128})).half().save_pretrained(
        tmp_path / "model"
    )
    save_tokenizer(tiny(CHATML), tmp_path / "model")
    return tmp_path / "model"


def choose(monkeypatch, dtype):
    monkeypatch.setattr(
        sys.modules["minilora.formats.load"], "auto_dtype", lambda device: DtypeChoice(dtype, "for a test")
    )


@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_load_computes_in_what_auto_comes_to_and_says_so_once(fresh, folder, monkeypatch, capsys, quantize, dtype):
    choose(monkeypatch, dtype)
    model, _ = load(folder, quantize=quantize)
    load(folder, quantize=quantize)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {m.compute_dtype for m in model.modules() if isinstance(m, NF4Linear)} <= {dtype}
    assert model(torch.arange(9)[None]).dtype == dtype
    assert capsys.readouterr().err == f"minilora: the model computes in {str(dtype)[6:]}, for a test\n"


def test_a_slow_dtype_that_was_asked_for_is_taken_with_a_remark(fresh, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["minilora.formats.load"], "slower_than_float32", lambda dtype: 9.7)
    model, _ = load(folder, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert "bfloat16 takes 10 times as long as in float32 on this CPU" in capsys.readouterr().err


@pytest.mark.parametrize("quantize", ["nf4", None])
def test_a_saved_folder_keeps_the_dtype_of_its_checkpoint(folder, tmp_path, quantize):
    model, tokenizer = load(folder, quantize=quantize, dtype=torch.float32)
    save_pretrained(model, tokenizer, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["torch_dtype"] == "float16"
    assert {t.dtype for t in load_file(tmp_path / "saved/model.safetensors").values()} == {torch.float16}
    assert saved_dtype(load(tmp_path / "saved", dtype=torch.bfloat16)[0]) == torch.float16
    if quantize is None:  # nothing was rounded on the way: the same bytes
        before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "saved"))
        assert all(torch.equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize(
    "outtype, expected", [("f16", torch.float16), ("f32", torch.float32), ("q8_0", torch.bfloat16)]
)
def test_a_gguf_file_has_the_dtype_of_its_embedding_or_bfloat16(folder, tmp_path, outtype, expected):
    model, tokenizer = load(folder, quantize=None, dtype=torch.float32)
    save_gguf(model, tokenizer, tmp_path / "model.gguf", outtype=outtype)
    assert saved_dtype(load(tmp_path / "model.gguf")[0]) == expected


def test_the_log_says_what_a_run_computes_in_and_why(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_seconds", lambda x, W: 1.0)  # so that "auto" is bfloat16
    run(tiny_model(), random_rows(4), tmp_path / "float32", max_steps=1)
    run(tiny_model(nf4=True), random_rows(4), tmp_path / "bfloat16", max_steps=1)
    by_choice, by_itself = (read_log(tmp_path / name / "log.jsonl")[0] for name in ("float32", "bfloat16"))
    assert (by_choice["step"], by_choice["device"], by_choice["dtype"]) == (0, "cpu", "float32")
    assert by_choice["dtype_reason"].startswith('chosen; dtype="auto" would be bfloat16, since a product')
    assert by_itself["dtype"] == "bfloat16" and by_itself["dtype_reason"] == auto_dtype("cpu").reason


def test_a_run_resumed_where_auto_is_another_dtype_is_told_so(tmp_path):
    rows = random_rows(4)
    run(tiny_model(), rows, tmp_path, max_steps=1)
    with pytest.raises(InputError, match=r"of another run: dtype was 'float32' and is 'bfloat16'"):
        run(tiny_model().bfloat16(), rows, tmp_path, max_steps=1, resume="auto")
