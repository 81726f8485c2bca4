"""What initialisations and merges that look at data share.

Read batches.py first: what a batch is, and the function that calls the model on one. input_moments.py and
incremental_pca.py are statistics of what layers see.
"""

from minilora.variants.calibration.batches import (
    Forward,
    as_list,
    as_mapping,
    attended_tokens,
    looking_at_inputs,
    loras_to_start,
)
from minilora.variants.calibration.incremental_pca import IncrementalPCA
from minilora.variants.calibration.input_moments import input_moments

__all__ = [
    "Forward",
    "IncrementalPCA",
    "as_list",
    "as_mapping",
    "attended_tokens",
    "input_moments",
    "looking_at_inputs",
    "loras_to_start",
]
