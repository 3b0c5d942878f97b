"""ImageNet (ILSVRC 2012): the Kaggle archive read in place, class folders, or an LMDB packed from either."""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from dataloaders.image_files import Labelled, by_class, classes_of, decoded, of_list, source_of
from dataloaders.image_lmdb import Packed, pack
from dataloaders.image_set import ImageSet, with_val
from engine.command import run
from engine.config import PositiveInt, UserError

KAGGLE = Path("ILSVRC") / "Data" / "CLS-LOC"
SOLUTION = "LOC_val_solution.csv"


def imagenet(
    cache_dir: str,
    *,
    root: str,
    edge: PositiveInt = 224,
    val_images: PositiveInt = 10000,
    val_seed: int = 0,
) -> ImageSet:
    """ImageNet, 1000 classes, decoded once, below cache_dir: 150 kB an image at 224x224.

    root: the unpacked Kaggle archive (ILSVRC/Data/CLS-LOC/train/WNID/*, a flat val/ and LOC_val_solution.csv); or
        train/WNID/* and val/WNID/*; or train.lmdb and val.lmdb, packed by python -m dataloaders.imagenet ROOT OUT.
    edge: images are decoded to edge x edge: the shorter edge is resized to it, then the middle is taken.
    val_images: taken out of train, as many of each class (rounded down); the official val, with labels, is our test.
    val_seed: of the choice of these.

    UserError for missing or damaged files, and for a val/ with other images than LOC_val_solution.csv."""
    base = Path(root)
    sources, files, classes = find(base)
    splits = {
        split: decoded(sources[split], own, edge, cache_dir, f"imagenet {split}")
        for split, own in files.items()
    }
    return with_val(ImageSet("imagenet", classes, splits), val_images, val_seed)


def find(base: Path) -> tuple[dict, dict[str, list[Labelled]], tuple[str, ...]]:
    """(source of train and of test, files of each, WordNet ids in alphabetical order)."""
    if (base / "train.lmdb").exists() and (base / "val.lmdb").exists():
        packed = {"train": Packed(base / "train.lmdb"), "test": Packed(base / "val.lmdb")}
        classes = packed["train"].classes
        if packed["test"].classes != classes:
            raise UserError(f"imagenet: train.lmdb and val.lmdb in {base} have other classes")
        return packed, {split: source.files for split, source in packed.items()}, classes
    data = base / KAGGLE if (base / KAGGLE).is_dir() else base
    train, held_out = source_of(data, "train"), source_of(data, "val")
    if train is None or held_out is None:
        raise UserError(
            f"imagenet: {base} holds neither {KAGGLE}/ (the Kaggle archive) nor train/ and val/, nor train.lmdb and "
            "val.lmdb"
        )
    classes = classes_of(train)
    solution = next((one for one in (base / SOLUTION, data / SOLUTION) if one.exists()), None)
    names = held_out.names()
    flat = not any("/" in name for name in names)
    if flat and solution is None:
        raise UserError(
            f"imagenet: {data / 'val'} has no class folders, and there is no {SOLUTION} in {base}"
        )
    test = solved(solution, classes, names) if flat else by_class(held_out, classes, "imagenet val")
    files = {"train": by_class(train, classes, "imagenet train"), "test": test}
    return {"train": train, "test": held_out}, files, classes


def solved(path: Path, classes: Sequence[str], names: Sequence[str]) -> list[Labelled]:
    """Lines ImageId,PredictionString: the first word of the latter is the class. UserError unless they are of `names`,
    the images that are there."""
    places, found = {wnid: place for place, wnid in enumerate(classes)}, []
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if lacking := {"ImageId", "PredictionString"} - set(rows.fieldnames or ()):
            raise UserError(
                f"{path}: column {' and '.join(sorted(lacking))} missing; expected ImageId,PredictionString"
            )
        for number, row in enumerate(rows, start=2):
            words = (row.get("PredictionString") or "").split()
            if not words or words[0] not in places:
                raise UserError(f"{path}:{number}: {words[:1]} is no class of train/")
            found.append(Labelled(f"{row['ImageId']}.JPEG", places[words[0]]))
    return of_list(sorted(found, key=lambda one: one.name), names, path)


def main(arguments: Sequence[str]) -> int:
    """Packs train and val of ROOT into OUT/train.lmdb and OUT/val.lmdb; one that is there whole stays."""
    parser = argparse.ArgumentParser(description="packs the files of ImageNet into two LMDBs, as they are")
    parser.add_argument(
        "root", metavar="ROOT", type=Path, help="the unpacked Kaggle archive, or class folders"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of train.lmdb and val.lmdb")
    given = parser.parse_args(arguments)
    sources, files, classes = find(given.root)
    for split, name in (("train", "train.lmdb"), ("test", "val.lmdb")):
        path = given.out / name
        if path.is_file() and Packed(path).holds(files[split], classes):
            print(f"{path}: is there already, with these {len(files[split])} images")
            continue
        pack(sources[split], files[split], classes, path)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
