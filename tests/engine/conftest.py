"""Fixtures of the config tests."""

import pytest


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a YAML into an empty working folder and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "config.yaml") -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return name

    return write
