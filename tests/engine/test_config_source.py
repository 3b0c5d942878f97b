"""What YAML text means: scalars, sources, `_base_`, variables and overrides."""

import re

import pytest
from config_texts import EXPERT, MOE, refused, value_of
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import UserError, dump, load


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 0.0001),
        ("1E5", 100000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("010", 10),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("off", "off"),
        ("True", "True"),
        ("1:30", "1:30"),
        ("2024-01-31", "2024-01-31"),
        ("0x10", "0x10"),
        ("'0016E5'", "0016E5"),
        ("!!str 12", "12"),
        ("[1, [2, a], {b: c}]", [1, [2, "a"], {"b": "c"}]),
    ],
)
def test_bare_words(text, value):
    found = value_of(text)
    assert found == value
    assert type(found) is type(value)


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(1 - 10**18, 10**18 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8).filter(
        lambda text: "${" not in text
    )
    | st.sampled_from(
        ["1e-4", "0016E5", "yes", "null", "true", "8/255", "010", "", " a", "- a", "a: b", "#"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc_1", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(plain_values)
def test_dump_reads_back_as_the_same_value(value):
    for text in (dump(value), dump(value, flow=True)):
        assert repr(value_of(text)) == repr(value)
    assert "\n" not in dump(value, flow=True)


def test_what_is_nested_without_end_is_refused(write):
    (line,) = refused(write("name: " + 3000 * "["))
    assert line == "config.yaml: lists and mappings are nested too deeply"


def test_broken_yaml_names_the_line(write):
    assert refused(write("name: a\ntrain: [1, 2\nname: b\n"))[0].startswith("config.yaml:3: not YAML: ")
    assert refused(write("data: {root: ${A}}\n")) == [
        "config.yaml:1: not YAML: expected ',' or '}', but got '{'; "
        'inside {...} a "${VAR}" stands in quotes'
    ]
    assert refused(write("a: &a [*a]\n"))[0] == "config.yaml:1: an alias that contains itself"
    assert "python/name:os.system is not allowed" in refused(write("a: !!python/name:os.system x\n"))[0]


def test_duplicate_keys_are_told_with_both_lines(write):
    lines = refused(write(EXPERT + "  epochs: 4\nname: again\n"))
    assert lines == [
        "config.yaml:7: epochs: given twice, first at config.yaml:5",
        "config.yaml:8: name: given twice, first at config.yaml:1",
    ]


def test_files_that_are_no_config(write, tmp_path):
    write(EXPERT, "expert.yaml")
    (tmp_path / "image.yaml").write_bytes(b"\xff\xfe\x00")
    for name, words in {
        "expret.yaml": "No such file or directory; did you mean 'expert.yaml'?",
        ".": "Is a directory",
        "image.yaml": "not a text file in UTF-8",
        write("", "empty.yaml"): "expected a mapping of keys to values, found nothing",
        write("- a\n", "list.yaml"): "expected a mapping of keys to values, found a list",
        write("a: 1\n---\nb: 2\n", "two.yaml"): "not YAML",
    }.items():
        with pytest.raises(UserError, match=re.escape(words)):
            load(name)


def test_variables(write, monkeypatch):
    monkeypatch.setenv("HERE", "/disk")
    monkeypatch.setenv("EMPTY", "")
    text = EXPERT.replace("root: somewhere", 'root: "${HERE}/${EMPTY:-a}/${NOT_THERE:-b}"')
    assert load(write(text)).data.args["root"] == "/disk/a/b"
    assert refused(write(EXPERT.replace("somewhere", '"${NOT_THERE}/x"'))) == [
        "config.yaml:2: ${NOT_THERE}/x: the variable NOT_THERE is not set; set it, or write "
        "${NOT_THERE:-default}"
    ]


def test_variable_in_a_default_of_the_schema(write, monkeypatch):
    assert load(write(EXPERT)).data.cache_dir == ".cache"
    monkeypatch.setenv("MOE_CACHE", "/fast")
    assert load(write(EXPERT)).data.cache_dir == "/fast"


# _base_


def test_base_is_merged_deeply_and_lists_are_replaced(write):
    write(EXPERT, "base.yaml")
    write("_base_: base.yaml\ntrain: {epochs: 9}\ndata: {subsets: [urban, rain]}\n")
    config = load("config.yaml")
    assert (config.name, config.train.epochs, config.train.optimizer.args["lr"]) == ("expert", 9, 0.1)
    assert (config.data.subsets, config.data.image_size) == (["urban", "rain"], (48, 64))


def test_later_bases_win_and_paths_are_relative_to_the_file(write):
    write(EXPERT, "folder/expert.yaml")
    write("_base_: expert.yaml\ntrain: {epochs: 4, seed: 4}\n", "folder/four.yaml")
    write("_base_: [folder/expert.yaml, folder/four.yaml]\ntrain: {seed: 5}\n")
    config = load("config.yaml")
    assert (config.train.epochs, config.train.seed) == (4, 5)
    text = config.render_with_sources()
    assert re.search(r"epochs: 4 +# folder/four.yaml:2\n", text)
    assert re.search(r"seed: 5 +# config.yaml:2\n", text)
    assert re.search(r"name: expert +# folder/expert.yaml:1\n", text)


def test_another_component_drops_the_arguments_of_the_base(write):
    write(EXPERT, "base.yaml")
    write("_base_: base.yaml\nname: other\ntrain: {optimizer: {name: adamw, lr: 0.2}}\n")
    config = load("config.yaml")
    assert config.train.optimizer.name == "adamw"
    assert config.train.optimizer.args["lr"] == 0.2
    assert "momentum" not in config.train.optimizer.args
    assert config.network.args["backbone"] == "resnet18"  # the run's own name is no component's


def test_the_same_component_keeps_the_arguments_of_the_base(write):
    write(EXPERT, "base.yaml")
    write("_base_: base.yaml\ntrain: {optimizer: {name: sgd, lr: 0.2}}\n")
    assert load("config.yaml").train.optimizer.args["momentum"] == 0.5


def test_another_data_set_or_gate_keeps_what_is_not_its_own(write):
    write(MOE.replace("somewhere", "somewhere, num_classes: 11"), "base.yaml")
    write("_base_: base.yaml\ndata: {name: cityscapes, root: elsewhere}\ngate: {type: uniform}\n")
    config = load("config.yaml")
    assert (config.data.name, config.data.image_size, config.data.subsets) == (
        "cityscapes",
        (48, 64),
        ["highway", "urban"],
    )
    assert "num_classes" not in config.data.args
    assert (config.gate.name, config.gate.conv) == ("uniform", True)
    assert "width" not in config.gate.args


def test_experts_replace_those_of_the_base(write):
    write(MOE, "base.yaml")
    write("_base_: base.yaml\nexperts: {open: runs/open, street: runs/street}\n")
    assert load("config.yaml").experts == {"open": "runs/open", "street": "runs/street"}


def test_circle_of_bases(write):
    write("_base_: b.yaml\n", "a.yaml")
    write("_base_: ./a.yaml\n", "b.yaml")
    assert refused("a.yaml") == ["b.yaml: _base_: goes in a circle: a.yaml -> b.yaml -> a.yaml"]
    write("_base_: nowhere.yaml\n", "c.yaml")
    with pytest.raises(UserError, match=r"c.yaml: _base_: nowhere.yaml: No such file"):
        load("c.yaml")


# Overrides


def test_overrides(write):
    config = load(
        write(EXPERT),
        [
            "train.epochs=7",
            "train.optimizer.lr=1/4",
            "data.subsets=[a, b]",
            "evaluate.attacks=[{name: clean}]",
            "train.ema=0.9",
            "train.ema=null",
        ],
    )
    assert (config.train.epochs, config.train.optimizer.args["lr"]) == (7, 0.25)
    assert (config.data.subsets, config.train.ema) == (["a", "b"], None)
    assert re.search(r"epochs: 7 +# command line\n", config.render_with_sources())


def test_override_with_another_component_in_any_order(write):
    for overrides in (
        ["gate.type=classwise", "gate.hidden=32"],
        ["gate.hidden=32", "gate.type=classwise"],
    ):
        gate = load(write(MOE), overrides).gate
        assert (gate.name, gate.args["hidden"], gate.args["width"], gate.conv) == ("classwise", 32, 16, True)


def test_override_with_a_mapping_replaces(write):
    config = load(
        write(MOE), {"experts": {"one": "runs/one"}, "gate": {"type": "uniform"}}, origin="stages.x.set"
    )
    assert config.experts == {"one": "runs/one"}
    assert config.gate.conv is False
    assert "# stages.x.set" in config.render_with_sources()


def test_override_fills_a_section_that_is_null(write):
    assert load(write(EXPERT), ["train=null", "train.epochs=8"]).train.epochs == 8


def test_override_of_a_list_entry(write):
    assert load(write(EXPERT), ["evaluate.attacks=[{name: clea}]", "evaluate.attacks.0.name=clean"])
    assert refused(write(EXPERT), "data.subsets.3=a") == [
        "command line: data.subsets.3: data.subsets (config.yaml:2) has no entry '3' to set"
    ]


def test_wrong_overrides_are_told_together(write):
    assert refused(
        write(EXPERT), "train", "=1", "train.epochs.x=1", "train.ema=[1", "name=${NOPE}", "trian.seed=1"
    ) == [
        "command line: train: expected KEY=VALUE such as train.epochs=3",
        "command line: =1: expected KEY=VALUE such as train.epochs=3",
        "command line: train.epochs.x: train.epochs (config.yaml:5) has no entry 'x' to set",
        "command line: train.ema: not YAML: expected ',' or ']', but got '<stream end>'",
        "command line: name: ${NOPE}: the variable NOPE is not set; set it, or write ${NOPE:-default}",
        "command line: trian: unknown key; allowed: name, output, data, network, experts, gate, gates, ensemble, "
        "shared_encoder, cache, train, evaluate; did you mean 'train'?",
    ]
