"""The `minilora` command: recipes, the demo, and reports for people.

Read cli.py first, then demo.py.
"""

from minilora.app.cli import main

__all__ = [
    "main",
]
