"""The ledger: what was written comes back, what is damaged is done again, what doesn't belong is refused."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import UserError
from evaluation.ledger import Ledger, read_lines, read_manifest, read_seconds, read_units

MANIFEST = {
    "protocol": {"seed": 1, "classes": ["a", "b"]},
    "targets": [{"name": "moe", "identity": {"sha": "x"}}],
}
UNITS = {f"unit {number}": [{"value": number + place / 10} for place in range(3)] for number in range(3)}


def fill(folder, units=UNITS, **keys):
    with Ledger(folder, MANIFEST, **keys) as ledger:
        for number, (unit, records) in enumerate(units.items()):
            ledger.add(unit, records, seconds=number)


def values(folder):
    return {unit: [record["value"] for record in records] for unit, records in read_units(folder).items()}


WHOLE = {unit: [record["value"] for record in records] for unit, records in UNITS.items()}


def test_records_come_back_in_order_with_their_seconds(tmp_path):
    fill(tmp_path)
    assert values(tmp_path) == WHOLE
    assert read_seconds(tmp_path) == {"unit 0": 0, "unit 1": 1, "unit 2": 2}
    with Ledger(tmp_path, MANIFEST) as ledger:
        assert "unit 1" in ledger and "unit 3" not in ledger
        assert [record["value"] for record in ledger.records(["unit 2", "unit 0"])] == [
            2,
            2.1,
            2.2,
            0,
            0.1,
            0.2,
        ]
        assert ledger.records(["unit 0"])[1] == {**ledger.records(["unit 0"])[1], "of": 3, "place": 1}


def test_segments_of_several_processes_are_one_ledger(tmp_path):
    fill(tmp_path, {"unit 0": UNITS["unit 0"]}, rank=0)
    fill(tmp_path, {"unit 1": UNITS["unit 1"], "unit 2": UNITS["unit 2"]}, rank=3)
    assert sorted(path.name for path in tmp_path.glob("segment_*")) == [
        "segment_000.jsonl",
        "segment_003.jsonl",
    ]
    assert values(tmp_path) == WHOLE


def test_cut_anywhere_the_rest_counts_and_what_is_missing_is_written_behind_it(tmp_path):
    fill(tmp_path / "whole")
    text = (tmp_path / "whole" / "segment_000.jsonl").read_bytes()
    ends = [0]
    for line in text.splitlines(keepends=True):
        ends.append(ends[-1] + len(line))
    complete = {ends[3]: 1, ends[6]: 2, ends[9]: 3}
    for cut in sorted({0, 1, *(end + shift for end in ends for shift in (-2, -1, 0, 1)), len(text)}):
        if not 0 <= cut <= len(text):
            continue
        folder = tmp_path / f"cut_{cut}"
        shutil.copytree(tmp_path / "whole", folder)
        (folder / "segment_000.jsonl").write_bytes(text[:cut])
        # the newline belongs to a line, but a line is whole without it
        expected = sum(cut >= end - 1 for end in complete)
        with Ledger(folder, MANIFEST) as ledger:
            assert len(ledger.units) == expected, cut
            for unit, records in UNITS.items():
                if unit not in ledger:
                    ledger.add(unit, records, 0)
        assert values(folder) == WHOLE, cut


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_byte_costs_the_unit_that_it_is_in_and_no_other(tmp_path, data):
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    fill(folder)
    path = folder / "segment_000.jsonl"
    text = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(text) - 1))
    text[place] ^= data.draw(st.integers(1, 255))
    line = text[:place].count(b"\n")
    path.write_bytes(text)
    found = values(folder)
    hit = {f"unit {line // 3}", f"unit {min(line + 1, 8) // 3}"}  # a lost newline joins two lines
    assert set(WHOLE) - set(found) <= hit
    assert all(found[unit] == WHOLE[unit] for unit in found)
    with Ledger(folder, MANIFEST) as ledger:
        for unit in set(WHOLE) - set(ledger.units):
            ledger.add(unit, UNITS[unit], 0)
    assert values(folder) == WHOLE


def test_a_changed_value_with_an_old_checksum_is_not_believed(tmp_path):
    fill(tmp_path)
    path = tmp_path / "segment_000.jsonl"
    path.write_text(path.read_text().replace('"value":1.1', '"value":9.1'))
    assert values(tmp_path) == {unit: found for unit, found in WHOLE.items() if unit != "unit 1"}
    assert len(list(read_lines(path))) == 8


def test_another_evaluation_is_refused_with_what_differs(tmp_path):
    fill(tmp_path)
    seed = {**MANIFEST, "protocol": {**MANIFEST["protocol"], "seed": 2}}
    with pytest.raises(UserError, match=r"protocol\.seed \(was 1, is 2\)"):
        Ledger(tmp_path, seed)
    model = {**MANIFEST, "targets": [{"name": "moe", "identity": {"sha": "y"}}]}
    with pytest.raises(UserError, match=r"targets\.moe\.identity\.sha \(was x, is y\)"):
        Ledger(tmp_path, model)
    more = {**MANIFEST, "targets": [*MANIFEST["targets"], {"name": "new", "identity": {"sha": "z"}}]}
    with pytest.raises(UserError, match=r"targets\.new\.identity\.sha \(was missing, is z\)"):
        Ledger(tmp_path, more)
    assert read_manifest(tmp_path)["protocol"] == MANIFEST["protocol"]
    Ledger(tmp_path, MANIFEST).close()


def test_a_ledger_without_records_is_of_no_evaluation_yet(tmp_path):
    Ledger(tmp_path, MANIFEST).close()
    seed = {**MANIFEST, "protocol": {**MANIFEST["protocol"], "seed": 2}}
    Ledger(tmp_path, seed).close()
    assert read_manifest(tmp_path)["protocol"]["seed"] == 2


def test_replaced_it_keeps_its_records_and_the_manifest_that_it_had(tmp_path):
    fill(tmp_path)
    seed = {**MANIFEST, "protocol": {**MANIFEST["protocol"], "seed": 2}}
    before = (tmp_path / "manifest.json").read_bytes()
    with Ledger(tmp_path, seed, replace=True) as ledger:
        assert set(ledger.units) == set(UNITS)
    assert read_manifest(tmp_path)["protocol"]["seed"] == 2
    (kept,) = tmp_path.glob("manifest_*.json")
    assert kept.read_bytes() == before
    with pytest.raises(UserError, match="was 2, is 1"):
        Ledger(tmp_path, MANIFEST)


def test_a_segment_has_one_writer(tmp_path):
    with Ledger(tmp_path, MANIFEST, rank=1):
        with pytest.raises(UserError, match="segment_001.jsonl: another process is at work"):
            Ledger(tmp_path, MANIFEST, rank=1)
        Ledger(tmp_path, MANIFEST, rank=0).close()
    Ledger(tmp_path, MANIFEST, rank=1).close()


def test_what_is_no_ledger_is_told(tmp_path):
    with pytest.raises(UserError, match="no ledger here"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="can't be read"):
        Ledger(tmp_path, MANIFEST)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        read_manifest(tmp_path)
