"""Which layers are adapted where target_modules names none: by the type of the model, as in PEFT.

A line is a set of layers, and the model types (config.model_type) that have them. What PEFT's table lacks, such as
Whisper, ViT, CLIP and Mamba, follows the same choice: queries and values; of Mamba the projections that are called.
"""

LAYERS = {
    "q_proj v_proj": "llama llama4 mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text stablelm"
    " opt gptj gpt_neo bart mbart m2m_100 marian pegasus whisper wav2vec2 wavlm hubert vit deit clip siglip smollm3"
    " olmo olmo2 cohere",
    "q v": "t5 mt5 umt5 longt5",
    "q_proj v_proj fc1 fc2": "phi",
    "qkv_proj": "phi3 codegen",
    "c_attn": "gpt2 gpt_bigcode",
    "query_key_value": "gpt_neox bloom falcon chatglm",
    "query value": "bert roberta xlm-roberta electra layoutlm",
    "query_proj value_proj": "deberta-v2",
    "q_lin v_lin": "distilbert",
    "Wqkv": "mpt",
    "in_proj x_proj": "mamba",
}
DEFAULT_TARGETS = {kind: layers.split() for layers, kinds in LAYERS.items() for kind in kinds.split()}
