"""Evaluate classifiers, clean and under attacks that know the router. python evaluate_cnn_moe.py CONFIG [a.b=c ...]"""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "evaluate_cnn_moe"))
