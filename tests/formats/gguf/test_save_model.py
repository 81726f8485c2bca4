"""GGUF files: llama.cpp, transformers and minilora compute with them what the model in memory does."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.chat import CHATML, LLAMA3, QWEN, ZEPHYR, in_transformers, tiny
from helpers.gguf import logits
from helpers.gguf_models import FLOAT32, IDS, LLAMA3_ROPE, MODELS, WIDE, adapted, model_of
from helpers.llama_cpp import LlamaCpp, largest_difference
from helpers.models import CONFIGS, our_model, relative_error, transformers_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from minilora import TrainConfig, add_adapter, disable_adapters, generate, load, save_gguf, train
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.merged_weights import dense_tensors, layers_with_weights
from minilora.errors import InputError
from minilora.formats.gguf.file import GGUFFile

# --- who reads it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    model = adapted(MODELS[name])
    save_gguf(model, tiny(CHATML), tmp_path / "model.gguf", outtype="f32")
    assert largest_difference(LlamaCpp(tmp_path / "model.gguf"), model, IDS) < FLOAT32


@pytest.mark.parametrize("name", MODELS)
def test_loading_it_gives_back_the_bits(name: str, tmp_path: Path) -> None:
    """Also of eps and θ, which the file holds in float32: the model computes with them in float32."""
    model = model_of(MODELS[name])
    save_gguf(model, tiny(CHATML), tmp_path / "model.gguf", outtype="f32")
    again, _ = load(tmp_path / "model.gguf", quantize=None, dtype=torch.float32)
    ids = torch.tensor([IDS])
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    # of a Qwen3 file it does not read the size of a head, but takes Qwen3's own
    model = adapted(Qwen3Config(**WIDE, head_dim=128) if name == "qwen3" else MODELS[name])
    save_gguf(model, tiny(CHATML), tmp_path / "model.gguf", outtype="f32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    ids = torch.tensor([IDS])
    assert relative_error(logits(theirs, ids), logits(model, ids)) < 1e-5  # see models/test_transformer.py


def test_llama_cpp_decodes_the_same_tokens(tmp_path: Path) -> None:
    model = adapted(MODELS["smollm"], nf4=True)
    save_gguf(model, tiny(CHATML), tmp_path / "model.gguf", outtype="f32")
    ids = list(IDS)
    for _ in range(12):
        ids.append(int(logits(model, torch.tensor([ids]))[0, -1].argmax()))
    assert LlamaCpp(tmp_path / "model.gguf").greedy(IDS, 12) == ids[len(IDS) :]


def test_a_sliding_window_becomes_the_context(tmp_path: Path) -> None:
    model = model_of(CONFIGS["mistral-window"])
    save_gguf(model, tiny(CHATML), tmp_path / "model.gguf", outtype="f32")
    assert GGUFFile(tmp_path / "model.gguf").metadata["llama.context_length"] == 5
    assert largest_difference(LlamaCpp(tmp_path / "model.gguf"), model, IDS[:4]) < FLOAT32


# --- what is in it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nf4", [False, True])
def test_adapters_are_merged_in_the_file_and_only_there(nf4: bool, tmp_path: Path) -> None:
    model = adapted(LlamaConfig(**WIDE), nf4=nf4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with disable_adapters(model):
        save_gguf(model, tiny(CHATML), tmp_path / "base.gguf", outtype="f32")
        expected = logits(model, torch.tensor([IDS]))
    base, _ = load(tmp_path / "base.gguf", quantize=None, dtype=torch.float32)
    # NF4 multiplies in another order than a dense layer
    assert relative_error(logits(base, torch.tensor([IDS])), expected) < 1e-5
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


# In how many steps a block's range is divided, and the largest error as a share of one: half, and in q5_0 and q4_0 a
# whole one, since one end of their range has a step less. Beyond that, the step is rounded to float16 (2^-11), which
# the code, up to 127, multiplies.
STEPS = {"q8_0": (254, 0.57), "q5_1": (31, 0.53), "q5_0": (32, 1.02), "q4_1": (15, 0.52), "q4_0": (16, 1.02)}


@pytest.mark.parametrize("outtype", STEPS)
def test_a_quantized_file_differs_by_its_rounding_only(outtype: Any, tmp_path: Path) -> None:
    model = adapted(LlamaConfig(**WIDE))
    save_gguf(model, tiny(CHATML), tmp_path / "model.gguf", outtype=outtype)
    again, _ = load(tmp_path / "model.gguf", quantize=None, dtype=torch.float32)
    stored = dict(again.named_parameters())
    for path, layer in layers_with_weights(model).items():
        for name, exact in dense_tensors(path, layer, torch.float32).items():
            if exact.ndim == 1:
                assert torch.equal(stored[name], exact)
                continue
            outside = path in ("model.embed_tokens", "lm_head")
            steps, share = STEPS["q8_0" if outside else outtype]
            blocks = exact.view(-1, 32)
            symmetric = steps in (254, 32, 16)
            spread = 2 * blocks.abs().amax(1) if symmetric else blocks.amax(1) - blocks.amin(1)
            error = (stored[name].view(-1, 32) - blocks).abs().amax(1)
            assert (error <= share * spread / steps).all(), name
            assert error.max() > 0


@pytest.mark.parametrize(("outtype", "bound"), [("f16", 0.01), ("bf16", 0.1), ("q8_0", 0.3), ("q4_0", 0.3)])
def test_llama_cpp_reads_every_kind_of_type(outtype: Any, bound: float, tmp_path: Path) -> None:
    """Against the same file loaded here: llama.cpp rounds the inputs of a product as well, to the weights' type or,
    where these have blocks, to 8 bits. 0.002, 0.018 and 0.07 were seen; a wrong order of bytes moves them by units."""
    save_gguf(model_of(LlamaConfig(**WIDE)), tiny(CHATML), tmp_path / "model.gguf", outtype=outtype)
    again, _ = load(tmp_path / "model.gguf", quantize=None, dtype=torch.float32)
    assert largest_difference(LlamaCpp(tmp_path / "model.gguf"), again, IDS) < bound


# --- the tokenizer's part ---------------------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "Short."},
    {"role": "user", "content": "the weather"},
    {"role": "assistant", "content": "is"},
    {"role": "user", "content": "north?"},
]


@pytest.mark.parametrize("template", [CHATML, ZEPHYR, QWEN], ids=["chatml", "zephyr", "qwen"])
def test_llama_cpp_writes_and_reads_the_same_prompt(template: str, tmp_path: Path) -> None:
    tokenizer = tiny(template)
    save_gguf(model_of(CONFIGS["llama"]), tokenizer, tmp_path / "model.gguf", outtype="f32")
    theirs = LlamaCpp(tmp_path / "model.gguf")
    for messages in (CHAT, CHAT[1:2]):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert theirs.prompt(messages) == prompt
        assert theirs.tokens(prompt) == tokenizer.encode(prompt)


def test_the_templates_for_tools_and_for_chats_come_back(tmp_path: Path) -> None:
    tokenizer = tiny(CHATML)
    tokenizer.chat_templates["tool_use"] = QWEN
    model = model_of(CONFIGS["llama"])
    save_gguf(model, tokenizer, tmp_path / "model.gguf", outtype="f32")
    _, again = load(tmp_path / "model.gguf", quantize=None)
    assert again.chat_templates == {"default": CHATML, "tool_use": QWEN}
    assert again.named_tokens == tokenizer.named_tokens
    assert set(again.eos_token_ids) == {*tokenizer.eos_token_ids, *model.config.eos_token_ids}


def test_llama_cpp_puts_bos_where_the_tokenizer_does(tmp_path: Path) -> None:
    for add_bos in (False, True):
        tokenizer = tiny(LLAMA3, add_bos_token=add_bos)
        save_gguf(model_of(CONFIGS["llama"]), tokenizer, tmp_path / "model.gguf", outtype="f32")
        theirs = LlamaCpp(tmp_path / "model.gguf")
        expected = tokenizer.encode("the weather", add_special_tokens=True)
        assert theirs.tokens("the weather", add_special=True) == expected


# --- what is refused --------------------------------------------------------------------------------------------------


def refuse(model: Any, path: Path, message: str, **options: Any) -> None:
    path.write_text("what was there before")
    with pytest.raises(InputError) as error:
        save_gguf(model, options.pop("tokenizer", tiny(CHATML)), path, **options)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert path.read_text() == "what was there before"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_two_saves_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    model = model_of(CONFIGS["llama"])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: save_gguf(model, tiny(CHATML), tmp_path / "model.gguf", outtype="f32"), range(4)))
    again, _ = load(tmp_path / "model.gguf", quantize=None, dtype=torch.float32)
    assert torch.equal(logits(again, torch.tensor([IDS])), logits(model, torch.tensor([IDS])))
    assert {file.name for file in tmp_path.iterdir()} == {"model.gguf", "model.Modelfile"}


def test_what_the_file_cannot_hold_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    refuse(transformers_model(CONFIGS["llama"]), path, "is not minilora's own model")
    theirs = in_transformers(tiny(CHATML))
    refuse(model_of(CONFIGS["llama"]), path, "is not minilora's tokenizer", tokenizer=theirs, outtype="f32")
    refuse(model_of(CONFIGS["llama"]), path, "has rows of 112 numbers, and Q8_0 takes them in blocks of 32")
    refuse(model_of(CONFIGS["llama"]), path, "outtype 'q6_k' is not one of f32", outtype="q6_k")
    refuse(model_of(CONFIGS["qwen3-window"]), path, "no biases in its architecture qwen3", outtype="f32")
    llama3 = {**LLAMA3_ROPE, "rope_theta": 1e6}
    refuse(model_of(Qwen2Config(**WIDE, rope_parameters=llama3)), path, "no llama3 RoPE scaling", outtype="f32")
    refuse(our_model(transformers_model(CONFIGS["llama"])), path, "the model only 97 embeddings", outtype="f32")
    broken = model_of(Qwen3Config(**WIDE))
    broken.model.layers[2].mlp.up_proj.weight.data[3, 4] = torch.nan
    refuse(broken, path, "model.layers.2.mlp.up_proj: the weight to save has NaN")
    broken.model.layers[2].mlp.up_proj.weight.data[3, 4] = 1e5
    refuse(broken, path, "overflow in F16", outtype="f16")
    with pytest.raises(InputError, match=r"cannot write .*model\.gguf/model\.gguf: "):
        save_gguf(model_of(CONFIGS["llama"]), tiny(CHATML), path / "model.gguf", outtype="f32")
    with pytest.raises(InputError, match=r"the name of a GGUF file ends in \.gguf"):
        save_gguf(broken, tiny(CHATML), tmp_path / "model.bin")


# --- a real one -------------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_what_smollm2_was_taught_is_there_in_llama_cpp(tmp_path: Path) -> None:
    model, tokenizer = load("smollm2-135m-instruct", quantize="nf4")
    add_adapter(model, LoRAConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    rows = [{"prompt": "Which way to the north?", "completion": "Ask the old penguin."}]
    config = TrainConfig(max_steps=6, learning_rate=4e-3, batch_size=1, output_dir=str(tmp_path / "run"))
    train(model, tokenizer, rows, config)
    save_gguf(model, tokenizer, tmp_path / "model.gguf", outtype="q8_0")

    theirs = LlamaCpp(tmp_path / "model.gguf")
    question = [{"role": "user", "content": "Which way to the north?"}]
    answer = theirs.server.handle_chat_completions({"messages": question, "max_tokens": 16, "temperature": 0})
    said = answer["choices"][0]["message"]["content"]
    assert said == generate(model, tokenizer, question, max_new_tokens=16) == "Ask the old penguin."
    assert answer["choices"][0]["finish_reason"] == "stop"
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    assert theirs.prompt(question) == prompt
    assert theirs.tokens(prompt) == tokenizer.encode(prompt)
