"""Evaluate an FRRN run, or any number of them together: python evaluate_frrn.py CONFIG [a.b=c ...]"""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "evaluate", family="frrn"))
