"""LoRA and QLoRA from scratch."""
