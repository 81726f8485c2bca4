"""snapshot: a model's files from the Hugging Face Hub, or from its local cache."""

from pathlib import Path

from minilora.errors import InputError

# Weights, configuration and tokenizer; no pickles, no other frameworks' weights, no code.
PATTERNS = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
]


def snapshot(repo_id: str, files: list[str] | None = None) -> Path:
    """Folder of the model's newest revision in the Hub's cache, downloaded if it is not there yet: all, or `files`.

    With HF_HUB_OFFLINE=1 only the cache is looked at. Raises InputError if there is no such model, if it is gated,
    or if the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=files or PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{repo_id} is not a folder here, and the Hugging Face Hub does not give it: {reason}"
        ) from error
