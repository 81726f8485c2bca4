"""minilora beside its peers, in one run: `python -m benchmarks` lists what there is."""

from minilora_start import wait_briefly

wait_briefly()  # before PyTorch is imported; the contenders' processes inherit it
