"""What a config must hold, how mistakes are told, resolved configs, pipelines. Needs no data."""

import copy
from typing import get_args

import pytest
from config_texts import EVALUATION, EXPERT, MOE, PIPELINE, SHARED_ENCODER, refused, value_of

import networks
from engine.config import KINDS, RULES, ConfigError, Data, Section, Train, dump, from_dict, load, signature_of


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
        f"config.yaml:8: evalute: unknown key; allowed: {', '.join(KINDS['run'].fixed_keys())}; "
        "did you mean 'evaluate'?",
    ]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("train.epochs=0", "train.epochs: 0 is wrong; expected a whole number above 0"),
        ("train.epochs=1.5", "train.epochs: 1.5 is wrong; expected a whole number above 0"),
        ("train.epochs=true", "train.epochs: true is wrong; expected a whole number above 0"),
        ("train.epochs=null", "train.epochs: null is wrong; expected a whole number above 0"),
        ("train.seed=1e3", "train.seed: 1000.0 is wrong; expected a whole number, 0 or more"),
        ("train.seed=-1", "train.seed: -1 is wrong; expected a whole number, 0 or more"),
        ("train.compile=1", "train.compile: 1 is wrong; expected true or false"),
        ("train.compile=yes", 'train.compile: "yes" is wrong; expected true or false'),
        ("train.clip_norm=0", "train.clip_norm: 0 is wrong; expected a number above 0"),
        ("train.clip_norm=true", "train.clip_norm: true is wrong; expected a number above 0"),
        ("train.clip_norm=1/0", 'train.clip_norm: "1/0" is wrong; expected a number above 0'),
        ("train.ema=1", "train.ema: 1 is wrong; expected a number from 0, below 1"),
        *(
            (
                f"train.{key}={digits * '9'}",
                f"train.{key}: {18 * '9'}... has {digits} digits; allowed: 18, or text in quotes",
            )
            for key, digits in (("seed", 20), ("optimizer.lr", 400))
        ),
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
        ("data.augment.scale=[]", "data.augment.scale: [] is wrong; expected more entries"),
        (
            "data.augment.scale=[1, 1, 1]",
            "data.augment.scale: [1, 1, 1] is wrong; expected at most 2 entries",
        ),
        ("data.augment.scale=1", "data.augment.scale: 1 is wrong; expected a list such as [1, 2]"),
        (
            "evaluate={suite: quick, adversarials: uint8, eps: [1/255, 0.5/255]}",
            "evaluate.eps: 0.5/255 with adversarials: uint8 is no attack, as images of bytes change by 1/255 at least; "
            "take eps from 1/255 on, or adversarials: float32",
        ),
        (
            "evaluate={suite: quick, adversarials: uint8}",
            "evaluate.eps: missing; adversarials: uint8 needs eps from 1/255 on, what stands for it may be smaller",
        ),
        (
            "evaluate.adversarials=uint8",
            "evaluate.adversarials: needs attacks beside it: evaluate.suite, or evaluate.attacks",
        ),
        (
            "evaluate.eps=[1/255, 2]",
            "evaluate.eps: 2 lets every pixel become any other, as pixels are in [0, 1]; 2/255 may be meant",
        ),
        (
            "evaluate.eps=[300/255]",
            "evaluate.eps: 300/255 lets every pixel become any other, as pixels are in [0, 1]",
        ),
        ("evaluate.eps=[]", "evaluate.eps: [] is wrong; expected at least one eps, each only once"),
        (
            "evaluate.attack_images=0",
            "evaluate.attack_images: 0 is wrong; expected all, blocks, or a whole number above 0",
        ),
        ("data.component=1", None),
        (
            "name=../x",
            'name: "../x" is wrong; expected a name of letters, digits and _ - . /, '
            "a letter or a digit first in each part",
        ),
        (
            "evaluate.attacks=[clean]",
            'evaluate.attacks.0: "clean" is wrong; expected a mapping such as {name: clean}',
        ),
        (
            "evaluate.attack_rows=[]",
            "evaluate.attack_rows: [] is wrong; expected at least one entry, each only once",
        ),
        (
            "evaluate.attacks=[{name: soft_gate, temperatures: []}]",
            "evaluate.attacks.0.temperatures: [] is wrong; expected at least 1 entries",
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
        "config.yaml:1: network.name: missing; allowed: deeplabv3plus, frrn, smp, external",
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
        (
            MOE,
            {"ensemble": {"type": "mean"}},
            "ensemble: stands beside gate; a run has one of gate, gates, ensemble",
        ),
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


def test_all_mistakes_between_keys_are_told_at_once(write):
    adversarial = {"attack": "pgd", "eps": 0.01, "steps": 1}
    changes = {"ensemble": {"type": "mean"}, "experts": {"a": "b"}, "cache": {"budget": "1GB"}}
    assert sorted(
        line.split(": ", 1)[1]
        for line in refused(write(MOE), **changes, **{"train.adversarial": adversarial})
    ) == [
        "cache: needs experts and a gate to train: it keeps what frozen experts say",
        "cache: stands beside train.adversarial: what experts say changes with the attack",
        "ensemble: stands beside gate; a run has one of gate, gates, ensemble",
        "experts: gate needs at least 2 of them, found 1",
    ]


def test_runs_that_fit_together(write):
    assert (
        load(write(MOE), {"gate": {"type": "uniform"}, "experts": {"only": "runs/x"}}).gate.name == "uniform"
    )
    assert load(write(MOE), {"gate": None, "ensemble": {"type": "max"}}).ensemble.name == "max"
    assert load(write(MOE), {"train": None}).train is None


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {"experts": {"a": "runs/a", "b": "runs/b"}},
            ["experts: stands beside shared_encoder, whose decoders are the experts of its one gate"],
        ),
        (
            {"ensemble": {"type": "mean"}},
            ["ensemble: stands beside shared_encoder, whose decoders are the experts of its one gate"],
        ),
        ({"gate": None}, ["shared_encoder: needs gate, to join its decoders"]),
        ({"network": None}, ["shared_encoder: needs network, of which it takes encoder and decoders"]),
        (
            {"data.subsets": ["highway"], "gate": None},
            [
                "shared_encoder: needs gate, to join its decoders",
                "data.subsets: ['highway']: shared_encoder has a decoder for each subset; name at least 2, "
                "without all",
            ],
        ),
        (
            {"data.subsets": ["highway", "all"]},
            [
                "data.subsets: ['highway', 'all']: shared_encoder has a decoder for each subset; name at "
                "least 2, without all"
            ],
        ),
        (
            {"gate.calibrate": True},
            [
                "gate.calibrate: stands beside shared_encoder, whose decoders change with every step of the gate"
            ],
        ),
        (
            {"gate.optimizer": {"name": "sgd", "lr": 0.1}, "shared_encoder.training": "joint"},
            [
                "gate.optimizer: has no effect in joint training, where train.optimizer moves gate and "
                "experts alike"
            ],
        ),
        ({"shared_encoder.training": "both"}, None),
        ({"shared_encoder": {}}, None),
        ({"shared_encoder": "separate"}, None),
    ],
)
def test_checks_around_a_shared_encoder(write, changes, lines):
    found = [line.split(": ", 1)[1] for line in refused(write(SHARED_ENCODER), **changes)]
    assert sorted(found) == sorted(lines) if lines else len(found) == 1


def test_a_shared_encoder_is_a_gate_without_experts(write):
    for training in ("separate", "joint"):
        config = load(write(SHARED_ENCODER), {"shared_encoder": {"training": training}})
        assert config.shared_encoder.training == training
        assert from_dict(config.resolved()) == config
    assert load(write(MOE)).shared_encoder is None


def test_a_misspelt_section_does_not_bring_further_mistakes(write):
    assert len(refused(write(MOE.replace("experts:", "expert:")))) == 1
    assert len(refused(write(EXPERT.replace("network:", "netwrok:")))) == 1
    assert len(refused(write(EXPERT.replace("subsets:", "subset:")))) == 1


GARBAGE = (
    None,
    True,
    3,
    -0.5,
    "",
    "@a",
    [],
    [[1]],
    [None],
    {},
    {"a": {}},
    {"name": {}},
    {"type": [1]},
    {"a": "b"},
)


def places(value, path=()):
    """Every path in a plain value."""
    for key, item in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield (*path, key)
        yield from places(item, (*path, key))


@pytest.mark.parametrize("text", [EXPERT, MOE, SHARED_ENCODER, EVALUATION, PIPELINE])
def test_nothing_that_is_written_is_a_bug_of_ours(write, text):
    """Any garbage at any place either loads or is refused in our words."""
    resolved = load(write(text)).resolved()
    for *above, last in places(resolved):
        for value in GARBAGE:
            mapping = copy.deepcopy(resolved)
            below = mapping
            for key in above:
                below = below[key]
            below[last] = value
            try:
                config = from_dict(mapping)
            except ConfigError as error:
                assert all(line.startswith("stored config: ") for line in error.lines)
            else:
                assert from_dict(config.resolved()) == config
                assert value_of(config.render_with_sources()) == config.resolved()


def test_kind_is_told_by_the_keys(write):
    write(EXPERT, "expert.yaml")
    write(MOE, "moe.yaml")
    kinds = {
        name: type(load(write(text)))
        for name, text in zip("rrep", (EXPERT, MOE, EVALUATION, PIPELINE), strict=True)
    }
    assert kinds == {"r": KINDS["run"], "e": KINDS["evaluation"], "p": KINDS["pipeline"]}


def test_a_wrong_train_section_of_a_classifier_is_the_one_mistake_told():
    network = {"name": "cnn_moe", "arch": "resnet18"}
    with pytest.raises(ConfigError) as raised:
        from_dict({"name": "x", "data": {"name": "digits"}, "network": network, "train": 5})
    assert len(raised.value.lines) == 1 and "train: 5 is wrong" in raised.value.lines[0]


def test_all_numbers_that_make_no_network_are_told_at_once():
    network = {"name": "cnn_moe", "arch": "resnet18", "ratio": 2, "num_experts": 1, "router_width": -1}
    with pytest.raises(ConfigError) as raised:
        from_dict(
            {"name": "x", "data": {"name": "digits"}, "network": network, "train": {"method": "standard"}}
        )
    told = "\n".join(raised.value.lines)
    assert "network.ratio: 2 is wrong; expected a number above 0, at most 1" in told
    assert "network.num_experts: 1 is wrong; expected a whole number, 2 or more" in told
    assert "network.router_width: -1 is wrong" in told


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
    assert config.stages["urban"].set == {"data.subsets": ["all"], "train.ema": 0.9, "train.epochs": 1}
    assert config.set == {"data.workers": 0}


def test_a_stage_may_use_earlier_stages_only(write):
    assert refused(write(PIPELINE), **{"stages.highway.set": {"network": ["x", "@urban"]}}) == [
        "command line: stages.highway.set.network: no stage @urban; allowed: the stages before it (none)"
    ]
    lines = refused(
        write(PIPELINE.replace("@urban", "@urbann").replace("  highway: {config: expert.yaml}\n", ""))
    )
    assert lines == [
        "config.yaml:4: stages.moe.set.experts: no stage @highway; allowed: the stages before it (urban)",
        "config.yaml:4: stages.moe.set.experts: no stage @urbann; allowed: the stages before it (urban); "
        "did you mean 'urban'?",
    ]


def test_a_stage_has_a_folder_of_its_own(write):
    told = "has no effect: name and output of a stage are given by the pipeline"
    overrides = {"set": {"output": "x"}, "stages.highway.set": {"name": "x", "output": "y"}}
    assert refused(write(PIPELINE), **overrides) == [
        f"command line: set.output: {told}",
        f"command line: stages.highway.set.name: {told}",
        f"command line: stages.highway.set.output: {told}",
    ]
    nested = PIPELINE + "  urban/other: {config: expert.yaml}\n"
    assert refused(write(nested)) == [
        "config.yaml:6: stages.urban/other: lies in the folder of stage urban, which empties it"
    ]


# Resolved


@pytest.mark.parametrize("text", [EXPERT, MOE, SHARED_ENCODER, EVALUATION, PIPELINE])
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
    assert resolved["evaluate"]["attacks"] == []


def test_configs_with_other_values_differ(write):
    path = write(EXPERT)
    assert load(path) == load(path, ["train.epochs=3"])
    assert load(path) != load(path, ["train.epochs=4"])


def test_stored_config_with_a_mistake_names_its_origin(write):
    stored = {**load(write(EXPERT)).resolved(), "nmae": "x"}
    with pytest.raises(ConfigError, match=r"^best.safetensors: nmae: unknown key; .* did you mean 'name'\?$"):
        from_dict(stored, origin="best.safetensors")


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
        "Run", "Evaluation", "Pipeline", "Stage", "Data", "Augment", "Gate", "SharedEncoder", "Cache",
        "Train", "Adversarial", "Evaluate", "Corruptions", "Classification", "ImageData", "ClassifierTrain",
        "RouterTraining", "ClassifierEvaluate", "ClassifierEvaluation",
    }  # fmt: skip


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_is_described(name):
    assert (SECTIONS[name].__doc__ or "").strip()
    for key, field in SECTIONS[name].model_fields.items():
        assert field.description, f"{name}.{key} has no description"


def test_paths_of_components():
    assert set(RULES.components) == {
        ("data",),
        ("network",),
        ("gate",),
        ("ensemble",),
        ("train", "optimizer"),
        ("train", "schedule"),
        ("train", "loss"),
        ("train", "router", "optimizer"),
        ("train", "router", "schedule"),
        ("evaluate", "transfer"),
    }
    fixed = RULES.components["data",][1]  # of both kinds of data
    assert {"image_size", "subsets", "pad", "flip", "cache_dir"} <= fixed
