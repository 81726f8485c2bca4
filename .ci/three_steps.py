"""Three training steps of a tiny model, by the installed wheel alone."""

import minilora.kernels
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

import minilora as ml
from minilora.models import ModelConfig, Transformer
from minilora.text import Tokenizer

for package in (ml, minilora.kernels):
    assert "site-packages" in str(package.__file__), package.__file__

words = ["<unk>", "<eos>", "the", "light", "is", "red", "green", "stop", "go"]
backend = Backend(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = Tokenizer(backend, {"eos_token": "<eos>"})

shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
config = ModelConfig.from_hf({"model_type": "llama", "vocab_size": len(words), "rms_norm_eps": 1e-5, **shape})
model = Transformer(config)
for block in model.model.layers:
    block.mlp.up_proj = ml.NF4Linear.from_linear(block.mlp.up_proj)
ml.add_adapter(model, ml.LoRAConfig(r=4, target_modules="all-linear"))
rows = [{"text": "the light is red stop"}, {"text": "the light is green go"}]
result = ml.train(model, tokenizer, rows, ml.TrainConfig(max_steps=3, output_dir="three-steps"))
assert result.steps == 3 and torch.tensor(result.loss).isfinite()
