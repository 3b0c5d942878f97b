"""What attacks did to gates and their experts, as a function of the ledger's records: telemetry and components."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from evaluation.ledger import Record
from evaluation.record_checks import bouts, right_pixels
from evaluation.targets import ROUTED, Kind
from metrics.gate import mean_effective_experts

TELEMETRY_COLUMNS = (
    "model", "eps", "attack", "figure", "expert", "class", "clean", "attacked", "n_images",
)  # fmt: skip
COMPONENT_COLUMNS = ("model", "eps", "part", "value", "n_images")
SMALLEST = (
    1e-6  # a share below counts as this in KL: that of an expert which has nothing is infinite otherwise
)

# key of a record -> name of the figure, its mean over the images
PER_IMAGE = {
    "flips": "route flip rate",  # share of sites, classes and places with another best expert than on the clean image
    "margin": "gate margin",  # lead of the best gate logit over the second
    "least_margin": "least gate margin",
    "entropy": "gate entropy",  # in nats, of the weights of a soft gate, of softmax(gate logits) of a hard one
}


def telemetry_rows(
    records: Iterable[Record],
    kinds: Mapping[str, Kind],
    experts: Mapping[str, Sequence[str]] | None = None,
    classes: Sequence[str] = (),
) -> Iterator[dict]:
    """Rows of telemetry.csv: per routed target, eps and attack a figure on the clean images and on those of the
    attack, in the columns of TELEMETRY_COLUMNS. experts: names of each target's; numbers where there are none."""
    for bout in bouts(records, kinds, {}):
        if bout.eps == 0 or bout.kind not in ROUTED:
            continue
        for name, own in bout.attacks.items():
            images = [image for image in bout.clean if image in own]
            clean, attacked = [bout.clean[image] for image in images], [own[image] for image in images]
            head = {"model": bout.target, "eps": bout.eps, "attack": name, "n_images": len(images)}
            names = (experts or {}).get(bout.target)
            for row in figures(clean, attacked, names, classes):
                yield {**head, **row}


def figures(
    clean: Sequence[Record], attacked: Sequence[Record], experts: Sequence[str] | None, classes: Sequence[str]
) -> Iterator[dict]:
    """Every figure of the same images before and after an attack."""

    def row(figure: str, before: float, after: float, **more) -> dict:
        return {"figure": figure, "clean": float(before), "attacked": float(after), **more}

    def both(value: Callable[[Sequence[Record]], float]) -> tuple[float, float]:
        return value(clean), value(attacked)

    for key, name in PER_IMAGE.items():  # None, what isn't finite in a record, is NaN
        yield row(name, *both(lambda records, key=key: np.mean([one[key] for one in records], dtype=float)))
    yield row("images with a flip", *both(lambda records: np.mean([one["flips"] > 0 for one in records])))
    before, after = (np.array([one["weights"] for one in records], float) for records in (clean, attacked))
    shares = [
        np.array([one.get("shares", one["weights"]) for one in records], float)
        for records in (clean, attacked)
    ]
    yield row("KL(clean || attacked)", 0.0, kl(*shares).mean())
    loads = [weights.mean(axis=(0, 1, 3)) for weights in (before, after)]  # [N, S, E, K] -> [E]
    yield row("load shift", 0.0, np.abs(loads[1] - loads[0]).sum() / 2)
    yield row("largest load", *(load.max() for load in loads))
    by_place = [
        np.moveaxis(weights.mean(axis=0), 1, -1) for weights in (before, after)
    ]  # [N, S, E, K] -> [S, K, E]
    yield row("effective experts", *map(mean_effective_experts, by_place))
    experts = experts or [str(place) for place in range(len(loads[0]))]
    for place, expert in enumerate(experts):
        yield row("load", *(load[place] for load in loads), expert=expert)
    if before.shape[3] == 1:
        return
    for place, expert in enumerate(experts):
        for index in range(before.shape[3]):
            weight = (weights[:, :, place, index].mean() for weights in (before, after))
            yield row(
                "weight", *weight, expert=expert, **{"class": classes[index] if classes else str(index)}
            )


def kl(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence in nats of shares [N, S, E, K] over the experts, mean over sites and classes, [N]."""
    first, second = (np.maximum(one, SMALLEST) for one in (first, second))
    first, second = (one / one.sum(axis=2, keepdims=True) for one in (first, second))
    return (first * np.log(first / second)).sum(axis=2).mean(axis=(1, 2))


def component_rows(
    records: Iterable[Record], kinds: Mapping[str, Kind], experts: Mapping[str, Sequence[str]] | None = None
) -> Iterator[dict]:
    """The parts of each routed target at each eps, in the columns of COMPONENT_COLUMNS: accuracy clean and in the
    worst case over all recorded points, of each of its experts attacked by itself (where these are targets of their
    names, given by `experts`), of its router (see below), on the images whose route the worst case changed and on the
    others, and of the best and worst single expert on those very images.

    A point is what an attack gave of an image, either incumbent, at this eps or a smaller one. The route of an image
    that none of them changes is undecided: attacks may have changed it on their way, and others may."""
    records = list(records)
    points: dict[str, list[Record]] = {}
    for record in records:
        points.setdefault(record["target"], []).append(record)
    for bout in bouts(records, kinds, {}):
        if bout.eps == 0 or bout.kind not in ROUTED or not bout.attacks:
            continue
        inside = [one for one in points[bout.target] if one["eps"] <= bout.eps and one["image"] in bout.clean]
        worst = worst_records(inside)
        flipped = [image for image, one in worst.items() if one["flips"] > 0]
        kept = [image for image in worst if image not in flipped]
        ever = {one["image"] for one in inside if one["flips"] > 0}
        parts = [
            ("clean", accuracy(bout.clean.values()), len(bout.clean)),
            ("model", accuracy(worst.values()), len(worst)),
        ]
        for expert in (experts or {}).get(bout.target, ()):
            own = [one for one in points.get(expert, ()) if one["eps"] <= bout.eps]
            if any(one["eps"] > 0 for one in own):
                own = worst_records(own)
                parts.append((f"expert {expert}, attacked by itself", accuracy(own.values()), len(own)))
        parts += [
            ("route changed at a recorded point", len(ever) / len(worst), len(worst)),
            ("route undecided: at no recorded point", 1 - len(ever) / len(worst), len(worst)),
            ("model, route changed", accuracy(worst[image] for image in flipped), len(flipped)),
            ("model, route not changed", accuracy(worst[image] for image in kept), len(kept)),
        ]
        if all("expert_right" in one for one in worst.values()):
            for name, choose in (("best", max), ("worst", min)):
                right = sum(choose(one["expert_right"]) for one in worst.values())
                parts.append(
                    (
                        f"{name} single expert of each image, same images",
                        share(right, worst.values()),
                        len(worst),
                    )
                )
        for part, value, count in parts:
            yield {"model": bout.target, "eps": bout.eps, "part": part, "value": value, "n_images": count}


def worst_records(points: Iterable[Record]) -> dict[str, Record]:
    """Of each image the record with the fewest right pixels; of several the one at the smallest eps, the clean one
    first."""
    worst: dict[str, Record] = {}
    for one in sorted(points, key=lambda record: record["eps"]):
        if one["image"] not in worst or right_pixels(one) < right_pixels(worst[one["image"]]):
            worst[one["image"]] = one
    return worst


def accuracy(records: Iterable[Record]) -> float:
    """Share of right pixels, all images pooled; NaN without any."""
    records = list(records)
    return share(sum(right_pixels(one) for one in records), records)


def share(right: int, records: Iterable[Record]) -> float:
    valid = sum(one["valid"] for one in records)
    return right / valid if valid else float("nan")
