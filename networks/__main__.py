"""python -m networks: what the tables hold, with the keys that a YAML may give. Imports no heavy library."""

import json
import re
from textwrap import wrap

from engine.config import signature_of
from networks import ENSEMBLES, GATES, NETWORKS


def main() -> None:
    for title, key, table in (
        ("Networks", "network.name", NETWORKS),
        ("Gates", "gate.type", GATES),
        ("Ensembles", "ensemble.type", ENSEMBLES),
    ):
        print(f"{title} ({key})")
        for name, spec in table.items():
            print("\n".join(entry(name, spec)))
        print()


def entry(name: str, spec: str) -> list[str]:
    """Name and first sentence, then a line for each key: default and description."""
    signature = signature_of(spec)
    lines = [f"  {name:<16} {signature.docstring.splitlines()[0]}"]
    for key in signature.types:
        default = f" = {json.dumps(signature.defaults[key])}" if key in signature.defaults else ""
        text = description(signature.docstring, key)
        lines += wrap(text, 110, initial_indent=f"      {key + default:<26} ", subsequent_indent=" " * 33)
    return lines


def description(docstring: str, key: str) -> str:
    """What the docstring's Args say about a key, in one line."""
    found = re.search(rf"^ *{key}: (.*(?:\n {{8}}.*)*)", docstring, re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


if __name__ == "__main__":
    main()
