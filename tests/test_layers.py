"""Who may import whom. A new arrow is a new entry in ALLOWED; entry scripts stay a docstring and one call."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    "pipelines",
    "reports",
    "evaluation",
    "engine",
    "networks",
    "attacks",
    "dataloaders",
    "metrics",
)
# Layer -> what of ours it may import beside itself. A dotted name allows that module alone.
ALLOWED = {
    "scripts": {"pipelines"},
    "pipelines": set(LAYERS),
    "reports": {"evaluation", "engine", "metrics"},
    # certificates hold for layers of these very classes, not for others of their names
    "evaluation": {"engine", "attacks", "metrics", "networks.external", "networks.moe", "networks.normalize"},
    "engine": {"attacks", "metrics"},
    "networks": {"engine.config"},
    "attacks": {"engine.config"},
    "dataloaders": {"engine.command", "engine.config", "engine.disk"},
    "metrics": {"engine.config"},
}
# What engine.config is made of; it is read before anything heavy, so it imports nothing heavy itself.
CONFIG_MODULES = {
    "config",
    "schema",
    "classifier_schema",
    "sections",
    "components",
    "merge",
    "values",
    "errors",
    "yaml_source",
}
LIGHT = {"pydantic", "pydantic_core", "yaml"}
TABLE_FILES = ("engine", "networks", "attacks", "dataloaders", "metrics")


def imports_of(path: Path, package: str = "") -> set[str]:
    """Dotted names that a file imports anywhere, also inside functions; `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def illegal(layer: str, names: set[str]) -> list[str]:
    """The imports of our own that a layer may not have."""

    def allowed(name: str) -> bool:
        return any(name == target or name.startswith(f"{target}.") for target in {layer, *ALLOWED[layer]})

    ours = {name for name in names if name.split(".")[0] in {*LAYERS, "tests", "benchmarks"} | SCRIPTS}
    return sorted(name for name in ours if not allowed(name))


COMMANDS = {ROOT / "evaluation" / "verify.py"}  # `python -m`: begins at the top, as a script does
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
FILES = [("scripts", path) for path in sorted(ROOT.glob("*.py"))] + [
    (layer, path) for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))
]


@pytest.mark.parametrize(("layer", "path"), FILES, ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_imports_point_down(layer, path):
    package = ".".join(path.relative_to(ROOT).parent.parts)
    wrong = illegal(layer, imports_of(path, package))
    if path in COMMANDS:
        wrong = [name for name in wrong if not name.startswith("pipelines.")]
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}; {layer} may import {sorted(ALLOWED[layer])}"


def test_every_folder_with_code_is_a_layer():
    others = {"tests", "benchmarks", "docs", "configs"}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders - others <= set(LAYERS)


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        ("attacks", "import networks"),
        ("attacks", "from networks.moe import Frozen"),
        ("attacks", "def attack():\n    from networks import moe"),
        ("networks", "import engine"),
        ("networks", "import engine.loop"),
        ("networks", "from engine import loop, config"),
        ("networks", "from ..engine import loop"),
        ("networks", "from engine.configuration import Size"),
        ("engine", "from dataloaders.frames import Frame"),
        ("engine", "from evaluation import tables"),
        ("evaluation", "import pipelines.segmentation"),
        ("evaluation", "from networks.deeplab import DeepLabV3Plus"),
        ("metrics", "import attacks.clean"),
        ("reports", "from networks.moe import Frozen"),
        ("scripts", "from engine.config import load"),
        ("pipelines", "import train_deeplab"),
        ("engine", "from tests.engine import helpers"),
    ],
)
def test_a_planted_import_is_found(tmp_path, layer, code):
    planted = tmp_path / "planted.py"
    planted.write_text(code + "\n")
    assert illegal(layer, imports_of(planted, layer)) != []


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        ("attacks", "import torch"),
        ("attacks", "from engine.config import UserError"),
        ("attacks", "from engine import config"),
        ("attacks", "from . import clean"),
        ("engine", "from metrics.confusion import miou"),
        ("pipelines", "import dataloaders.cache, networks"),
    ],
)
def test_a_fitting_import_passes(tmp_path, layer, code):
    fitting = tmp_path / "fitting.py"
    fitting.write_text(code + "\n")
    assert illegal(layer, imports_of(fitting, layer)) == []


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_entry_scripts_are_a_docstring_and_one_call(script):
    text = (ROOT / f"{script}.py").read_text()
    assert len(text.splitlines()) <= 15
    assert f"python {script}.py" in ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("layer", TABLE_FILES)
def test_tables_stand_in_files_without_imports(layer):
    body = ast.parse((ROOT / layer / "__init__.py").read_text()).body
    docstring, *tables = body
    assert isinstance(docstring, ast.Expr)
    assert tables
    for table in tables:
        assert isinstance(table, ast.Assign)
        entries = ast.literal_eval(table.value)
        for name, target in entries.items():
            module, _, thing = target.partition(":")
            file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
            assert file.is_file(), f"{layer}: {name} is to be in {file.relative_to(ROOT)}"
            defined = {getattr(node, "name", None) for node in ast.parse(file.read_text()).body}
            assert thing in defined, f"{layer}: {name}: no {thing} in {file.relative_to(ROOT)}"


@pytest.mark.parametrize("module", sorted(CONFIG_MODULES))
def test_config_imports_nothing_heavy(module):
    standard = sys.stdlib_module_names
    for name in imports_of(ROOT / "engine" / f"{module}.py", "engine"):
        top = name.split(".")[0]
        assert top in standard or top in LIGHT or name.split(".")[:2][-1] in CONFIG_MODULES, name
