"""generate: the tokens are transformers', however the prompts are batched; sampling has the model's probabilities."""

import dataclasses
import importlib
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count
from typing import Any

import pytest
import torch
from helpers.chat import CHATML, tiny, user
from helpers.models import CONFIGS, SHAPE, our_model, transformers_model
from helpers.sampling import chi_square
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minilora.adapters.attach import add_adapter
from minilora.adapters.lora_config import LoRAConfig
from minilora.errors import InputError
from minilora.evaluation.generate import encode_prompt, generate, generate_tokens, stream
from minilora.evaluation.sampling import Sampling
from minilora.formats.load import load
from minilora.models.config import ModelConfig
from minilora.models.transformer import Transformer
from minilora.nf4.linear import NF4Linear

module = importlib.import_module("minilora.evaluation.generate")  # `minilora.generate` itself is the function
RAGGED = (1, 4, 4, 9, 13, 6)
PREFIX = 20


def prompts(lengths: tuple[int, ...] = RAGGED, prefix: int = PREFIX, seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths behind a prefix that they share."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(SHAPE["vocab_size"], (length,), generator=generator).tolist() for length in (prefix, *lengths)
    ]
    return [rows[0] + row for row in rows[1:]]


def transformers_tokens(theirs: Any, prompts: list[list[int]], max_new_tokens: int, eos: list[int]) -> list[list[int]]:
    """transformers' greedy generate, prompts padded on the left; each row up to and with its first EOS."""
    T = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt in prompts])
    attention_mask = torch.tensor([[0] * (T - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    rows = theirs.generate(
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos or None,
        pad_token_id=0,
    )[:, T:].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in eos), max_new_tokens) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def some_eos(theirs: Any) -> list[int]:
    """Tokens that do come up in the model's answers: one early in the first row, one late in the second."""
    first, second, *_ = transformers_tokens(theirs, prompts(), 20, [])
    return [first[3], second[12]]


@pytest.fixture(scope="module")
def llama() -> Any:
    return transformers_model(CONFIGS["llama"])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The (B, T) of every forward."""
    shapes = []
    forward = Transformer.forward

    def recording(self: Transformer, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", recording)
    return shapes


# ------------------------------------------------------------------------------------------------ greedy


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    theirs = transformers_model(CONFIGS[name])
    ours = our_model(theirs)
    eos = some_eos(theirs)
    expected = transformers_tokens(theirs, prompts(), 20, eos)
    assert len({len(row) for row in expected}) > 1, "the rows should end at different steps"
    for batch_size in (None, 4, 1):
        assert generate_tokens(ours, prompts(), 20, eos, batch_size=batch_size) == expected


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6).map(tuple),
    prefix=st.sampled_from([0, 3, 40]),
    max_new_tokens=st.integers(1, 12),
    eos=st.sets(st.integers(0, SHAPE["vocab_size"] - 1), max_size=12),
    batch_size=st.sampled_from([None, 1, 2, 3]),
    seed=st.integers(0, 2**32),
)
def test_any_batch_of_prompts_gives_the_tokens_of_transformers(
    llama: Any, lengths: tuple[int, ...], prefix: int, max_new_tokens: int, eos: set[int], batch_size: int, seed: int
) -> None:
    rows = prompts(lengths, prefix, seed)
    expected = transformers_tokens(llama, rows, max_new_tokens, sorted(eos))
    assert generate_tokens(our_model(llama), rows, max_new_tokens, eos, batch_size=batch_size) == expected


@pytest.mark.model
def test_smollm2_gives_the_tokens_of_transformers(smollm2_transformers: Any) -> None:
    model, tokenizer = load("smollm2-135m-instruct", quantize=None, dtype=torch.float32)
    questions = ["Hi!", "What is the capital of France?", "Name three rivers, and say for each where it meets the sea."]
    rows = [encode_prompt(tokenizer, [user(question)]) for question in questions]
    eos = tokenizer.eos_token_ids
    assert generate_tokens(model, rows, 10, eos) == transformers_tokens(smollm2_transformers, rows, 10, eos)


def test_with_adapters_on_4_bit_layers_the_tokens_are_those_without_a_cache(llama: Any) -> None:
    model = our_model(llama)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                setattr(block, name, NF4Linear.from_linear(linear))
    add_adapter(model, LoRAConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.eval()
    for prompt, new in zip(prompts(), generate_tokens(model, prompts(), 8), strict=True):
        tokens = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert new == tokens[len(prompt) :]


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5, top_k=40, top_p=0.95, seed=3)])
def test_a_gpu_gives_the_same_tokens(llama: Any, sampling: Sampling) -> None:
    model, eos = our_model(llama), some_eos(llama)
    expected = generate_tokens(model, prompts(), 20, eos, sampling)
    assert generate_tokens(model.to("cuda"), prompts(), 20, eos, sampling) == expected


# ------------------------------------------------------------------------------------------------ less work


def test_the_shared_prefix_is_read_once(
    llama: Any, seen: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = our_model(llama)
    tokens = generate_tokens(model, prompts(), 5, batch_size=2)
    shared = sum(B * T for B, T in seen)
    assert seen[0] == (1, PREFIX)
    monkeypatch.setattr(module, "WORTH_SHARING", math.inf)
    seen.clear()
    assert generate_tokens(model, prompts(), 5, batch_size=2) == tokens
    assert sum(B * T for B, T in seen) - shared == PREFIX * (len(RAGGED) - 1)


def test_a_prompt_that_is_the_shared_prefix_keeps_a_token_to_read(llama: Any) -> None:
    base = prompts((1,), 80)[0]
    rows = [base, base, [*base, 5]]
    expected = transformers_tokens(llama, rows, 6, [])
    assert generate_tokens(our_model(llama), rows, 6) == expected


def test_finished_rows_leave_the_batch(
    llama: Any, seen: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows, eos = our_model(llama), prompts(), some_eos(llama)
    new = generate_tokens(model, rows, 20, eos)
    batch_sizes = [B for B, T in seen if T == 1]
    assert batch_sizes == sorted(batch_sizes, reverse=True)
    assert batch_sizes[-1] < len(rows)
    assert len(batch_sizes) == max(map(len, new)) - 1, "decoding goes on only while a row needs it"
    for never_or_at_once in (0.0, 1.0):
        monkeypatch.setattr(module, "WORTH_DROPPING", never_or_at_once)
        assert generate_tokens(model, rows, 20, eos) == new


def test_prompts_are_read_a_few_rows_at_a_time(
    llama: Any, seen: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = our_model(llama), prompts()
    expected = generate_tokens(model, rows, 6)
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 16)
    seen.clear()
    assert generate_tokens(model, rows, 6) == expected
    reading = [shape for shape in seen[1:] if shape[1] > 1]
    assert len(reading) > 2
    assert all(B * T <= 16 for B, T in reading)


def test_without_a_batch_size_the_cache_stays_small(
    llama: Any, seen: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = our_model(llama)
    config = model.config
    own = max(RAGGED) + 5  # tokens beside the shared prefix, which is there once
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * own
    monkeypatch.setattr(module, "CACHE_BYTES", 2 * row)
    generate_tokens(model, prompts(), 5)
    assert max(B for B, T in seen) == 2


# ------------------------------------------------------------------------------------------------ limits and errors


def test_a_row_ends_where_the_positions_end(llama: Any) -> None:
    model = our_model(transformers_model(type(llama.config)(**SHAPE, max_position_embeddings=32)))
    rows = prompts((1, 6, 11), PREFIX)
    assert [len(row) for row in generate_tokens(model, rows, 100)] == [11, 6, 1]
    with pytest.raises(InputError, match="prompt 1 has 32 tokens, and the model takes 32"):
        generate_tokens(model, [[1], [1] * 32], 1)


def test_an_empty_prompt_is_an_error_and_no_prompt_is_not(llama: Any) -> None:
    with pytest.raises(InputError, match="prompt 1 is empty"):
        generate_tokens(our_model(llama), [[1], []], 1)
    assert generate_tokens(our_model(llama), [], 1) == []


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)])
def test_a_damaged_model_is_an_error(llama: Any, sampling: Sampling) -> None:
    model = our_model(llama)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = math.nan
    with pytest.raises(InputError, match="NaN"):
        generate_tokens(model, prompts(), 3, sampling=sampling)


@pytest.mark.parametrize("values", [{"max_new_tokens": 0}, {"max_new_tokens": 2.5}, {"batch_size": 0}])
def test_no_tokens_and_no_rows_are_errors(llama: Any, values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(values))} must be a whole number of at least 1"):
        generate_tokens(our_model(llama), [[1]], **values)


@pytest.mark.parametrize("token", [SHAPE["vocab_size"], -1])
def test_a_token_that_the_model_does_not_know_is_an_error(llama: Any, token: int) -> None:
    with pytest.raises(InputError, match=f"prompt 1 has token {token}, the model knows 97: the tokenizer is another's"):
        generate_tokens(our_model(llama), [[1, 2], [3, token]], 1)


@pytest.mark.parametrize("messages", [{"role": "user", "content": "a"}, None, 5])
def test_what_is_no_text_and_no_conversation_is_an_error(llama: Any, messages: Any) -> None:
    with pytest.raises(InputError, match="messages are a text, a list of messages or a list of these, not"):
        generate(our_model(llama), tiny(), messages)


def test_modes_are_as_before_and_no_gradient_is_kept(llama: Any) -> None:
    model = our_model(llama)
    model.train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    modes = []
    model.register_forward_hook(lambda m, args, output: modes.append((m.training, output.requires_grad)))
    generate_tokens(model, prompts(), 2)
    assert set(modes) == {(False, False)}
    assert [m.training for m in model.modules()] == before
    with pytest.raises(InputError):
        generate_tokens(model, [[]], 2)
    assert [m.training for m in model.modules()] == before


# ------------------------------------------------------------------------------------------------ sampled


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_sampled_tokens_have_the_probabilities_of_the_softmax(llama: Any, temperature: float) -> None:
    prompt, n = prompts()[3], 4000
    logits = llama(torch.tensor([prompt])).logits[0, -1].detach().double()
    exact = (logits / 8 / temperature).softmax(-1)  # an eighth, for a distribution over many tokens
    model = our_model(llama)
    with torch.no_grad():
        model.lm_head.weight.div_(8)
    rows = generate_tokens(model, [prompt] * n, 1, sampling=Sampling(temperature, seed=1))
    statistic, bound = chi_square(Counter(row[0] for row in rows), exact, n)
    assert statistic < bound


def test_a_seed_gives_the_same_tokens_in_any_batch(llama: Any) -> None:
    model, eos, sampling = our_model(llama), some_eos(llama), Sampling(2.0, top_p=0.9, seed=5)
    tokens = generate_tokens(model, prompts(), 12, eos, sampling)
    assert generate_tokens(model, prompts(), 12, eos, sampling, batch_size=1) == tokens
    assert generate_tokens(model, prompts(), 12, eos, Sampling(2.0, top_p=0.9, seed=6)) != tokens
    torch.manual_seed(8)
    unseeded = [generate_tokens(model, prompts(), 12, eos, Sampling(2.0)) for _ in range(2)]
    torch.manual_seed(8)
    assert [generate_tokens(model, prompts(), 12, eos, Sampling(2.0)) for _ in range(2)] == unseeded
    assert unseeded[0] != unseeded[1]


# ------------------------------------------------------------------------------------------------ text


@pytest.fixture(scope="module")
def chat() -> tuple[Transformer, Any]:
    """A random model for the tiny tokenizer with its chat template."""
    tokenizer = tiny(CHATML, eos_token="<|im_end|>")
    theirs = transformers_model(type(CONFIGS["llama"])(**SHAPE | {"vocab_size": len(tokenizer)}))
    return our_model(theirs), tokenizer


def test_one_prompt_gives_a_str_and_a_list_gives_a_list(chat: tuple[Transformer, Any]) -> None:
    model, tokenizer = chat
    conversations = [[user("a bee")], [user("the weather, the weather in the north")]]
    texts = generate(model, tokenizer, conversations, 8)
    assert texts == [generate(model, tokenizer, conversation, 8) for conversation in conversations]
    ids = tokenizer.encode(tokenizer.apply_chat_template(conversations[0], add_generation_prompt=True))
    assert texts[0] == tokenizer.decode(generate_tokens(model, [ids], 8, tokenizer.eos_token_ids)[0])
    continued = generate(model, tokenizer, ["a bee"], 8)
    assert continued == [generate(model, tokenizer, "a bee", 8)]
    assert continued == [tokenizer.decode(generate_tokens(model, [tokenizer.encode("a bee")], 8)[0])]
    assert generate(model, tokenizer, [], 8) == []


def test_a_plain_text_begins_as_the_tokenizer_says() -> None:
    tokenizer = tiny(add_bos_token=True)
    assert encode_prompt(tokenizer, "a bee") == [tokenizer.bos_token_id, *tokenizer.encode("a bee")]


def test_an_answer_ends_with_the_tokens_of_the_model_and_of_the_tokenizer(chat: tuple[Transformer, Any]) -> None:
    model, tokenizer = chat
    config = ModelConfig.from_hf(model.config.to_hf() | {"eos_token_id": [7, 9]})
    other = Transformer(config)
    assert module.eos_token_ids(other, tokenizer) == {7, 9, tokenizer.eos_token_id}


def test_the_stream_joined_is_the_answer(chat: tuple[Transformer, Any]) -> None:
    """A random model writes random bytes, so that characters break off in the middle."""
    model, tokenizer = chat
    for seed in range(5):
        options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "seed": seed}
        pieces = []
        for piece in stream(model, tokenizer, [user("a bee")], **options):
            assert torch.is_grad_enabled(), "the caller's mode is its own"
            pieces.append(piece)
        assert len(pieces) > 5
        assert "".join(pieces) == generate(model, tokenizer, [user("a bee")], **options)


def test_the_stream_keeps_back_a_character_until_it_is_whole(
    chat: tuple[Transformer, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = chat
    text = "né 🤗👩‍👧 中."
    tokens = tokenizer.encode(text)
    assert len(tokens) > len(text), "some characters should take several tokens"

    def decode(*args: Any) -> Iterator[list[tuple[int, int]]]:
        yield from ([(0, token)] for token in tokens)

    monkeypatch.setattr(module, "_decode", decode)
    pieces = list(stream(model, tokenizer, "a"))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[0] == "n"


# ------------------------------------------------------------------------------------------------ progress


@pytest.mark.parametrize(("seconds", "shown"), [(60, True), (0, False)])
def test_a_long_call_shows_its_progress(
    chat: tuple[Transformer, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seconds: int,
    shown: bool,
) -> None:
    monkeypatch.setattr("minilora.progress.clock", count(step=seconds).__next__)
    generate(*chat, [user("a bee")], 8, progress="answering")
    output = capsys.readouterr()
    assert output.out == ""
    assert ("answering: 0 of 1 rows" in output.err) == ("answering: 1 of 1 rows · done in" in output.err) == shown


@pytest.mark.parametrize("prefix", [PREFIX, 0])
@pytest.mark.parametrize("room", [100, 25])
def test_progress_counts_tokens_read_and_written_and_ends_at_the_whole(
    llama: Any, monkeypatch: pytest.MonkeyPatch, prefix: int, room: int
) -> None:
    """Also for rows that end early, by a token or where the model's positions do."""
    advanced: list[tuple[int, str]] = []
    totals: list[int] = []

    def progress_bar(label: str | None, total: int) -> Any:
        totals.append(total)
        return nullcontext(lambda n, text=None: advanced.append((n, text)))

    monkeypatch.setattr(module, "progress_bar", progress_bar)
    model = our_model(llama)
    model.config = dataclasses.replace(model.config, max_position_embeddings=prefix + room)
    rows = prompts(prefix=prefix)
    answers = generate_tokens(model, rows, 20, some_eos(llama), batch_size=4, progress="answering")
    ends = [len(row) + len(answer) for row, answer in zip(rows, answers, strict=True)]
    assert (max(ends) == prefix + room) == (room == 25)
    assert [sum(n for n, _ in advanced)] == totals == [sum(map(len, rows)) + 20 * len(rows)]
    assert [text for _, text in advanced if text][-1] == "answering: 6 of 6 rows"
    read = [n for n, text in advanced if text is None]
    assert sum(read) == sum(map(len, rows)) and len(read) > 2, "while they are read, batch by batch"
