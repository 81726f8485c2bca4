"""The optimizer: AdamW against torch's and bitsandbytes' own, and its state in a checkpoint."""

import shutil
import sys

import pytest
import torch
from helpers.training import random_rows, run, timeless_log, tiny_model, trained

from minilora.adapters.attach import add_adapter
from minilora.adapters.for_training import adapter_parameters
from minilora.adapters.lora_config import LoRAConfig
from minilora.errors import InputError
from minilora.training.config import TrainConfig
from minilora.training.optimizer import make_optimizer, optimizer_state, restore_optimizer

R = 128  # so that a factor has 4096 numbers: bitsandbytes leaves smaller tensors in 32 bits


def gradients(model, seed):
    """Give every trained parameter the same random gradient for the same seed."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)


def theirs(name, parameters, **settings):
    if name == "adamw":
        return torch.optim.AdamW(parameters, **settings, fused=False, foreach=False)
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(parameters, **settings)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_the_updates_are_those_of_torch_and_bitsandbytes(name):
    ours, reference = tiny_model(r=R), tiny_model(r=R)
    config = TrainConfig(optimizer=name, learning_rate=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    optimizer = make_optimizer(ours, "default", config)
    settings = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    expected = theirs(name, adapter_parameters(reference).values(), **settings)
    start = trained(ours)
    for step in range(4):
        for model, each in ((ours, optimizer), (reference, expected)):
            gradients(model, step)
            each.step()
    for path, parameter in trained(reference).items():
        assert not torch.equal(parameter, start[path])
        # bitsandbytes is the same code; torch's fused kernel takes AdamW's terms together in another order
        tolerance = 1e-6 if name == "adamw" else 0
        torch.testing.assert_close(trained(ours)[path], parameter, rtol=tolerance, atol=tolerance)
    dtypes = {value.dtype for state in optimizer.state.values() for key, value in state.items() if "1" in key}
    assert (torch.uint8 in dtypes) == (name == "adamw_8bit")


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("loraplus_lr_ratio", [None, 16])
def test_its_state_goes_into_tensors_and_back_bit_for_bit(name, loraplus_lr_ratio):
    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    config = TrainConfig(optimizer=name, learning_rate=1e-2, loraplus_lr_ratio=loraplus_lr_ratio)
    first = tiny_model(r=R)
    optimizer = make_optimizer(first, "default", config)
    rates = {group["lr"] / 1e-2 for group in optimizer.param_groups}
    assert rates == ({1.0} if loraplus_lr_ratio is None else {1.0, 16.0})
    for step in range(2):
        gradients(first, step)
        optimizer.step()
    saved = optimizer_state(optimizer, adapter_parameters(first))
    assert all(isinstance(value, torch.Tensor) for value in saved.values())
    second = tiny_model(r=R)
    second.load_state_dict(first.state_dict())
    resumed = make_optimizer(second, "default", config)
    restore_optimizer(resumed, adapter_parameters(second), {key: value.clone() for key, value in saved.items()})
    for step in range(2, 4):
        for model, each in ((first, optimizer), (second, resumed)):
            gradients(model, step)
            each.step()
    assert all(torch.equal(p, trained(second)[path]) for path, p in trained(first).items())


def ten_steps(folder, name, device="cpu", **settings):
    model = tiny_model(r=R, dropout=0.3).to(device)
    result = run(model, random_rows(41), folder, optimizer=name, max_steps=10, save_every=5, keep_last=9, **settings)
    return result.checkpoint / "trainer_state.safetensors"


def assert_five_and_five_are_ten(tmp_path, name, device):
    straight = ten_steps(tmp_path / "straight", name, device)
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-000010")
    resumed = ten_steps(tmp_path / "resumed", name, device, resume="auto")
    assert straight.read_bytes() == resumed.read_bytes()
    assert timeless_log(tmp_path / "straight") == timeless_log(tmp_path / "resumed")


def test_five_steps_and_five_resumed_are_ten_in_8_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    assert_five_and_five_are_ten(tmp_path, "adamw_8bit", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_five_steps_and_five_resumed_are_ten_on_a_gpu(tmp_path, name):
    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    assert_five_and_five_are_ten(tmp_path, name, "cuda")


@pytest.mark.gpu
def test_what_is_paged_is_paged_again_after_a_resume():
    pytest.importorskip("bitsandbytes")
    models = [torch.nn.Sequential(torch.nn.Linear(512, 512)).cuda() for _ in range(2)]  # large enough to be paged
    optimizers = []
    for model in models:
        add_adapter(model, LoRAConfig(r=256, target_modules=["0"]))
        optimizers.append(make_optimizer(model, "default", TrainConfig(optimizer="paged_adamw_8bit")))
    gradients(models[0], 0)
    optimizers[0].step()
    saved = optimizer_state(optimizers[0], adapter_parameters(models[0]))
    restore_optimizer(optimizers[1], adapter_parameters(models[1]), {key: value.cpu() for key, value in saved.items()})
    for state in (state for optimizer in optimizers for state in optimizer.state.values()):
        assert getattr(state["state1"], "is_paged", False)
        assert getattr(state["state2"], "is_paged", False)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_without_bitsandbytes_one_error_says_so(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    message = (
        "needs bitsandbytes: pip install" if name == "adamw_8bit" else "not work on cpu: choose adamw_8bit or adamw"
    )
    with pytest.raises(InputError, match=message):
        make_optimizer(tiny_model(), "default", TrainConfig(optimizer=name))


def test_a_device_that_bitsandbytes_does_not_know():
    model = tiny_model().to("meta")
    with pytest.raises(InputError, match=r"does not work on meta: choose adamw$"):
        make_optimizer(model, "default", TrainConfig(optimizer="adamw_8bit"))


def test_settings_that_do_not_go_together():
    with pytest.raises(InputError, match="optimizer must be adamw, adamw_8bit or paged_adamw_8bit, not 'sgd'"):
        TrainConfig(optimizer="sgd")
    with pytest.raises(InputError, match="lora_fa comes with an AdamW of its own: leave out optimizer='adamw_8bit'"):
        TrainConfig(optimizer="adamw_8bit", lora_fa=True)
