"""TinyImageNet (Stanford CS231N): 200 classes of 64x64, read in place from its own layout."""

from collections.abc import Sequence
from pathlib import Path

from dataloaders.image_files import Labelled, by_class, classes_of, decoded, of_list, source_of
from dataloaders.image_set import ImageSet, with_val
from engine.config import PositiveInt, UserError

EDGE = 64


def tiny_imagenet(
    cache_dir: str, *, root: str, val_images: PositiveInt = 2000, val_seed: int = 0
) -> ImageSet:
    """TinyImageNet, 64x64, decoded once, below cache_dir.

    root: the unpacked tiny-imagenet-200: wnids.txt, train/WNID/images/*.JPEG, val/images/*.JPEG with
        val/val_annotations.txt; or val/WNID/*, and archives train.tar.gz and val.tar.gz, with any number of classes.
    val_images: taken out of train, as many of each class (rounded down); the official val, with labels, is our test.
    val_seed: of the choice of these.

    UserError for missing or damaged files, and for a val/ with other images than val_annotations.txt."""
    base = Path(root)
    train, held_out = source_of(base, "train"), source_of(base, "val")
    if train is None or held_out is None:
        raise UserError(
            f"tiny_imagenet: {base} needs train/ and val/ (or .tar.gz of them), as in tiny-imagenet-200"
        )
    wnids = class_ids(base, train)
    files = {"train": by_class(train, wnids, "tiny_imagenet train")}
    annotations = base / "val" / "val_annotations.txt"
    if annotations.exists():
        files["test"] = annotated(annotations, wnids, held_out.names())
    else:
        files["test"] = by_class(held_out, wnids, "tiny_imagenet val")
    sources = {"train": train, "test": held_out}
    splits = {
        split: decoded(sources[split], own, EDGE, cache_dir, f"tiny_imagenet {split}")
        for split, own in files.items()
    }
    return with_val(ImageSet("tiny_imagenet", wnids, splits), val_images, val_seed)


def class_ids(base: Path, train) -> tuple[str, ...]:
    """WordNet ids in alphabetical order: those of wnids.txt, else the folders of train."""
    if (base / "wnids.txt").exists():
        return tuple(sorted((base / "wnids.txt").read_text().split()))
    return classes_of(train)


def annotated(path: Path, wnids: tuple[str, ...], names: Sequence[str]) -> list[Labelled]:
    """Lines of FILE <tab> WNID <tab> box. UserError unless they are of `names`, the images that are there."""
    places, found = {wnid: place for place, wnid in enumerate(wnids)}, []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        name, _, rest = line.partition("\t")
        wnid = rest.split("\t")[0]
        if wnid not in places:
            raise UserError(f"{path}:{number}: {wnid!r} is no class of wnids.txt")
        found.append(Labelled(f"images/{name}", places[wnid]))
    return of_list(found, names, path)
