"""Scratch memory: never shared by results or threads, and not bound to inference mode."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

from minilora import nf4
from minilora.nf4 import scratch


def test_results_do_not_share_the_scratch_memory():
    a, b = nf4.quantize(torch.randn(64, 64)), nf4.quantize(torch.randn(64, 64))
    first = nf4.dequantize(a)
    before = first.clone()
    nf4.dequantize(b)
    assert torch.equal(first, before)


def test_threads_do_not_share_the_scratch_memory():
    both_at_work = Barrier(2, timeout=60)

    def own_memory(_):
        address = scratch.workspace("pairs", 64, torch.int64, torch.device("cpu")).data_ptr()
        both_at_work.wait()
        return address

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(own_memory, range(2))
    assert first != second


def test_scratch_memory_born_in_inference_mode_serves_outside_it():
    q = nf4.quantize(torch.randn(64, 64))

    def both():
        with torch.inference_mode():
            inside = nf4.dequantize(q)
        return torch.equal(inside, nf4.dequantize(q))

    with ThreadPoolExecutor(1) as fresh_thread:
        assert fresh_thread.submit(both).result()
