"""Which models compute packed sequences as they compute each one alone, and faster than padded ones.

minilora's own Transformer is told their lengths. A transformers model finds them by itself, where positions start again
and neither a mask nor a cache is given. FlashAttention, flex attention, and "sdpa" inside `attention_row_by_row` then
skip what is not in a query's sequence. Other kinds of attention compute the scores of all pairs of tokens and mask most
of them (on a CPU, with 8 sequences of some 150 tokens, a step then took 1.5 times that of padded ones, with 4 of 512
three times).
"""

import inspect

import torch
from torch import nn

from minilora.models.rotary import row_positions
from minilora.models.transformer import Transformer
from minilora.models.transformers_attention import attention_row_by_row
from minilora.torch_helpers import in_mode

SKIPS_OTHER_ROWS = ("flash", "flex")  # kinds of attention, as part of transformers' names for them
PROBED = 4  # tokens a sequence


def can_pack(model: nn.Module) -> bool:
    """Whether sequences are to be packed for this model: it keeps them apart, and does no work between them."""
    if isinstance(model, Transformer):
        return True
    attention = str(getattr(getattr(model, "config", None), "_attn_implementation", None))
    if any(kind in attention for kind in SKIPS_OTHER_ROWS):
        return keeps_rows_apart(model)
    if attention != "sdpa":
        return False
    with attention_row_by_row() as calls:
        return keeps_rows_apart(model) and calls.row_by_row > 0 and calls.all_pairs == 0


def keeps_rows_apart(model: nn.Module) -> bool:
    """Whether in a transformers model the gradient between two packed sequences is zero, exactly.

    It is not in models with recurrence or convolutions, nor in those that take no positions or ignore them. Nothing is
    known of a model that cannot be called with embeddings alone.
    """
    takes = inspect.signature(model.forward).parameters
    if not {"inputs_embeds", "position_ids", "use_cache"} <= takes.keys():
        return False
    device = next(model.parameters()).device
    with in_mode(model, training=False), torch.enable_grad():
        embed = model.get_input_embeddings()  # type: ignore[operator] # of the transformers library
        x = embed(torch.arange(2 * PROBED, device=device)[None]).detach().requires_grad_()
        positions = row_positions((PROBED, PROBED)).to(device)
        try:
            logits = model(inputs_embeds=x.clone(), position_ids=positions, use_cache=False).logits
        except Exception:
            return False
        (gradient,) = torch.autograd.grad(logits[:, PROBED:].float().square().sum(), x)
    return not gradient[:, :PROBED].any()
