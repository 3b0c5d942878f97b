"""Where experts agree, where one of them is right, and where all are wrong, pixel by pixel."""

from collections.abc import Sequence

import numpy as np

AGREE_RIGHT, AGREE_WRONG, ALL_WRONG, FIRST_ALONE = 0, 1, 2, 3
UNLABELLED = 255


def disagreement(predictions: np.ndarray, labels: np.ndarray, ignore_index: int = 255) -> np.ndarray:
    """Case of each pixel, uint8 of the shape of `labels`; predictions [E, ...], E >= 2.

    0: all experts agree and are right. 1: all agree and are wrong. 2: all are wrong, with different answers.
    3 + e: only expert e is right. 3 + E: several, but not all, are right (three experts and more).
    255: no label. `case_names` gives the names in this order.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    num_experts = len(predictions)
    right = predictions == labels
    count = right.sum(axis=0)
    agree = (predictions == predictions[0]).all(axis=0)
    case = np.where(agree, AGREE_WRONG, ALL_WRONG)
    case = np.where(count == 1, FIRST_ALONE + right.argmax(axis=0), case)
    case = np.where(count > 1, FIRST_ALONE + num_experts, case)
    case = np.where(count == num_experts, AGREE_RIGHT, case)
    return np.where(labels == ignore_index, UNLABELLED, case).astype(np.uint8)


def case_names(experts: Sequence[str]) -> list[str]:
    """Names of the cases 0, 1, ... of `disagreement` for experts in the order of its predictions."""
    names = ["agree, right", "agree, wrong", "all wrong, differently"]
    names += [f"only {expert} right" for expert in experts]
    return names + (["several right"] if len(experts) > 2 else [])
