"""Answers of two classifiers, and the folder that an evaluation of them writes."""

import csv
import math

import numpy as np

from evaluation.classifier_autoattack import AUTOATTACK
from evaluation.classifier_clean import About, Clean
from evaluation.classifier_tables import SUITE, write_classifier_tables
from evaluation.classifiers import Answers
from tests.evaluation import image_ledgers as made
from tests.evaluation.image_ledgers import LABELS, MOE, PLAIN

ABOUTS = {
    MOE: About("cnn_moe", 2000, 1100, 0.0123, 0.01, 0.0023, "advmoe", 0.004),
    PLAIN: About("cnn", 1000, 1000, 0.01, 0.01, 0.0, "trades"),
}


def clean():
    """The mixture has all but the last image right, of which expert 1 has every image wrong; the plain one all."""
    labels = np.array(LABELS)
    said = labels.copy()
    said[11] = 0
    ranked = np.stack([said, *((said + step) % 4 for step in (1, 2, 3))], axis=1)
    routes = np.array([[0]] * 9 + [[1]] * 3)
    moe = Answers(ranked, routes, np.stack([labels, (labels + 1) % 4], axis=1), labels)
    plain = np.stack([(labels + step) % 4 for step in range(4)], axis=1)
    return Clean(np.array(made.IMAGES), labels, tuple("abcd"), {MOE: moe, PLAIN: Answers(plain)}, "test")


def write(folder, names=(SUITE, AUTOATTACK)):
    ledgers = {}
    if SUITE in names:
        ledgers[SUITE] = made.suite(folder / "ledger")
    if AUTOATTACK in names:
        ledgers[AUTOATTACK] = made.auto(folder / "ledger_autoattack")
    write_classifier_tables(folder, clean(), ABOUTS, "toy", ledgers)
    return ledgers


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def exact_interval(hits, images, level=0.95):
    """Clopper-Pearson by halving: the p at which that many hits, or more extreme counts, have half of 1 - level."""

    def at_least(p, hits):
        return sum(math.comb(images, k) * p**k * (1 - p) ** (images - k) for k in range(hits, images + 1))

    def solved(wanted, hits):
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if at_least(middle, hits) < wanted else (low, middle)
        return low

    tail = (1 - level) / 2
    return (solved(tail, hits) if hits else 0.0, solved(1 - tail, hits + 1) if hits < images else 1.0)
