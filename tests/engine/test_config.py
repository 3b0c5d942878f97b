"""What a YAML means, what is refused and how it is told, without data and without any network."""

import re
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import networks
from engine.config import (
    KINDS,
    RULES,
    ConfigError,
    Data,
    Gate,
    Section,
    Train,
    UserError,
    component,
    dump,
    from_dict,
    load,
    signature_of,
    table_of,
)
from engine.yaml_source import parse, to_plain

TABLES = (
    "networks:NETWORKS",
    "networks:GATES",
    "networks:ENSEMBLES",
    "attacks:ATTACKS",
    "dataloaders:DATASETS",
    "engine:LOSSES",
    "engine:OPTIMIZERS",
    "engine:SCHEDULES",
)

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
  urban: {config: expert.yaml, set: {data.subsets: [urban], name: urban}}
  moe: {config: moe.yaml, set: {experts: {highway: "@highway", urban: "@urban"}}}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a YAML into an empty working folder and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "config.yaml") -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return name

    return write


def refused(path: str, *overrides: str, **values) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(path, overrides or values)
    return error.value.lines


def value_of(text: str):
    problems = []
    value, _ = to_plain(parse(text, "text", problems))
    assert problems == []
    return value


# YAML


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
    | st.integers()
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
        "command line: trian: unknown key; allowed: name, output, data, network, experts, gate, ensemble, "
        "train, evaluate; did you mean 'train'?",
    ]


# What is told


def test_every_mistake_at_once_with_line_value_and_suggestion(write):
    lines = refused(
        write(
            "name: moe\n"
            "data: {name: a2d2, root: x, image_size: [48, 64], subsets: [highway], num_clases: 38}\n"
            "experts: {highway: runs/highway, urban: runs/urban}\n"
            "gate: {type: classwize}\n"
            "train:\n"
            "  epoch: 50\n"
            "  optimizer: {name: sgd, lr: fast}\n"
            "evalute: {split: test}\n"
        )
    )
    data_keys = ["name", *signature_of("dataloaders.a2d2:a2d2").types, *Data.fixed_keys()]
    assert lines == [
        f"config.yaml:2: data.num_clases: unknown key of a2d2; allowed: {', '.join(data_keys)}; "
        "did you mean 'num_classes'?",
        f'config.yaml:4: gate.type: "classwize" is unknown; allowed: {", ".join(networks.GATES)}; '
        "did you mean 'classwise'?",
        f"config.yaml:6: train.epoch: unknown key; allowed: {', '.join(Train.fixed_keys())}; "
        "did you mean 'epochs'?",
        'config.yaml:7: train.optimizer.lr: "fast" is wrong; expected a number above 0',
        "config.yaml:8: evalute: unknown key; allowed: name, output, data, network, experts, gate, ensemble, "
        "train, evaluate; did you mean 'evaluate'?",
    ]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("train.epochs=0", "train.epochs: 0 is wrong; expected a whole number above 0"),
        ("train.epochs=1.5", "train.epochs: 1.5 is wrong; expected a whole number above 0"),
        ("train.epochs=true", "train.epochs: true is wrong; expected a whole number above 0"),
        ("train.epochs=null", "train.epochs: null is wrong; expected a whole number above 0"),
        ("train.seed=1e3", "train.seed: 1000.0 is wrong; expected a whole number"),
        ("train.compile=1", "train.compile: 1 is wrong; expected true or false"),
        ("train.compile=yes", 'train.compile: "yes" is wrong; expected true or false'),
        ("train.clip_norm=0", "train.clip_norm: 0 is wrong; expected a number above 0"),
        ("train.clip_norm=true", "train.clip_norm: true is wrong; expected a number above 0"),
        ("train.clip_norm=1/0", 'train.clip_norm: "1/0" is wrong; expected a number above 0'),
        ("train.ema=1.1", "train.ema: 1.1 is wrong; expected a number from 0 to 1"),
        ("train.optimizer.lr=1e999", "train.optimizer.lr: Infinity is wrong; expected a number above 0"),
        (
            "train.precision=fp16",
            "train.precision: \"fp16\" is unknown; allowed: fp32, bf16; did you mean 'bf16'?",
        ),
        ("train.optimizer=sgd", 'train.optimizer: "sgd" is wrong; expected a mapping such as {name: sgd}'),
        (
            "train.optimizer={nam: sgd}",
            "train.optimizer.nam: unknown key; allowed: name; did you mean 'name'?",
        ),
        (
            "train.optimizer={type: sgd}",
            "train.optimizer.type: unknown key; allowed: name; did you mean 'name'?",
        ),
        ("train.optimizer={}", "train.optimizer.name: missing; allowed: sgd, adamw"),
        ("data.workers=-1", "data.workers: -1 is wrong; expected a whole number, 0 or more"),
        (
            "data.image_size=[48]",
            "data.image_size: [48] is wrong; expected [height, width], two whole numbers above 0",
        ),
        (
            "data.image_size=48",
            "data.image_size: 48 is wrong; expected [height, width], two whole numbers above 0",
        ),
        (
            "data.image_size=[0, 9]",
            "data.image_size: [0, 9] is wrong; expected [height, width], two whole numbers above 0",
        ),
        ("data.subsets=[]", "data.subsets: [] is wrong; expected at least one entry, each only once"),
        (
            "data.subsets=[a, a]",
            'data.subsets: ["a", "a"] is wrong; expected at least one entry, each only once',
        ),
        ("data.subsets=highway", 'data.subsets: "highway" is wrong; expected a list such as [a, b]'),
        (
            "data.subsets=[0016E5]",
            "data.subsets.0: 1600000.0 is wrong; expected text (a number or true in quotes)",
        ),
        (
            "data.augment=some",
            'data.augment: "some" is wrong; expected none, or a mapping of scale, flip, color, blur',
        ),
        ("data.augment.flip=2", "data.augment.flip: 2 is wrong; expected a number from 0 to 1"),
        (
            "data.augment.scale=[2, 1]",
            "data.augment.scale: [2.0, 1.0] is wrong; expected the smallest zoom first",
        ),
        ("data.num_classes=12", "data.num_classes: 12 is unknown; allowed: 11, 38, 55; did you mean '11'?"),
        ("data.component=1", None),
        ("name=../x", 'name: "../x" is wrong; expected a name of letters, digits and _ - . /'),
        (
            "evaluate.attacks=[clean]",
            'evaluate.attacks.0: "clean" is wrong; expected a mapping such as {name: clean}',
        ),
        ("evaluate.subsets=[]", "evaluate.subsets: [] is wrong; expected at least one entry, each only once"),
    ],
)
def test_refused_values(write, change, line):
    found = refused(write(EXPERT), change)
    assert len(found) == 1
    assert line is None or found == [f"command line: {line}"]


def test_names_of_experts(write):
    assert 'experts.c d: "c d" is wrong; expected a name' in refused(write(EXPERT), "experts={c d: x}")[0]


def test_missing_keys_name_their_section(write):
    lines = refused(write("network: {backbone: resnet18}\ndata:\n  name: a2d2\n"))
    assert lines == [
        "config.yaml:1: name: missing; name of the run; its folder is OUTPUT/NAME",
        "config.yaml:1: network.name: missing; allowed: deeplabv3plus",
        "config.yaml:2: data.root: missing; a2d2 needs it",
        "config.yaml:2: data.image_size: missing; [height, width] of the network's input in pixels",
        "config.yaml:2: data.subsets: missing; subsets to train on, such as [highway, urban], or [all]",
    ]


def test_augmentation_can_be_switched_off(write):
    assert load(write(EXPERT), ["data.augment=none"]).data.augment == "none"
    assert load(write(EXPERT)).data.augment.scale == (0.5, 2.0)


@pytest.mark.parametrize(
    ("text", "changes", "line"),
    [
        (MOE, {"ensemble": {"type": "mean"}}, "ensemble: stands beside gate; a run has one of the two"),
        (MOE, {"experts": {}}, "gate: needs experts: {name: run folder, ...}, the networks to join"),
        (MOE, {"experts": {"a": "b"}}, "experts: gate needs at least 2 of them, found 1"),
        (MOE, {"gate": None}, "experts: need gate (to be trained) or ensemble (fixed) to join them"),
        (EXPERT, {"network": None}, "a run needs network, or experts and gate, or experts and ensemble"),
        (
            EXPERT,
            {"gate": {"type": "simple"}},
            "gate: needs experts: {name: run folder, ...}, the networks to join",
        ),
        (
            MOE,
            {"gate": None, "ensemble": {"type": "max"}, "experts": {"a": "b"}},
            "experts: ensemble needs at least 2 of them, found 1",
        ),
        (EVALUATION, {"experts": {"a": "b"}}, "ensembles: need at least 2 experts to join"),
        (
            EVALUATION,
            {"gates": {"baseline": "runs/x"}},
            "gates.baseline: is a row of baselines already; rows need their own names",
        ),
        (EVALUATION, {"ensembles": ["maen"]}, None),
        (
            EVALUATION,
            {"gates": {}, "experts": {}, "baselines": {}, "ensembles": []},
            "nothing to evaluate: name runs under baselines, experts or gates",
        ),
    ],
)
def test_checks_between_keys(write, text, changes, line):
    (found,) = refused(write(text), **changes)
    assert line is None or found.split(": ", 1)[1] == line


def test_runs_that_fit_together(write):
    assert (
        load(write(MOE), {"gate": {"type": "uniform"}, "experts": {"only": "runs/x"}}).gate.name == "uniform"
    )
    assert load(write(MOE), {"gate": None, "ensemble": {"type": "max"}}).ensemble.name == "max"
    assert load(write(MOE), {"train": None}).train is None


def test_a_misspelt_section_does_not_bring_further_mistakes(write):
    assert len(refused(write(MOE.replace("experts:", "expert:")))) == 1
    assert len(refused(write(EXPERT.replace("network:", "netwrok:")))) == 1
    assert len(refused(write(EXPERT.replace("subsets:", "subset:")))) == 1


KEYS = ["name", "type", "data", "experts", "gate", "ensemble", "ensembles", "gates", "baselines", "stages", "set"]
KEYS += ["train", "optimizer", "lr", "augment", "scale", "subsets", "image_size", "evaluate", "attacks", "config"]
garbage = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.sampled_from(["", "a", "sgd", "@a", "uniform"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS) | st.just("x"), inner, max_size=4)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([EXPERT, MOE, EVALUATION, PIPELINE]),
    st.lists(st.sampled_from(KEYS), min_size=1, max_size=3),
    garbage,
)
def test_nothing_that_is_written_is_a_bug_of_ours(text, path, value):
    """Any value at any place either loads or is refused in our words."""
    mapping = value_of(text)
    below = mapping
    for key in path[:-1]:
        below[key] = below[key] if isinstance(below.get(key), dict) else {}
        below = below[key]
    below[path[-1]] = value
    try:
        config = from_dict(mapping)
    except ConfigError as error:
        assert all(line.startswith("stored config: ") and len(line) < 600 for line in error.lines)
    else:
        assert from_dict(config.resolved()) == config


def test_kind_is_told_by_the_keys(write):
    write(EXPERT, "expert.yaml")
    write(MOE, "moe.yaml")
    kinds = {
        name: type(load(write(text)))
        for name, text in zip("rrep", (EXPERT, MOE, EVALUATION, PIPELINE), strict=True)
    }
    assert kinds == {"r": KINDS["run"], "e": KINDS["evaluation"], "p": KINDS["pipeline"]}


# Pipelines


def test_stage_files_are_relative_to_the_pipeline(write):
    write(PIPELINE, "folder/pipeline.yaml")
    write("_base_: folder/pipeline.yaml\nstages: {moe: {config: own.yaml}}\n", "derived.yaml")
    config = load("derived.yaml", ["stages.urban.config=here.yaml"])
    assert [stage.config for stage in config.stages.values()] == [
        "folder/expert.yaml",
        "here.yaml",
        "own.yaml",
    ]
    assert config.stages["moe"].set == {"experts": {"highway": "@highway", "urban": "@urban"}}
    assert (
        load("derived.yaml", ["stages.urban.config=b.yaml"], origin="a/x").stages["urban"].config == "b.yaml"
    )


def test_dotted_keys_of_a_stage_are_overridden_as_such(write):
    overrides = [
        "stages.urban.set.train.epochs=1",
        "stages.urban.set.data.subsets=[all]",
        "set.data.workers=0",
    ]
    config = load(write(PIPELINE), overrides)
    assert config.stages["urban"].set == {"data.subsets": ["all"], "name": "urban", "train.epochs": 1}
    assert config.set == {"data.workers": 0}


def test_a_stage_may_use_earlier_stages_only(write):
    assert refused(write(PIPELINE), **{"stages.highway.set": {"name": ["x", "@urban"]}}) == [
        "command line: stages.highway.set.name: no stage @urban; allowed: the stages before it (none)"
    ]
    lines = refused(
        write(PIPELINE.replace("@urban", "@urbann").replace("  highway: {config: expert.yaml}\n", ""))
    )
    assert lines == [
        "config.yaml:4: stages.moe.set.experts: no stage @highway; allowed: the stages before it (urban)",
        "config.yaml:4: stages.moe.set.experts: no stage @urbann; allowed: the stages before it (urban); "
        "did you mean 'urban'?",
    ]


# Resolved


@pytest.mark.parametrize("text", [EXPERT, MOE, EVALUATION, PIPELINE])
def test_resolved_and_rendered_configs_are_the_same_config(write, text):
    config = load(write(text))
    resolved = config.resolved()
    assert from_dict(resolved) == config
    assert from_dict(value_of(dump(resolved))).resolved() == resolved
    rendered = config.render_with_sources()
    assert value_of(rendered) == resolved
    assert all(" # " in line for line in rendered.splitlines() if not line.endswith(":"))


def test_resolved_holds_defaults_and_numbers(write):
    resolved = load(write(EXPERT), ["train.optimizer.lr=8/255"]).resolved()
    assert resolved["train"]["optimizer"]["lr"] == 8 / 255
    assert resolved["train"]["schedule"]["name"] == "poly"
    assert resolved["data"]["image_size"] == [48, 64]
    assert resolved["evaluate"]["attacks"] == [{"name": "clean"}]


def test_configs_with_other_values_differ(write):
    path = write(EXPERT)
    assert load(path) == load(path, ["train.epochs=3"])
    assert load(path) != load(path, ["train.epochs=4"])


def test_stored_config_with_a_mistake_names_its_origin(write):
    stored = {**load(write(EXPERT)).resolved(), "nmae": "x"}
    with pytest.raises(ConfigError, match=r"^best.safetensors: nmae: unknown key; .* did you mean 'name'\?$"):
        from_dict(stored, origin="best.safetensors")


# Components

TOY = '''
"""A module that can't be imported."""
from engine.config import Probability, Size

if __name__ != "toy_is_importable":
    raise RuntimeError("imported")
'''
TOY_CLASS = '''
class Base:
    """shared: told here."""

    def __init__(self, num_classes, *, shared: int = 1, rate: "Probability" = 0.5):
        self.num_classes, self.shared, self.rate = num_classes, shared, rate


class Toy(Base):
    """rate: of something."""


def place(*, folder: str = "${TOY_FOLDER:-here}"): ...


def build(first, second=3, *, size: Size, pair: tuple[int, float] | None = None, names: list[str] = ("a",)):
    return first, second, size, pair, names
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A module with components, in the table of networks; importable or not."""

    def make(name: str, importable: bool, more: str = "") -> None:
        text = (TOY if not importable else "from engine.config import Probability, Size\n") + TOY_CLASS + more
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        for entry, what in {"toy": "Toy", "build": "build", "place": "place", "bad": "bad"}.items():
            monkeypatch.setitem(networks.NETWORKS, entry, f"{name}:{what}")

    return make


def test_signatures_are_read_without_importing(toy):
    toy("toy_broken", importable=False)
    assert component("networks:NETWORKS", "toy").args == {"shared": 1, "rate": 0.5}
    with pytest.raises(RuntimeError, match="imported"):
        component("networks:NETWORKS", "toy").build(3)


def test_build_gives_positions_of_the_program_and_keys_of_the_yaml(toy):
    toy("toy_good", importable=True)
    built = component("networks:NETWORKS", "toy", rate="1/4").build(7)
    assert (built.num_classes, built.shared, built.rate) == (7, 1, 0.25)
    arguments = component("networks:NETWORKS", "build", size=[3, 4], pair=[1, 2])
    assert arguments.args == {"size": (3, 4), "pair": (1, 2.0), "names": ["a"]}
    assert arguments.build(1) == (1, 3, (3, 4), (1, 2.0), ["a"])
    assert arguments.plain() == {"name": "build", "size": [3, 4], "pair": [1, 2.0], "names": ["a"]}


def test_variables_in_a_default_of_a_component(toy, monkeypatch):
    toy("toy_place", importable=True)
    assert component("networks:NETWORKS", "place").args == {"folder": "here"}
    monkeypatch.setenv("TOY_FOLDER", "there")
    assert component("networks:NETWORKS", "place").args == {"folder": "there"}


def test_component_from_the_program_is_checked_as_a_yaml_is(toy):
    toy("toy_checked", importable=True)
    with pytest.raises(ConfigError) as error:
        component("networks:NETWORKS", "build", pair=[1, "x"], nmes=[])
    assert error.value.lines == [
        "build: nmes: unknown key of build; allowed: name, size, pair, names; did you mean 'names'?",
        "build: size: missing; build needs it",
        'build: pair.1: "x" is wrong; expected a number such as 1e-4 or 8/255',
    ]
    with pytest.raises(ConfigError, match=r"^build: sise: unknown key .* did you mean 'size'\?$"):
        component("networks:NETWORKS", "build", sise=[3, 4])


@pytest.mark.parametrize(
    "function",
    [
        "def bad(*, x): ...",
        "def bad(*, x: Unknown): ...",
        "def bad(*, x: bytes): ...",
        "def bad(*, x: int = 8 // 3): ...",
        "def other(*, x: int): ...",
    ],
)
def test_what_no_yaml_key_can_be_made_of_is_a_bug(toy, function):
    name = f"toy_bad_{abs(hash(function))}"
    toy(name, importable=True, more=function)
    with pytest.raises(TypeError, match=name):
        component("networks:NETWORKS", "bad", x=1)


# Descriptions


def sections(model: type[Section]) -> dict[str, type[Section]]:
    """A section and those below it."""
    found = {model.__name__: model}
    for field in model.model_fields.values():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, Section):
                found |= sections(part)
    return found


SECTIONS = {name: section for kind in KINDS.values() for name, section in sections(kind).items()}


def test_the_walk_over_sections_finds_them_all():
    assert set(SECTIONS) == {
        "Run", "Evaluation", "Pipeline", "Stage", "Data", "Augment", "Gate", "Train", "Evaluate",
    }  # fmt: skip


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_is_described(name):
    assert (SECTIONS[name].__doc__ or "").strip()
    for key, field in SECTIONS[name].model_fields.items():
        assert field.description, f"{name}.{key} has no description"


@pytest.mark.parametrize(("table", "name"), [(table, name) for table in TABLES for name in table_of(table)])
def test_every_component_can_be_configured_and_is_described(table, name):
    signature = signature_of(table_of(table)[name])
    fixed = {"dataloaders:DATASETS": Data, "networks:GATES": Gate}.get(table)
    for argument in signature.types:
        assert re.search(rf"\b{argument}\b", signature.docstring), (
            f"{table} {name}: {argument} is not described"
        )
        assert argument not in (fixed.fixed_keys() if fixed else {}), f"{table} {name}: {argument} is taken"
        assert argument not in ("name", "type", "component")
    required = [argument for argument in signature.types if argument not in signature.defaults]
    arguments = dict.fromkeys(required, "x")
    if table != "dataloaders:DATASETS":
        assert component(
            table,
            name,
            key="type" if table in ("networks:GATES", "networks:ENSEMBLES") else "name",
            **arguments,
        )


def test_paths_of_components():
    assert set(RULES.components) == {
        ("data",),
        ("network",),
        ("gate",),
        ("ensemble",),
        ("train", "optimizer"),
        ("train", "schedule"),
        ("train", "loss"),
    }
