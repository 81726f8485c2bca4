"""`minilora kernels`: the table, a model's shapes tried from its configuration alone, and all of it forgotten."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers.trials import FakeGPU
from torch import nn

pytest.importorskip("transformers")  # which a GPU's machine may lack
from helpers.models import CONFIGS

from minilora.app import cli, kernel_table
from minilora.app.kernel_table import linear_shapes
from minilora.models.config import ModelConfig
from minilora.models.transformer import Transformer
from minilora.nf4 import dispatch
from minilora.nf4.kernel_device import Kind
from minilora.nf4.kernel_trials import Trials


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MINILORA_KERNELS", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    dispatch.trials.cache_clear()
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def gpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    """Every device is this one: fused kernels win with up to 64 rows, the backward kernel is wrong."""
    found = FakeGPU(lambda kind, shape, M: (1e-5, 2.5e-5 if M <= 64 else 0.5e-5))
    found.faults["backward"] = "off by 3 times what rounding explains"

    def trials(device: torch.device) -> Trials:
        return Trials(found, cache)

    trials.cache_clear = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(kernel_table, "trials", trials)
    return found


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = 0
    try:
        cli.main(["kernels", *argv])
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


def model_folder(folder: Path) -> Path:
    folder.mkdir()
    hf = {"model_type": "llama", "vocab_size": 32, "hidden_size": 256, "intermediate_size": 640}
    more = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(hf | more))
    return folder


def test_without_a_gpu_it_says_so(cache: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    why = "the NF4 kernels are for CUDA and ROCm GPUs, and the device is cpu: NF4Linear uses PyTorch's own operations"
    assert run(capsys, "--device", "cpu") == (0, f"{why}\n", "")
    code, out, err = run(capsys, "--device", "cpu", "--warm", str(tmp_path))
    assert (code, out, err) == (2, "", f"minilora: there is nothing to warm: {why}\n")
    code, _, err = run(capsys, "--device", "nonsense")
    assert code == 2 and "'nonsense' cannot be used here" in err


@pytest.mark.parametrize("wish", ["on", "off"])
def test_the_environment_s_choice_is_said(
    wish: str, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_table, "trials", lambda device: wish == "on")
    monkeypatch.setenv("MINILORA_KERNELS", wish)
    code, out, _ = run(capsys)
    assert code == 0 and out.startswith(f"MINILORA_KERNELS is '{wish}': ")


def test_before_a_trial_there_is_no_table(gpu: FakeGPU, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 0 and "No kernel has been tried on Fake 100 yet" in out


def test_a_model_is_warmed_by_its_configuration_and_the_table_shows_it(
    gpu: FakeGPU, capsys: pytest.CaptureFixture[str], tmp_path: Path, cache: Path
) -> None:
    code, out, _ = run(capsys, "--warm", str(model_folder(tmp_path / "model")), "--dtype", "float16")
    assert code == 0
    shapes = {(256, 256), (128, 256), (640, 256), (256, 640)}
    assert {shape for _, shape, _ in gpu.tried} == shapes
    assert gpu.proven[:3] == [
        Kind("quantize", torch.float16, 64, False),
        Kind("dequantize", torch.float16, 64, True),
        Kind("gemv", torch.float16, 64, True),
    ]
    lines = [line for line in out.splitlines() if "640x256" in line]
    assert [" ".join(line.strip("│ ").split()) for line in lines] == [
        "dequantize, float16, blocks of 64, double quantization │ 640x256 │ 1: 2.50",
        "gemv, float16, blocks of 64, double quantization │ 640x256 │ 1: 2.50",
        "matmul, float16, blocks of 64, double quantization │ 640x256 │ "
        "2: 2.50 4: 2.50 8: 2.50 16: 2.50 32: 2.50 64: 2.50 128: 0.50",
        "quantize, float16, blocks of 64 │ 640x256 │ 1: 2.50",
    ]
    assert "not used: off by 3 times what rounding explains" in out
    assert "GPU Fake 100, driver 1.2, torch 2, Triton 3, source abc" in out and str(cache) in out

    gpu.tried.clear()
    run(capsys, "--warm", str(tmp_path / "model"), "--dtype", "float16")
    assert gpu.tried == [], "it is known"
    code, out, _ = run(capsys, "--clear")
    assert code == 0 and "No kernel has been tried" in out and list(cache.glob("*.json")) == []
    run(capsys, "--clear", "--warm", str(tmp_path / "model"), "--dtype", "float16")
    assert len(gpu.tried) == 4 * (3 + 7), "the kind that is wrong is not timed"


def test_clear_works_where_there_is_no_gpu(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.mkdir(parents=True)
    (cache / "a.json").write_text("{}")
    assert run(capsys, "--clear", "--device", "cpu")[0] == 0
    assert list(cache.glob("*.json")) == []
    assert run(capsys, "--clear", "--device", "cpu")[0] == 0


def test_blocks_that_straddle_rows_are_for_no_fused_kernel(
    gpu: FakeGPU, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))
    assert run(capsys, "--warm", str(folder))[0] == 0
    of_down = {kind.kernel for kind, shape, _ in gpu.tried if shape == (256, 100)}
    assert of_down == {"quantize", "dequantize"}


def test_of_a_model_on_the_hub_only_the_configuration_is_fetched(
    gpu: FakeGPU, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched, folder = [], model_folder(tmp_path / "model")

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        fetched.append((repo_id, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert run(capsys, "--warm", "owner/model")[0] == 0
    assert fetched == [("owner/model", ["config.json"])] and len({shape for _, shape, _ in gpu.tried}) == 4


@pytest.mark.model
def test_a_gguf_file_will_do(gpu: FakeGPU, capsys: pytest.CaptureFixture[str], smollm2_gguf: Path) -> None:
    assert run(capsys, "--warm", str(smollm2_gguf))[0] == 0
    assert {shape for _, shape, _ in gpu.tried} == {(576, 576), (192, 576), (1536, 576), (576, 1536)}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shapes_are_those_of_the_model(name: str) -> None:
    config = ModelConfig.from_hf(CONFIGS[name].to_dict())
    with torch.device("meta"):
        model = Transformer(config)
    linears = (module for module in model.model.layers.modules() if isinstance(module, nn.Linear))
    assert set(linear_shapes(config)) == {(each.out_features, each.in_features) for each in linears}
