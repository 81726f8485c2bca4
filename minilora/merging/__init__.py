"""What a merge changes, layer by layer and format by format; and merges into 4 bits that keep the adapter.

Read report.py first, then into_nf4.py (merge_to_nf4, merge_to_lora). The plain merge is adapters/merge.py.
"""

from minilora.merging.into_nf4 import merge_to_lora, merge_to_nf4
from minilora.merging.report import MergeReport, merge_report

__all__ = [
    "MergeReport",
    "merge_report",
    "merge_to_lora",
    "merge_to_nf4",
]
