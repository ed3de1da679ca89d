r"""Compare draft trees, policies and other libraries with plain decoding, for figures that are published.

    python training/benchmark.py TARGET HEAD --dataset prompts.jsonl --dtype bfloat16 --pack --output results/mine

It does what `resps bench` does, and more: the fixed tree that is fastest on other prompts, the oracle, other libraries
(--peers), plots, and hashes of code and weights. The same command goes on where it was stopped.

Exit status: 0; 1 when an answer differs from the plain one and rounding does not explain it; 2 when nothing could be
measured; 130 after Ctrl-C.
"""

from runs.announcement import announce


if __name__ == "__main__":
    announce(__doc__)

import sys

from benchmarking.command import main


if __name__ == "__main__":
    sys.exit(main(None, __doc__))
