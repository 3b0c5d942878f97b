"""Every key of a config: Run, Evaluation and Pipeline with their sections."""

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator, ValidationError

from engine.components import Component, Named, mistakes_of, table_of
from engine.errors import Mistake, Mistakes, closest, no_choice, wrong
from engine.sections import ComponentSection, Config, Section
from engine.values import (
    Bool,
    Bytes,
    Decay,
    Float,
    Name,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Probability,
    Rows,
    Size,
    Subsets,
    Text,
    byte_count,
    number_or_none,
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


def _section_or_none(section: type[Section], value: Any) -> Any:
    if value == "none":
        return value
    if not isinstance(value, dict | section):
        raise Mistakes(wrong(value, f"none, or a mapping of {', '.join(section.fixed_keys())}"))
    try:
        return section.model_validate(value)
    except ValidationError as error:
        raise Mistakes(*mistakes_of(error)) from None


def _augment_or_none(value: Any) -> Augment | str:
    augment = _section_or_none(Augment, value)
    if augment != "none" and augment.scale[0] > augment.scale[1]:
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


_OF_LEARNED_WEIGHTS = ("input", "routing", "temperature", "balance", "entropy")


class Gate(ComponentSection):
    """A gate (its own keys beside these) and how it mixes the experts."""

    table = "networks:GATES"
    key = "type"
    conv: Bool = Field(False, description="3x3 convolution on the mixed logits, identity at the start")
    conv_at: Literal["logits", "full"] = Field(
        "logits", description="convolution before or after the upsampling"
    )
    mix: Literal["logits", "log_probs", "probs"] = Field("logits", description="what of the experts is mixed")
    input: Literal["features", "logits", "image"] = Field(
        "features", description="what the gate reads; logits of the experts and image: means of 16x16 pixels"
    )
    routing: Literal["soft", "top1"] = Field(
        "soft", description="weights of all experts, or the best expert alone (straight-through gradient)"
    )
    temperature: Positive = Field(
        1.0, description="gate logits are divided by it: below 1 the weights decide more, above 1 less"
    )
    calibrate: Bool = Field(
        False, description="divide each expert's logits by a temperature fitted on val before the gate trains"
    )
    balance: NonNegative = Field(
        0.0, description="added to the loss: times the variation of the experts' mean weights over the batch"
    )
    entropy: Float = Field(
        0.0,
        description="added to the loss: times the mean entropy of an image's weights; above 0 pushes the gate to "
        "decide, below 0 to weigh all alike",
    )
    loss_at: Literal["full", "logits"] = Field(
        "full", description="loss on upsampled logits, or (quick) on their own grid with labels reduced to it"
    )
    optimizer: Optimizer | None = Field(None, description="of this gate; null: train.optimizer")
    seed: NonNegativeInt | None = Field(None, description="seed of its first weights; null: train.seed")

    @classmethod
    def cross_checks(cls, data: dict) -> list[Mistake]:
        if data.get("type") == "uniform":
            defaults = {key: cls.model_fields[key].default for key in _OF_LEARNED_WEIGHTS}
            return [
                Mistake((key,), "has no effect on a uniform gate, whose weights are always equal")
                for key, default in defaults.items()
                if data.get(key, default) != default
            ]
        if data.get("routing") == "top1" and data.get("entropy"):
            return [Mistake(("entropy",), "stands beside routing: top1, whose weights have no entropy")]
        return []


class SharedEncoder(Section):
    """A mixture in one run: an encoder, and a decoder for each of data.subsets in place of the experts."""

    training: Literal["separate", "joint"] = Field(
        description="separate: each frame through the decoder of its own subset, the gate on top of what they "
        "say; joint: all by the loss of the mixture"
    )


class Cache(Section):
    """Outputs of frozen experts, kept in data.cache_dir/experts: later epochs and gates read them again."""

    budget: Bytes = Field(
        description="most that the outputs on train and val may take, such as 40GB or 500MB"
    )
    content: Literal["auto", "float32", "bfloat16", "top_k", "label_probs"] = Field(
        "auto",
        description="float32 (exact), bfloat16 or top_k (approximations), label_probs (all that the loss of a "
        "simple gate with mix: probs and loss_at: logits needs), auto: float32 if it fits, else bfloat16",
    )

    @property
    def bytes(self) -> int:
        """The budget in bytes."""
        return byte_count(self.budget)


class Adversarial(Section):
    """Training on attacked images: in each step some of the batch are attacked first, through all of the network."""

    attack: Literal["pgd", "segpgd"] = Field(
        description="what it raises, step by step: pgd cross-entropy (with loss: trades the divergence), segpgd "
        "cross-entropy of the pixels that are still right first"
    )
    eps: Positive = Field(description="largest change, for pixels in [0, 1], such as 2/255")
    steps: PositiveInt = Field(description="gradient steps from a random point; each costs a pass both ways")
    step_size: Positive | None = Field(None, description="length of a step, like eps; null: 2.5 eps / steps")
    norm: Literal["linf", "l2"] = Field(
        "linf", description="eps bounds each value (linf), or the length (l2)"
    )
    clean_fraction: Probability = Field(0.5, description="share of the images that are left as they are")
    loss: Literal["ce", "trades"] = Field(
        "ce",
        description="ce: train.loss of the images as attacked; trades: train.loss of the clean images, plus beta "
        "times the divergence of the attacked ones' predictions from theirs",
    )
    beta: NonNegative = Field(6.0, description="weight of the divergence in loss: trades")

    @classmethod
    def cross_checks(cls, data: dict) -> list[Mistake]:
        mistakes = [*boundless(data), *boundless(data, "step_size")]
        default = cls.model_fields["beta"].default
        if data.get("beta", default) != default and data.get("loss", "ce") == "ce":
            mistakes.append(Mistake(("beta",), "has no effect without loss: trades"))
        if number_or_none(data.get("beta")) == 0 and data.get("loss") == "trades":
            told = "0 leaves nothing of loss: trades but the loss of clean images; take it above 0"
            mistakes.append(Mistake(("beta",), f"{told}, or adversarial: none"))
        if number_or_none(data.get("clean_fraction")) == 1:
            told = "1 leaves no image to attack; take it below 1, or adversarial: none"
            mistakes.append(Mistake(("clean_fraction",), told))
        return mistakes


class BasicTrain(Section):
    """What every training has: epochs, optimizer, arithmetic, saving."""

    epochs: PositiveInt = Field(description="passes over the training images")
    batch_size: PositiveInt = Field(8, description="images in a batch")
    optimizer: Optimizer = Field({"name": "sgd"}, description="optimizer with its arguments")
    schedule: Schedule = Field(
        {"name": "poly"}, description="learning rate over the steps, with its arguments"
    )
    precision: Precision = Field("fp32", description="arithmetic of the forward pass")
    channels_last: Bool = Field(True, description="NHWC memory layout, faster on most machines")
    compile: Bool = Field(False, description="torch.compile the network (GPU only)")
    accumulate: PositiveInt = Field(1, description="batches whose gradients make one optimizer step")
    clip_norm: Positive | None = Field(None, description="largest norm of the gradient; null: no clipping")
    ema: Decay | None = Field(None, description="decay of the moving average of the weights; null: none")
    early_stop: PositiveInt | None = Field(
        None, description="epochs without improvement until the end; null: all"
    )
    eval_interval: PositiveInt = Field(1, description="epochs from one validation to the next")
    start_from: Text | None = Field(
        None,
        description="run folder or checkpoint with the first weights, of an equal network; null: new ones",
    )
    save_steps: PositiveInt | None = Field(
        200, description="steps between saves of last.pt; null: once an epoch"
    )
    seed: NonNegativeInt = Field(304, description="seed of first weights, order and augmentation")
    deterministic: Bool = Field(
        False, description="on a GPU exact kernels, slower, and a warning where an operation has none"
    )
    tensorboard: Bool = Field(True, description="write TensorBoard files into the run folder")
    wandb: Bool = Field(False, description="log to Weights & Biases as well (package wandb)")


class Train(BasicTrain):
    """How a segmentation network, or a gate over frozen experts, is trained."""

    loss: Loss = Field({"name": "cross_entropy"}, description="loss with its arguments")
    adversarial: Annotated[
        Adversarial | Literal["none"], PlainValidator(partial(_section_or_none, Adversarial))
    ] = Field("none", description="attacks on the training images, or none")
    monitor: Literal["miou", "aacc", "macc", "fwiou", "robust_miou"] = Field(
        default_factory=lambda train: "miou" if train.get("adversarial", "none") == "none" else "robust_miou",
        description="validation figure of the best: robust_miou, under the attack of train.adversarial, or of clean "
        "frames; default: robust_miou where there is such an attack, else miou",
    )

    @classmethod
    def cross_checks(cls, data: dict) -> list[Mistake]:
        if data.get("monitor") == "robust_miou" and data.get("adversarial", "none") == "none":
            told = "robust_miou is unknown as nothing attacks the validation; set train.adversarial, or take miou"
            return [Mistake(("monitor",), told)]
        return []


def word_or_count(*words: str) -> PlainValidator:
    """One of the words, or a whole number above 0."""

    def validate(value: Any) -> str | int:
        if value in words or (type(value) is int and value > 0):
            return value
        raise Mistakes(wrong(value, f"{', '.join(words)}, or a whole number above 0"))

    return PlainValidator(validate)


def each_once(values: list[float]) -> list[float]:
    if not values or len(set(values)) < len(values):
        raise Mistakes(wrong(values, "at least one eps, each only once"))
    return values


def _corruptions(value: Any) -> str | list[str]:
    if value in ("common", "all"):
        return value
    if not isinstance(value, list) or not value or len(set(map(str, value))) < len(value):
        raise Mistakes(wrong(value, "common, all, or a list such as [fog, snow], each only once"))
    known = _corruption_names("all")
    unknown = [name for name in value if name not in known]
    if unknown:
        raise Mistakes(*(no_choice(name, known) for name in unknown))
    return value


def _corruption_names(names: str | list[str]) -> list[str]:
    common, extra = table_of("dataloaders:CORRUPTIONS"), table_of("dataloaders:EXTRA_CORRUPTIONS")
    return {"common": [*common], "all": [*common, *extra]}[names] if isinstance(names, str) else names


def _severities(value: Any) -> list[int]:
    whole = isinstance(value, list) and value and all(type(one) is int for one in value)
    if whole and value == sorted(set(value) & set(range(1, 6))):
        return value
    raise Mistakes(wrong(value, "a list of whole numbers from 1 to 5, ascending, each only once"))


class Corruptions(Section):
    """Common corruptions of the images: noise, blur, weather, digital; a pass for each and each severity."""

    names: Annotated[str | list[str], PlainValidator(_corruptions)] = Field(
        "common", description="common (the 15), all (and the 4 extra ones), or a list such as [fog, snow]"
    )
    severities: Annotated[list[int], PlainValidator(_severities)] = Field(
        [1, 2, 3, 4, 5], description="how strong, from 1 to 5"
    )
    seed: NonNegativeInt = Field(
        0, description="seed of what is random in them; each image has its own numbers"
    )

    @property
    def chosen(self) -> list[str]:
        """The names, one by one."""
        return _corruption_names(self.names)


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
    suite: Literal["none", "quick", "standard", "sea"] = Field(
        "none",
        description="attacks on every network, about 60, 400 and 1100 passes per image and eps (more for a single one "
        "beside mixtures); what they are: python -m evaluation.suites",
    )
    eps: Annotated[list[Positive], AfterValidator(each_once)] = Field(
        [0.25 / 255, 0.5 / 255, 1 / 255, 2 / 255],
        description="largest changes that attacks may make, for pixels in [0, 1], such as [0.5/255, 1/255]; norm: l2 "
        "needs its own; of networks that were all trained on attacked images [2/255, 4/255, 8/255] unless told",
    )
    norm: Literal["linf", "l2"] = Field(
        "linf", description="eps bounds each value (linf), or the length (l2)"
    )
    attacks: list[Attack] = Field([], description="further attacks, beside those of the suite")
    attack_rows: Rows | None = Field(
        None, description="rows to attack; null: all baselines, experts, ensembles and gates"
    )
    attack_images: Annotated[str | int, word_or_count("all", "blocks")] = Field(
        "all",
        description="all, blocks (a frame of each block of neighbours), or a number of frames far apart",
    )
    attack_batch_size: PositiveInt = Field(4, description="frames attacked together: part of the result")
    attack_seed: NonNegativeInt = Field(0, description="seed of random starts")
    attack_checks: Bool = Field(
        True,
        description="check the attacked networks on two images: gradients, batches, an implanted weakness",
    )
    transfer: Attack | None = Field(
        None,
        description="an attack such as {name: pgd, steps: 20}: made for each row at the largest eps, shown to all",
    )
    detectors: Bool = Field(
        False,
        description="whether uncertainty and disagreement detect attacks, and attackers who know it: hundreds of "
        "passes per image at the largest eps",
    )
    adversarials: Literal["none", "uint8", "float32"] = Field(
        "none",
        description="keep attacked images beside the ledger; uint8: they are rounded, inside eps (from 1/255 on), "
        "before scoring",
    )
    deployment_precision: Precision = Field(
        "fp32", description="bf16: attacked images, which are made in float32, are scored in bf16 as well"
    )
    corruptions: Annotated[
        Corruptions | Literal["none"], PlainValidator(partial(_section_or_none, Corruptions))
    ] = Field("none", description="corruptions of the images to evaluate under, or none")
    precision: Precision = Field("fp32", description="arithmetic of the forward pass")
    overlays: NonNegativeInt = Field(4, description="frames of each subset to draw")
    controls: Bool = Field(
        True, description="rows a gate must beat: constant weights, true subset, random gate"
    )
    ceilings: Bool = Field(True, description="rows that bound a gate: oracle_expert, best_gate")

    @classmethod
    def cross_checks(cls, data: dict) -> list[Mistake]:
        eps, mistakes = data.get("eps"), boundless(data)
        attacked = data.get("suite", "none") != "none" or attacking(data.get("attacks"))
        if attacked and data.get("norm") == "l2" and data.get("eps") is None:
            told = "missing; the radii that stand for it are of linf: name those of l2, such as [0.5, 1, 2]"
            mistakes.append(Mistake(("eps",), told))
        elif attacked and data.get("adversarials") == "uint8":
            if eps is None:
                told = (
                    "missing; adversarials: uint8 needs eps from 1/255 on, what stands for it may be smaller"
                )
                mistakes.append(Mistake(("eps",), told))
            numbers = [
                number for number in map(number_or_none, eps if isinstance(eps, list) else ()) if number
            ]
            mistakes += [Mistake(("eps",), motionless(number)) for number in numbers if motionless(number)]
        if not attacked:
            mistakes += [
                Mistake((key,), "needs attacks beside it: evaluate.suite, or evaluate.attacks")
                for key in ("transfer", "detectors", "deployment_precision", "adversarials")
                if data.get(key) and data[key] not in ("fp32", "none")
            ]
        return mistakes


def attacking(attacks: Any) -> bool:
    """Whether evaluate.attacks, as written, holds anything but clean images."""
    if not isinstance(attacks, list):
        return bool(attacks)  # what is wrong with it is told elsewhere
    return any((one.get("name") if isinstance(one, dict) else one) != "clean" for one in attacks)


def motionless(eps: float) -> str:
    """What is wrong with an eps where attacked images are rounded to bytes: nothing, or that none can differ from
    the clean one."""
    if eps > 1 / 255 - 1e-9:
        return ""
    return (
        f"{eps * 255:.4g}/255 with adversarials: uint8 is no attack, as images of bytes change by 1/255 at least; take "
        "eps from 1/255 on, or adversarials: float32"
    )


def boundless(data: dict, key: str = "eps") -> list[Mistake]:
    """Mistakes of a section, as written, whose linf radius or radii are no bound for pixels in [0, 1]."""
    eps, mistakes = data.get(key), []
    for one in eps if isinstance(eps, list) else [eps]:
        if data.get("norm", "linf") == "linf" and (number_or_none(one) or 0) >= 1:
            meant = "" if isinstance(one, str) else f"; {one}/255 may be meant"
            told = f"{one} lets every pixel become any other, as pixels are in [0, 1]{meant}"
            mistakes.append(Mistake((key,), told))
    return mistakes


def run_or(table: str, value: Any) -> str | Component:
    """A path as it is, a network of the table as a component."""
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, dict | Component):
        told = "a run folder, a checkpoint file, or a network such as {name: external, file: FILE}"
        raise Mistakes(wrong(value, told))
    return Named(table).validate(value)


def _run_or_network(value: Any) -> str | Component:
    network = run_or("networks:NETWORKS", value)
    if isinstance(network, Component) and network.name != "external":
        told = f"{network.name} has no weights of its own; name the run folder of a trained one"
        raise Mistakes(Mistake(("name",), told))
    return network


Source = Annotated[str | Component, PlainValidator(_run_or_network)]


ROBUST_EPS = (2 / 255, 4 / 255, 8 / 255)  # evaluate.eps of adversarially trained networks


class Run(Config):
    """One network, one gate over frozen experts, or one ensemble of experts."""

    name: Name = Field(description="name of the run; its folder is OUTPUT/NAME")
    output: Text = Field("runs", description="folder of the run folders")
    data: Data = Field(description="data set and how its frames reach the network")
    network: Network | None = Field(None, description="network to train, or what the experts are")
    experts: dict[Name, Source] = Field(
        default_factory=dict,
        description="frozen networks to join: name -> run folder, checkpoint file, or an external network",
    )
    gate: Gate | None = Field(None, description="gate to train over the experts")
    gates: dict[Name, Gate] | None = Field(
        None, description="several gates to train in one pass: name -> gate; their folders are in NAME"
    )
    ensemble: Ensemble | None = Field(None, description="fixed rule that joins the experts, nothing to train")
    shared_encoder: SharedEncoder | None = Field(
        None, description="train network and gate as a mixture with one encoder and a decoder per subset"
    )
    cache: Annotated[Cache | Literal["none"], PlainValidator(partial(_section_or_none, Cache))] = Field(
        "none", description="outputs of the experts, computed once and kept on disk, or none"
    )
    train: Train | None = Field(None, description="training; null: the run can only be evaluated")
    evaluate: Evaluate = Field(default_factory=Evaluate, description="evaluation")

    @classmethod
    def bound(cls, data: dict, mistakes: list[Mistake]) -> dict:
        """What is trained on attacked images is attacked more strongly, where the config names no eps."""
        train, evaluate = data.get("train"), data.get("evaluate") or {}
        robust = isinstance(train, dict) and train.get("adversarial") not in (None, "none")
        linf = isinstance(evaluate, dict) and evaluate.get("norm", "linf") == "linf"
        if robust and linf and evaluate.get("eps") is None:
            return {**data, "evaluate": {**evaluate, "eps": list(ROBUST_EPS)}}
        return data

    @property
    def starts(self) -> dict[str, str]:
        """Role -> run folder or checkpoint that a training starts from: one, or one for each of several gates, the
        folder of its name in train.start_from."""
        start = self.train and self.train.start_from
        if not start:
            return {}
        return {f"start_from/{name}": f"{start}/{name}" for name in self.gates or ()} or {"start_from": start}

    @classmethod
    def cross_checks(cls, data: dict) -> list[Mistake]:
        around = _mistakes_around_shared_encoder if "shared_encoder" in data else _mistakes_of_joining
        return _mistakes_around_cache(data) + around(data)


def _mistakes_around_cache(data: dict) -> list[Mistake]:
    """It keeps what frozen experts say, which has to stay the same."""
    if data.get("cache", "none") == "none":
        return []
    mistakes, train = [], data.get("train") if isinstance(data.get("train"), dict) else {}
    if not data.get("experts") or "ensemble" in data:
        told = "needs experts and a gate to train: it keeps what frozen experts say"
        mistakes.append(Mistake(("cache",), told))
    if train.get("adversarial") not in (None, "none"):
        told = "stands beside train.adversarial: what experts say changes with the attack"
        mistakes.append(Mistake(("cache",), told))
    return mistakes


def _mistakes_of_joining(data: dict) -> list[Mistake]:
    """A run is a network, or one thing that joins enough experts."""
    mistakes, experts = [], data.get("experts")
    joins = [key for key in ("gate", "gates", "ensemble") if data.get(key)]
    if len(joins) > 1:
        told = f"stands beside {joins[0]}; a run has one of gate, gates, ensemble"
        mistakes.append(Mistake((joins[1],), told))
    if joins and not experts:
        mistakes.append(Mistake((joins[0],), "needs experts: {name: run folder, ...}, the networks to join"))
    if experts and not joins:
        mistakes.append(Mistake(("experts",), "need gate (to be trained) or ensemble (fixed) to join them"))
    if not (joins or experts or "network" in data):
        mistakes.append(Mistake((), "a run needs network, or experts and gate, or experts and ensemble"))
    several = data.get("gates") if isinstance(data.get("gates"), dict) else {}
    gates = [gate for gate in (data.get("gate"), *several.values()) if isinstance(gate, dict)]
    enough = 1 if gates and all(gate.get("type") == "uniform" for gate in gates) else 2
    if joins and experts and isinstance(experts, dict) and len(experts) < enough:
        told = f"{joins[0]} needs at least {enough} of them, found {len(experts)}"
        mistakes.append(Mistake(("experts",), told))
    return mistakes


def _mistakes_around_shared_encoder(data: dict) -> list[Mistake]:
    """It needs network, gate and at least two subsets, and has no other experts than its decoders."""
    mistakes = [
        Mistake((key,), "stands beside shared_encoder, whose decoders are the experts of its one gate")
        for key in ("experts", "gates", "ensemble")
        if data.get(key)
    ]
    needs = {"network": "of which it takes encoder and decoders", "gate": "to join its decoders"}
    mistakes += [
        Mistake(("shared_encoder",), f"needs {key}, {why}") for key, why in needs.items() if key not in data
    ]
    gate, shared, section = (
        data.get(key) if isinstance(data.get(key), dict) else {} for key in ("gate", "shared_encoder", "data")
    )
    if gate.get("calibrate") is True:
        told = "stands beside shared_encoder, whose decoders change with every step of the gate"
        mistakes.append(Mistake(("gate", "calibrate"), told))
    if gate.get("optimizer") and shared.get("training") == "joint":
        told = "has no effect in joint training, where train.optimizer moves gate and experts alike"
        mistakes.append(Mistake(("gate", "optimizer"), told))
    subsets = section.get("subsets")
    if isinstance(subsets, list) and (len(subsets) < 2 or "all" in subsets):
        told = f"{subsets}: shared_encoder has a decoder for each subset; name at least 2, without all"
        mistakes.append(Mistake(("data", "subsets"), told))
    return mistakes


class Evaluation(Config):
    """Any number of finished runs, evaluated together, each network once per image."""

    name: Name = Field(description="name of the evaluation; its folder is OUTPUT/NAME")
    output: Text = Field("runs", description="folder of the run folders")
    data: Data = Field(description="data set and how its frames reach the network")
    baselines: dict[Name, Source] = Field(
        default_factory=dict,
        description="networks trained on all subsets: row -> run folder, checkpoint file, or a network section such as "
        "{name: external, file: my_net.py} that brings its own weights",
    )
    experts: dict[Name, Source] = Field(
        default_factory=dict, description="networks trained on one subset: row -> as in baselines"
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
        description='dotted keys -> values; "@stage" is the run folder of an earlier stage, "@stage/gate" a gate in it',
    )


class Pipeline(Config):
    """Stages that run one after the other; each may use what earlier ones left in their run folders."""

    name: Name = Field(description="name of the pipeline; its folder is OUTPUT/NAME")
    output: Text = Field("runs", description="folder of the run folders")
    seed: NonNegativeInt = Field(0, description="added to train.seed of every stage")
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
        shared = data.get("set") if isinstance(data.get("set"), dict) else {}
        told = "has no effect: name and output of a stage are given by the pipeline"
        mistakes += [Mistake(("set", key), told) for key in ("name", "output") if key in shared]
        for name, stage in stages.items() if isinstance(stages, dict) else ():
            changes = stage.get("set") if isinstance(stage, dict) else None
            own = changes if isinstance(changes, dict) else {}
            mistakes += [
                Mistake(("stages", name, "set", key), told) for key in ("name", "output") if key in own
            ]
            mistakes += [
                Mistake(
                    ("stages", name),
                    f"lies in the folder of stage {other}, which empties it",
                )
                for other in stages
                if str(name).startswith(f"{other}/")
            ]
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
    """The stages that a value of Stage.set names as "@stage" or "@stage/folder in it", at any depth."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return [name for item in items for name in references(item)]
    return [value[1:].split("/")[0]] if isinstance(value, str) and value.startswith("@") else []
