"""Activation offloading to CPU memory: the same gradients to the last bit, and less memory where there is a GPU."""

import gc
import weakref

import pytest
import torch
from helpers.training import LLAMA, random_rows, run, tiny_model
from torch.utils.checkpoint import checkpoint

from minilora.adapters.attach import add_adapter
from minilora.adapters.lora_config import LoRAConfig
from minilora.data.batches import collate
from minilora.errors import InputError
from minilora.models.config import ModelConfig
from minilora.models.offload import ActivationOffload
from minilora.models.transformer import Transformer
from minilora.training.loss import summed_loss


def gradients(model, rows, *, checkpointing=True, offload=False):
    model.train().gradient_checkpointing = checkpointing
    model.offload_activations = offload
    torch.manual_seed(0)  # of the dropout
    loss = summed_loss(model, collate(rows, 0))
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach()} | found


def assert_equal_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())


@pytest.mark.parametrize("nf4", [False, True], ids=["float32", "NF4"])
def test_copies_change_no_bit_of_any_gradient(monkeypatch, nf4):
    model, rows = tiny_model(nf4=nf4, dropout=0.2), random_rows(4)
    plain = gradients(model, rows)
    assert len(plain) > 1
    copied = []
    copy = ActivationOffload._copy
    monkeypatch.setattr(ActivationOffload, "_copy", lambda *args: copied.append(1) or copy(*args))
    assert_equal_gradients(gradients(model, rows, offload=True), plain)
    assert len(copied) == 3, "both blocks' inputs to the CPU, and that of the first back"


def chain(blocks, offload):
    """The output of blocks, each checkpointed, and weak references to their inputs."""
    x, inputs = torch.randn(3, 8, requires_grad=True), []
    x = x * 1
    for block in blocks:
        inputs.append(weakref.ref(x))
        with offload.keeping(x):
            x = checkpoint(block, x, use_reentrant=False)
    return x, inputs


def test_of_every_block_the_input_is_moved_and_comes_back_once_needed(monkeypatch):
    blocks = [torch.nn.Linear(8, 8) for _ in range(4)]
    copies = []
    copy = ActivationOffload._copy
    monkeypatch.setattr(
        ActivationOffload, "_copy", lambda self, to, of, kept: copies.append(kept.index) or copy(self, to, of, kept)
    )
    y, inputs = chain(blocks, ActivationOffload(torch.device("cpu")))
    gc.collect()
    assert copies == [0, 1, 2, 3], "each went to the CPU"
    assert [reference() is None for reference in inputs] == [True] * 4, "only the copies are left"
    y.sum().backward(retain_graph=True)
    assert copies[4:] == [2, 1, 0], "the last had not left yet; of the others each came back once"
    first = blocks[0].weight.grad.clone()
    y.sum().backward()
    assert copies[7:] == [3, 2, 1, 0], "a second backward finds them again"
    torch.testing.assert_close(blocks[0].weight.grad, 2 * first, rtol=0, atol=0)


def test_what_blocks_share_is_not_moved():
    shared = torch.randn(3, 8, requires_grad=True)
    offload = ActivationOffload(torch.device("cpu"))
    x = torch.randn(3, 8, requires_grad=True)
    with offload.keeping(x):
        y = checkpoint(torch.mul, x, shared, use_reentrant=False)
    shared.grad = None
    y.sum().backward()
    assert len(offload._kept) == 1
    assert torch.equal(shared.grad, x)
    assert torch.equal(x.grad, shared)


def test_it_is_refused_where_there_is_nothing_to_move(tmp_path):
    rows = random_rows(4)
    with pytest.raises(InputError, match="set that too"):
        run(tiny_model(), rows, tmp_path, offload_activations=True)
    settings = {"gradient_checkpointing": True, "offload_activations": True}
    if not torch.cuda.is_available():
        model = tiny_model()
        with pytest.raises(InputError, match="to CPU memory: on cpu leave it out"):
            run(model, rows, tmp_path, **settings)
        assert not model.gradient_checkpointing, "the model is as it was"
    other = torch.nn.Sequential(tiny_model())
    with pytest.raises(InputError, match="is not minilora's own model: leave offload_activations out"):
        run(other, rows, tmp_path, **settings)


@pytest.mark.gpu
def test_on_a_gpu_the_gradients_are_the_same_and_the_peak_is_lower():
    torch.manual_seed(0)
    wide = LLAMA | {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 16, "num_attention_heads": 8}
    model = Transformer(ModelConfig.from_hf(wide)).to("cuda", torch.bfloat16)
    add_adapter(model, LoRAConfig(r=4, target_modules="all-linear"))  # its gradients are small beside a block's input
    rows = random_rows(64, longest=128)
    peaks, found = {}, {}
    for offload in (False, True, False, True):  # the first two also warm up
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found[offload] = gradients(model, rows, offload=offload)
        torch.cuda.synchronize()
        peaks[offload] = torch.cuda.max_memory_allocated() - before
    assert_equal_gradients(found[True], found[False])
    longest = max(len(row.input_ids) for row in rows)
    residual = len(rows) * longest * wide["hidden_size"] * 2  # bytes of one block's input
    # of 16 inputs two stay, of the last block and one being copied; half of the rest is for the allocator's rounding
    assert peaks[False] - peaks[True] > 7 * residual
