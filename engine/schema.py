"""Every key of a config: Run, Evaluation and Pipeline with their sections."""

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, ValidationError

from engine.components import Component, Named, mistakes_of
from engine.errors import Mistake, Mistakes, closest, wrong
from engine.sections import ComponentSection, Config, Section
from engine.values import (
    Bool,
    Int,
    Name,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Probability,
    Size,
    Subsets,
    Text,
)
from engine.yaml_source import expand

Network = Annotated[Component, Named("networks:NETWORKS")]
Ensemble = Annotated[Component, Named("networks:ENSEMBLES", key="type")]
EnsembleName = Annotated[Component, Named("networks:ENSEMBLES", key="type", bare=True)]
Attack = Annotated[Component, Named("attacks:ATTACKS")]
Optimizer = Annotated[Component, Named("engine:OPTIMIZERS")]
Schedule = Annotated[Component, Named("engine:SCHEDULES")]
Loss = Annotated[Component, Named("engine:LOSSES")]
Split = Literal["train", "gate", "val", "test"]
Precision = Literal["fp32", "bf16"]


class Augment(Section):
    """Random changes of training frames; the label follows where the geometry changes."""

    scale: tuple[Positive, Positive] = Field(
        (0.5, 2.0), description="[smallest, largest] zoom before the crop"
    )
    flip: Probability = Field(0.5, description="probability of a left-right flip")
    color: Probability = Field(
        0.5, description="probability of other brightness, contrast, saturation and hue"
    )
    blur: Probability = Field(0.2, description="probability of a Gaussian blur")


def _augment_or_none(value: Any) -> Augment | str:
    if value == "none":
        return value
    if not isinstance(value, dict | Augment):
        raise Mistakes(wrong(value, f"none, or a mapping of {', '.join(Augment.fixed_keys())}"))
    try:
        augment = Augment.model_validate(value)
    except ValidationError as error:
        raise Mistakes(*mistakes_of(error)) from None
    if augment.scale[0] > augment.scale[1]:
        raise Mistakes(
            Mistake(("scale",), f"{list(augment.scale)} is wrong; expected the smallest zoom first")
        )
    return augment


class Data(ComponentSection):
    """A data set (its own keys beside these) and how its frames reach the network."""

    table = "dataloaders:DATASETS"
    key = "name"
    image_size: Size = Field(description="[height, width] of the network's input in pixels")
    resize: Literal["squash", "letterbox"] = Field(
        "squash", description="how frames get this size: squash changes their aspect, letterbox pads"
    )
    subsets: Subsets = Field(description="subsets to train on, such as [highway, urban], or [all]")
    gate_data: Literal["gate", "train"] = Field(
        "gate", description="split that gates train on: gate (new to the experts) or train (as published)"
    )
    augment: Annotated[Augment | Literal["none"], PlainValidator(_augment_or_none)] = Field(
        default_factory=Augment, description="random changes of training frames, or none"
    )
    cache_dir: Text = Field(
        default_factory=lambda: expand("${MOE_CACHE:-.cache}"),
        description="folder of the cache of resized frames",
    )
    workers: NonNegativeInt = Field(2, description="processes that load frames; 0: the main process loads")


class Gate(ComponentSection):
    """A gate (its own keys beside these) and how it mixes the experts."""

    table = "networks:GATES"
    key = "type"
    conv: Bool = Field(False, description="3x3 convolution on the mixed logits, identity at the start")
    conv_at: Literal["logits", "full"] = Field(
        "logits", description="convolution before or after the upsampling"
    )
    mix: Literal["logits", "log_probs", "probs"] = Field("logits", description="what of the experts is mixed")


class Train(Section):
    """How a network, or a gate over frozen experts, is trained."""

    epochs: PositiveInt = Field(description="passes over the training frames")
    batch_size: PositiveInt = Field(8, description="frames in a batch")
    optimizer: Optimizer = Field({"name": "sgd"}, description="optimizer with its arguments")
    schedule: Schedule = Field(
        {"name": "poly"}, description="learning rate over the steps, with its arguments"
    )
    loss: Loss = Field({"name": "cross_entropy"}, description="loss with its arguments")
    precision: Precision = Field("fp32", description="arithmetic of the forward pass")
    channels_last: Bool = Field(True, description="NHWC memory layout, faster on most machines")
    compile: Bool = Field(False, description="torch.compile the network (GPU only)")
    accumulate: PositiveInt = Field(1, description="batches whose gradients make one optimizer step")
    clip_norm: Positive | None = Field(None, description="largest norm of the gradient; null: no clipping")
    ema: Probability | None = Field(
        None, description="decay of the moving average of the weights; null: none"
    )
    early_stop: PositiveInt | None = Field(
        None, description="epochs without improvement until the end; null: all"
    )
    eval_interval: PositiveInt = Field(1, description="epochs from one validation to the next")
    monitor: Literal["miou", "aacc", "macc", "fwiou"] = Field(
        "miou", description="validation figure of the best"
    )
    save_steps: PositiveInt | None = Field(
        200, description="steps between saves of last.pt; null: once an epoch"
    )
    seed: Int = Field(304, description="seed of first weights, order and augmentation")
    deterministic: Bool = Field(False, description="deterministic algorithms only, slower on GPU")
    tensorboard: Bool = Field(True, description="write TensorBoard files into the run folder")
    wandb: Bool = Field(False, description="log to Weights & Biases as well (package wandb)")


class Evaluate(Section):
    """What is measured, on which frames, and how the figures are taken."""

    subsets: Subsets | None = Field(None, description="subsets to evaluate on; null: those of data, and all")
    split: Split = Field("test", description="split to evaluate on")
    batch_size: PositiveInt = Field(4, description="frames in a batch")
    resolution: Literal["native", "network"] = Field(
        "native", description="size at which labels are compared"
    )
    absent: Literal["nan", "zero", "one", "gt_only"] = Field(
        "nan",
        description="a class without pixels in mIoU: left out, 0, 1; gt_only counts those with ground truth",
    )
    attacks: list[Attack] = Field([{"name": "clean"}], description="attacks to evaluate under", min_length=1)
    precision: Precision = Field("fp32", description="arithmetic of the forward pass")
    overlays: NonNegativeInt = Field(4, description="frames of each subset to draw")
    controls: Bool = Field(
        True, description="rows a gate must beat: constant weights, true subset, random gate"
    )
    ceilings: Bool = Field(True, description="rows that bound a gate: oracle_expert, best_gate")


class Run(Config):
    """One network, one gate over frozen experts, or one ensemble of experts."""

    name: Name = Field(description="name of the run; its folder is OUTPUT/NAME")
    output: Text = Field("runs", description="folder of the run folders")
    data: Data = Field(description="data set and how its frames reach the network")
    network: Network | None = Field(None, description="network to train, or what the experts are")
    experts: dict[Name, Text] = Field(
        default_factory=dict, description="frozen networks to join: name -> run folder or checkpoint file"
    )
    gate: Gate | None = Field(None, description="gate to train over the experts")
    ensemble: Ensemble | None = Field(None, description="fixed rule that joins the experts, nothing to train")
    train: Train | None = Field(None, description="training; null: the run can only be evaluated")
    evaluate: Evaluate = Field(default_factory=Evaluate, description="evaluation")

    @classmethod
    def cross_checks(cls, data: dict) -> list[Mistake]:
        joins = [key for key in ("gate", "ensemble") if key in data]
        experts = data.get("experts")
        if len(joins) == 2:
            return [Mistake(("ensemble",), "stands beside gate; a run has one of the two")]
        if joins and not experts:
            return [Mistake((joins[0],), "needs experts: {name: run folder, ...}, the networks to join")]
        if experts and not joins:
            return [Mistake(("experts",), "need gate (to be trained) or ensemble (fixed) to join them")]
        if not joins and "network" not in data:
            return [Mistake((), "a run needs network, or experts and gate, or experts and ensemble")]
        gate = data.get("gate")
        enough = 1 if isinstance(gate, dict) and gate.get("type") == "uniform" else 2
        if joins and isinstance(experts, dict) and len(experts) < enough:
            return [
                Mistake(("experts",), f"{joins[0]} needs at least {enough} of them, found {len(experts)}")
            ]
        return []


class Evaluation(Config):
    """Any number of finished runs, evaluated together, each network once per image."""

    name: Name = Field(description="name of the evaluation; its folder is OUTPUT/NAME")
    output: Text = Field("runs", description="folder of the run folders")
    data: Data = Field(description="data set and how its frames reach the network")
    baselines: dict[Name, Text] = Field(
        default_factory=dict,
        description="networks trained on all subsets: row -> run folder or checkpoint file",
    )
    experts: dict[Name, Text] = Field(
        default_factory=dict,
        description="networks trained on one subset: row -> run folder or checkpoint file",
    )
    gates: dict[Name, Text] = Field(
        default_factory=dict, description="gates over these experts: row -> run folder or checkpoint file"
    )
    ensembles: list[EnsembleName] = Field([], description="fixed rules that join the experts, by their names")
    evaluate: Evaluate = Field(default_factory=Evaluate, description="evaluation")

    @classmethod
    def cross_checks(cls, data: dict) -> list[Mistake]:
        named = {key: data[key] for key in ("baselines", "experts", "gates") if data.get(key)}
        groups = {key: rows for key, rows in named.items() if isinstance(rows, dict)}
        mistakes = []
        if not named:
            mistakes.append(Mistake((), "nothing to evaluate: name runs under baselines, experts or gates"))
        if data.get("ensembles") and len(groups.get("experts", {})) < 2:
            mistakes.append(Mistake(("ensembles",), "need at least 2 experts to join"))
        seen: dict[str, str] = {}
        for group, rows in groups.items():
            for row in rows:
                if row in seen:
                    mistakes.append(
                        Mistake((group, row), f"is a row of {seen[row]} already; rows need their own names")
                    )
                seen[row] = group
        return mistakes

    def plain(self) -> dict[str, Any]:
        return {**super().plain(), "ensembles": [ensemble.name for ensemble in self.ensembles]}


class Stage(Section):
    """One step of a pipeline: a config and what to change in it."""

    config: Text = Field(description="YAML file of the stage, relative to the file of the pipeline")
    set: dict[Text, Any] = Field(
        default_factory=dict,
        description='dotted keys -> values; "@stage" is the run folder of an earlier stage',
    )


class Pipeline(Config):
    """Stages that run one after the other; each may use what earlier ones left in their run folders."""

    name: Name = Field(description="name of the pipeline; its folder is OUTPUT/NAME")
    output: Text = Field("runs", description="folder of the run folders")
    seed: Int = Field(0, description="added to train.seed of every stage")
    set: dict[Text, Any] = Field(default_factory=dict, description="dotted keys -> values, for every stage")
    jobs: PositiveInt = Field(1, description="stages that run at the same time, sharing the cores")
    stages: dict[Name, Stage] = Field(
        description="name -> config and what to change in it, in order", min_length=1
    )
    report: Bool = Field(True, description="write report.html at the end")

    @classmethod
    def cross_checks(cls, data: dict) -> list[Mistake]:
        mistakes: list[Mistake] = []
        earlier: list[str] = []
        stages = data.get("stages")
        for name, stage in stages.items() if isinstance(stages, dict) else ():
            changes = stage.get("set") if isinstance(stage, dict) else None
            for key, value in changes.items() if isinstance(changes, dict) else ():
                allowed = f"allowed: the stages before it ({', '.join(earlier) or 'none'})"
                mistakes += [
                    Mistake(
                        ("stages", name, "set", key), f"no stage @{other}; {allowed}", closest(other, earlier)
                    )
                    for other in references(value)
                    if other not in earlier
                ]
            earlier.append(name)
        return mistakes


def references(value: Any) -> list[str]:
    """The stages that a value of Stage.set names as "@stage", at any depth."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return [name for item in items for name in references(item)]
    return [value[1:]] if isinstance(value, str) and value.startswith("@") else []
