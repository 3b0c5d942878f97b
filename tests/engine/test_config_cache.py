"""The cache section of a config: sizes in words, contents, and what it stands beside."""

import pytest
from config_texts import EXPERT, MOE, refused

from engine.config import from_dict, load
from engine.values import byte_count

CACHE = {"budget": "40GB"}


def test_there_is_none_unless_asked_for(write):
    assert load(write(MOE)).cache == load(write(MOE), {"cache": "none"}).cache == "none"


def test_a_cache_with_its_defaults_and_resolved(write):
    config = load(write(MOE), {"cache": CACHE})
    assert config.cache.bytes == 40 * 10**9 and config.cache.content == "auto"
    assert config.resolved()["cache"] == {"budget": "40GB", "content": "auto"}
    assert from_dict(config.resolved()) == config
    assert load(write(MOE), ["cache.budget=500MB", "cache.content=top_k"]).cache.bytes == 5 * 10**8


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1KB", 1000), ("2.5 MB", 2_500_000), ("500mb", 5 * 10**8), ("0.1TB", 10**11), ("3.3GB", 3_300_000_000)],
)
def test_sizes_are_powers_of_a_thousand(text, expected):
    assert byte_count(text) == expected


@pytest.mark.parametrize(
    ("cache", "line"),
    [
        *(
            ({"budget": value}, f"cache.budget: {shown} is wrong; expected a size such as 40GB or 500MB")
            for value, shown in [
                (40, "40"),
                ("40", '"40"'),
                ("0GB", '"0GB"'),
                ("-1GB", '"-1GB"'),
                ("4 gigs", '"4 gigs"'),
                ("1GBs", '"1GBs"'),
            ]
        ),
        (
            {"content": "float32"},
            "cache.budget: missing; most that the outputs on train and val may take, such as 40GB or 500MB",
        ),
        (
            {**CACHE, "content": "flaot32"},
            'cache.content: "flaot32" is unknown; allowed: auto, float32, bfloat16, top_k, label_probs; '
            "did you mean 'float32'?",
        ),
        ({**CACHE, "size": 1}, "cache.size: unknown key; allowed: budget, content"),
        ("auto", 'cache: "auto" is wrong; expected none, or a mapping of budget, content'),
    ],
)
def test_mistakes(write, cache, line):
    (found,) = refused(write(MOE), cache=cache)
    assert found.split(": ", 1)[1] == line


@pytest.mark.parametrize(
    ("text", "changes"),
    [(EXPERT, {}), (MOE, {"experts": {}}), (MOE, {"gate": None, "ensemble": {"type": "mean"}})],
)
def test_only_gates_over_experts_have_one(write, text, changes):
    found = [line.split(": ", 1)[1] for line in refused(write(text), **changes, cache=CACHE)]
    assert "cache: needs experts and a gate to train: it keeps what frozen experts say" in found
    load(write(EXPERT), {"cache": "none"})
