"""Networks from configs and from checkpoints; a gate is only ever put on the experts it was trained with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from engine.checkpoints import load_weights, tensors_sha256
from engine.config import Component, Gate, UserError, component
from networks.moe import Frozen, MixtureOfExperts, gate_channels

NETWORKS = "networks:NETWORKS"


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
    """The checkpoint of a run folder; a checkpoint file stands for itself."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / "checkpoints" / "best.safetensors"


def read_checkpoint(path: str, key: str) -> tuple[Path, dict, dict]:
    """(file, tensors, metadata). UserError naming the config key where nothing is trained there yet."""
    file = weights_file(path)
    if not file.exists():
        raise UserError(f"{key}: no checkpoint at {file}; train that network first")
    return file, *load_weights(file)


def load_network(path: str, key: str) -> Trained:
    """A trained expert or baseline. Raises UserError for a missing or damaged file, and for a gate's."""
    file, tensors, metadata = read_checkpoint(path, key)
    if "gate" in metadata:
        what = "a mixture" if "shared_encoder" in metadata else "a gate"
        raise UserError(f"{key}: {file} holds {what}, not a network; name the run of an expert or a baseline")
    network = stored_network(metadata).build(len(metadata["classes"]))
    load_tensors(network, tensors, f"{key}: {file}")
    return Trained(file, Frozen(network), metadata, tensors_sha256(tensors))


def stored_network(metadata: dict) -> Component:
    """The network that a checkpoint describes; its weights come from there, nothing is to be downloaded."""
    arguments = dict(metadata["network"])
    if "pretrained" in arguments:
        arguments["pretrained"] = "none"
    return component(NETWORKS, arguments.pop("name"), **arguments)


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
            expert["path"], f"{key}: experts.{expert['name']}"
        )
        if trained.sha256 != expert["sha256"]:
            raise UserError(
                f"{key}: {file} was trained with another expert {expert['name']}: it had {expert['sha256'][:16]}, "
                f"{trained.file} is {trained.sha256[:16]}; train the gate again or give it its expert back"
            )
        experts[expert["name"]] = trained
    mixture = build_mixture(experts, Gate.model_validate(metadata["gate"]))
    try:
        mixture.load_trainable_state(tensors)
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"{key}: {file} doesn't fit its own description: {str(error).splitlines()[-1].strip()}"
        ) from None
    return Trained(file, mixture.eval().requires_grad_(False), metadata, tensors_sha256(tensors)), experts


def require_classes(trained: Trained, classes: tuple[str, ...], key: str, owner: str) -> None:
    """UserError where a network was trained on another class list."""
    if trained.classes == classes:
        return
    differing = [f"{a} / {b}" for a, b in zip(trained.classes, classes, strict=False) if a != b][:3]
    raise UserError(
        f"{key}: {trained.file} was trained on another class list ({len(trained.classes)} classes) than that {owner} "
        f"({len(classes)})" + (f"; first differences: {', '.join(differing)}" if differing else "")
    )
