"""Splits of recordings by blocks of neighbouring frames, with a guard gap between splits and between blocks of test."""

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from dataloaders.frames import SPLITS, Frame
from engine.config import UserError

SHARES = {"gate": 0.15, "val": 0.15, "test": 0.20}  # of the frames; train has the rest
DEALINGS = 200


def split_by_blocks(
    frames: Sequence[Frame],
    sequences: Sequence[str],
    numbers: Sequence[int],
    train_only: Collection[str],
    guard: int,
    seed: int,
    shares: Mapping[str, float] = SHARES,
) -> list[Frame]:
    """The frames with their split filled in, less those that the guard gap leaves out.

    A block (frame.block) goes to one split as a whole. Blocks in `train_only` go to train; the others of each
    subset are dealt in the order of a hash of (seed, block), so that every split gets its share of their
    frames. Two frames of one sequence in different splits are more than `guard` frame numbers apart: where
    they are not, the frame of the split that stands earlier in train, gate, val, test is left out. So are two
    frames in different blocks of test, which intervals take for independent: there the later frame is left
    out. Of 200 dealings that leave frames of every subset in every split, the one is taken that loses the fewest.

    sequences, numbers: recording and frame number of each frame. shares: of the frames, for gate, val and test.
    Raises UserError where no dealing does, for too few blocks or too wide a gap."""
    sizes = Counter(frame.block for frame in frames)
    blocks = list(sizes)
    subsets: dict[str, Counter] = {block: Counter() for block in blocks}
    for frame in frames:
        subsets[frame.block][frame.subset] += 1
    dealt: dict[str, list[str]] = {}
    for block in blocks:
        if block not in train_only:
            dealt.setdefault(subsets[block].most_common(1)[0][0], []).append(block)
    position = {block: number for number, block in enumerate(blocks)}
    block_of = np.array([position[frame.block] for frame in frames])
    subset_names, subset_of = np.unique([frame.subset for frame in frames], return_inverse=True)
    recordings = [np.flatnonzero(np.array(sequences) == sequence) for sequence in dict.fromkeys(sequences)]

    best = None
    for dealing in range(DEALINGS):
        splits = dict.fromkeys(train_only, "train")
        for members in dealt.values():
            splits |= deal(members, sizes, f"{seed}/{dealing}", shares)
        ranks = np.array([SPLITS.index(splits[block]) for block in blocks])[block_of]
        near = too_near(ranks, np.array(numbers), recordings, guard)
        kept = ~(near | touching(ranks, np.array(numbers), block_of, recordings, guard))
        filled = len({*zip(subset_of[kept], ranks[kept], strict=True)}) == len(subset_names) * len(SPLITS)
        if filled and (best is None or kept.sum() > best[1].sum()):
            best = ranks, kept
    if best is None:
        raise UserError(
            f"no split by blocks leaves frames of every subset in all of {', '.join(SPLITS)}: {len(blocks)} "
            f"blocks, a guard gap of {guard} frame numbers; make the gap (data.guard) smaller"
        )
    return [
        replace(frame, split=SPLITS[rank]) for frame, rank, stays in zip(frames, *best, strict=True) if stays
    ]


def deal(
    blocks: Sequence[str], sizes: Counter, key: str, shares: Mapping[str, float] = SHARES
) -> dict[str, str]:
    """Block -> split for the blocks of one subset: test, val and gate in turn take theirs, train the rest."""
    order = sorted(blocks, key=lambda block: hashlib.sha256(f"{key}/{block}".encode()).digest())
    total = sum(sizes[block] for block in blocks)
    splits = {}
    for split in reversed(SPLITS[1:]):
        taken = 0
        while order and (taken == 0 or taken + sizes[order[0]] / 2 <= shares[split] * total):
            splits[order[0]] = split
            taken += sizes[order.pop(0)]
    return splits | dict.fromkeys(order, "train")


def too_near(
    ranks: np.ndarray, numbers: np.ndarray, recordings: Sequence[np.ndarray], guard: int
) -> np.ndarray:
    """bool [N]: frames at most `guard` numbers from one of a later split (higher rank) in their recording.

    recordings: for each one the indices of its frames."""
    near = np.zeros(len(ranks), dtype=bool)
    for members in recordings:
        for rank in range(1, len(SPLITS)):
            later = np.sort(numbers[members[ranks[members] == rank]])
            earlier = members[ranks[members] < rank]
            first = np.searchsorted(later, numbers[earlier] - guard)
            last = np.searchsorted(later, numbers[earlier] + guard, side="right")
            near[earlier] |= last > first
    return near


def touching(
    ranks: np.ndarray, numbers: np.ndarray, blocks: np.ndarray, recordings: Sequence[np.ndarray], guard: int
) -> np.ndarray:
    """bool [N]: frames of test at most `guard` numbers after one, itself not such, of another block of test."""
    near = np.zeros(len(ranks), dtype=bool)
    for members in recordings:
        test = members[ranks[members] == SPLITS.index("test")]
        # block and number of the last frame that stays, and of the last that stays of another block than this
        last = before = (-1, -math.inf)
        for frame in test[np.argsort(numbers[test], kind="stable")]:
            other = before if blocks[frame] == last[0] else last
            near[frame] = numbers[frame] - other[1] <= guard
            if not near[frame]:
                last, before = (blocks[frame], numbers[frame]), other
    return near
