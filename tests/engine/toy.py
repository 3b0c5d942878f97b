"""A training small enough for tests. As a script it trains, and kills itself if told to.

python toy.py FOLDER [resume] [kill=N]     SIGKILL before the N-th batch (from 0) that this process fetches"""

import os
import random
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine.learner import Learner
from engine.loop import fit, optimizer_steps, supervised
from engine.losses import cross_entropy
from engine.optimizers import poly, sgd
from engine.randomness import seed_everything
from engine.runs import RunFolder
from engine.steps import Phase

METRICS = ("miou", "aacc")
CLASSES = 3
KILLED = {"ema": 0.9, "accumulate": 2, "save_steps": 2, "clip_norm": 5.0}  # settings of the script


def settings(**changed) -> SimpleNamespace:
    """The train section with its defaults, but for what is given."""
    values = dict(
        epochs=3, precision="fp32", channels_last=True, compile=False, accumulate=1, clip_norm=None, ema=None,
        early_stop=None, eval_interval=1, monitor="miou", save_steps=None, tensorboard=False, wandb=False,
    )  # fmt: skip
    return SimpleNamespace(**{**values, **changed})


class Net(nn.Sequential):
    """With BatchNorm and dropout, so that buffers and the random generators matter."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Conv2d(8, CLASSES, 1),
        )


class Batches:
    """Noise whose label is its strongest channel; some pixels have none. It depends on seed and place only.

    hook(epoch, index) is called before a batch is given."""

    def __init__(self, count: int = 6, size: int = 4, seed: int = 0, hook=None):
        self.count, self.size, self.seed, self.hook = count, size, seed, hook

    def __len__(self) -> int:
        return self.count

    def epoch(self, epoch: int, start: int = 0):
        assert start < self.count, "asked for an epoch that is over"
        torch.rand(3)  # a DataLoader draws its base seed here
        for index in range(start, self.count):
            if self.hook:
                self.hook(epoch, index)
            rows = range(index * self.size, (index + 1) * self.size)
            images, labels = zip(*(self.frame(epoch, row) for row in rows), strict=True)
            frames = [SimpleNamespace(name=f"frame_{epoch}_{row}") for row in rows]
            yield SimpleNamespace(images=torch.stack(images), labels=torch.stack(labels), frames=frames)

    def frame(self, epoch: int, row: int):
        image = np.random.default_rng((self.seed, epoch, row)).integers(0, 256, (3, 8, 8), dtype=np.uint8)
        label = image.argmax(0).astype(np.uint8)
        label[:, : row % 5] = 255
        return torch.from_numpy(image), torch.from_numpy(label)


def validate(model) -> dict[str, float]:
    """Pixel accuracy on a fixed batch, under both names. Draws numbers, as a validation loader would."""
    torch.rand(1), np.random.rand(), random.random()
    (batch,) = Batches(1, 8, seed=99).epoch(0)
    with torch.no_grad():
        hits = model(batch.images.float() / 255).argmax(1) == batch.labels
    return {"miou": hits[batch.labels != 255].float().mean().item(), "aacc": hits.float().mean().item()}


def weights(model):
    return model.state_dict(), {"class_names": ["red", "green", "blue"]}


def phase_of(model, steps: int, *, name="net", parameters=None, loss=None, **arguments) -> Phase:
    parameters = list(model.parameters() if parameters is None else parameters)
    optimizer = sgd(parameters, **{"lr": 0.5, **arguments})
    loss = loss or supervised(cross_entropy(None, 255))
    return Phase(name, loss, parameters, optimizer, poly(optimizer, steps))


def one_phase(model, steps: int) -> list[Phase]:
    return [phase_of(model, steps)]


def train(
    folder,
    *,
    resume=False,
    batches=None,
    validate=validate,
    net=Net,
    phases=one_phase,
    weights=weights,
    options=None,
    **changed,
):
    """fit on the toy with changed settings; options: those of the learner. Returns (result, run, model)."""
    config, batches = settings(**changed), Batches() if batches is None else batches
    one = learner(folder, batches, config, resume, net, phases, weights, **(options or {}))
    (result,) = together([one], batches, validate, config)
    return result, one.run, one.model


def learner(
    folder,
    batches,
    config,
    resume=False,
    net=Net,
    phases=one_phase,
    weights=weights,
    seed=304,
    **options,
) -> Learner:
    seed_everything(seed)
    model = net()
    run = RunFolder(folder, {"name": Path(folder).name}, resume=resume)
    return Learner(model, phases(model, optimizer_steps(batches, config)), run, weights, **options)


def together(learners, batches, validate, config) -> list:
    """fit; validate takes one model."""
    return fit(
        learners,
        batches,
        lambda models: [validate(model) for model in models],
        config,
        torch.device("cpu"),
        metrics=METRICS,
    )


def main(folder: str, *words: str) -> None:
    kills = [int(word.removeprefix("kill=")) for word in words if word.startswith("kill=")]
    fetched = iter(range(10**6))

    def kill_self(epoch, index):
        if next(fetched) in kills:
            os.kill(os.getpid(), signal.SIGKILL)

    train(folder, resume="resume" in words, batches=Batches(hook=kill_self), **KILLED)


if __name__ == "__main__":
    main(*sys.argv[1:])
