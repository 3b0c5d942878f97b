"""Anybody's network: what a function in a Python file of the user's returns, from images in [0, 1] to logits."""

import hashlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from engine.config import PositiveInt, UserError
from networks.normalize import Normalize
from networks.resize import pad_to, upsample

ROOT = Path(__file__).resolve().parents[1]
OURS = {path.parent.name for path in ROOT.glob("*/__init__.py")}
INSTALLED = tuple(sysconfig.get_paths()[kind] for kind in ("stdlib", "purelib", "platlib"))
# What a routed network or an ensemble offers to adaptive attacks and to evaluation, beside its logits.
OFFERED = {
    "combine",
    "conditional",
    "expert_logits",
    "expert_names",
    "forward_given",
    "gate_and_mix",
    "gate_logits",
    "inspect",
    "num_experts",
    "route",
    "routing",
    "top_k",
}


class External(nn.Module):
    """A network of your own: FUNCTION of FILE returns any callable from images to logits.

    The callable takes images [B, 3, H, W] in [0, 1] and returns logits [B, classes, h, w] of any size, which are
    brought to that of the images. An nn.Module is best: its tensors identify it, and it can be trained. The function
    loads the weights. A module that also has `feature_channels` and forward_features(images) -> (logits, features
    [B, F, h', w']) has features for a gate; any other has none, and a gate over it needs input: logits or image.
    Routed networks and ensembles keep what they offer beside their logits (such as gate_logits and
    forward_given), so that attacks can adapt to them. The code of the file is run as it is.

    Args:
        num_classes: number of classes.
        file: Python file; it may import files beside it.
        function: function of the file that returns the network; it is given num_classes if it has a parameter
            of that name.
        args: further arguments for the function, by name.
        stride: images are padded to multiples of it, the logits cropped again.
        mean: of a normalisation in front of the network, in units of [0, 1]; null: images stay as they are.
        std: like mean.
        sha256: of the file; any other file is refused. null: whatever the file holds.

    Raises UserError for a file or function that is missing or fails, for a routed network or an ensemble with stride,
    mean or std, and, when it runs, for what are no logits.
    """

    sites = ("h", "w")  # of a logit

    def __init__(
        self,
        num_classes: int,
        *,
        file: str,
        function: str = "build",
        args: dict | None = None,
        stride: PositiveInt = 1,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        sha256: str | None = None,
    ):
        super().__init__()
        self.num_classes, self.stride = num_classes, stride
        self._source, self._file = f"{file}:{function}", Path(file)  # where it lies is no part of what it is
        self.changes_images = stride > 1 or mean is not None or std is not None
        self.file_sha256 = sha256_of(Path(file), sha256)
        self.normalize = Normalize(mean or (0.0,) * 3, std or (1.0,) * 3)
        self.network = built(Path(file), function, num_classes, args or {})
        hidden = sorted(name for name in OFFERED if hasattr(self.network, name))
        if self.changes_images and hidden:
            raise UserError(
                f"network.file: what {self._source} returned offers {', '.join(hidden)} to attacks, but behind mean, "
                "std or stride it would see other images than they do; normalise and pad inside the network"
            )
        with_features = hasattr(self.network, "forward_features")
        self.feature_channels = getattr(self.network, "feature_channels", 0) if with_features else 0

    @property
    def opaque(self) -> bool:
        """Whether nothing here tells the network from another: it is no nn.Module, which holds its weights."""
        return not isinstance(self.network, nn.Module)

    def __getattr__(self, name: str) -> Any:
        if name in OFFERED:
            return getattr(super().__getattr__("network"), name)
        return super().__getattr__(name)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, H, W] in [0, 1] -> logits [B, num_classes, H, W]."""
        return upsample(self.forward_features(images)[0], images.shape[-2:], self.stride)

    def forward_features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, num_classes, h, w] as the network gives them and its features, [B, 0, 1, 1] without any."""
        entering = self.entered(images)
        with told_with_line(self._file, images):
            if self.feature_channels:
                logits, features = self.network.forward_features(entering)
            else:
                logits, features = self.network(entering), images.new_empty(len(images), 0, 1, 1)
        self.refuse_other_than_logits(logits, len(images))
        return logits, features

    def entered(self, images: torch.Tensor) -> torch.Tensor:
        """What the network is given."""
        return pad_to(self.normalize(images), self.stride) if self.changes_images else images

    def refuse_other_than_logits(self, logits: Any, images: int) -> None:
        sites = "".join(f", {site}" for site in self.sites)
        expected = f"logits [{images}, {self.num_classes}{sites}] in floating point"
        if not isinstance(logits, torch.Tensor):
            raise UserError(
                f"network.file: {self._source} gave a {type(logits).__name__}, expected {expected}"
            )
        shape = tuple(logits.shape)
        if (
            len(shape) != 2 + len(self.sites)
            or shape[:2] != (images, self.num_classes)
            or not logits.is_floating_point()
        ):
            kind = str(logits.dtype).removeprefix("torch.")
            raise UserError(f"network.file: {self._source} gave {list(shape)} {kind}, expected {expected}")


class ExternalClassifier(External):
    """A classifier of your own: FUNCTION of FILE returns any callable from images [B, C, H, W] in [0, 1] to logits
    [B, classes]; keys and mistakes as in `External`."""

    sites = ()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W] in [0, 1] -> logits [B, num_classes]."""
        with told_with_line(self._file, images):
            logits = self.network(self.entered(images))
        self.refuse_other_than_logits(logits, len(images))
        return logits


def sha256_of(file: Path, expected: str | None) -> str:
    """SHA-256 of the file. UserError where it is missing, or not the expected one."""
    if not file.is_file():
        raise UserError(f"network.file: no file {file}; name the Python file of your network")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if expected not in (None, found):
        raise UserError(f"network.sha256: {file} has {found}, the config says {expected}")
    return found


def built(file: Path, function: str, num_classes: int, args: dict) -> Callable:
    """What the function of the file returns. UserError with file and line where it fails."""
    with told_with_line(file), importable(file.parent):
        builder = getattr(imported(file), function, None)
        if not callable(builder):
            raise UserError(f"network.function: {file} has no function {function}")
        if "num_classes" in inspect.signature(builder).parameters:
            args = {"num_classes": num_classes, **args}
        network = builder(**args)
    if not callable(network):
        raise UserError(
            f"network.function: {file}:{function} returned a {type(network).__name__}; expected a callable "
            "from images to logits"
        )
    return network


def imported(file: Path):
    """The file as a module of its own."""
    name = f"external_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Inside, the files of the folder can be imported, and come before those of their names that were imported from
    another network's folder, or are ours; never before what is installed. Those of our names are gone afterwards."""
    place = folder.resolve()
    own = {path.stem: path for path in place.glob("*.py")}
    own |= {path.parent.name: path for path in place.glob("*/__init__.py")}
    hidden = {}
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        if top in own and file_of(sys.modules.get(top)) != own[top] and not is_installed(module):
            hidden[name] = module
    for name in hidden:
        del sys.modules[name]
    sys.path.insert(0, str(place))
    try:
        yield
    finally:
        sys.path.remove(str(place))
        gone = {name.partition(".")[0] for name in hidden} | (OURS & own.keys() if place != ROOT else set())
        for name in [name for name in sys.modules if name.partition(".")[0] in gone]:
            del sys.modules[name]
        sys.modules.update(hidden)


def file_of(module: ModuleType | None) -> Path | None:
    """That a module was made from; None for those that are from none."""
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file else None


def is_installed(module: ModuleType) -> bool:
    """Whether a module came with Python or a package, or is from no file."""
    file = file_of(module)
    return file is None or any(file.is_relative_to(Path(one).resolve()) for one in INSTALLED)


@contextmanager
def told_with_line(file: Path, images: torch.Tensor | None = None) -> Iterator[None]:
    """Turns what the user's code raises into a UserError that names its last line there and what it was given."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = f", line {own[-1].lineno}" if own else ""
        told = f"{file}{line}: {type(error).__name__}: {error}"
        if images is None:
            raise UserError(f"network.file: {told}") from error
        raise UserError(f"{told} (images {list(images.shape)})") from error
