"""All honesty checks of an evaluation: of its records, which costs nothing, and of its networks, on a few images."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from attacks.threat import Threat
from evaluation.findings import Finding
from evaluation.ledger import Record
from evaluation.record_checks import check_records
from evaluation.suites import Member
from evaluation.target_checks import check_targets
from evaluation.targets import Target


def run_checks(
    targets: Sequence[Target],
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    members: Mapping[str, Sequence[Member]],
    records: Iterable[Record],
    *,
    dataset: str = "",
    quantised: bool = False,
) -> list[Finding]:
    """All checks: of the records of an evaluation, and of its targets on a few images [B, C, H, W] with labels
    [B, *S] under a threat, its eps the one at which attacks are tested; members of each target by its name."""
    columns = {name: {one.name: one.column for one in own} for name, own in members.items()}
    kinds = {target.name: target.kind for target in targets}
    found = check_records(records, kinds, columns, dataset=dataset, quantised=quantised)
    return found + check_targets(targets, images, labels, threat, members)
