"""Merges that look at what they do: into NF4 again, and the report of what a merge changes.

Read report.py first. The plain merge is adapters/attach.py.
"""

from minilora.merging.into_nf4 import merge_to_lora, merge_to_nf4
from minilora.merging.report import MergeReport, merge_report

__all__ = [
    "MergeReport",
    "merge_report",
    "merge_to_lora",
    "merge_to_nf4",
]
