"""Blocks under torch.compile: the same losses and gradients, and no new graphs for rows of new lengths."""

import copy

import torch
from helpers.models import CONFIGS, our_model, transformers_model
from helpers.training import random_rows
from torch._dynamo.testing import CompileCounterWithBackend

from minilora.adapters.attach import add_adapter
from minilora.adapters.lora_config import LoRAConfig
from minilora.data.batches import collate, pack
from minilora.models.transformer import Transformer
from minilora.training.loss import summed_loss

# torch 2.6 and 2.11 compile a block anew for another number of rows, whose lengths it counts, not for other lengths.
ROWS = (4, 4, 4) if torch.__version__.startswith(("2.6.", "2.11.")) else (4, 3, 5)


def adapted() -> Transformer:
    model = our_model(transformers_model(CONFIGS["qwen3-window"]))
    add_adapter(model, LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model.train()


def test_new_lengths_compile_nothing_new() -> None:
    model = adapted()
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")  # the graphs as they are, without generating code for them
    for block in compiled.model.layers:
        block.compile(backend=graphs, dynamic=True)
    counts = []
    for seed, n in enumerate(ROWS):
        rows = random_rows(n, seed=seed)
        for batch in (pack(rows), collate(rows, 0)):
            losses = [summed_loss(each, batch) for each in (model, compiled)]
            for loss in losses:
                loss.backward()
            # the same steps, grouped otherwise: float32's rounding in a sum of some dozen tokens
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
        counts.append(graphs.frame_count)
    for (path, ours), theirs in zip(compiled.named_parameters(), model.parameters(), strict=True):
        if ours.grad is not None or theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=path)
    assert counts[0] > 0
    assert counts[-1] == counts[0], counts
