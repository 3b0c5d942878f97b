"""Training: losses, optimizers, the loop, the run folder. Knows no network, data set or attack by name."""

LOSSES = {
    "cross_entropy": "engine.losses:cross_entropy",
    "ohem": "engine.losses:ohem",
    "dice": "engine.losses:dice",
    "cross_entropy_dice": "engine.losses:cross_entropy_dice",
}

OPTIMIZERS = {
    "sgd": "engine.optimizers:sgd",
    "adamw": "engine.optimizers:adamw",
}

SCHEDULES = {
    "poly": "engine.optimizers:poly",
    "cosine": "engine.optimizers:cosine",
    "step": "engine.optimizers:step",
}
