"""A store gives back what was put in, bit for bit, and notices when it no longer can."""

import errno
import json
import multiprocessing
import os

import pytest
import torch

from engine import disk, expert_cache
from engine.expert_cache import bytes_on_disk, open_store, store_key
from engine.row_files import Layout, RowFile
from tests.damage import cut_off, empty, flip_a_bit

ROWS = 7
GROUPS = [range(0, 3), range(3, 6), range(6, 7)]
generator = torch.Generator().manual_seed(0)
MAPS = torch.randn(ROWS, 4, 3, 5, generator=generator).contiguous(memory_format=torch.channels_last)
CONTENT = {
    "maps": MAPS,
    "half": torch.randn(ROWS, 2, 4, 3, 5, generator=generator).bfloat16(),
    "ids": torch.randint(0, 256, (ROWS, 6), generator=generator).byte(),
}


class Maker:
    """compute of a store: the rows of CONTENT; counts what it was asked for and stops where told."""

    def __init__(self, stop_at: int | None = None, error=KeyboardInterrupt):
        self.asked, self.stop_at, self.error = [], stop_at, error

    def __call__(self, rows):
        if self.stop_at is not None and rows[0] >= self.stop_at:
            raise self.error
        self.asked.extend(rows)
        return {
            name: tensor[list(rows)].clone(memory_format=torch.preserve_format)
            for name, tensor in CONTENT.items()
        }


def opened(folder, maker=None, groups=GROUPS, log=None, notes=dict):
    told = [] if log is None else log
    return open_store(
        folder / "key", "toy", batches=groups, compute=maker or Maker(), notes=notes, log=told.append
    )


def assert_right(store):
    for name, tensor in store.read(range(ROWS)).items():
        assert tensor.dtype == CONTENT[name].dtype and torch.equal(tensor, CONTENT[name])


def test_rows_come_back_bit_for_bit_in_any_order_with_their_strides(tmp_path):
    store = opened(tmp_path)
    for rows in (range(ROWS), [5], [6, 0, 3], [2, 2, 4]):
        found = store.read(rows)
        assert list(found) == list(CONTENT)
        for name, tensor in found.items():
            expected = CONTENT[name][list(rows)]
            assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    assert store.read([1, 4])["maps"].is_contiguous(memory_format=torch.channels_last)
    assert store.read([1, 4])["half"].is_contiguous()
    assert (
        store.nbytes == sum(tensor.nbytes for tensor in CONTENT.values()) == bytes_on_disk(tmp_path / "key")
    )


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2), (0, 2, 3, 1), (0, 3, 2, 1)])
def test_any_order_of_the_dimensions_in_memory_is_kept(tmp_path, order):
    outer = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    tensor = outer.permute([order.index(place) for place in range(4)])
    layout = Layout.of(tensor)
    assert layout == Layout.from_plain(json.loads(json.dumps(layout.plain())))
    (tmp_path / "rows").write_bytes(layout.to_bytes(tensor).tobytes())
    assert (tmp_path / "rows").stat().st_size == 2 * layout.nbytes
    found = RowFile(tmp_path / "rows", layout, 2).gather([0, 1])
    assert torch.equal(found, tensor) and found.stride() == tensor.stride()


def test_a_finished_store_is_not_made_again_and_keeps_its_notes(tmp_path):
    opened(tmp_path, notes=lambda: {"largest": 0.5})
    maker = Maker()
    assert opened(tmp_path, maker).notes == {"largest": 0.5}
    assert maker.asked == []


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, empty, os.remove])
@pytest.mark.parametrize("file", ["maps.bin", "half.bin", "ids.bin", "meta.json"])
def test_a_damaged_store_is_told_and_made_again(tmp_path, file, damage):
    opened(tmp_path)
    damage(tmp_path / "key" / file)
    maker, log = Maker(), []
    assert_right(opened(tmp_path, maker, log=log))
    assert maker.asked == list(range(ROWS))
    assert len(log) == 1 and file in log[0] and "making it again" in log[0]
    maker = Maker()
    opened(tmp_path, maker)
    assert maker.asked == []


PAIRS = [range(0, 2), range(2, 4), range(4, 6), range(6, 7)]


def test_changed_notes_are_noticed(tmp_path):
    opened(tmp_path, notes=lambda: {"largest": 0.5})
    meta = tmp_path / "key" / "meta.json"
    sealed = json.loads(meta.read_text())
    meta.write_text(json.dumps({**sealed, "meta": sealed["meta"].replace("0.5", "0.1")}))
    assert opened(tmp_path, notes=lambda: {"largest": 0.5}).notes == {"largest": 0.5}


@pytest.mark.parametrize(
    ("stop_at", "groups", "asked"),
    [(6, GROUPS, [6]), (6, PAIRS, [6]), (3, GROUPS, [3, 4, 5, 6]), (3, PAIRS, [2, 3, 4, 5, 6])],
)
def test_an_interrupted_store_goes_on_where_it_was(tmp_path, stop_at, groups, asked):
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, Maker(stop_at=stop_at))
    assert not (tmp_path / "key").exists()
    assert bytes_on_disk(tmp_path / "key") == sum(tensor[:stop_at].nbytes for tensor in CONTENT.values())
    maker, log = Maker(), []
    assert_right(opened(tmp_path, maker, groups, log))
    assert maker.asked == asked and f"going on after {stop_at} frames" in log[0]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["key"]


@pytest.mark.parametrize(
    ("file", "damage", "kept"),
    [("maps.bin", flip_a_bit, 5), ("ids.bin", cut_off, 0), ("journal", cut_off, 3), ("journal", empty, 0)],
)
def test_only_what_is_right_of_an_interrupted_store_is_kept(tmp_path, file, damage, kept):
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, Maker(stop_at=6))
    damage(tmp_path / "key.building" / file)
    maker = Maker(stop_at=6)
    with pytest.raises(KeyboardInterrupt):  # a second time
        opened(tmp_path, maker)
    assert maker.asked == list(range({5: 3, 3: 3, 0: 0}[kept], 6))
    assert_right(opened(tmp_path))


def test_a_disk_that_fills_up_leaves_nothing_and_a_later_try_works(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]
    assert_right(opened(tmp_path))


def test_an_opened_store_outlives_its_files(tmp_path):
    store = opened(tmp_path)
    for path in (tmp_path / "key").iterdir():
        path.unlink()
    assert_right(store)


def open_and_save(folder, barrier, number):
    barrier.wait()
    maker = Maker()
    store = opened(folder, maker)
    torch.save((len(maker.asked), store.read(range(ROWS))), folder / f"{number}.pt")


def test_processes_that_need_the_same_store_make_it_once(tmp_path):
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(3)
    workers = [fork.Process(target=open_and_save, args=(tmp_path, barrier, number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    found = [torch.load(tmp_path / f"{number}.pt") for number in range(3)]
    assert sorted(made for made, _ in found) == [0, 0, ROWS]
    for _, tensors in found:
        assert all(torch.equal(tensors[name], CONTENT[name]) for name in CONTENT)


def test_a_store_is_named_by_all_of_its_facts(monkeypatch):
    facts = {"experts": ["a", "b"], "content": "float32", "copies": 1}
    key = store_key(facts)
    assert key == store_key(dict(reversed(facts.items())))
    others = [{**facts, "experts": ["b", "a"]}, {**facts, "content": "top_k"}, {**facts, "copies": 2}]
    assert len({key, *map(store_key, others)}) == 4
    monkeypatch.setattr(expert_cache, "VERSION", expert_cache.VERSION + 1)
    assert store_key(facts) != key
