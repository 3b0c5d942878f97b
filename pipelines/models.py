"""Networks from configs and from checkpoints; a gate is only ever put on the experts it was trained with."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from dataloaders.frames import FrameIndex
from engine.checkpoints import copy_tensors, load_weights, tensors_sha256, with_contents
from engine.config import Component, Data, Gate, Run, UserError, component, table_of
from engine.errors import blaming
from networks.complexity import parameters
from networks.moe import Frozen, MixtureOfExperts, gate_channels

NETWORKS = "networks:NETWORKS"
CLASSIFIERS = "networks:CLASSIFIERS"
# Arguments of a network that change how it is trained, not what it computes.
FREE_ARGUMENTS = ("pretrained", "checkpointing")


@dataclass(frozen=True)
class Trained:
    """A network as loaded from a run: in eval mode, its weights frozen, `sha256` over its tensors."""

    file: Path
    network: nn.Module
    metadata: dict
    sha256: str

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.metadata["classes"])


def weights_file(path: str | Path) -> Path:
    """The checkpoint of a run folder, or of the folder of an export; a checkpoint file stands for itself."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return path
    exported = path / "best.safetensors"
    return exported if exported.exists() else path / "checkpoints" / "best.safetensors"


def read_checkpoint(path: str, key: str) -> tuple[Path, dict, dict]:
    """(file, tensors, metadata). UserError naming the config key where nothing is trained there yet, or the file is
    damaged."""
    file = weights_file(path)
    if not file.exists():
        raise UserError(f"{key}: no checkpoint at {file}; train that network first")
    with blaming(key):
        return file, *load_weights(file)


def load_network(source: str | Component, key: str, classes: Sequence[str] = ()) -> Trained:
    """A trained expert or baseline: of a run folder or checkpoint, or an external network with weights of its own,
    which is taken to have these classes.

    Raises UserError for a missing or damaged file, and for a gate's."""
    if isinstance(source, Component):
        return load_external(source, classes, key)
    file, tensors, metadata = read_checkpoint(source, key)
    if "gate" in metadata:
        what = "a mixture" if "shared_encoder" in metadata else "a gate"
        raise UserError(f"{key}: {file} holds {what}, not a network; name the run of an expert or a baseline")
    network = stored_network(metadata).build(len(metadata["classes"]))
    load_tensors(network, tensors, f"{key}: {file}")
    return Trained(file, Frozen(network), metadata, tensors_sha256(tensors))


def load_classifier(source: str, key: str) -> Trained:
    """A trained classifier of a run folder, of the folder of an export, or of a checkpoint.

    Raises UserError for a missing or damaged file, and for one of segmentation."""
    file, tensors, metadata = read_checkpoint(source, key)
    arguments = dict(metadata.get("network") or {})
    name = arguments.pop("name", "gate")
    if name not in table_of(CLASSIFIERS):
        raise UserError(f"{key}: {file} holds a {name}, not a classifier; name a run of train_cnn_moe.py")
    network = component(CLASSIFIERS, name, **arguments).build(len(metadata["classes"]))
    load_tensors(network, tensors, f"{key}: {file}")
    return Trained(file, network.eval().requires_grad_(False), metadata, tensors_sha256(tensors))


def built_external(network: Component, num_classes: int, key: str) -> nn.Module:
    """The module of an external network, in evaluation mode; what is wrong is told at the key that names it."""
    try:
        return network.build(num_classes).eval()
    except UserError as error:
        raise UserError(re.sub(r"^network\.", f"{key}.", str(error))) from error


def load_external(network: Component, classes: Sequence[str], key: str) -> Trained:
    """A network that brings its own weights. What identifies it are its tensors and its section, where the contents of
    files stand for their paths."""
    module = built_external(network, len(classes), key)
    total, trained = parameters(module)
    metadata = {
        "classes": list(classes),
        "subsets": [],  # that it was trained on: unknown
        "network": network.plain(),
        "parameters": total,
        "trained_parameters": trained,
        "budget": {"images": None, "steps": None},
        "file_sha256": module.file_sha256,
        "tensors_sha256": tensors_sha256(module.state_dict()),
    }
    both = f"{json.dumps(contents_of(network), sort_keys=True)} {metadata['tensors_sha256']}"
    adaptive = hasattr(module, "gate_logits") or hasattr(module, "expert_logits")  # which Frozen would hide
    frozen = module.requires_grad_(False) if adaptive else Frozen(module)
    return Trained(Path(network.args["file"]), frozen, metadata, hashlib.sha256(both.encode()).hexdigest())


def contents_of(network: Component) -> dict:
    """The section of an external network, with the contents of the files that it names in place of their paths."""
    return {key: with_contents(value) for key, value in network.plain().items() if key != "sha256"}


def stored_network(metadata: dict) -> Component:
    """The network that a checkpoint describes; its weights come from there, nothing is to be downloaded."""
    arguments = dict(metadata["network"])
    return without_pretrained(component(NETWORKS, arguments.pop("name"), **arguments))


def without_pretrained(network: Component) -> Component:
    """The same network with first weights of its own."""
    bare = {"pretrained": "none"} if "pretrained" in network.args else {}
    return replace(network, args={**network.args, **bare})


def source_of(stored: str | dict) -> str | Component:
    """Where a checkpoint says that a network is from: a path as it is, a network section as a component."""
    if isinstance(stored, str):
        return stored
    arguments = dict(stored)
    return component(NETWORKS, arguments.pop("name"), **arguments)


def normalisation(network: nn.Module) -> dict:
    """What a checkpoint says of a network's own; nothing of one without."""
    own = getattr(network, "normalize", None)
    if own is None:
        return {}
    return {"normalisation": {"mean": own.mean.flatten().tolist(), "std": own.std.flatten().tolist()}}


def load_tensors(module: nn.Module, tensors: Mapping, where: str) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{where} doesn't fit its own description: {str(error).splitlines()[1].strip()}"
        ) from None


def build_mixture(experts: Mapping[str, Trained], gate: Gate) -> MixtureOfExperts:
    """A mixture with an untrained gate. Raises UserError for experts of different class lists."""
    first, *others = experts
    for name in others:
        require_classes(experts[name], experts[first].classes, f"experts.{name}", f"of experts.{first}")
    networks = {name: trained.network for name, trained in experts.items()}
    for name, network in networks.items():
        if gate.input == "features" and not network.feature_channels:
            raise UserError(
                f"experts.{name}: {experts[name].file} offers no features for a gate to read; set gate.input: logits "
                "or gate.input: image"
            )
    num_classes = len(experts[first].classes)
    head = gate.component.build(gate_channels(networks, num_classes, gate.input), len(networks), num_classes)
    return MixtureOfExperts(networks, head, num_classes, **mixture_arguments(gate))


def mixture_arguments(gate: Gate) -> dict:
    """The keys of a gate's section that say how the mixture is put together."""
    keys = ("conv", "conv_at", "mix", "input", "routing", "temperature", "calibrate")
    return {key: getattr(gate, key) for key in keys}


def load_gate(
    path: str, key: str, known: Mapping[str, Trained] | None = None
) -> tuple[Trained, dict[str, Trained]]:
    """A trained mixture and its experts by name; those among `known` are shared, not loaded again. The experts
    of a shared encoder come from the same file.

    Raises UserError, with both hashes, where an expert is not the one that the gate was trained with."""
    file, tensors, metadata = read_checkpoint(path, key)
    if "gate" not in metadata:
        raise UserError(f"{key}: {file} holds a network, not a gate; name the run of a gate")
    if "shared_encoder" in metadata:
        from pipelines.shared_encoder import from_checkpoint  # which takes parts of this module

        return from_checkpoint(file, tensors, metadata, f"{key}: {file}")
    by_hash = {trained.sha256: trained for trained in (known or {}).values()}
    experts = {}
    for expert in metadata["experts"]:
        trained = by_hash.get(expert["sha256"]) or load_network(
            source_of(expert["path"]), f"{key}: experts.{expert['name']}", metadata["classes"]
        )
        if trained.sha256 != expert["sha256"]:
            raise UserError(
                f"{key}: {file} was trained with another expert {expert['name']}: it had {expert['sha256'][:16]}, "
                f"{trained.file} is {trained.sha256[:16]}; train the gate again or give it its expert back"
            )
        experts[expert["name"]] = trained
    mixture = build_mixture(experts, Gate.model_validate(metadata["gate"]))
    copy_tensors(mixture.trainable_state(), tensors, f"{key}: {file}")
    return Trained(file, mixture.eval().requires_grad_(False), metadata, tensors_sha256(tensors)), experts


def start_from(run: Run, model: nn.Module, live: Mapping[str, Tensor], classes: tuple[str, ...]) -> None:
    """Copies the weights of train.start_from into the live tensors of an untrained network or mixture.

    Raises UserError where they belong to something else: a gate instead of a network, another architecture,
    other experts or classes."""
    key = "train.start_from"
    file, tensors, metadata = read_checkpoint(run.train.start_from, key)
    kinds = ("shared_encoder", "gate", "network")
    stored, wanted = (next(kind for kind in kinds if about.get(kind)) for about in (metadata, vars(run)))
    if stored != wanted:
        raise UserError(f"{key}: {file} holds a {stored}, and a {wanted} is to be trained; name another run")
    trained = Trained(file, model, metadata, metadata["tensors_sha256"])
    require_classes(trained, classes, key, f"of data {run.data.name}")
    if run.network and "network" in metadata:
        require_network(trained, run.network, key)
    if wanted != "network":
        experts = [one["name"] for one in metadata.get("experts", ())] or metadata[wanted]["decoders"]
        if experts != list(model.expert_names):
            raise UserError(
                f"{key}: {file} joins {', '.join(experts)}; here it is {', '.join(model.expert_names)}"
            )
    copy_tensors(live, tensors, f"{key}: {file}")


def require_network(trained: Trained, wanted: Component, key: str) -> None:
    """UserError where a network was built with other arguments that matter."""
    asked = wanted.plain()
    for name, stored in trained.metadata["network"].items():
        if name not in FREE_ARGUMENTS and stored != asked.get(name):
            raise UserError(
                f"{key}: {trained.file} was built with network.{name}: {stored}, the config says {asked.get(name)}"
            )


def require_home(trained: Trained, name: str, index: FrameIndex) -> None:
    """UserError where an expert has the name of one subset of the data and was trained on others alone: what is told of
    it, and where it is sent frames, would be another's."""
    home = trained.metadata["subsets"]
    if name in index.subsets and home and name not in home:
        raise UserError(
            f"experts.{name}: {trained.file} was trained on {', '.join(home)}, and {name} is another subset of data "
            f"{index.name}; name the run of {name}, or give this expert another name"
        )


def tell_other_frames(trained: Trained, key: str, data: Data) -> None:
    """Prints that a network was trained on frames of another size, or resized otherwise, than reach it here."""
    there = trained.metadata.get("config", {}).get("data", {})
    if not there:  # it brings its own weights
        return
    (height, width), resize = there["image_size"], there["resize"]
    if ((height, width), resize) != (tuple(data.image_size), data.resize):
        here = f"{data.image_size[0]}x{data.image_size[1]} ({data.resize})"
        print(
            f"warning: {key}: trained on frames of {height}x{width} ({resize}), here they reach it at {here}"
        )


def require_classes(trained: Trained, classes: tuple[str, ...], key: str, owner: str) -> None:
    """UserError where a network was trained on another class list."""
    if trained.classes == classes:
        return
    differing = [f"{a} / {b}" for a, b in zip(trained.classes, classes, strict=False) if a != b][:3]
    raise UserError(
        f"{key}: {trained.file} was trained on another class list ({len(trained.classes)} classes) than that {owner} "
        f"({len(classes)})" + (f"; first differences: {', '.join(differing)}" if differing else "")
    )
