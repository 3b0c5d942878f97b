"""What an evaluation tells about its gates: their weights, whether these follow the light, and their regret."""

from collections.abc import Sequence

import numpy as np

from evaluation.ceilings import best_gate_of
from evaluation.results import Results
from metrics.confusion import aacc
from metrics.gate import gate_statistics, pearson, spearman
from metrics.gate_alarm import collapse_warning

GATE_COLUMNS = (
    "model", "subset", "class", "expert", "mean", "std", "entropy_of_mean", "mean_entropy", "entropy_max",
    "collapsed", "dead_share", "pearson_luma", "spearman_luma", "regret_aacc", "regret_miou", "n_images",
)  # fmt: skip


def gate_rows(results: Results, subsets: Sequence[str]) -> list[dict]:
    """Lines of gate.csv: statistics of every gate's weights per subset, class and expert.

    Class "" is the weight of the image: the mean over the classes where a gate has weights per class. Its lines
    also have the regret of the gate on the subset, and dead_share: the mean share of its hidden units that say nothing
    of an image. pearson_luma and spearman_luma correlate the weights with the mean luma of the images."""
    rows = []
    for name in results.names("gate"):
        for subset in subsets:
            mask = results.mask(subset)
            weights = results.weights[name][mask].astype(np.float64)  # [n, E, K]
            parts = [("", weights.mean(axis=2, keepdims=True))]
            if weights.shape[2] > 1:
                classes = results.protocol.classes
                parts += [(class_name, weights[:, :, [index]]) for index, class_name in enumerate(classes)]
            for class_name, part in parts:
                statistics = gate_statistics(part)
                about = {
                    "model": name,
                    "subset": subset,
                    "class": class_name,
                    "entropy_of_mean": float(statistics.entropy_of_mean[0]),
                    "mean_entropy": float(statistics.mean_entropy[0]),
                    "entropy_max": statistics.entropy_max,
                    "collapsed": int(statistics.collapsed[0]),
                    "n_images": statistics.images,
                }
                if not class_name:
                    if name in results.dead:
                        about["dead_share"] = float(results.dead[name][mask].mean(dtype=np.float64))
                    about |= {f"regret_{key}": value for key, value in regret(results, name, subset).items()}
                for index, expert in enumerate(results.row(name).experts):
                    series = part[:, index, 0], results.luma[mask]
                    correlations = {"pearson_luma": pearson(*series), "spearman_luma": spearman(*series)}
                    mean, std = float(statistics.mean[index, 0]), float(statistics.std[index, 0])
                    rows.append(about | {"expert": expert, "mean": mean, "std": std} | correlations)
    return rows


def collapse_warnings(results: Results, subsets: Sequence[str]) -> list[str]:
    """A sentence for every gate that gives nearly all of its weight to one expert over all images of the
    training subsets among `subsets`; of weights per class those of classes with ground truth there count."""
    trained = [subset for subset in subsets if subset in (*results.protocol.training_subsets, "all")]
    if not trained:
        return []
    mask = np.any([results.mask(subset) for subset in trained], axis=0)
    present = np.flatnonzero(results.truth[mask].sum(axis=0))
    warnings = []
    for name in results.names("gate"):
        weights, classes = results.weights[name][mask], results.protocol.classes
        if weights.shape[2] > 1:
            weights, classes = weights[:, :, present], [classes[index] for index in present]
        experts = results.row(name).experts
        warnings.append(collapse_warning(name, gate_statistics(weights), experts, classes))
    return list(filter(None, warnings))


def regret(results: Results, gate: str, subset: str) -> dict[str, float]:
    """By how much the best gate of its kind (simple or class-wise) over the same experts is better: aacc (pixel
    accuracy) and miou (over the classes with ground truth), in [-1, 1]; empty where there is no such row.

    The best gate bounds the pixel accuracy of gates whose weights are for whole images and mix the experts' own logits,
    without a convolution. The regret of others (spatial, calibrated and class-wise, mix: log_probs or probs, with a
    convolution) may be negative."""
    ceiling = best_gate_of(results.weights[gate].shape[2])
    if ceiling not in results.by_name or set(results.row(ceiling).experts) != set(results.row(gate).experts):
        return {}
    best, own = (aacc(results.total(name, subset)) for name in (ceiling, gate))
    return {
        "aacc": float(best - own),
        "miou": results.miou_gt_only(ceiling, subset) - results.miou_gt_only(gate, subset),
    }
