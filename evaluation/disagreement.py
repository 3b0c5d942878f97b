"""What an evaluation tells about experts that disagree: tables of cases, and how well that detects errors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.results import Results
from metrics.detection import auroc
from metrics.disagreement import CASES, CONTRADICTED, FOLLOWED, ONE_FOLLOWED, OWN_ANSWER, TIED

DISAGREEMENT_COLUMNS = (
    "model", "kind", "subset", "class", "case", "followed", "pixels", "share", "answer", "right", "accuracy",
    "n_images",
)  # fmt: skip
TIE = "tie"  # stands where the name of a followed expert would


@dataclass(frozen=True)
class Part:
    """A case, or a part of one: its pixels that follow one expert, or that follow by a tie."""

    place: int  # along the axis of cases
    case: str
    followed: str  # "", an expert, or TIE
    slug: str  # as a name of columns


def parts_of(results: Results, model: str) -> list[Part]:
    """The four cases in the order of CASES, each followed by its parts."""
    agreed, against, followed, own = CASES
    experts = enumerate(results.row(model).experts, TIED + 1)
    return [
        Part(FOLLOWED, agreed, "", "agree_followed"),
        Part(TIED, agreed, TIE, "agree_tied"),
        Part(CONTRADICTED, against, "", "agree_contradicted"),
        Part(ONE_FOLLOWED, followed, "", "differ_followed"),
        *(Part(place, followed, expert, f"followed_{expert}") for place, expert in experts),
        Part(OWN_ANSWER, own, "", "differ_own"),
    ]


def case_totals(results: Results, model: str, subset: str) -> np.ndarray:
    """Pixels of a subset by class, case and who is right, int64 [K, 5 + E, 2 + E] as of `count_cases`."""
    return results.cases[model][results.mask(subset)].sum(axis=0, dtype=np.int64)


def error_detection(results: Results, model: str, subset: str) -> dict[str, float]:
    """AUROC of what the experts' disagreement says about where the model is wrong, pixels of a subset pooled.

    auroc_differ: of the score 1 where the experts' answers differ, else 0, so (1 + TPR - FPR) / 2, where TPR is
    the share of wrong pixels on which they differ, FPR that of right ones. auroc_jensen_shannon: of the
    Jensen-Shannon distance between the experts' probabilities (`metrics.detection.jensen_shannon`), taken on the
    grid of their logits, enlarged like these, in 256 bins. 0.5 is chance; NaN without a right or a wrong pixel.
    """
    agree, differ = case_totals(results, model, subset)[:, : len(CASES)].sum(axis=0).reshape(2, 2, -1).sum(1)
    right = np.array([agree[1], differ[1]])
    wrong = np.array([agree[0], differ[0]]) - right
    scores = results.scores[model][results.mask(subset)].sum(axis=0, dtype=np.int64)
    return {
        "auroc_differ": float(auroc(np.stack([right, wrong]))),
        "auroc_jensen_shannon": float(auroc(scores)),
    }


def disagreement_rows(results: Results, subsets: Sequence[str]) -> Iterator[dict]:
    """Lines of disagreement.csv: pixels of each case (and part), their share of the labelled pixels of the class
    ("": of all classes), and how many of them each answer gets right: the model's and every expert's."""
    for model in results.cases:
        experts = results.row(model).experts
        for subset in subsets:
            by_class = case_totals(results, model, subset)
            groups = [("", by_class.sum(axis=0)), *zip(results.protocol.classes, by_class, strict=True)]
            base = {"model": model, "kind": results.row(model).kind, "subset": subset}
            base["n_images"] = int(results.mask(subset).sum())
            for class_name, counts in groups:
                labelled = int(counts[: len(CASES), 0].sum())
                for part in parts_of(results, model):
                    pixels = int(counts[part.place, 0])
                    if class_name and not pixels:
                        continue
                    about = {"class": class_name, "case": part.case, "followed": part.followed}
                    about |= {"pixels": pixels, "share": pixels / labelled if labelled else None}
                    for answer, right in zip((model, *experts), counts[part.place, 1:].tolist(), strict=True):
                        accuracy = right / pixels if pixels else None
                        yield base | about | {"answer": answer, "right": right, "accuracy": accuracy}


def per_image_columns(results: Results) -> list[str]:
    """Columns of disagreement_per_image.csv; experts are those of all models."""
    columns = ["model", "kind", "subset", "image", "pixels"]
    for model in results.cases:
        for part in parts_of(results, model):
            columns += [part.slug, f"{part.slug}_right"]
            columns += [f"{part.slug}_right_{expert}" for expert in results.row(model).experts]
    return list(dict.fromkeys(columns))


def per_image_rows(results: Results) -> Iterator[dict]:
    """A line per model and image: labelled pixels, and for each case (and part) `CASE`, those of the case,
    `CASE_right`, those of them that the model has right, `CASE_right_EXPERT`, those that an expert has right."""
    for model, cases in results.cases.items():
        experts, kind = results.row(model).experts, results.row(model).kind
        images = cases.sum(axis=1, dtype=np.int64)  # [N, 5 + E, 2 + E]
        for name, subset, counts in zip(results.images, results.subsets, images.tolist(), strict=True):
            line = {"model": model, "kind": kind, "subset": subset, "image": name}
            line["pixels"] = sum(count[0] for count in counts[: len(CASES)])
            for part in parts_of(results, model):
                pixels, right, *others = counts[part.place]
                line |= {part.slug: pixels, f"{part.slug}_right": right}
                line |= {f"{part.slug}_right_{name}": n for name, n in zip(experts, others, strict=True)}
            yield line
