"""The `minilora` command: recipes, the demo, and reports for people.

Read cli.py first, then demo.py, which scores with bfcl.py. recipe.py reads recipes, report.py makes tables and pages,
kernel_table.py shows what kernels have won.
"""

from minilora.app.cli import main

__all__ = [
    "main",
]
