"""Train an FRRN expert, baseline or gate: python train_frrn.py CONFIG [a.b=c ...]"""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "train", family="frrn"))
