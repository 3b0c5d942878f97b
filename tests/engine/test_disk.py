"""Progress without a terminal. Full disks and locks are tested with the two caches that use them."""

from engine import disk


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(monkeypatch):
    clock, told = iter(range(0, 1000, 4)), []
    monkeypatch.setattr(disk.time, "monotonic", lambda: next(clock))
    assert list(disk.progress(iter("abcdefgh"), 8, "caching", told.append)) == list("abcdefgh")
    assert told == ["caching: 3 of 8 frames", "caching: 6 of 8 frames"]
