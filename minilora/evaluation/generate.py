"""Decoding with a KV cache: greedy or sampled, many prompts at a time, or as a stream of text.

    |<- shared prefix ->|<- rest of the prompt ->|<- new tokens ->|
    | you  are  helpful | what   is    2+2   ·   | 4     <eos>    |    · padding, hidden by the attention mask
    | you  are  helpful | name   a     long  river | the   Nile   |

The prefix that all prompts share (a system prompt, few-shot examples) is computed once, and on a CPU kept once; on a
GPU its keys and values are copied into every batch's cache, where attention's kernels want them. Prompts are batched by
length, and rows that have ended leave the batch.
Each row may have an adapter of its own; keys and values depend on it, so that no prefix is shared then.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from itertools import chain, groupby, takewhile
from typing import Any, cast, overload

import torch
from torch import Tensor

from minilora.adapters import adapters_for_rows, evaluating
from minilora.errors import InputError
from minilora.evaluation.sampling import GREEDY, Sampling, choose, draw_uniforms
from minilora.models import KVCache, Transformer, require_own_model
from minilora.nf4 import keeping_weights
from minilora.progress import progress_bar
from minilora.text import Tokenizer, require_own_tokenizer

Conversation = list[dict[str, str]]
Step = list[tuple[int, int]]  # (row, token) of every row that got one

TOKENS_AT_ONCE = 2048  # in a forward pass over prompts: enough for a matrix product's full speed
LARGEST_BATCH, CACHE_BYTES = 128, 2**30  # a batch's rows where the caller names no batch_size
WORTH_SHARING = 64  # prompt tokens saved; below that a forward pass for the prefix alone costs more than it saves
WORTH_DROPPING = 0.75  # compact the batch once this share of it, or less, is still being written


# ------------------------------------------------------------------------------------------------ text


@overload
def generate(
    model: Transformer, tokenizer: Tokenizer, messages: str | Conversation, max_new_tokens: int = ...,
    temperature: float = ..., top_k: int | None = ..., top_p: float | None = ..., seed: int | None = ...,
    batch_size: int | None = ..., progress: str | None = ..., adapter_names: Sequence[str] | None = ...,
) -> str: ...  # fmt: skip
@overload
def generate(
    model: Transformer, tokenizer: Tokenizer, messages: list[str] | list[Conversation], max_new_tokens: int = ...,
    temperature: float = ..., top_k: int | None = ..., top_p: float | None = ..., seed: int | None = ...,
    batch_size: int | None = ..., progress: str | None = ..., adapter_names: Sequence[str] | None = ...,
) -> list[str]: ...  # fmt: skip
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    messages: str | Conversation | list[str] | list[Conversation],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    progress: str | None = None,
    adapter_names: Sequence[str] | None = None,
) -> str | list[str]:
    """Answer a conversation or continue a text, or many of them.

    Prompts are put into batches by length, and what they all begin with is computed once. On a CPU each NF4 weight is
    dequantized once a call, not at every token, where that copy fits in memory.

    Args:
        model: minilora's `Transformer`, as `load` gives it.
        tokenizer: the model's, as `load` gives it.
        messages: a conversation, which is a list of messages and goes through the chat template; a str, which is
            continued as it stands; or a list of either.
        max_new_tokens: tokens of an answer at most; it also ends where the model's positions do.
        temperature: what the logits are divided by before a token is drawn; 0 takes the likeliest.
        top_k: keep the k likeliest tokens; None keeps all.
        top_p: keep the fewest tokens that together have this probability; None keeps all.
        seed: draws the same tokens again, whatever the batch size; None takes torch's global generator.
        batch_size: prompts at a time; by default as many as a cache of 1 GiB holds, and 128 at most.
        progress: label of a progress bar, shown once the call has taken some seconds; None shows none.
        adapter_names: for each prompt the adapter that answers it, "__base__" for none; by default the active ones.

    Returns:
        The answer as a str for one prompt; for a list of them the answers in the given order.

    Raises:
        InputError: a prompt is empty or fills `max_position_embeddings`; a setting is out of range; the adapter names
            are not the model's, or not one for each prompt; the model or the tokenizer is another library's.

    Source: nucleus sampling (top_p): Holtzman et al., arXiv 1904.09751, section 3.1.
    """
    require_own_model(model, "with transformers, call model.generate(input_ids)")
    if not isinstance(messages, str | list | tuple):
        raise InputError(f"messages are a text, a list of messages or a list of these, not {messages!r}")
    one = isinstance(messages, str) or (bool(messages) and isinstance(messages[0], dict))
    prompts = cast(list[str | Conversation], [messages] if one else messages)
    tokens = generate_tokens(
        model,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids(model, tokenizer),
        sampling=Sampling(temperature, top_k, top_p, seed),
        batch_size=batch_size,
        progress=progress,
        adapter_names=adapter_names,
    )
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
    return texts[0] if one else texts


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    messages: str | Conversation,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """Yield the answer piece by piece as it is written; joined, the pieces are what `generate` returns.

    A character that takes several tokens comes out once it is whole.
    """
    _check_sizes(max_new_tokens, 1)
    prompt = encode_prompt(tokenizer, messages)
    sampling = Sampling(temperature, top_k, top_p, seed)
    tokens: list[int] = []
    shown = 0
    for step in _decode(model, [prompt], max_new_tokens, eos_token_ids(model, tokenizer), sampling, 1):
        tokens += [token for _, token in step]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if len(text) > shown and not text.endswith("\ufffd"):  # else the bytes so far end inside a character
            yield text[shown:]
            shown = len(text)
    rest = tokenizer.decode(tokens, skip_special_tokens=True)[shown:]
    if rest:
        yield rest


def encode_prompt(
    tokenizer: Tokenizer, prompt: str | Conversation, tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """The tokens that an answer follows: the text as it stands, or the chat template up to the assistant's turn."""
    require_own_tokenizer(tokenizer)
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, add_special_tokens=True)
    return tokenizer.encode(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tools=tools))


def eos_token_ids(model: Transformer, tokenizer: Tokenizer) -> set[int]:
    """Every token that ends an answer, by the model's configuration or the tokenizer's."""
    return {*model.config.eos_token_ids, *tokenizer.eos_token_ids}


# ------------------------------------------------------------------------------------------------ tokens


def generate_tokens(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    eos_token_ids: Collection[int] = (),
    sampling: Sampling = GREEDY,
    batch_size: int | None = None,
    progress: str | None = None,
    adapter_names: Sequence[str] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, in the given order, up to and with the first of `eos_token_ids`.

    A prompt gets at most `max_new_tokens`, and no more than fit into `max_position_embeddings`.
    Greedy decoding gives transformers' tokens. Raises `InputError` as `generate` does.
    """
    _check_sizes(max_new_tokens, batch_size)
    new: list[list[int]] = [[] for _ in prompts]
    longest, ended = model.config.max_position_embeddings, 0
    # Counted are the tokens to read and to write, for the time left; what a row that ends early does not write is done.
    with progress_bar(progress, sum(map(len, prompts)) + len(prompts) * max_new_tokens) as advance:
        advance(0, f"{progress}: 0 of {len(prompts)} rows")
        steps = _decode(model, prompts, max_new_tokens, eos_token_ids, sampling, batch_size, adapter_names, advance)
        for row, token in chain.from_iterable(steps):
            new[row].append(token)
            left = max_new_tokens - len(new[row])
            is_last = token in eos_token_ids or left == 0 or len(prompts[row]) + len(new[row]) == longest
            ended += is_last
            advance(1 + left if is_last else 1, f"{progress}: {ended} of {len(prompts)} rows")
    return new


@torch.no_grad()
def _decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_token_ids: Collection[int],
    sampling: Sampling,
    batch_size: int | None,
    adapter_names: Sequence[str] | None = None,
    read: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Step]:
    """Decode all prompts batch by batch; a step's tokens come out as soon as they are chosen.

    `read` is told how many tokens of the prompts have been read since the last time.
    """
    if adapter_names is not None and len(adapter_names) != len(prompts):
        raise InputError(f"adapter_names has {len(adapter_names)} names for {len(prompts)} prompts: give one for each")
    limits = [_room(model, i, prompt, max_new_tokens) for i, prompt in enumerate(prompts)]
    uniforms = draw_uniforms(sampling, len(prompts), max_new_tokens)
    naming = nullcontext() if adapter_names is None else adapters_for_rows(model, adapter_names)
    with evaluating(model), keeping_weights(), naming as row_names:

        def forward(rows: list[int], *inputs: Any, **more: Any) -> Tensor:
            """The model's forward pass over these prompts, each through the adapter named for it."""
            if row_names is not None and adapter_names is not None:
                row_names.use([adapter_names[row] for row in rows])
            return model(*inputs, **more)

        prefix = shared_prefix(model, prompts, longest=None if adapter_names is None else 0)
        read(prefix.length * len(prompts))
        for rows in _batches(model, prompts, limits, batch_size, prefix.length):
            new_tokens = max(limits[row] for row in rows)
            state, logits = _prefill(model, forward, prefix, prompts, rows, new_tokens, read)
            for n in range(max_new_tokens):
                chosen = choose(logits, sampling, uniforms[state.rows, n] if uniforms is not None else None)
                tokens = chosen.tolist()
                yield [(row, token) for row, token, live in zip(state.rows, tokens, state.live, strict=True) if live]
                state.live = [
                    live and token not in eos_token_ids and n + 1 < limits[row]
                    for row, token, live in zip(state.rows, tokens, state.live, strict=True)
                ]
                if not any(state.live):
                    break
                if sum(state.live) <= WORTH_DROPPING * len(state.live):
                    chosen = state.drop_finished(chosen)
                visible = state.visible[:, : state.cache.length + 1]
                logits = forward(state.rows, chosen[:, None], visible, state.positions[:, None], state.cache)[:, 0]
                state.positions = state.positions + 1


def _check_sizes(max_new_tokens: int, batch_size: int | None) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not (isinstance(value, int) and value >= 1) and (name, value) != ("batch_size", None):
            raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")


def _room(model: Transformer, i: int, prompt: Sequence[int], max_new_tokens: int) -> int:
    longest = model.config.max_position_embeddings
    if not prompt:
        raise InputError(f"prompt {i} is empty: give it at least one token")
    if len(prompt) >= longest:
        raise InputError(f"prompt {i} has {len(prompt)} tokens, and the model takes {longest}: shorten it")
    known = model.config.vocab_size
    if unknown := [token for token in (min(prompt), max(prompt)) if not 0 <= token < known]:
        raise InputError(f"prompt {i} has token {unknown[0]}, the model knows {known}: the tokenizer is another's")
    return min(max_new_tokens, longest - len(prompt))


def _batches(
    model: Transformer, prompts: Sequence[Sequence[int]], limits: list[int], batch_size: int | None, shared: int
) -> Iterator[list[int]]:
    """Prompts of like length together, the longest first: too large a batch shows at once.

    A sliding window counts places in the cache, padding among them. Where a row outgrows the window, a batch
    takes prompts of one length only, so that there is no padding.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    longest = max((len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)), default=1)
    of_a_token = _new_cache(model, 1, 1)
    row_bytes = (longest - shared) * sum(tensor.nbytes for tensor in [*of_a_token.keys, *of_a_token.values])
    size = batch_size or max(1, min(LARGEST_BATCH, CACHE_BYTES // row_bytes))
    one_length = any(window is not None and window < longest for window in model.config.sliding_windows)
    for _, group in groupby(order, key=lambda i: len(prompts[i]) if one_length else 0):
        rows = list(group)
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


@dataclass
class _State:
    """A batch between two steps; `live` says which of its `rows` are still being written."""

    rows: list[int]
    live: list[bool]
    cache: KVCache
    visible: Tensor  # (B, max_length) int64: 0 where the cache holds padding
    positions: Tensor  # (B,) of the next token

    def drop_finished(self, tokens: Tensor) -> Tensor:
        """Take the finished rows out of the batch, and out of `tokens` (B,)."""
        keep = torch.tensor([i for i, live in enumerate(self.live) if live], device=tokens.device)
        for layer in range(len(self.cache.keys)):  # layer by layer: only one is held twice
            self.cache.keys[layer] = self.cache.keys[layer][keep]
            self.cache.values[layer] = self.cache.values[layer][keep]
        self.visible, self.positions = self.visible[keep], self.positions[keep]
        self.rows = [row for row, live in zip(self.rows, self.live, strict=True) if live]
        self.live = [True] * len(self.rows)
        return tokens[keep]


def _prefill(
    model: Transformer,
    forward: Callable[..., Tensor],
    prefix: KVCache,
    prompts: Sequence[Sequence[int]],
    rows: list[int],
    new_tokens: int,
    read: Callable[[int], None],
) -> tuple[_State, Tensor]:
    """Read the rows' prompts behind the prefix; the logits (B, V) are those of each row's first new token.

    They are padded on the right, where the causal mask hides it, and read a few rows at a time: each time the
    padding goes up to the longest of those only, and the activations stay small.
    """
    past = prefix.length
    device = prefix.keys[0].device
    lengths = [len(prompts[row]) - past for row in rows]
    longest = lengths[0]  # `rows` are ordered by length
    place = torch.arange(longest)
    visible = torch.ones(len(rows), past + longest + new_tokens - 1, dtype=torch.int64)
    visible[:, past : past + longest] = place < torch.tensor(lengths)[:, None]
    cache = expanded(model, prefix, len(rows), visible.shape[1])
    logits = []
    for batch in micro_batches(lengths):
        T = lengths[batch.start]
        padded = [[*prompts[row][past:], *[0] * T][:T] for row in rows[batch]]
        last = place[:T] == torch.tensor(lengths[batch])[:, None] - 1
        part = copy(cache)  # the batch's rows of the cache, in its memory
        part.keys, part.values = [k[batch] for k in cache.keys], [v[batch] for v in cache.values]
        inputs = {"cache": part, "logits_at": last.to(device)}
        logits.append(forward(rows[batch], torch.tensor(padded, device=device), **inputs))
        read(sum(lengths[batch]))
    cache.length = past + longest
    positions = torch.tensor([past + length for length in lengths])
    state = _State(rows, [True] * len(rows), cache, visible.to(device), positions.to(device))
    return state, torch.cat(logits)


def micro_batches(lengths: list[int], batch_size: int | None = None) -> Iterator[slice]:
    """Cut rows, the longest first, so that a forward pass takes `TOKENS_AT_ONCE`, padding included."""
    start = 0
    while start < len(lengths):
        rows = max(1, TOKENS_AT_ONCE // lengths[start])
        end = start + min(rows, batch_size or rows)
        yield slice(start, end)
        start = end


# ------------------------------------------------------------------------------------------------ prefix and cache


def shared_prefix(model: Transformer, prompts: Sequence[Sequence[int]], longest: int | None = None) -> KVCache:
    """A cache of one row with the tokens that all prompts begin with, at most `longest`; empty where that does not pay.

    It leaves every prompt at least one token.
    """
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    limits = [len(prompt) - 1 for prompt in prompts] + ([] if longest is None else [longest])
    length = min([len(list(alike)), *limits])
    if length * (len(prompts) - 1) < WORTH_SHARING:
        length = 0
    prefix = _new_cache(model, 1, length)
    if length:
        device = prefix.keys[0].device
        no_logits = torch.zeros(1, length, dtype=torch.bool, device=device)
        model(torch.tensor([list(prompts[0][:length])], device=device), cache=prefix, logits_at=no_logits)
    return prefix


def expanded(model: Transformer, prefix: KVCache, batch_size: int, max_length: int) -> KVCache:
    """A cache of `batch_size` rows for `max_length` tokens, each row beginning with the prefix."""
    if prefix.keys[0].is_cpu:
        return _new_cache(model, batch_size, max_length, shared=prefix)
    cache = _new_cache(model, batch_size, max_length)
    for layer in range(len(cache.keys)):
        cache.keys[layer][:, :, : prefix.length] = prefix.keys[layer]
        cache.values[layer][:, :, : prefix.length] = prefix.values[layer]
    cache.length = prefix.length
    return cache


def _new_cache(model: Transformer, batch_size: int, max_length: int, shared: KVCache | None = None) -> KVCache:
    """An empty cache in the dtype and on the device of the model's activations."""
    weight = model.model.embed_tokens.weight
    return KVCache(model.config, batch_size, max_length, weight.dtype, weight.device, shared)
