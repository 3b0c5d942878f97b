"""Write a trained classifier as a plain CNN: python -m pipelines.export RUN [--pathway E] --out FOLDER [--onnx].

Of a mixture one pathway: expert E at all of its sites. Where it routes by stage or layer, or mixes its best experts,
few images, or none, take that way; a line tells so."""

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.checkpoints import atomic_write, save_weights
from engine.command import run
from engine.config import UserError
from networks.cnn_moe.sparse import SparseCNN
from networks.complexity import parameters
from pipelines.models import Trained, load_classifier

WEIGHTS, GRAPH = "best.safetensors", "model.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # the extra `export`
OLDEST_OPSET = 18  # the exporter writes no older one, whatever it is asked for
LARGEST_GAP = 1e-4  # between torch and onnxruntime, of the range of the logits
PLAIN = ("arch", "ratio", "stem", "enlarge", "mean", "std")  # arguments of a cnn


@dataclass(frozen=True)
class Exported:
    """network: the plain CNN that best.safetensors holds; graph: what model.onnx is made of, with the same logits;
    arguments: of the network as a component; notes: for people."""

    network: nn.Module
    graph: nn.Module
    arguments: dict
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graph:
    """An ONNX file as bytes; gap: its largest difference from torch; spread: of the logits, largest less smallest."""

    data: bytes
    opset: int
    gap: float
    spread: float


def export(
    run: str,
    folder: Path,
    *,
    pathway: int | None = None,
    onnx: bool = False,
    opset: int | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Writes best.safetensors, and with `onnx` model.onnx, into the folder; returns what is to be told. Nothing is
    written before all is known to be right. UserError for a wrong pathway, a folder that is there (without overwrite)
    or holds something else, a missing package, and an ONNX graph with other logits."""
    if onnx:
        require_packages(opset)
    trained = load_classifier(run, "RUN")
    check_folder(folder, trained.file, overwrite)
    exported = plain_network(trained, pathway)
    size = image_size(trained)
    graph = onnx_graph(exported, size, opset) if onnx else None
    remove(folder / GRAPH)  # it is of other weights
    save_weights(folder / WEIGHTS, exported.network.state_dict(), about(trained, exported, pathway))
    told = [*exported.notes, f"{folder / WEIGHTS}: {parameters(exported.network)[0]:,} parameters"]
    if graph:
        atomic_write(folder / GRAPH, graph.data)
        told.append(
            f"{folder / GRAPH}: opset {graph.opset}, {parameters(exported.graph)[0]:,} parameters, largest difference "
            f"from torch {graph.gap:.1e} of logits that range over {graph.spread:.3g}"
        )
    return told


def plain_network(trained: Trained, pathway: int | None) -> Exported:
    """The plain CNN in a classifier: a pathway of a mixture; itself; of a sparse network the CNN of full width whose
    pruned filters are 0, for no other plain CNN has its widths, while its graph is without these filters."""
    network, stored = trained.network, trained.metadata["network"]
    arguments = {"name": "cnn", **{key: stored[key] for key in PLAIN if key in stored}}
    if hasattr(network, "pathway"):
        if pathway is None:
            raise UserError(
                f"--pathway: missing; {trained.file} holds a mixture of {network.num_experts}: 0 to "
                f"{network.num_experts - 1}"
            )
        plain = network.pathway(pathway)
        return Exported(plain, plain, arguments, other_ways(network, pathway))
    if pathway is not None:
        raise UserError(f"--pathway: {trained.file} holds a {stored['name']}, which has none; leave it out")
    if isinstance(network, SparseCNN):
        note = f"pruned filters are 0 in {WEIGHTS}, a cnn of full width, and left out of {GRAPH}"
        return Exported(network.folded(), network.kept(), {**arguments, "ratio": 1.0}, (note,))
    return Exported(network, network, arguments)


def other_ways(mixture: nn.Module, pathway: int) -> tuple[str, ...]:
    """Where not every image takes a single pathway, what this one is."""
    sites, granularity = mixture.router.sites, mixture.body.granularity
    if granularity == "model" and mixture.routing == "hard":
        return ()
    why = f"routes for each {granularity}" if granularity != "model" else "mixes its best experts"
    where = f" at all {sites} sites" if sites > 1 else ""
    return (f"the mixture {why}: pathway {pathway} is expert {pathway}{where}, for every image",)


def about(trained: Trained, exported: Exported, pathway: int | None) -> dict:
    """Metadata that make best.safetensors a network `cnn`, and tell where it is from."""
    source = trained.metadata
    origin = {
        key: source[key] for key in ("config", "network", "start_from", "exported_from") if key in source
    }
    return {
        **{key: source[key] for key in ("classes", "data", "epoch", "steps", "images_seen") if key in source},
        "image_size": list(image_size(trained)),
        "network": exported.arguments,
        "parameters": parameters(exported.network)[0],
        "exported_from": {
            **origin,
            "path": str(trained.file),
            "pathway": pathway,
            "tensors_sha256": trained.sha256,
        },
    }


def image_size(trained: Trained) -> tuple[int, int, int]:
    """Channels, height and width of the images that it was trained on."""
    if not trained.metadata.get("image_size"):
        raise UserError(f"RUN: {trained.file} doesn't tell the size of its images; train that network again")
    return tuple(trained.metadata["image_size"])


def check_folder(folder: Path, source: Path, overwrite: bool) -> None:
    """UserError where the folder may not be filled."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {folder} should become a folder, but is a file")
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if found and not overwrite:
        raise UserError(f"--out: {folder} is not empty; replace what is there (--overwrite), or name another")
    others = [name for name in found if name not in (WEIGHTS, GRAPH)]
    if others:
        raise UserError(
            f"--out: {folder} holds other things than an export ({', '.join(others[:3])}); name another"
        )
    if found and (folder / WEIGHTS).resolve() == source.resolve():
        raise UserError(f"--out: {folder} holds RUN itself; name another")


def remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{file}: can't be replaced: {error.strerror}") from error


def require_packages(opset: int | None) -> None:
    """UserError with the command that installs them where packages for ONNX are missing, and for an opset that the
    exporter doesn't write."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx: needs {', '.join(missing)}: pip install {' '.join(PACKAGES)}")
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise UserError(f"--opset: {opset} is wrong; expected {OLDEST_OPSET} to {newest}")


@torch.no_grad()
def onnx_graph(exported: Exported, size: tuple[int, int, int], opset: int | None) -> Graph:
    """A graph images [batch, C, H, W] in [0, 1] -> logits [batch, classes], run by onnxruntime on other numbers of
    images than it was traced with. UserError where its logits are not those of the network in torch."""
    import onnx
    import onnxruntime

    dice = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            exported.graph.eval(),
            (torch.rand(2, *size, generator=dice),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=opset,
            verbose=False,
        )
    proto = program.model_proto
    data = proto.SerializeToString()
    onnx.checker.check_model(data)
    found = next(one.version for one in proto.opset_import if not one.domain)
    if opset not in (None, found):
        raise UserError(f"--opset: {opset} can't be written, the exporter gave {found}; leave it out")
    try:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"--onnx: onnxruntime can't run opset {found}; try a lower --opset ({reason})"
        ) from error
    gap, logits = 0.0, []
    for count in (1, 7):
        images = torch.rand(count, *size, generator=dice)
        logits.append(exported.network(images))
        (answer,) = session.run(None, {"images": images.numpy()})
        gap = max(gap, largest_gap(torch.from_numpy(answer), logits[-1]))
    logits = torch.cat(logits)
    spread = (logits.max() - logits.min()).item()
    if not gap <= LARGEST_GAP * spread:  # NaN is not
        raise UserError(
            f"--onnx: the graph's logits differ from torch by {gap:.1e}, and they range over {spread:.3g}; "
            f"at most {LARGEST_GAP:.0e} of that is allowed, nothing was written"
        )
    return Graph(data, found, gap, spread)


def largest_gap(logits: Tensor, others: Tensor) -> float:
    """inf where one is not finite."""
    gap = (logits - others).abs().max().item()
    return gap if gap == gap else float("inf")


def main(argv: Sequence[str]) -> int:
    given = _parser().parse_args(argv)
    told = export(
        given.run,
        Path(given.out),
        pathway=given.pathway,
        onnx=given.onnx,
        opset=given.opset,
        overwrite=given.overwrite,
    )
    print("\n".join(told))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.export", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", help="run folder or checkpoint of a classifier")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="the folder to write")
    parser.add_argument("--pathway", metavar="E", type=int, help="of a mixture: the expert, from 0")
    parser.add_argument("--onnx", action="store_true", help=f"write {GRAPH} too, checked by onnxruntime")
    parser.add_argument("--opset", metavar="N", type=int, help="of ONNX; default: the exporter's")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
