"""Cityscapes (Cordts et al. 2016) in its official layout; subsets and splits by city."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dataloaders.frames import IGNORE, SPLITS, Frame, FrameIndex
from dataloaders.masks import id_table, no_unknown_values, read_id_mask, refuse_kitti
from engine.config import UserError

# Label id, name and colour of the 19 classes that count; the other ids of 0..33 are ignored.
CLASSES = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
LABEL_IDS = 34

# Cities of the official train split that are kept for the gate (492 frames) and for validation (315 frames).
GATE_CITIES = ("cologne", "stuttgart", "weimar")
VAL_CITIES = ("hanover", "jena")

BLOCK_LENGTH = 10
IMAGE_ENDING, LABEL_ENDING = "_leftImg8bit.png", "_gtFine_labelIds.png"


def cityscapes(
    *,
    root: str,
    cities: dict[str, list[str]] | None = None,
    gate_cities: list[str] | None = None,
    val_cities: list[str] | None = None,
) -> FrameIndex:
    """The finely annotated frames of root/leftImg8bit and root/gtFine, 19 classes.

    No city is in two splits: test is the official val split (the labels of the official test split are
    secret), and the cities of the official train split are shared out to train, gate and val.

    root: the folder that holds leftImg8bit and gtFine.
    cities: subset -> its cities; others are not used. Without it all cities are one subset, "city".
    gate_cities: cities of the official train split for the gate; default cologne, stuttgart, weimar.
    val_cities: cities of the official train split for validation; default hanover, jena.

    Frame.scene is the city, Frame.block 10 consecutive frames of it. Raises UserError for a folder of another
    layout (KITTI by name), for a city that is not there, in two subsets or in two splits."""
    base = Path(root)
    if not base.is_dir():
        raise UserError(f"cityscapes: there is no folder {base} (data.root)")
    refuse_kitti("cityscapes", base)
    there = {part: cities_in(base / "leftImg8bit" / part) for part in ("train", "val")}
    if not there["train"] and not there["val"]:
        raise UserError(
            f"cityscapes: {base} has no leftImg8bit/train/CITY and no leftImg8bit/val/CITY (data.root)"
        )
    gate = chosen("gate_cities", gate_cities, GATE_CITIES, there["train"])
    val = chosen("val_cities", val_cities, VAL_CITIES, there["train"])
    if both := sorted(set(gate) & set(val)):
        raise UserError(
            f"cityscapes: {', '.join(both)} stands in gate_cities and in val_cities; allowed: one of them"
        )
    split_of = (
        dict.fromkeys(there["train"], "train") | dict.fromkeys(gate, "gate") | dict.fromkeys(val, "val")
    )
    split_of |= dict.fromkeys(there["val"], "test")
    frames = [
        frame
        for subset, members in subset_cities(cities, list(split_of)).items()
        for city in members
        for frame in city_frames(
            base, "val" if city in there["val"] else "train", city, subset, split_of[city]
        )
    ]
    ids = dict.fromkeys(range(LABEL_IDS), IGNORE) | {
        label: number for number, (label, _, _) in enumerate(CLASSES)
    }
    return FrameIndex(
        name="cityscapes",
        root=base,
        classes=tuple(name for _, name, _ in CLASSES),
        palette=tuple(colour for _, _, colour in CLASSES),
        frames=tuple(sorted(frames, key=lambda frame: SPLITS.index(frame.split))),
        read_label=partial(read_id_mask, table=id_table(ids)),
        unknown_values=no_unknown_values,
        label_map="cityscapes 19 train ids",
    )


def cities_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def chosen(key: str, given: list[str] | None, default: Sequence[str], there: list[str]) -> list[str]:
    """The given cities, or those of the default that are there. UserError for a given one that is not."""
    if given is None:
        return [city for city in default if city in there]
    if missing := [city for city in given if city not in there]:
        raise UserError(
            f"cityscapes: {key}: there is no {missing[0]!r} in train; there are {', '.join(there)}"
        )
    return given


def subset_cities(cities: dict[str, list[str]] | None, there: list[str]) -> dict[str, list[str]]:
    """Subset -> cities. UserError for a city that is not there or stands in two subsets."""
    if cities is None:
        return {"city": there}
    named = [city for members in cities.values() for city in members]
    if missing := [city for city in named if city not in there]:
        raise UserError(f"cityscapes: cities: there is no {missing[0]!r}; there are {', '.join(there)}")
    if twice := [city for city in named if named.count(city) > 1]:
        raise UserError(f"cityscapes: cities: {twice[0]!r} stands in two subsets; allowed: one")
    return cities


def city_frames(base: Path, part: str, city: str, subset: str, split: str) -> list[Frame]:
    """The frames of a city, from the official split `part` on disk, in the order of the recording."""
    images = sorted((base / "leftImg8bit" / part / city).glob(f"*{IMAGE_ENDING}"))
    names = [image.name.removesuffix(IMAGE_ENDING) for image in images]
    labels = base / "gtFine" / part / city
    return [
        Frame(
            name,
            image,
            labels / f"{name}{LABEL_ENDING}",
            subset,
            split,
            city,
            f"{city}/{position // BLOCK_LENGTH}",
        )
        for position, (name, image) in enumerate(zip(names, images, strict=True))
    ]
