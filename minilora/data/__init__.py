"""Rows of other people's data, made into token ids with labels, and into batches.

Read rows.py first (the formats), then messages.py (a conversation in one form), examples.py (token ids and labels) and
batches.py; answers.py finds the assistant's words in a rendered conversation, by the places of its pieces (pieces.py).
Where rows come from: files.py and tables.py; which are taken: mixture.py.
"""

from minilora.data.batches import Batch, PackedBatch, batches, collate, pack
from minilora.data.examples import IGNORE, Example, encode_rows, show_example
from minilora.data.files import SUFFIXES
from minilora.data.mixture import mix_rows, split_rows
from minilora.data.rows import Row, Rows, Skipped, as_rows, given_rows, load_rows, quoted

__all__ = [
    "Batch",
    "Example",
    "IGNORE",
    "PackedBatch",
    "Row",
    "Rows",
    "SUFFIXES",
    "Skipped",
    "as_rows",
    "batches",
    "collate",
    "encode_rows",
    "given_rows",
    "load_rows",
    "mix_rows",
    "pack",
    "quoted",
    "show_example",
    "split_rows",
]
