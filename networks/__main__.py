"""python -m networks: what the tables hold, with the keys that a YAML may give. Imports no heavy library."""

from engine.config import listing
from networks import CLASSIFIERS, ENSEMBLES, GATES, NETWORKS
from networks.cnn_moe import ARCHITECTURES


def main() -> None:
    for title, key, table in (
        ("Networks", "network.name", NETWORKS),
        ("Gates", "gate.type", GATES),
        ("Ensembles", "ensemble.type", ENSEMBLES),
        ("Classifiers", "network.name", CLASSIFIERS),
    ):
        print(f"{title} ({key})", *listing(table), "", sep="\n")
    print("Architectures of classifiers (network.arch)", *(f"  {name}" for name in ARCHITECTURES), sep="\n")


if __name__ == "__main__":
    main()
