"""Packed sequences: loss and gradients of padded rows and of transformers' single ones; no token sees another row.

A transformers model finds the rows by itself; which models do so is tried on models that do, and on some that do not.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import CONFIGS, OTHER_CONFIGS, SHAPE, our_model, transformers_model
from helpers.peft import tiny_gpt2
from helpers.training import LLAMA, random_rows, run, tiny_model, trained
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from minilora.adapters.attach import add_adapter
from minilora.adapters.lora_config import LoRAConfig
from minilora.data.batches import batches, collate, pack
from minilora.data.examples import Example
from minilora.models import packed_sequences
from minilora.models.kv_cache import KVCache
from minilora.models.packed_sequences import can_pack, keeps_rows_apart
from minilora.models.transformers_attention import attention_row_by_row
from minilora.training.loss import label_tokens, summed_loss

NAMES = ["llama", "smollm", "llama3-rope", "qwen2", "qwen3", "mistral-window", "qwen3-window"]
# Sums of a hundred products in another order, through three layers, as a share of the largest gradient.
ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12}


def rows() -> list[Example]:
    """Of 1 to 20 tokens; one has nothing to learn, and one a label on its first token, which nothing predicts."""
    return [*random_rows(4), Example([5], [5]), Example([6, 7, 8], [6, -100, 8]), Example([9, 3], [-100, -100])]


def loss_and_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return {"loss": loss.detach(), **dict(zip(parameters, gradients, strict=True))}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], rounding: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        atol = rounding * float(expected.abs().max()) + 1e-30
        torch.testing.assert_close(
            ours[name], expected, rtol=0, atol=atol, check_dtype=False, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- the batch --------------------------------------------------------------------------------------------------------


def test_pack_by_hand() -> None:
    batch = pack([Example([1, 2, 3], [-100, 2, 3]), Example([4], [4]), Example([], []), Example([5, 6], [5, 6])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.labels.tolist() == [[-100, 2, 3, -100, -100, 6]]  # 4 and 5 would be predicted from another row
    assert batch.lengths == (3, 1, 0, 2)


# --- minilora's own model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_packed_is_padded_is_one_row_at_a_time(name: str, dtype: torch.dtype) -> None:
    theirs = transformers_model(CONFIGS[name]).to(dtype)
    ours = our_model(theirs)
    packed = loss_and_gradients(ours, summed_loss(ours, pack(rows())))
    padded = loss_and_gradients(ours, summed_loss(ours, collate(rows(), 0)))
    assert_close(packed, padded, ROUNDING[dtype])
    single = sum(
        theirs(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss * label_tokens([row])
        for row in rows()
        if label_tokens([row])
    )
    assert isinstance(single, Tensor)
    # transformers computes angles and norms in float32 in a float64 model too
    assert_close(packed, loss_and_gradients(theirs, single), ROUNDING[torch.float32])


@pytest.mark.parametrize("nf4", [False, True], ids=["float32", "NF4"])
def test_packed_is_padded_with_adapters_and_checkpointing(nf4: bool) -> None:
    model = tiny_model(nf4=nf4).train()
    padded = loss_and_gradients(model, summed_loss(model, collate(rows(), 0)))
    # with NF4 the activations are bfloat16, of 8 bits, and the sums over a row are rounded in another order
    rounding = 3e-2 if nf4 else ROUNDING[torch.float32]
    for model.gradient_checkpointing in (False, True):
        assert_close(loss_and_gradients(model, summed_loss(model, pack(rows()))), padded, rounding)


@pytest.mark.parametrize("name", NAMES)
def test_no_token_sees_another_row(name: str) -> None:
    model = our_model(transformers_model(CONFIGS[name]))
    batch = pack(rows())
    ends = torch.tensor(batch.lengths).cumsum(0).tolist()
    embeddings = _watched_embeddings(model)
    logits = model(batch.input_ids, lengths=batch.lengths)
    for row, (length, end) in enumerate(zip(batch.lengths, ends, strict=True)):
        inside = torch.zeros(ends[-1], dtype=torch.bool)
        inside[end - length : end] = True

        changed = batch.input_ids.clone()
        changed[0, inside] = (changed[0, inside] + 1) % 97
        others = model(changed, lengths=batch.lengths)[0, ~inside]
        assert torch.equal(others, logits[0, ~inside]), f"{row}: the logits of other rows changed"

        (gradient,) = torch.autograd.grad(logits[0, inside].square().sum(), embeddings[0], retain_graph=True)
        assert gradient[0, inside].all(dim=-1).any()
        assert not gradient[0, ~inside].any(), f"{row}: other rows' inputs have a gradient"


def _watched_embeddings(model: nn.Module) -> list[Tensor]:
    """What the embedding gave, in each pass to come, as a leaf that gets gradients."""
    seen: list[Tensor] = []

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    model.get_submodule("model.embed_tokens").register_forward_hook(watch)
    return seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": (5, 2)}, r"rows of 7 tokens in all do not fill input_ids \(1, 8\)"),
        ({"lengths": (5, 3), "attention_mask": torch.ones(1, 8)}, "neither an attention_mask nor a cache"),
        ({"lengths": (5, 3), "cache": KVCache(tiny_model().config, 1, 8)}, "neither an attention_mask nor a cache"),
    ],
)
def test_packed_sequences_alone(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model()(torch.ones(1, 8, dtype=torch.int64), **arguments)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_no_padding_goes_through_the_model(packed: bool, tmp_path: Any) -> None:
    model, examples = tiny_model(), random_rows(12, longest=30)
    shapes = _input_shapes(model)
    run(model, examples, tmp_path, batch_size=4, gradient_accumulation_steps=2, packing=packed)
    order = batches(examples, 8, group_by_length=not packed)
    passes = [[examples[i] for i in step[j : j + 4]] for step in order for j in range(0, len(step), 4)]
    lengths = [[len(example.input_ids) for example in one] for one in passes]
    assert shapes == [(1, sum(one)) if packed else (len(one), max(one)) for one in lengths]


def _input_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    embedding.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[:2])))
    return shapes


def llama_with_adapter(attention: str) -> Any:
    model = llama(attention)
    torch.manual_seed(1)
    add_adapter(model, LoRAConfig(r=4, target_modules="all-linear"))
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_transformers_model_is_packed_where_its_attention_can_go_row_by_row(
    attention: str, checkpointing: bool, tmp_path: Path
) -> None:
    """What is trained is the same, and so is the loss of held-out rows."""
    models = [llama_with_adapter(attention) for _ in range(2)]
    shapes = _input_shapes(models[0])
    settings = {"max_steps": 3, "batch_size": 3, "eps": 1.0, "learning_rate": 0.5, "group_by_length": False}
    settings["gradient_checkpointing"] = checkpointing
    held_out = random_rows(4, seed=1)
    packed = run(models[0], random_rows(9), tmp_path / "a", held_out, **settings)
    padded = run(models[1], random_rows(9), tmp_path / "b", held_out, packing=False, **settings)
    in_training, held_out_shapes = shapes[-5:-2], shapes[-2:]
    assert {batch for batch, _ in in_training} == {1 if attention == "sdpa" else 3}
    assert [batch for batch, _ in held_out_shapes] == ([1, 1] if attention == "sdpa" else [3, 1])
    # float32 sums in another order; with eps = 1 the update is smooth in the gradient
    for a, b in zip(trained(models[0]).values(), trained(models[1]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert packed.eval_loss == pytest.approx(padded.eval_loss, rel=1e-6)


# --- transformers models ----------------------------------------------------------------------------------------------


class NoPositions(LlamaForCausalLM):
    """Takes positions, and does not look at them."""

    def forward(self, position_ids: Any = None, inputs_embeds: Any = None, use_cache: Any = None) -> Any:
        return super().forward(inputs_embeds=inputs_embeds, use_cache=use_cache)


class NoEmbeddings(LlamaForCausalLM):
    """Looks at the tokens themselves, as a router by token does."""

    def forward(
        self, input_ids: Any = None, position_ids: Any = None, inputs_embeds: Any = None, use_cache: Any = None
    ) -> Any:
        return super().forward(input_ids=input_ids.clone(), position_ids=position_ids, use_cache=use_cache)


def seeded(model: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return model(config).eval()


def llama(attention: str) -> Any:
    return seeded(LlamaForCausalLM, LlamaConfig(**LLAMA, attn_implementation=attention))


QWEN3_NEXT = Qwen3NextConfig(
    **SHAPE,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)


PACKED = ("llama", "qwen3", "mixtral", "phi", "phi3", "gpt2", "gpt-neox", "gemma3", "cohere", "cohere2", "granite")


@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_which_transformers_models_are_packed_and_that_their_loss_is_that_of_padded_rows(name: str) -> None:
    """Gemma 2 caps its scores, Falcon has an attention of its own, the others do not know rows by their positions."""
    model = transformers_model(OTHER_CONFIGS[name])
    assert can_pack(model) == (name in PACKED)
    if name not in PACKED:
        return
    padded = loss_and_gradients(model, summed_loss(model, collate(rows(), 0)))
    all_pairs = loss_and_gradients(model, summed_loss(model, pack(rows())))
    with attention_row_by_row() as calls:
        row_by_row = loss_and_gradients(model, summed_loss(model, pack(rows())))
    assert (calls.row_by_row, calls.all_pairs) == (model.config.num_hidden_layers, 0)
    largest = max(float(gradient.abs().max()) for gradient in padded.values())
    for name, expected in padded.items():
        for ours in (row_by_row[name], all_pairs[name]):
            # relative to the largest gradient: that of a key's bias is zero but for rounding
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=ROUNDING[torch.float32] * largest)


def test_a_model_is_not_packed_if_one_of_its_layers_computes_all_pairs() -> None:
    def copy_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": kwargs["attention_mask"].clone()}

    model = llama("sdpa")
    assert can_pack(model)
    model.model.layers[1].self_attn.register_forward_pre_hook(copy_mask, with_kwargs=True)
    assert keeps_rows_apart(model)
    assert not can_pack(model)


def test_the_modules_are_in_their_modes_after_the_probe() -> None:
    theirs = tiny_gpt2()  # which has dropout
    theirs.train().get_input_embeddings().eval()
    modes = [module.training for module in theirs.modules()]
    assert can_pack(theirs)
    assert [module.training for module in theirs.modules()] == modes


@pytest.mark.parametrize(
    "model",
    [
        lambda: seeded(NoPositions, LlamaConfig(**LLAMA)),
        lambda: seeded(BloomForCausalLM, BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)),
        lambda: seeded(Qwen3NextForCausalLM, QWEN3_NEXT),
        lambda: seeded(NoEmbeddings, LlamaConfig(**LLAMA)),
        lambda: nn.Linear(3, 3),
    ],
    ids=["ignores positions", "takes none", "linear attention", "refuses embeddings", "no language model"],
)
def test_models_that_would_mix_rows_are_not_packed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_pack(model())
    monkeypatch.setattr(packed_sequences, "SKIPS_OTHER_ROWS", ("",))
    assert not can_pack(model())


@pytest.mark.gpu
def test_flex_attention_trains_on_packed_rows() -> None:
    """On a CPU it has no gradient."""
    model = llama("flex_attention").cuda()
    assert can_pack(model)
    packed = summed_loss(model, pack(rows())).item()
    assert packed == pytest.approx(summed_loss(llama("eager"), collate(rows(), 0)).item(), rel=1e-3)  # TF32 on a GPU
