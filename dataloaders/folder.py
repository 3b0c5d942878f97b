"""Anybody's data: a folder of images, one of id masks, classes.json, and a CSV that names the frames."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

from dataloaders.blocks import SHARES, split_by_blocks
from dataloaders.frames import SPLITS, Frame, FrameIndex
from dataloaders.manifest import Manifest, read_classes
from dataloaders.masks import id_table, no_unknown_values, read_id_mask, refuse_kitti
from engine.config import NonNegativeInt, UserError

BLOCK_LENGTH = 10
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG")
ANY_ENDING = ".{png,jpg,jpeg}"  # stands in messages for that of an image which isn't there


def folder(
    *,
    root: str,
    images: str = "images",
    labels: str = "labels",
    manifest: str = "manifest.csv",
    classes: str = "classes.json",
    name_column: str = "name",
    subset_column: str = "subset",
    split_by: Literal["column", "blocks"] = "column",
    split_column: str = "split",
    sequence_column: str | None = None,
    block_column: str | None = None,
    train_only: str | None = None,
    guard: NonNegativeInt = 0,
    split_seed: NonNegativeInt = 304,
    split_shares: dict[str, float] | None = None,
) -> FrameIndex:
    """The frames of `manifest`: root/images/NAME.png (.jpg, .jpeg, in capitals too) with the id mask
    root/labels/NAME.png, of the same size, one channel of 8 or 16 bits.

    root: folder of the data; the other paths are below it or absolute.
    images, labels: folders of the images and of the id masks.
    manifest: CSV file with a header and one row a frame.
    classes: JSON list of {"id", "name", "color": [r, g, b], "ignore": bool}; 255 in a mask is always ignored.
    name_column, subset_column: columns of the frame's name and of its subset.
    split_by: column: `split_column` says train, gate, val or test; rows that leave it empty are not used.
        blocks: blocks of neighbouring frames are dealt to the splits, as blocks.split_by_blocks describes.
    split_column: column of the split, for split_by: column.
    sequence_column: column of the recording; without it every image is a recording of its own, independent of
        all others: of frames of one drive intervals come out too narrow then, and shared recordings stay unseen.
    block_column: column of the block; without it a block is 10 consecutive rows of a sequence.
    train_only: "COLUMN=VALUE", for split_by: blocks: in each sequence the blocks with such rows are one unit
        that goes to train. Meant for clips of nearly identical frames.
    guard: for split_by: blocks: frames of different splits, and of different blocks of test, are more than this
        many frame numbers apart; the number of a frame is what its name ends in.
    split_seed: for split_by: blocks: changes how the blocks are dealt.
    split_shares: for split_by: blocks: the shares of gate, val and test, {gate: 0.15, val: 0.15, test: 0.2} where
        they are not given; train has the rest.

    Frame.scene is the sequence or, with split_by: blocks, the block. Raises UserError for missing or
    malformed files, columns and values, with file:line."""
    base = Path(root)
    if not base.is_dir():
        raise UserError(f"folder: there is no folder {base} (data.root)")
    if not (base / manifest).exists():
        refuse_kitti("folder", base)
    if split_by == "blocks" and sequence_column is None:
        raise UserError("folder: split_by: blocks needs sequence_column, the column of the recording")
    if split_by == "column" and (train_only or guard or split_shares or split_seed != 304):
        raise UserError("folder: train_only, guard, split_shares and split_seed are for split_by: blocks")
    shares = check_shares(split_shares or SHARES)
    names, palette, ids = read_classes(base / classes)
    rows = Manifest(base / manifest)
    sequences = rows.column(sequence_column or name_column)
    if "all" in rows.column(subset_column):
        line = rows.column(subset_column).index("all") + 2
        raise UserError(f"{rows.path}:{line}: a subset can't be named all, which stands for all of them")
    blocks = block_names(sequences, rows.column(block_column) if block_column else None)
    fields = rows.column(name_column), rows.column(subset_column), sequences, blocks
    files_of = cache(list_files)  # one listing of a folder instead of a look at every file
    frames = []
    for name, subset, sequence, block in zip(*fields, strict=True):
        image, label = find_image(base / images, name, files_of), base / labels / f"{name}.png"
        frames.append(Frame(name, image, label, subset, "", sequence, block))
    if split_by == "column":
        frames, note = take_splits(frames, rows, split_column)
    else:
        frames, note = make_splits(frames, rows, train_only, guard, split_seed, shares)
    if not (sequence_column or block_column):
        note += (
            "; no sequence_column or block_column says which frames belong to one recording: each counts as "
            "independent, and of frames that are not the intervals come out too narrow"
        )
    return FrameIndex(
        name="folder",
        root=base,
        classes=names,
        palette=palette,
        frames=tuple(frames),
        read_label=partial(read_id_mask, table=id_table(ids)),
        unknown_values=no_unknown_values,
        label_map=f"folder {hashlib.sha256(repr((names, sorted(ids.items()))).encode()).hexdigest()[:16]}",
        notes=(note,),
    )


def block_names(sequences: list[str], blocks: list[str] | None) -> list[str]:
    """The block of each row as SEQUENCE/BLOCK; where none are told, 10 consecutive rows of a sequence."""
    if blocks is None:
        seen: Counter = Counter()
        blocks = []
        for sequence in sequences:
            blocks.append(str(seen[sequence] // BLOCK_LENGTH))
            seen[sequence] += 1
    return [f"{sequence}/{block}" for sequence, block in zip(sequences, blocks, strict=True)]


def find_image(images: Path, name: str, files_of: Callable[[Path], set[str]]) -> Path:
    """The image of that name, whatever its ending. One that is not there is found missing when it is read."""
    wanted = images / name
    there = files_of(wanted.parent)
    endings = [ending for ending in IMAGE_ENDINGS if f"{wanted.name}{ending}" in there]
    if len(endings) > 1:
        raise UserError(f"{wanted}: there are {len(endings)} images of this name ({', '.join(endings)})")
    return wanted.with_name(wanted.name + (endings[0] if endings else ANY_ENDING))


def list_files(path: Path) -> set[str]:
    return set(os.listdir(path)) if path.is_dir() else set()


def take_splits(frames: list[Frame], rows: Manifest, column: str) -> tuple[list[Frame], str]:
    """The frames for which the column tells a split, and a note on the number of the others."""
    splits = rows.column(column, empty=True)
    for position, split in enumerate(splits):
        if split and split not in SPLITS:
            raise UserError(
                f"{rows.line(position)}: {column} is {split!r}; allowed: {', '.join(SPLITS)} or empty"
            )
    used = [replace(frame, split=split) for frame, split in zip(frames, splits, strict=True) if split]
    note = f"split by column {column!r}: {len(frames) - len(used)} of {len(frames)} frames have no split"
    return used, note


def check_shares(shares: Mapping[str, float]) -> Mapping[str, float]:
    """The shares themselves. Raises UserError where they are not gate, val and test, or leave nothing to train."""
    fit = set(shares) == set(SHARES) and min(shares.values()) > 0 and sum(shares.values()) < 1
    if not fit:
        raise UserError(
            f"folder: split_shares takes {', '.join(SHARES)}, each above 0, together below 1 (train has the rest); "
            f"found {dict(shares)}"
        )
    return shares


def make_splits(
    frames: list[Frame],
    rows: Manifest,
    train_only: str | None,
    guard: int,
    seed: int,
    shares: Mapping[str, float],
) -> tuple[list[Frame], str]:
    """The frames dealt to splits by blocks, which become their scenes, and a note on the frames left out."""
    sequences = [frame.scene for frame in frames]
    units: dict[str, str] = {}
    if train_only:
        column, _, value = train_only.partition("=")
        marked = [told == value for told in rows.column(column, empty=True)]
        if not any(marked):
            raise UserError(f"{rows.path}: no row has {train_only} (data.train_only)")
        units = {
            frame.block: f"{frame.scene}/{train_only}"
            for frame, mark in zip(frames, marked, strict=True)
            if mark
        }
    frames = [replace(frame, block=units.get(frame.block, frame.block)) for frame in frames]
    numbers = frame_numbers(frames, rows)
    kept = split_by_blocks(frames, sequences, numbers, set(units.values()), guard, seed, shares)
    note = (
        f"split by {len({frame.block for frame in frames})} blocks, seed {seed}: {len(frames) - len(kept)} "
        f"of {len(frames)} frames are left out by the guard gap of {guard} frame numbers"
    )
    return [replace(frame, scene=frame.block) for frame in kept], note


def frame_numbers(frames: list[Frame], rows: Manifest) -> list[int]:
    """The number that each name ends in. Raises UserError for a name without one."""
    numbers = []
    for position, frame in enumerate(frames):
        match = re.search(r"\d+$", frame.name)
        if match is None:
            raise UserError(
                f"{rows.line(position)}: {frame.name!r} ends in no frame number; split_by: blocks needs it"
            )
        numbers.append(int(match[0]))
    return numbers
