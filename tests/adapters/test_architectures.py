"""Other people's models, architecture by architecture: three steps, PEFT's folder, a merge, and the disk."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from helpers.architectures import ARCHITECTURES, NOT_AS_PEFT, Architecture
from torch import Tensor, nn

import minilora as ml

FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}  # sums in another order, through up to four layers after three steps of training


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """All numbers of the output in one row."""
    found = model(**inputs)
    if isinstance(found, Tensor):
        return found.flatten()
    names = ("logits", "last_hidden_state", "logits_per_image")
    return next(found[name] for name in names if name in set(found)).flatten()


def trained(architecture: Architecture) -> tuple[nn.Module, nn.Module]:
    """The base, and the model after three steps, in which every trained number must have a gradient."""
    torch.manual_seed(0)
    base = architecture.build().eval().requires_grad_(False)  # frozen, torch takes other kernels for some layers
    with torch.no_grad():  # the models' own start is so small that an adapter could hardly be seen
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model = copy.deepcopy(base)
    ml.add_adapter(model, ml.LoRAConfig(r=4, init_lora_weights=False, **architecture.adapted))
    parameters = ml.trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        output(model, architecture.inputs).square().mean().backward()
        assert not [name for name, parameter in parameters.items() if parameter.grad is None]
        optimizer.step()
    return base, model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_it_trains_goes_through_peft_s_folder_and_merges_onto_the_disk(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    with torch.enable_grad():
        base, model = trained(architecture)
    before, tuned = output(base, architecture.inputs), output(model, architecture.inputs)
    assert (tuned - before).abs().max() > 1e-3
    with ml.disable_adapters(model):
        assert torch.equal(output(model, architecture.inputs), before)

    ml.save_adapter(model, tmp_path / "adapter")
    again = copy.deepcopy(base)
    ml.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(output(again, architecture.inputs), tuned)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    if name in NOT_AS_PEFT:
        assert (output(theirs, architecture.inputs) - tuned).abs().max() > 1e-3, "an exception that is none"
    else:
        torch.testing.assert_close(output(theirs, architecture.inputs), tuned, **FLOAT32)

    ml.unload(model, merge=True)
    torch.testing.assert_close(output(model, architecture.inputs), tuned, **FLOAT32)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(tmp_path / "merged")
        from_disk = type(base).from_pretrained(tmp_path / "merged").eval()  # type: ignore[attr-defined]
        torch.testing.assert_close(output(from_disk, architecture.inputs), tuned, **FLOAT32)
