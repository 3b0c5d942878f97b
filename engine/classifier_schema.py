"""The config of a classifier: an image set, a CNN, and how it is trained and attacked."""

from functools import partial
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, PlainValidator

from engine.components import Component, Named
from engine.errors import Mistake
from engine.schema import (
    Attack,
    BasicTrain,
    Optimizer,
    Precision,
    Schedule,
    attacking,
    boundless,
    each_once,
    run_or,
    word_or_count,
)
from engine.sections import ComponentSection, Config, Section
from engine.values import (
    Bool,
    Name,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Rows,
    Text,
    number_or_none,
)
from engine.yaml_source import expand

Classifier = Annotated[Component, Named("networks:CLASSIFIERS")]

Method = Literal["advmoe", "at_moe", "trades", "pgd_at", "standard"]
METHODS = get_args(Method)
OF_ROUTERS = ("advmoe", "at_moe")  # methods that need a router
WITHOUT_ROUTER = ("cnn", "sparse_cnn")  # networks that have none


class ImageData(ComponentSection):
    """An image set (its own keys beside these) and how its training images are changed."""

    table = "dataloaders:IMAGE_SETS"
    key = "name"
    pad: NonNegativeInt = Field(
        4, description="black pixels around a training image before it is cropped at random"
    )
    flip: Bool = Field(True, description="left-right flips of training images, half of them")
    cache_dir: Text = Field(
        default_factory=lambda: expand("${MOE_CACHE:-.cache}"), description="folder of decoded image files"
    )


class RouterTraining(Section):
    """How the router is trained where that is a phase of its own (method: advmoe); `balance` for all methods."""

    target: Literal["task", "label_mod", "cluster", "none"] = Field(
        "label_mod",
        description="what it learns: task (the mixture's own loss, through the straight-through gradient), label_mod "
        "(label modulo the experts, as in the published code), cluster (a k-means cluster of the image), none",
    )
    attack: Literal["router", "joint"] = Field(
        "router", description="what its images are attacked for: its own scores, or these and the logits"
    )
    beta: NonNegative = Field(
        1.0, description="weight of the divergence of its scores under attack, beside that of the target, 1"
    )
    balance: NonNegative = Field(
        0.0,
        description="weight of a loss that lowers the scores of experts with more than their share of images, with any "
        "method",
    )
    clip_norm: Positive = Field(1.0, description="largest norm of its gradient")
    optimizer: Optimizer | None = Field(None, description="of the router; null: train.optimizer")
    schedule: Schedule | None = Field(None, description="of the router's rate; null: train.schedule")

    @classmethod
    def cross_checks(cls, data: dict) -> list[Mistake]:
        if number_or_none(data.get("beta", 1)) != 0 or data.get("target") == "task":
            return []
        if data.get("target") == "none" and not number_or_none(data.get("balance")):
            told = "0 beside target: none and balance: 0 leaves the router nothing to learn"
        else:
            told = "0 leaves the attack on the router without effect; take more, or target: task"
        return [Mistake(("beta",), told)]


class ClassifierTrain(BasicTrain):
    """How a classifier is trained. eps and steps are those of the training attack, for pixels in [0, 1]."""

    method: Method = Field(
        description="advmoe (pathways given the router, router given the pathways, in turn), at_moe (both at once, "
        "by the loss of trades), trades, pgd_at (cross-entropy of attacked images), standard (no attack)"
    )
    batch_size: PositiveInt = Field(128, description="images in a batch")
    schedule: Schedule = Field(
        {"name": "cosine"}, description="learning rate over the steps, with its arguments"
    )
    eps: Positive | None = Field(
        None, description="largest change in training, such as 8/255; null: method standard"
    )
    steps: PositiveInt = Field(2, description="gradient steps of the training attack")
    step_size: Positive | None = Field(None, description="length of a step; null: 2.5 eps / steps")
    beta: NonNegative = Field(6.0, description="weight of the divergence under attack (TRADES)")
    router: RouterTraining | None = Field(
        None, description="the router's phase, for method: advmoe; other methods know its balance alone"
    )
    balanced_start: Bool = Field(
        True, description="set the biases of a new router so that all experts get images at first"
    )
    start_head: Literal["kept", "fresh"] = Field(
        "kept",
        description="last layer under start_from: kept, or fresh, which other classes than those of that run need",
    )
    val_images: PositiveInt = Field(
        1000, description="validation images, at most: clean top-1, loads and attacks are all on these"
    )
    val_steps: PositiveInt = Field(10, description="gradient steps of the validation attack, at eps")
    val_eps: Positive | None = Field(None, description="largest change in validation; null: eps")
    monitor: Literal["robust_top1", "top1"] = Field(
        default_factory=lambda train: "robust_top1" if train.get("val_eps") or train.get("eps") else "top1",
        description="validation figure of the best: robust_top1, the lower of accuracy under an attack through "
        "the router and under one that keeps the clean route; top1 where nothing attacks the validation",
    )

    @classmethod
    def cross_checks(cls, data: dict) -> list[Mistake]:
        method = data.get("method")
        mistakes = [one for key in ("eps", "val_eps", "step_size") for one in boundless(data, key)]
        if method in METHODS and method != "standard" and "eps" not in data:
            mistakes.append(Mistake(("eps",), f"missing; method: {method} attacks its images, such as 8/255"))
        if method == "standard" and "eps" in data:
            mistakes.append(
                Mistake(("eps",), "has no effect with method: standard; val_eps is for the validation")
            )
        idle = {"standard": ("beta", "steps", "step_size"), "pgd_at": ("beta",)}.get(method, ())
        if "beta" not in idle and number_or_none(data.get("beta")) == 0:
            told = "0 leaves the attacked images without weight; take more, or method: standard"
            mistakes.append(Mistake(("beta",), told))
        if not data.get("val_eps") and method == "standard":
            idle += ("val_steps",)
        for key in idle:
            default = cls.model_fields[key].default
            if data.get(key, default) != default:
                why = ", as nothing attacks the validation; set val_eps" if key == "val_steps" else ""
                left = "null" if default is None else f"{default:g}, the default"
                mistakes.append(Mistake((key,), f"has no effect with method: {method}{why}, or take {left}"))
        if method in METHODS and method != "advmoe":
            told = f"has no effect with method: {method}, which knows balance alone of train.router; null for none"
            mistakes += [Mistake(("router", key), told) for key in idle_keys(data)]
        if method == "standard" and data.get("monitor") == "robust_top1" and not data.get("val_eps"):
            told = "robust_top1 is unknown as nothing attacks the validation; set val_eps, such as 8/255, or take top1"
            mistakes.append(Mistake(("monitor",), told))
        if data.get("start_head") == "fresh" and data.get("start_from") is None:
            mistakes.append(Mistake(("start_head",), "has no effect without start_from"))
        return mistakes


def idle_keys(train: dict) -> list[str]:
    """The keys of a train section's router, as written, that only method: advmoe knows."""
    router = train.get("router")
    if not isinstance(router, dict):
        return []
    defaults = {key: field.default for key, field in RouterTraining.model_fields.items() if key != "balance"}
    return [key for key, default in defaults.items() if router.get(key, default) != default]


class ClassifierEvaluate(Section):
    """What is measured of classifiers, on which images, and how they are attacked."""

    split: Literal["val", "test"] = Field("test", description="split to evaluate on")
    batch_size: PositiveInt = Field(256, description="images in a batch of the clean pass")
    images_seed: NonNegativeInt = Field(
        0, description="seed of the order from which the images to attack are taken, the first ones of it"
    )
    attack_images: Annotated[str | int, word_or_count("all")] = Field(
        1000, description="images to attack: all, or a number"
    )
    suite: Literal["none", "quick", "standard"] = Field(
        "none", description="attacks on every network; what they are and cost: python -m evaluation.suites"
    )
    restarts: PositiveInt = Field(
        1,
        description="times that each attack of the suite begins, with all its steps: as many times the cost",
    )
    eps: Annotated[list[Positive], AfterValidator(each_once)] | None = Field(
        None,
        description="largest changes that attacks may make, for pixels in [0, 1], such as [8/255]; null: that of the "
        "validation in training, for a training's own config and norm: linf",
    )
    norm: Literal["linf", "l2"] = Field(
        "linf", description="eps bounds each value (linf), or the length (l2)"
    )
    attacks: list[Attack] = Field([], description="further attacks, beside those of the suite")
    attack_rows: Rows | None = Field(None, description="rows to attack; null: all models")
    attack_batch_size: PositiveInt = Field(100, description="images attacked together: part of the result")
    attack_seed: NonNegativeInt = Field(0, description="seed of random starts, of AutoAttack's too")
    attack_checks: Bool = Field(
        True,
        description="check the attacked networks on two images: gradients, batches, an implanted weakness",
    )
    deployment_precision: Precision = Field(
        "fp32", description="bf16: attacked images, which are made in float32, are scored in bf16 as well"
    )
    pathways: Bool = Field(
        True,
        description="attack every pathway of a mixture as a network by itself, too: rows of their own where an image "
        "takes one for all layers (granularity: model), and AutoAttack on each; not of one that weighs several for an "
        "image (top_k)",
    )
    autoattack: NonNegativeInt = Field(
        0,
        description="images for AutoAttack standard, the first ones of those attacked; 0: none",
    )
    autoattack_eps: Positive | None = Field(
        None, description="largest change that AutoAttack may make, one of eps; null: the largest of these"
    )
    autoattack_batch_size: PositiveInt = Field(
        25,
        description="images that AutoAttack takes together: part of the result, and done whole or not at all",
    )

    @classmethod
    def cross_checks(cls, data: dict) -> list[Mistake]:
        mistakes = boundless(data)
        if data.get("deployment_precision") == "bf16" and not suite_or_attacks(data):
            mistakes.append(
                Mistake(
                    ("deployment_precision",), "needs attacks beside it: evaluate.suite, or evaluate.attacks"
                )
            )
        for key in ("autoattack_eps", "autoattack_batch_size"):
            if key in data and data[key] != cls.model_fields[key].default and not data.get("autoattack"):
                mistakes.append(Mistake((key,), "has no effect without evaluate.autoattack"))
        return mistakes


Source = Annotated[str | Component, PlainValidator(partial(run_or, "networks:GUEST_CLASSIFIERS"))]


def suite_or_attacks(evaluate: dict) -> bool:
    """Whether a section, as written, asks for attacks other than AutoAttack."""
    return evaluate.get("suite", "none") != "none" or attacking(evaluate.get("attacks"))


def missing_eps(evaluate: Any) -> list[Mistake]:
    """The mistake of a section, as written, that asks for attacks and doesn't say how large they may be."""
    if not isinstance(evaluate, dict) or evaluate.get("eps") is not None:
        return []
    if not (suite_or_attacks(evaluate) or evaluate.get("autoattack")):
        return []
    return [Mistake(("evaluate", "eps"), "missing; attacks need it, such as [8/255]")]


class ClassifierEvaluation(Config):
    """Any number of trained classifiers, evaluated together on the same images."""

    name: Name = Field(description="name of the evaluation; its folder is OUTPUT/NAME")
    output: Text = Field("runs", description="folder of the run folders")
    data: ImageData = Field(description="image set")
    models: dict[Name, Source] = Field(
        description="row -> run folder, checkpoint file, or a network section such as "
        "{name: external, file: my_net.py} that brings its own weights"
    )
    evaluate: ClassifierEvaluate = Field(default_factory=ClassifierEvaluate, description="evaluation")

    @classmethod
    def cross_checks(cls, data: dict) -> list[Mistake]:
        mistakes = missing_eps(data.get("evaluate"))
        if "models" in data and not data["models"]:
            mistakes.append(
                Mistake(("models",), "nothing to evaluate: name a run, such as {advmoe: runs/advmoe}")
            )
        return mistakes


class Classification(Config):
    """One classifier: dense, slim, sparse, or a mixture of pathways."""

    name: Name = Field(description="name of the run; its folder is OUTPUT/NAME")
    output: Text = Field("runs", description="folder of the run folders")
    data: ImageData = Field(description="image set")
    network: Classifier = Field(description="network with its arguments")
    train: ClassifierTrain = Field(description="training")
    evaluate: ClassifierEvaluate = Field(default_factory=ClassifierEvaluate, description="evaluation")

    @classmethod
    def cross_checks(cls, data: dict) -> list[Mistake]:
        network, train = (
            data.get(key) if isinstance(data.get(key), dict) else {} for key in ("network", "train")
        )
        method, name = train.get("method"), network.get("name")
        evaluate = data.get("evaluate") if isinstance(data.get("evaluate"), dict) else {}
        known = (train.get("eps") or train.get("val_eps")) and evaluate.get("norm", "linf") == "linf"
        mistakes = [] if known else missing_eps(evaluate)
        if method in OF_ROUTERS and name in WITHOUT_ROUTER:
            told = f"{method} trains a router, and a {name} has none; allowed: trades, pgd_at, standard"
            mistakes.append(Mistake(("train", "method"), told))
        if train.get("router") and name in WITHOUT_ROUTER and method not in OF_ROUTERS:
            mistakes.append(Mistake(("train", "router"), f"has no effect: a {name} has none"))
        if train.get("balanced_start", True) is not True and name in WITHOUT_ROUTER:
            told = f"has no effect: a {name} has no router"
            mistakes.append(Mistake(("train", "balanced_start"), told))
        return mistakes
