"""Where experts agree, whom a combination of them follows, and who is right there: counts of pixels."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.config import IGNORE

# All experts say the same class, and so does the combination, or it contradicts them; experts differ, and the
# combination says what at least one of them says, or what none does. Each pixel is in exactly one of them.
CASES = ("agree, followed", "agree, contradicted", "differ, one followed", "differ, own answer")
FOLLOWED, CONTRADICTED, ONE_FOLLOWED, OWN_ANSWER = range(4)
TIED = 4  # parts of cases that are counted as well; part 5 + e: the experts differ, and e is followed

# What `case_map` tells apart: the first three; 3 + e: e alone is followed; 3 + E: several who agree are.
AGREED, AGAINST_ALL, OWN, FIRST_ALONE = range(4)
UNLABELLED = 255

_AGREE_CODES = 12  # 4 * (followed, contradicted, tied) + 2 * (combination right) + (experts right)


def count_cases(
    answers: Tensor, experts: Tensor, labels: Tensor, tied: Tensor, num_classes: int
) -> np.ndarray:
    """Pixels of each case, int64 [R, B, K, 5 + E, 2 + E], of R combinations of the same E >= 2 experts.

    answers [R, B, ...], experts [E, B, ...] and labels [B, ...] are class ids; `tied` [R, B, ...] is true where
    the combination's logit of its answer leads that of the experts' common answer by no more than rounding: there
    either class is its answer, so it is taken to follow (where the experts differ, tied says nothing). By image
    and class of the label; then by case: the four of CASES, which partition the labelled pixels; the pixels of
    the first one that are so by `tied` alone; those of the third one where expert e is followed (three experts
    and more: several may be at once). The last axis: pixels; those where the combination is right; those where
    expert e is.
    """
    codes, patterns = _codes(answers, experts, labels, tied)
    rows, images = answers.shape[:2]
    num_codes = _AGREE_CODES + 2 * patterns
    cells = rows * images * num_classes * num_codes
    index = torch.int32 if cells < 2**31 else torch.int64
    labels = labels.to(index)
    block = torch.arange(rows * images, device=codes.device, dtype=index).view(rows, images) * num_classes
    place = (block.view(rows, images, *[1] * (labels.dim() - 1)) + labels) * num_codes + codes
    ignored = (labels == IGNORE) | (labels < 0) | (labels >= num_classes)
    place.masked_fill_(ignored, cells)
    counts = torch.bincount(place.flatten(), minlength=cells + 1)[:cells].cpu().numpy()
    counts = counts.reshape(rows, images, num_classes, num_codes)
    return np.tensordot(counts, _meaning(len(experts)), axes=1)


def case_map(answers: Tensor, experts: Tensor, labels: Tensor, tied: Tensor) -> Tensor:
    """Case of each pixel, uint8 [R, B, ...], 255 without a label; arguments as of `count_cases`.

    0: agree, followed. 1: agree, contradicted. 2: differ, own answer. 3 + e: differ, expert e alone is
    followed. 3 + E: differ, several experts who agree are followed. `case_names` has the names in this order.
    """
    follows = answers == experts[:, None]  # [E, R, B, ...]
    count = follows.sum(dim=0)
    one = torch.where(count == 1, FIRST_ALONE + follows.to(torch.uint8).argmax(dim=0), OWN)
    differ = torch.where(count > 1, FIRST_ALONE + len(experts), one)
    agree = torch.where(follows[0] | tied, AGREED, AGAINST_ALL)
    case = torch.where((experts == experts[0]).all(dim=0), agree, differ)
    return torch.where(labels == IGNORE, UNLABELLED, case).to(torch.uint8)


def case_names(experts: Sequence[str]) -> list[str]:
    """Names of the cases 0, 1, ... of `case_map`."""
    names = ["experts agree, followed", "experts agree, contradicted", "experts differ, own answer"]
    names += [f"follows {expert}" for expert in experts]
    return names + (["follows several"] if len(experts) > 2 else [])


def _codes(answers: Tensor, experts: Tensor, labels: Tensor, tied: Tensor) -> tuple[Tensor, int]:
    """(a code of each pixel [R, B, ...], 3 ** E); `_meaning` says what a code stands for."""
    patterns = 3 ** len(experts)
    dtype = torch.uint8 if _AGREE_CODES + 2 * patterns < 256 else torch.int32
    right = (answers == labels).to(dtype)
    differ = torch.zeros_like(right)
    for place, expert in enumerate(experts):  # a digit each: 0 neither, 1 as the combination, 2 right instead
        follows = answers == expert
        differ += (follows.to(dtype) + 2 * ((expert == labels) & ~follows).to(dtype)) * 3**place
    differ += right * patterns + _AGREE_CODES
    relation = (answers != experts[0]).to(dtype) * (1 + tied.to(dtype))
    agree = 4 * relation + 2 * right + (experts[0] == labels).to(dtype)
    return torch.where((experts == experts[0]).all(dim=0), agree, differ), patterns


def _meaning(num_experts: int) -> np.ndarray:
    """What a pixel of each code counts for, int64 [codes, 5 + E, 2 + E]."""
    patterns = 3**num_experts
    meaning = np.zeros((_AGREE_CODES + 2 * patterns, TIED + 1 + num_experts, 2 + num_experts), np.int64)
    for code in range(_AGREE_CODES):
        relation, right, expert_right = code // 4, code // 2 % 2, code % 2
        who = np.array([1, right, *[expert_right] * num_experts])
        meaning[code, [FOLLOWED, CONTRADICTED, FOLLOWED][relation]] = who
        if relation == 2:
            meaning[code, TIED] = who
    for pattern in range(2 * patterns):
        right, digits = pattern // patterns, pattern % patterns // 3 ** np.arange(num_experts) % 3
        who = np.array([1, right, *np.where(digits == 1, right, digits == 2)])
        code = _AGREE_CODES + pattern
        meaning[code, ONE_FOLLOWED if (digits == 1).any() else OWN_ANSWER] = who
        meaning[code, TIED + 1 :][digits == 1] = who
    return meaning
