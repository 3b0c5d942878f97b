"""python -m attacks: what the table holds, with the keys that a YAML may give. Imports no heavy library."""

from attacks import ATTACKS
from engine.config import listing


def main() -> None:
    print("Attacks (evaluate.attacks, name)", *listing(ATTACKS), sep="\n")


if __name__ == "__main__":
    main()
