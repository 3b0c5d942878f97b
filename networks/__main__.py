"""python -m networks: what the tables hold, with the keys that a YAML may give. Imports no heavy library."""

from engine.config import listing
from networks import ENSEMBLES, GATES, NETWORKS


def main() -> None:
    for title, key, table in (
        ("Networks", "network.name", NETWORKS),
        ("Gates", "gate.type", GATES),
        ("Ensembles", "ensemble.type", ENSEMBLES),
    ):
        print(f"{title} ({key})", *listing(table), "", sep="\n")


if __name__ == "__main__":
    main()
