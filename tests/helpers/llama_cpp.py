"""llama.cpp itself, in the process of the tests: what it makes of a GGUF file."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

xllamacpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")


class LlamaCpp:
    """llama.cpp's server with a model, and a LoRA on it; everything in float32 that can be."""

    def __init__(self, model: Path, lora: Path | None = None, context: int = 256) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, -1
        params.fit_params = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        self.server = xllamacpp.Server(params)

    def ask(self, path: str, **body: Any) -> Any:
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokens(self, text: str, add_special: bool = False) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=add_special, parse_special=True)["tokens"]

    def prompt(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return self.ask("/apply-template", messages=messages, **options)["prompt"]

    def greedy(self, ids: list[int], count: int) -> list[int]:
        options = {"temperature": -1, "return_tokens": True, "cache_prompt": False}
        return self.ask("/completion", prompt=ids, n_predict=count, **options)["tokens"]

    def log_probabilities(self, ids: list[int], vocab_size: int) -> Tensor | None:
        """Of the token after `ids`, (vocab_size,); None where the likeliest is half of a UTF-8 character."""
        options = {"temperature": -1, "n_probs": vocab_size, "cache_prompt": False}
        steps = self.ask("/completion", prompt=ids, n_predict=1, **options).get("completion_probabilities")
        if not steps:
            return None
        result = torch.full((vocab_size,), torch.nan, dtype=torch.float64)
        for token in steps[0]["top_logprobs"]:
            result[token["id"]] = token["logprob"]
        return result


def largest_difference(theirs: LlamaCpp, model: nn.Module, ids: list[int]) -> float:
    """The largest difference of any token's log-probability, after the first token, the first two, and so on."""
    with torch.no_grad():
        ours = torch.log_softmax(model(torch.tensor([ids]))[0].double(), dim=-1)
    answers = [theirs.log_probabilities(ids[: i + 1], ours.shape[1]) for i in range(len(ids))]
    differences = [(a - b).abs().max() for a, b in zip(answers, ours, strict=True) if a is not None]
    assert len(differences) >= 3
    return float(torch.stack(differences).max())
