"""Small configs of every kind, and what loading them gives or tells."""

import pytest

from engine.config import ConfigError, load
from engine.yaml_source import parse, to_plain

EXPERT = """\
name: expert
data: {name: a2d2, root: somewhere, image_size: [48, 64], subsets: [highway]}
network: {name: deeplabv3plus, backbone: resnet18}
train:
  epochs: 3
  optimizer: {name: sgd, lr: 0.1, momentum: 0.5}
"""
MOE = """\
name: moe
data: {name: a2d2, root: somewhere, image_size: [48, 64], subsets: [highway, urban]}
experts: {highway: runs/highway, urban: runs/urban}
gate: {type: simple, width: 4, conv: true}
train: {epochs: 2}
"""
SHARED_ENCODER = """\
name: shared
data: {name: a2d2, root: somewhere, image_size: [48, 64], subsets: [highway, urban]}
network: {name: deeplabv3plus, backbone: resnet18}
gate: {type: simple, conv: true}
shared_encoder: {training: separate}
train: {epochs: 2}
"""
EVALUATION = """\
name: all_rows
data: {name: a2d2, root: somewhere, image_size: [48, 64], subsets: [highway, urban]}
baselines: {baseline: runs/baseline}
experts: {highway: runs/highway, urban: runs/urban}
gates: {moe: runs/moe}
ensembles: [mean, vote]
"""
PIPELINE = """\
name: all_stages
stages:
  highway: {config: expert.yaml}
  urban: {config: expert.yaml, set: {data.subsets: [urban], train.ema: 0.9}}
  moe: {config: moe.yaml, set: {experts: {highway: "@highway", urban: "@urban"}}}
"""


def refused(path: str, *overrides: str, **values) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(path, overrides or values)
    return error.value.lines


def value_of(text: str):
    problems = []
    value, _ = to_plain(parse(text, "text", problems))
    assert problems == []
    return value
