"""Which models read rows that are laid end to end as they read each row alone, and faster than padded ones.

minilora's own Transformer is told the rows' lengths. A transformers model finds them by itself, where positions start
again, no mask is given and no cache. FlashAttention and flex attention then skip what is not in a query's row, and so
does what is called "sdpa" inside `attention_row_by_row`. Other kinds of attention compute the scores of all pairs of
tokens and mask most of them (on a CPU, with 8 rows of some 150 tokens, a step then took 1.5 times that of padded rows,
with 4 rows of 512 three times).
"""

import inspect

import torch
from torch import nn

from minilora.models.transformer import Transformer, row_positions
from minilora.models.transformers_attention import attention_row_by_row
from minilora.torch_helpers import in_mode

__all__ = ["can_pack", "keeps_rows_apart"]

SKIPS_OTHER_ROWS = ("flash", "flex")  # kinds of attention, as part of transformers' names for them
PROBED = 4  # tokens a row


def can_pack(model: nn.Module) -> bool:
    """Whether rows of the model are to be laid end to end: it keeps them apart, and does no work between them."""
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
    """Whether a transformers model shows no trace of one row in the next: a gradient that is zero, exactly.

    Models with recurrence or convolutions do not, nor do those that take no positions or do not look at them, and
    nothing is known of one that cannot be called with embeddings alone.
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
