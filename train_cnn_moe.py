"""Train a classifier: dense, slim, or a mixture of pathways. python train_cnn_moe.py CONFIG [a.b=c ...]"""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "train_cnn_moe"))
