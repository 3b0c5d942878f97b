"""What stands beside a ledger: written once, read as it was, damage named."""

from functools import partial

import pytest

from engine.config import UserError
from evaluation.beside import CERTIFICATES, FINDINGS, TRANSFER, Beside, once, read_beside, write_beside
from evaluation.certificate import Certified
from evaluation.findings import Finding

FOUND = [
    Finding("masking", "moe", 2 / 255, "", "flag", "a gap"),
    Finding("float32", "net", None, "", "ok", ""),
]
PROVED = [Certified("net", 2 / 255, 0.25, "", 4), Certified("moe", 2 / 255, None, "none computed: why", 0)]


def test_what_was_written_is_read(tmp_path):
    assert read_beside(tmp_path) == Beside([], [], [], [])
    write_beside(tmp_path / FINDINGS, FOUND)
    write_beside(tmp_path / CERTIFICATES, PROVED)
    write_beside(tmp_path / TRANSFER, [{"source": "a", "value": 0.5}])
    assert read_beside(tmp_path) == Beside(FOUND, PROVED, [{"source": "a", "value": 0.5}], [])


def test_it_is_made_again_only_where_its_source_is_another(tmp_path):
    made = []

    def make(keep):
        made.append(1)
        return [{"value": len(made)}]

    for source, value in (({"eps": 1}, 1), ({"eps": 1}, 1), ({"eps": 2}, 2), ({"eps": 1}, 3)):
        once(tmp_path / TRANSFER, source, make)
        assert read_beside(tmp_path).transfer == [{"value": value}]


def test_what_a_killed_process_had_done_is_not_done_again(tmp_path):
    done, folder = [], tmp_path / TRANSFER

    def rows(keep, last):
        def work(place):
            done.append(place)
            if place == last:
                raise KeyboardInterrupt
            return {"place": place, "third": place / 3}

        return [keep(f"batch {place}", partial(work, place)) for place in range(4)]

    with pytest.raises(KeyboardInterrupt):
        once(folder, {"eps": 1}, partial(rows, last=2))
    assert not folder.exists()
    once(folder, {"eps": 1}, partial(rows, last=None))
    assert done == [0, 1, 2, 2, 3]
    assert read_beside(tmp_path).transfer == [{"place": place, "third": place / 3} for place in range(4)]
    with pytest.raises(KeyboardInterrupt):
        once(folder, {"eps": 2}, partial(rows, last=2))  # of another source nothing is taken
    assert done[5:] == [0, 1, 2]
    once(folder, {"eps": 3}, partial(rows, last=None))
    assert done[8:] == [0, 1, 2, 3] and [path.name for path in tmp_path.iterdir()] == [TRANSFER]


@pytest.mark.parametrize("text", ["{]", "[]", "{}", '{"rows": 3}', '{"rows": [{"check": "x"}]}'])
def test_damage_is_named(tmp_path, text):
    (tmp_path / FINDINGS).write_text(text)
    with pytest.raises(UserError, match=r"findings\.json: damaged .*delete it"):
        read_beside(tmp_path)
