"""On Apple's and Intel's GPUs, as helpers/stand_in_device.py plays them: only what they have, and the CPU's numbers."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stand_in_device import StandInDevice, has_mps_kernel
from helpers.training import LLAMA, random_rows, run, tiny_base, tiny_model, trained
from torch import Tensor, nn

import minilora as ml
from minilora import devices, nf4
from minilora.data.batches import collate
from minilora.evaluation.generate import generate_tokens
from minilora.evaluation.sampling import Sampling
from minilora.merging.into_nf4 import merge_to_nf4
from minilora.models.config import ModelConfig
from minilora.models.transformer import Transformer
from minilora.nf4 import codec
from minilora.training.loss import held_out_loss, language_model_loss
from minilora.training.random_states import set_torch_random_states, torch_random_states
from minilora.variants import eva, lora_ga

# Sums of some dozen float32 numbers, added in another order (attention, AdamW); a wrong path is off by far more.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(params=["mps", "xpu"])
def device(request: pytest.FixtureRequest) -> Iterator[StandInDevice]:
    with StandInDevice(request.param) as device:
        yield device
    for table in (nf4.code, nf4.dynamic_map, codec.byte_pairs, codec._rounding_table):
        table.cache_clear()


def on_cpu(x: Any) -> Any:
    return {key: on_cpu(value) for key, value in x.items()} if isinstance(x, dict) else x.detach().cpu()


def in_nf4(model: nn.Module) -> nn.Module:
    """Its blocks' linear layers in NF4, multiplied in float32."""
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                setattr(part, name, ml.NF4Linear.from_linear(linear))
    return model


def adapted(config: Any = None) -> Transformer:
    model = in_nf4(tiny_base())
    ml.add_adapter(model, config or ml.LoRAConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


# --- what is played --------------------------------------------------------------------------------------------------


def test_what_a_device_lacks_is_refused() -> None:
    table, index = torch.randn(4, dtype=torch.complex64), torch.tensor([1, 3])
    with StandInDevice("mps"):
        for lacked in (
            lambda: torch.ones(2, device="mps", dtype=torch.float64),
            lambda: torch.ones(2, device="mps").double(),
            lambda: torch.ones(2, device="mps").to("cpu", torch.float64),  # it would be cast before it is copied
            lambda: torch.gather(table.to("mps"), 0, index.to("mps")),
        ):
            with pytest.raises(TypeError, match="mps has no"):
                lacked()
        with pytest.raises(NotImplementedError, match="take is not implemented for the MPS device"):
            torch.take(torch.ones(2, device="mps"), torch.tensor([1], device="mps"))
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(2, device="mps") + torch.ones(2)
        assert torch.ones(2, device="mps").cpu().double().sum() == 2
    with StandInDevice("xpu"), pytest.raises(TypeError, match="xpu has no"):
        torch.ones(2, device="xpu").double()


def test_the_list_of_mps_kernels_is_read_as_pytorch_writes_it() -> None:
    for name in ("gather.out", "gather", "bucketize.Tensor", "mul_.Tensor", "mm", "silu_backward", "matmul"):
        assert has_mps_kernel(name), name
    for name in ("take", "frexp.Tensor_out", "_linalg_eigh"):
        assert not has_mps_kernel(name), name


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(96, 64), (5, 77)])  # the last block is short
def test_nf4_has_the_cpus_bytes(device: StandInDevice, shape: Any, double_quant: bool, dtype: torch.dtype) -> None:
    w = torch.randn(shape).to(dtype)
    w.view(-1)[:64] = 0
    # bitsandbytes rounds absmax to the nearest code everywhere but on a CPU
    expected = nf4.quantize(w, double_quant=double_quant, absmax_rule="nearest")
    q = nf4.quantize(w.to(device.device), double_quant=double_quant)
    for field in dataclasses.fields(q):
        ours, theirs = getattr(q, field.name), getattr(expected, field.name)
        assert torch.equal(ours.cpu(), theirs) if isinstance(theirs, Tensor) else ours == theirs, field.name
    for out in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(nf4.dequantize(q, out).cpu(), nf4.dequantize(expected, out))


def test_a_value_that_cannot_be_quantized_is_named(device: StandInDevice) -> None:
    w = torch.randn(4, 64)
    w[1, 3] = torch.inf
    with pytest.raises(ml.InputError, match="element 67 of the flattened tensor is inf"):
        nf4.quantize(w.to(device.device))


@pytest.mark.parametrize("in_4_bits", [True, False])
@pytest.mark.parametrize("variant", ["LoRA", "rsLoRA and dropout", "DoRA", "IA3", "LoHa", "LoKr", "VeRA", "none"])
def test_a_layers_values_and_gradients(device: StandInDevice, variant: str, in_4_bits: bool) -> None:
    configs = {
        "LoRA": ml.LoRAConfig(r=4, target_modules=["0"]),
        "rsLoRA and dropout": ml.LoRAConfig(r=4, target_modules=["0"], use_rslora=True, lora_dropout=0.5),
        "DoRA": ml.LoRAConfig(r=4, target_modules=["0"], use_dora=True),
        "IA3": ml.IA3Config(target_modules=["0"], feedforward_modules=[]),
        "LoHa": ml.LoHaConfig(r=4, target_modules=["0"]),
        "LoKr": ml.LoKrConfig(r=4, target_modules=["0"]),
        "VeRA": ml.VeRAConfig(r=4, target_modules=["0"]),
    }
    torch.manual_seed(0)
    linear = nn.Linear(40, 24)
    plain = nn.Sequential(ml.NF4Linear.from_linear(linear) if in_4_bits else linear)
    x = torch.randn(6, 40)

    def results(kind: Any) -> Any:
        model = copy.deepcopy(plain).to(kind)
        torch.manual_seed(1)
        if variant != "none":
            ml.add_adapter(model, configs[variant])
        inputs = x.to(kind).requires_grad_()
        torch.manual_seed(2)  # of the dropout
        y = model(inputs)
        y.square().sum().backward()
        adapters = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return on_cpu({"y": y, "x": inputs.grad, **adapters})

    torch.testing.assert_close(results(device.device), results("cpu"), **CLOSE)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "orthogonal", "loftq"])
def test_starts_that_take_a_weight_apart(device: StandInDevice, start: str) -> None:
    config = ml.LoRAConfig(r=4, target_modules=["0"], init_lora_weights=start)

    def results(kind: Any) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 24)).to(kind)
        ml.add_adapter(model, config)
        return on_cpu(dict(model.named_parameters()))

    torch.testing.assert_close(results(device.device), results("cpu"), **CLOSE)


@pytest.mark.parametrize("start", [eva, lora_ga], ids=lambda module: module.__name__)
def test_starts_that_look_at_data(device: StandInDevice, start: Any) -> None:
    config = ml.LoRAConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=start.__name__.split(".")[-1])

    def results(kind: Any) -> Any:
        model = tiny_base().to(kind)
        ml.add_adapter(model, config)
        batch = {key: value.to(kind) for key, value in collate(random_rows(6), 0)._asdict().items()}
        start.initialize(model, [batch], forward=language_model_loss)
        return on_cpu({name: p for name, p in model.named_parameters() if "lora" in name})

    torch.testing.assert_close(results(device.device), results("cpu"), **CLOSE)


# --- a model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"packing": False, "loraplus_lr_ratio": 4.0},
        {"gradient_checkpointing": True, "max_grad_norm": 0.1},
        {"lora_fa": True},
    ],
    ids=lambda settings: next(iter(settings), "as it is"),
)
def test_training(device: StandInDevice, tmp_path: Path, settings: dict[str, Any]) -> None:
    if device.device.type == "xpu" and settings.get("gradient_checkpointing"):
        pytest.skip("the stand-in cannot follow PyTorch's attention into a recomputation")
    rows = random_rows(8)

    def results(kind: Any) -> Any:
        model = adapted().to(kind)
        short = {"max_steps": 3, "batch_size": 4, "save_every": 1, "eval_every": 3}
        result = run(model, rows, tmp_path / str(kind), eval_rows=rows[:3], **short, **settings)
        assert ("gpu_mb" in result.history[1]) == (kind != "cpu")
        return {"loss": torch.tensor([result.loss, result.eval_loss]), **on_cpu(trained(model))}

    # AdamW divides by √v: of an element whose gradient is near zero, rounding moves much of one of three 0.01
    torch.testing.assert_close(results(device.device), results("cpu"), rtol=1e-3, atol=3e-4)
    assert {"index_select", "_log_softmax", "silu_backward"} <= device.used


def test_training_in_bfloat16(device: StandInDevice, tmp_path: Path) -> None:
    result = run(tiny_model(nf4=True).to(device.device), random_rows(8), tmp_path, max_steps=2, batch_size=4)
    expected = run(tiny_model(nf4=True), random_rows(8), tmp_path / "cpu", max_steps=2, batch_size=4)
    assert result.loss == pytest.approx(expected.loss, rel=2**-8)  # bfloat16's rounding


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.8, top_k=10, top_p=0.9, seed=1)], ids=["greedy", "sampled"]
)
def test_decoding(device: StandInDevice, sampling: Sampling, window: int | None) -> None:
    architecture = LLAMA if window is None else LLAMA | {"model_type": "mistral", "sliding_window": window}

    def results(kind: Any) -> list[list[int]]:
        torch.manual_seed(0)
        model = in_nf4(Transformer(ModelConfig.from_hf(architecture))).to(kind)
        return generate_tokens(model, [[3, 4, 5, 6, 7], [8, 9]], 6, [2], sampling)

    assert results(device.device) == results("cpu")


def test_padding_rows_with_adapters_of_their_own_and_evaluation(device: StandInDevice) -> None:
    ids, mask = torch.tensor([[0, 3, 4], [5, 6, 7]]), torch.tensor([[0, 1, 1], [1, 1, 1]])

    def results(kind: Any) -> list[Any]:
        model = adapted().to(kind)
        ml.add_adapter(model, ml.LoRAConfig(r=2, target_modules=["q_proj"]), "other")
        with torch.no_grad():
            logits = on_cpu(model(ids.to(kind), mask.to(kind)))[mask.bool()]
        tokens = generate_tokens(model, [[3, 4, 5], [6, 7]], 3, adapter_names=["default", "other"])
        return [logits, held_out_loss(model, random_rows(4), 0), tokens]

    torch.testing.assert_close(results(device.device), results("cpu"), **CLOSE)


def test_merging(device: StandInDevice, tmp_path: Path) -> None:
    batch = collate(random_rows(6), 0)._asdict()

    def results(kind: Any) -> list[Any]:
        model = adapted(ml.LoRAConfig(r=4, target_modules=["layers.0.self_attn.k_proj"])).to(kind)
        found = ml.merge_report(model, ["bfloat16", "nf4"]).summary("nf4")
        ml.save_adapter(model, tmp_path / str(kind))
        ml.merge(model)
        ml.unmerge(model)
        merge_to_nf4(model, [{key: value.to(kind) for key, value in batch.items()}])
        with torch.no_grad():
            return [found.median_kept, on_cpu(model(torch.tensor([[3, 4, 5]]).to(kind)))]

    # A weight between two of NF4's values may go to either of them, and absmax is rounded by another rule than on a CPU
    torch.testing.assert_close(results(device.device), results("cpu"), rtol=0.05, atol=0.05)


# --- what minilora asks of a device -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "available, expected", [("", "cpu"), ("cuda", "cuda"), ("xpu", "xpu"), ("mps", "mps"), ("cuda xpu", "cuda")]
)
def test_the_default_device_is_a_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, available: str, expected: str
) -> None:
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu), ("mps", torch.backends.mps)):
        monkeypatch.setattr(module, "is_available", lambda kind=kind: kind in available)
    assert devices.default_device() == expected


def test_memory_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "max_memory_allocated", lambda device: 3 * 2**20)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5 * 2**20)
    found = {kind: devices.peak_memory(torch.device(kind)) for kind in ("cpu", "cuda", "xpu", "mps")}
    assert found == {"cpu": None, "cuda": 3 * 2**20, "xpu": 3 * 2**20, "mps": 5 * 2**20}


def test_random_states_of_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    states: dict[str, Tensor] = {}
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        monkeypatch.setattr(module, "is_available", lambda: True)
        monkeypatch.setattr(module, "device_count", lambda: 2)
        monkeypatch.setattr(
            module, "get_rng_state_all", lambda kind=kind: [torch.tensor([i, len(kind)]) for i in (0, 1)]
        )
        monkeypatch.setattr(
            module, "set_rng_state", lambda state, i, kind=kind: states.update({f"random.{kind}.{i}": state})
        )
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: states.update({"random.mps.0": state}))
    saved = torch_random_states()
    assert sorted(saved) == [
        "random.cpu",
        *(f"random.{kind}" for kind in ("cuda.0", "cuda.1", "mps.0", "xpu.0", "xpu.1")),
    ]
    set_torch_random_states(saved)
    assert states == {name: state for name, state in saved.items() if name != "random.cpu"}
