"""docs/from_the_public_repositories.md names commands and keys that exist."""

import re
import shlex
from pathlib import Path

import pytest

from engine.config import load
from engine.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "from_the_public_repositories.md").read_text()
COMMANDS = re.findall(r"`python (\w+\.py [^`]*)`", PAGE)
KEYED = "network=|train\\.|data\\.|evaluate\\.|models="


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_taken(command):
    script, config, *overrides = shlex.split(command)
    assert (ROOT / script).is_file()
    load(ROOT / config, overrides)


def test_there_are_commands():
    assert len(COMMANDS) >= 4 and {shlex.split(one)[0] for one in COMMANDS} >= {
        "train_cnn_moe.py",
        "evaluate_cnn_moe.py",
    }


@pytest.mark.parametrize(
    "key",
    sorted(set(re.findall(r"`((?:train|data|evaluate)\.[a-z_.]+)`", PAGE)) - {"train.router"}),
)
def test_a_key_of_the_page_is_known(key):
    """Somewhere: of a segmentation network's config or of a classifier's."""
    known = []
    for name in ("configs/config_deeplab_highway.yaml", "configs/cnn_moe/resnet18_cifar10.yaml"):
        try:
            load(ROOT / name, [f"{key}=[]"])
            known.append(True)
        except UserError as error:
            known.append("unknown key" not in str(error) and "is no argument" not in str(error))
    assert any(known), key
