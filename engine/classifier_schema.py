"""The config of a classifier: an image set, a CNN, and how it is trained and attacked."""

from typing import Annotated, Literal

from pydantic import Field

from engine.components import Component, Named
from engine.errors import Mistake
from engine.schema import BasicTrain, Optimizer, Schedule
from engine.sections import ComponentSection, Config, Section
from engine.values import Bool, Name, NonNegative, NonNegativeInt, Positive, PositiveInt, Text
from engine.yaml_source import expand

Classifier = Annotated[Component, Named("networks:CLASSIFIERS")]

METHODS = ("advmoe", "at_moe", "trades", "pgd_at", "standard")
ROUTED = METHODS[:2]  # those that need a router
UNROUTED = ("cnn", "sparse_cnn")  # networks that have none


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
    """How the router is trained where that is a phase of its own (method: advmoe)."""

    target: Literal["task", "label_mod", "cluster", "none"] = Field(
        "task",
        description="what it learns: task (the mixture's own loss, through the straight-through gradient), label_mod "
        "(label modulo the experts, as in the published code), cluster (a k-means cluster of the image), none",
    )
    attack: Literal["router", "joint"] = Field(
        "router", description="what its images are attacked for: its own scores, or these and the logits"
    )
    beta: NonNegative = Field(6.0, description="weight of the divergence of its scores under attack")
    balance: NonNegative = Field(
        0.0, description="weight of a loss that wants equal loads (Switch, arXiv 2101.03961)"
    )
    clip_norm: Positive = Field(1.0, description="largest norm of its gradient")
    optimizer: Optimizer | None = Field(None, description="of the router; null: train.optimizer")
    schedule: Schedule | None = Field(None, description="of the router's rate; null: train.schedule")


class ClassifierTrain(BasicTrain):
    """How a classifier is trained. eps and steps are those of the training attack, for pixels in [0, 1]."""

    method: Literal["advmoe", "at_moe", "trades", "pgd_at", "standard"] = Field(
        description="advmoe (pathways given the router, router given the pathways, in turn), at_moe (both at once), "
        "trades, pgd_at (cross-entropy of attacked images), standard (no attack)"
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
    router: RouterTraining | None = Field(None, description="the router's phase, for method: advmoe")
    balanced_start: Bool = Field(
        True, description="set the router's biases so that all experts get images at first"
    )
    start_head: Literal["kept", "fresh"] = Field(
        "kept",
        description="last layer under start_from: kept, or fresh, which other classes than those of that run need",
    )
    val_images: PositiveInt = Field(1000, description="validation images that are attacked, at most")
    val_steps: PositiveInt = Field(10, description="gradient steps of the validation attack, at eps")
    val_eps: Positive | None = Field(None, description="largest change in validation; null: eps")
    monitor: Literal["robust_top1", "top1"] = Field(
        "robust_top1",
        description="validation figure of the best: robust_top1 is the lower of accuracy under an attack through the "
        "router and under one that keeps the clean route",
    )

    @classmethod
    def cross_checks(cls, data: dict) -> list[Mistake]:
        mistakes, method = [], data.get("method")
        if method in METHODS and method != "standard" and "eps" not in data:
            mistakes.append(Mistake(("eps",), f"missing; method: {method} attacks its images, such as 8/255"))
        if method == "standard" and "eps" in data:
            mistakes.append(
                Mistake(("eps",), "has no effect with method: standard; val_eps is for the validation")
            )
        if data.get("router") is not None and method in METHODS and method != "advmoe":
            mistakes.append(Mistake(("router",), f"has no effect with method: {method}"))
        if data.get("start_head") == "fresh" and data.get("start_from") is None:
            mistakes.append(Mistake(("start_head",), "has no effect without start_from"))
        return mistakes


class Classification(Config):
    """One classifier: dense, slim, sparse, or a mixture of pathways."""

    name: Name = Field(description="name of the run; its folder is OUTPUT/NAME")
    output: Text = Field("runs", description="folder of the run folders")
    data: ImageData = Field(description="image set")
    network: Classifier = Field(description="network with its arguments")
    train: ClassifierTrain = Field(description="training")

    @classmethod
    def cross_checks(cls, data: dict) -> list[Mistake]:
        network, train = (
            data.get(key) if isinstance(data.get(key), dict) else {} for key in ("network", "train")
        )
        method, name = train.get("method"), network.get("name")
        if method in ROUTED and name in UNROUTED:
            told = f"{method} trains a router, and a {name} has none; allowed: trades, pgd_at, standard"
            return [Mistake(("train", "method"), told)]
        return []
