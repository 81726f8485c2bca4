"""minilora beside its peers, in one run: `python -m benchmarks` lists what there is."""
