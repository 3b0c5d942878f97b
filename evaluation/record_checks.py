"""Honesty checks of a ledger's records, pure functions of them: what speaks against a robust figure.

A figure of attacks that can't see their target's gradient, or were stopped too soon, is no figure of robustness.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attacks.pixel_losses import RESTLESS
from attacks.quantise import LEVELS
from evaluation.findings import Finding
from evaluation.formats import percent
from evaluation.ledger import Record
from evaluation.plan import records_of
from evaluation.suites import CLEAN
from evaluation.targets import Kind
from metrics.gate import COLLAPSE, is_collapsed, mean_effective_experts

# Attacks by the name of their component. What is in neither has another goal than accuracy, or knows the target.
WHITE_BOX = ("fgsm", "pgd", "segpgd", "cospgd", "apgd", "apgd_targeted")
ON_GATE = ("gate_only", "change_route")
WEAKER = {
    "square": "a black-box attack",
    "universal": "one perturbation for all images",
    **dict.fromkeys(ON_GATE, "an attack on the gate alone"),
}
OTHER_GOAL = ("clean", "hide", "evade")
OTHER_COUNT = ("hide", "change_route")  # attacks that count something else than right pixels

ALARM = 0.002  # of accuracy, by which weaker attacks may add to the white-box ones (as in AutoAttack)
GAP = 0.05  # of accuracy, by which the adaptive suite may be below the common one: less says little
ZERO_SHARE = 0.05  # of steps with a gradient of zeros
FILLED = 0.95  # of eps: a universal perturbation that changes less is of a smaller ball
UNSETTLED = 0.05  # of a loss's range, by which its last values may differ (Pintor et al.)
LONG = 50  # steps from which an attack is expected to have settled
KEPT = 0.9  # of the clean accuracy: more under attack isn't plausible ...
PLAUSIBLE_EPS = 2 / 255  # ... from this linf radius on; robust training does keep that at smaller ones
EASY = ("mnist", "mnist_t10k")  # ... but for these data, where robust training keeps more

# (data set, norm) -> (eps, best published accuracy there): RobustBench at 78fcc9e (2025-03), the lower one of
# AutoAttack and external attacks; L2 and ImageNet by AutoAttack.
PUBLISHED = {
    ("cifar10", "linf"): (8 / 255, 0.7371),
    ("cifar10", "l2"): (0.5, 0.8497),
    ("cifar100", "linf"): (8 / 255, 0.4267),
    ("imagenet", "linf"): (4 / 255, 0.5956),
}


@dataclass(frozen=True)
class Bout:
    """What a ledger says of a target at one eps: image -> record of the clean images and under each attack, those
    with the fewest correct pixels; "suite" columns of the attacks. Attacks that were made for another target have
    its name in theirs."""

    target: str
    kind: Kind
    eps: float
    clean: Mapping[str, Record]
    attacks: Mapping[str, Mapping[str, Record]]
    columns: Mapping[str, str]
    dataset: str = ""
    quantised: bool = False

    def finding(self, check: str, severity: str, text: str, attack: str = "") -> Finding:
        return Finding(check, self.target, self.eps, attack, severity, text)

    def of(self, components: Sequence[str]) -> list[str]:
        """Attacks of these components, made for this target."""
        return [name for name in self.attacks if self.component(name) in components and self.is_own(name)]

    def component(self, attack: str) -> str:
        return next(iter(self.attacks[attack].values()))["settings"]["name"]

    def is_own(self, attack: str) -> bool:
        return all(record["source"] == self.target for record in self.attacks[attack].values())

    def accuracy(self, attacks: Sequence[str] = ()) -> float:
        """Share of pixels that are right in the worst case of each image, the clean one included."""
        cases = [self.clean, *(self.attacks[name] for name in attacks)]
        right = sum(min(right_pixels(case[image]) for case in cases) for image in self.clean)
        return right / max(sum(record["valid"] for record in self.clean.values()), 1)

    def floor(self) -> float:
        """Accuracy of the best constant answer."""
        pixels = Counter()
        for record in self.clean.values():
            for truth, _, count in record["cells"]:
                pixels[truth] += count
        return max(pixels.values(), default=0) / max(pixels.total(), 1)


Check = Callable[[Bout], list[Finding]]


def check_records(
    records: Iterable[Record],
    kinds: Mapping[str, Kind],
    columns: Mapping[str, Mapping[str, str]],
    *,
    dataset: str = "",
    quantised: bool = False,
    checks: Sequence[Check] | None = None,
) -> list[Finding]:
    """The checks that need no network, or some of them. kinds: of each target; columns: of each target, attack ->
    "common" or "adaptive". dataset: as in PUBLISHED. quantised: the images were rounded after the attack."""
    found = []
    for bout in bouts(records, kinds, columns, dataset, quantised):
        own = OF_CLEAN if bout.eps == 0 else OF_RECORDS
        found += [one for check in own if checks is None or check in checks for one in check(bout)]
    return found


def check_manifest(
    manifest: Mapping, units: Mapping[str, Sequence[Record]], checks: Sequence[Check] | None = None
) -> list[Finding]:
    """`check_records` of a complete ledger as `read_manifest` and `read_units` give it."""
    targets, protocol = manifest["targets"], manifest["protocol"]
    columns = {one["name"]: {own["name"]: own["column"] for own in one["members"]} for one in targets}
    kinds = {one["name"]: one["identity"]["kind"] for one in targets}
    rounded = protocol.get("adversarials") == "uint8"
    records = records_of(manifest, units)
    return check_records(
        records, kinds, columns, dataset=protocol.get("dataset", ""), quantised=rounded, checks=checks
    )


def bouts(
    records: Iterable[Record],
    kinds: Mapping[str, Kind],
    columns: Mapping[str, Mapping[str, str]],
    dataset: str = "",
    quantised: bool = False,
) -> Iterator[Bout]:
    """A bout of each target for its clean images and for each eps, ascending."""
    found: dict[str, dict[float, dict[str, dict[str, Record]]]] = {name: {} for name in kinds}
    for record in records:
        if record["incumbent"] != "pixels" or record["target"] not in found:
            continue
        own = record["source"] == record["target"]
        name = record["attack"] if own else f"{record['attack']} for {record['source']}"
        by_eps = found[record["target"]].setdefault(record["eps"], {})
        by_eps.setdefault(name, {})[record["image"]] = record
    for target, by_eps in found.items():
        clean = by_eps.get(0.0, {}).get(CLEAN.name, {})
        for eps in sorted(by_eps):
            own = columns.get(target, {})
            yield Bout(target, kinds[target], eps, clean, by_eps[eps], own, dataset, quantised)


def weaker_attacks(bout: Bout) -> list[Finding]:
    """Attacks that know less than the white-box ones, and find more all the same: black-box ones, those on the gate
    alone, images made for another network."""
    white_box = bout.of(WHITE_BOX)
    if not white_box:
        return []
    base, found = bout.accuracy(white_box), []
    for name in bout.attacks:
        weaker = WEAKER.get(bout.component(name)) if bout.is_own(name) else "images made for another network"
        if weaker is None:
            continue
        gain = base - bout.accuracy([*white_box, name])
        text = (
            f"{weaker} takes {percent(gain)} points of accuracy from the white-box attacks' {percent(base)} %"
        )
        if gain > ALARM:
            found.append(
                bout.finding(
                    "weaker attacks", "flag", f"{text}: gradients are masked, or too few steps", name
                )
            )
        else:
            found.append(bout.finding("weaker attacks", "ok", text, name))
    return found


def masking(bout: Bout) -> list[Finding]:
    """The adaptive suite far below the common one: the latter doesn't see what the former does."""
    common = [name for name, column in bout.columns.items() if column == "common" and name in bout.attacks]
    adaptive = [
        name for name, column in bout.columns.items() if column == "adaptive" and name in bout.attacks
    ]
    if not adaptive and bout.kind == "single":
        text = "not judged: no attack beyond the common ones was run; it has no routes or parts to adapt to"
        return [bout.finding("masking", "note", text)]
    if not adaptive:
        text = "no adaptive attack was run: nothing here may be called robust"
        return [bout.finding("masking", "flag", text)]
    before, after = bout.accuracy(common), bout.accuracy([*common, *adaptive])
    text = (
        f"the adaptive suite leaves {percent(after)} % of accuracy, the common one {percent(before)} %: "
        f"{percent(before - after)} points between them"
    )
    if before - after <= GAP:
        return [bout.finding("masking", "ok", text)]
    if bout.kind == "single":
        return [bout.finding("masking", "note", f"{text}; the common suite is too weak for this network")]
    return [bout.finding("masking", "flag", f"{text}; gradients are masked, the common figure means nothing")]


def gradients_met(bout: Bout) -> list[Finding]:
    """Gradients that were not finite (no step was made there), or zero while pixels were still right."""
    found = []
    for name, records in bout.attacks.items():
        steps = sum(record["backwards"] for record in records.values())
        if not steps:
            continue
        bad, zero = (
            sum(record[key] for record in records.values()) for key in ("bad_gradients", "zero_gradients")
        )
        if bad:
            text = f"{bad} of {steps} gradients were not finite: no step was made there"
            found.append(bout.finding("gradients met", "flag", text, name))
        if zero:
            text = f"{zero} of {steps} gradients were zero where answers were still right"
            severe = bout.component(name) in (*WHITE_BOX, *ON_GATE) and zero > ZERO_SHARE * steps
            found.append(bout.finding("gradients met", "flag" if severe else "note", text, name))
        if not bad and not zero:
            text = f"all {steps} gradients were finite and not zero"
            found.append(bout.finding("gradients met", "ok", text, name))
    return found


def incomplete_optimisation(bout: Bout) -> list[Finding]:
    """Indicator 4. The last ten values of the loss that an attack tracked, in units of its whole range, differ by more
    than UNSETTLED on most of the images that it has not broken. Of a short attack, a note: suites of few steps never
    settle; and where it leaves no more than GAP, since more steps can't find more than that. Attacks whose trace
    doesn't say so are named in a note."""
    found, left_out = [], []
    for name in bout.of(WHITE_BOX):
        records = [one for one in bout.attacks[name].values() if one.get("unsettled") is not None]
        records = [one for one in records if right_pixels(one)]
        if not records:
            continue
        settings = records[0]["settings"]
        reason = why_unjudged(settings)
        if reason:
            left_out.append(f"{name} ({reason})")
            continue
        moving = sum(one["unsettled"] > UNSETTLED for one in records)
        steps = settings.get("steps", 1)
        text = (
            f"in the last 10 of {steps} steps the loss still moved by more than {100 * UNSETTLED:.0f} % of its "
            f"range on {moving} of {len(records)} images that are not broken"
        )
        severity = "ok"
        if 2 * moving > len(records):
            severity = "flag" if steps >= LONG and bout.accuracy([name]) > GAP else "note"
            text += "; more steps may find more"
        found.append(bout.finding("incomplete optimisation", severity, text, name))
    if left_out:
        text = f"not judged: {', '.join(left_out)}"
        found.append(bout.finding("incomplete optimisation", "note", text))
    return found


def why_unjudged(settings: Mapping) -> str:
    """Why the recorded losses of an attack with these settings don't tell whether it had settled; "" where they do."""
    if settings.get("restarts", 1) * settings.get("targets", 1) > 1:
        return "it begins several times"
    tracked = (
        settings["name"] == "apgd" and settings.get("track") != "loss"
    )  # cross-entropy beside a restless loss
    loss = settings.get("loss", settings["name"])
    return f"{loss} goes up and down by itself" if loss in RESTLESS and not tracked else ""


def silent_success(bout: Bout) -> list[Finding]:
    """Indicator 3. The attack saw fewer correct pixels than the network has on the images that it gave back: it lost
    what it had found, or the network doesn't answer the same twice."""
    found = []
    for name, records in bout.attacks.items():
        if bout.component(name) in OTHER_COUNT or not bout.is_own(name):
            continue
        lost = [right_pixels(one) - one["claimed_correct"] for one in records.values()]
        worse = sum(one > 0 for one in lost)
        if not worse:
            text = "what attacks found is what the network says of their images"
            found.append(bout.finding("silent success", "ok", text, name))
            continue
        text = f"{worse} of {len(lost)} images have more right answers than the attack had seen, {max(lost)} at most"
        severity = "flag"
        if bout.quantised:
            severity, text = "note", f"{text}; they were rounded to bytes in between"
        found.append(bout.finding("silent success", severity, text, name))
    return found


def plausibility(bout: Bout) -> list[Finding]:
    """An accuracy under attack that is close to the clean one, or above what anybody has published for these data."""
    own = [name for name in bout.attacks if bout.component(name) not in OTHER_GOAL]
    if not own:
        return []
    clean, robust = bout.accuracy(), bout.accuracy(own)
    norm = next(iter(bout.attacks[own[0]].values()))["norm"]
    found = []
    if clean and robust > KEPT * clean:
        told = f"accuracy {percent(robust)} % under attack, {percent(clean)} % without, on {len(bout.clean)} images"
        trivial = clean <= bout.floor()
        text = f"{told}: {'no better than a constant answer' if trivial else 'hardly anything is lost'}"
        large = norm == "linf" and bout.eps >= PLAUSIBLE_EPS - 1e-9
        severe = large and bout.dataset not in EASY and not trivial
        found.append(bout.finding("plausibility", "flag" if severe else "note", text))
    eps, best = PUBLISHED.get((bout.dataset, norm), (math.inf, 1.0))
    if bout.eps >= eps - 1e-9 and robust > best:
        text = (
            f"accuracy {percent(robust)} % under attack on {len(bout.clean)} images; the best that is published "
            f"for {bout.dataset} at this eps or a smaller one is {percent(best)} %"
        )
        found.append(bout.finding("plausibility", "flag", text))
    return found or [bout.finding("plausibility", "ok", f"accuracy {percent(robust)} %")]


def gate_collapse(bout: Bout) -> list[Finding]:
    """A gate that gives nearly everything to one expert on the clean images, wherever it decides (each site, each
    class): hardly anything hangs on the image."""
    weights = [record["weights"] for record in bout.clean.values() if "weights" in record]
    if not weights:
        return []
    load = np.array(weights, dtype=float).mean(axis=0).swapaxes(1, 2)  # [N, S, E, K] -> [S, K, E]
    load = load.reshape(-1, load.shape[2])
    if not np.isfinite(load).all():
        text = "its weights are not finite"
        return [Finding("gate collapse", bout.target, None, "", "flag", text)]
    largest = load.max(axis=1)
    text = f"expert {load[0].argmax()} has {percent(float(largest[0]))} % of the weight"
    if len(load) > 1:
        many = (largest > COLLAPSE).sum()
        text = f"some expert has over {100 * COLLAPSE:g} % of the weight at {many} of {len(load)} sites and classes"
    text += (
        f" over {len(weights)} clean images; effective number of experts {mean_effective_experts(load):.2f} of "
        f"{load.shape[1]}{', mean of these' * (len(load) > 1)}"
    )
    severity = "flag" if is_collapsed(load) else "ok"
    return [Finding("gate collapse", bout.target, None, "", severity, text)]


def gate_logits_finite(bout: Bout) -> list[Finding]:
    """A gate whose logits are NaN or all masked somewhere: its shares, and all that is averaged with them, are NaN. A
    mask of -inf on some experts is none of that. Silent where all is well."""
    cases = [bout.clean] if bout.eps == 0 else bout.attacks.values()
    broken = {image for case in cases for image, one in case.items() if not np.isfinite(shares_of(one)).all()}
    if not broken:
        return []
    text = f"gate logits not finite on {len(broken)} images: what is told of the gate there is NaN"
    eps = bout.eps or None
    return [Finding("gate logits", bout.target, eps, "", "flag", text)]


def logits_finite(bout: Bout) -> list[Finding]:
    """Images that a network answers with NaN or infinities: attacks reject such points, so a figure may be too high.
    Silent where all is well."""
    cases = {CLEAN.name: bout.clean} if bout.eps == 0 else bout.attacks
    found = []
    for name, records in cases.items():
        broken = sum(one.get("status", "ok") != "ok" for one in records.values())
        if broken:
            text = f"logits are not finite on {broken} of {len(records)} images"
            found.append(bout.finding("logits", "flag", text, name))
    return found


def shares_of(record: Record) -> np.ndarray:
    """What the gate gives each expert, from its logits where they are recorded; empty without a gate."""
    return np.array(record.get("shares", record.get("weights", [])), dtype=float)


def universal_radius(bout: Bout) -> list[Finding]:
    """A universal perturbation in a ball larger than its own, where it changes no more than in its own. Silent
    elsewhere."""
    found = []
    for name in bout.of(("universal",)):
        records = list(bout.attacks[name].values())
        norm = records[0]["norm"]
        used = max(one.get(norm, bout.eps) for one in records)
        whole = math.floor(LEVELS * bout.eps + 1e-6) / LEVELS
        reach = whole if bout.quantised and norm == "linf" else bout.eps
        if used < FILLED * reach:
            size = f"{LEVELS * used:.3g}/255" if norm == "linf" else f"{used:.4g}"
            text = f"changes images by {size} at most: it is scaled down to a smaller eps, never up to a larger one"
            found.append(bout.finding("universal radius", "note", text, name))
    return found


OF_CLEAN: tuple[Check, ...] = (logits_finite, gate_collapse, gate_logits_finite)
OF_RECORDS: tuple[Check, ...] = (
    logits_finite,
    gate_logits_finite,
    weaker_attacks,
    masking,
    gradients_met,
    incomplete_optimisation,
    silent_success,
    plausibility,
    universal_radius,
)


def right_pixels(record: Record) -> int:
    return sum(pixels for truth, said, pixels in record["cells"] if truth == said)
