"""`python -m minilora`: the `minilora` command."""

import os
import sys

from minilora_start import main, wait_briefly

if __name__ == "__main__":
    if wait_briefly():  # too late for this process, in which the package, and so PyTorch, is imported
        os.execv(sys.executable, sys.orig_argv)
    main()
