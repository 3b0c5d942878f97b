"""What the documents point at is there: files, headings, scripts, modules and configs."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "configs/**/*.md")
    for path in ROOT.glob(pattern)
)


def heading_anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a document's headings: lower case, no punctuation, a hyphen for each space."""
    headings = re.findall(r"(?m)^#+ +(.+?) *$", re.sub(r"(?ms)^```.*?^```", "", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (document.parent / name).resolve() if name else document
        assert linked.exists(), target
        if anchor:
            assert anchor in heading_anchors(linked.read_text()), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_what_is_there(document):
    text = document.read_text()
    for name in re.findall(r"\bconfigs/[\w/]+\.yaml\b", text) + re.findall(r"\bpython (\w+\.py)\b", text):
        assert (ROOT / name).is_file(), name
    for module in re.findall(r"\bpython -m ([\w.]*\w)", text):
        assert importlib.util.find_spec(module) is not None, module
