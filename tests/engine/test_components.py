"""Components: signatures read without importing, arguments checked, every keyword described."""

import re

import pytest

import networks
from engine.config import ConfigError, Data, Gate, component, signature_of, table_of

TABLES = (
    "networks:NETWORKS",
    "networks:GATES",
    "networks:ENSEMBLES",
    "attacks:ATTACKS",
    "dataloaders:DATASETS",
    "engine:LOSSES",
    "engine:OPTIMIZERS",
    "engine:SCHEDULES",
)

TOY = '''
class Base:
    """shared: told here."""

    def __init__(self, num_classes, *, shared: int = 1, rate: "Probability" = 0.5):
        self.num_classes, self.shared, self.rate = num_classes, shared, rate


class Toy(Base):
    """rate: of something."""


def place(*, folder: str = "${TOY_FOLDER:-here}"): ...


def build(first, second=3, *, size: Size, pair: tuple[int, float] | None = None, names: list[str] = ("a",)):
    return first, second, size, pair, names
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A module with components, in the table of networks; importable or not."""

    def make(name: str, importable: bool, more: str = "") -> None:
        first = "from engine.config import Size\n" if importable else "raise RuntimeError('imported')\n"
        (tmp_path / f"{name}.py").write_text(first + TOY + more)
        monkeypatch.syspath_prepend(tmp_path)
        for entry, what in {"toy": "Toy", "build": "build", "place": "place", "bad": "bad"}.items():
            monkeypatch.setitem(networks.NETWORKS, entry, f"{name}:{what}")

    return make


def test_signatures_are_read_without_importing(toy):
    toy("toy_broken", importable=False)
    assert component("networks:NETWORKS", "toy").args == {"shared": 1, "rate": 0.5}
    with pytest.raises(RuntimeError, match="imported"):
        component("networks:NETWORKS", "toy").build(3)


def test_build_gives_positions_of_the_program_and_keys_of_the_yaml(toy):
    toy("toy_good", importable=True)
    built = component("networks:NETWORKS", "toy", rate="1/4").build(7)
    assert (built.num_classes, built.shared, built.rate) == (7, 1, 0.25)
    arguments = component("networks:NETWORKS", "build", size=[3, 4], pair=[1, 2])
    assert arguments.args == {"size": (3, 4), "pair": (1, 2.0), "names": ["a"]}
    assert arguments.build(1) == (1, 3, (3, 4), (1, 2.0), ["a"])
    assert arguments.plain() == {"name": "build", "size": [3, 4], "pair": [1, 2.0], "names": ["a"]}


def test_variables_in_a_default_of_a_component(toy, monkeypatch):
    toy("toy_place", importable=True)
    assert component("networks:NETWORKS", "place").args == {"folder": "here"}
    monkeypatch.setenv("TOY_FOLDER", "there")
    assert component("networks:NETWORKS", "place").args == {"folder": "there"}


def test_component_from_the_program_is_checked_as_a_yaml_is(toy):
    toy("toy_checked", importable=True)
    with pytest.raises(ConfigError) as error:
        component("networks:NETWORKS", "build", pair=[1, "x"], nmes=[])
    assert error.value.lines == [
        "build: nmes: unknown key of build; allowed: name, size, pair, names; did you mean 'names'?",
        "build: size: missing; build needs it",
        'build: pair.1: "x" is wrong; expected a number such as 1e-4 or 8/255',
    ]
    with pytest.raises(ConfigError, match=r"^build: sise: unknown key .* did you mean 'size'\?$"):
        component("networks:NETWORKS", "build", sise=[3, 4])


def test_choices_may_have_a_name_here_or_in_the_module_they_come_from(tmp_path, monkeypatch):
    folder = tmp_path / "toy_choices"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "shades.py").write_text("raise RuntimeError\nShade = Literal['light', 'dark']\n")
    (folder / "user.py").write_text(
        "raise RuntimeError\nfrom toy_choices.shades import Shade as Tone\nWidth = Literal['slim', 'wide']\n"
        "def make(*, width: Width, shade: Tone = 'light'): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(networks.NETWORKS, "toy", "toy_choices.user:make")
    assert component("networks:NETWORKS", "toy", width="slim").args == {"width": "slim", "shade": "light"}
    with pytest.raises(ConfigError, match="width: .*allowed: slim, wide"):
        component("networks:NETWORKS", "toy", width="middle")


@pytest.mark.parametrize(
    "function",
    [
        "def bad(*, x): ...",
        "def bad(*, x: Unknown): ...",
        "def bad(*, x: bytes): ...",
        "def bad(*, x: int = 8 // 3): ...",
        "def other(*, x: int): ...",
    ],
)
def test_what_no_yaml_key_can_be_made_of_is_a_bug(toy, function):
    name = f"toy_bad_{abs(hash(function))}"
    toy(name, importable=True, more=function)
    with pytest.raises(TypeError, match=name):
        component("networks:NETWORKS", "bad", x=1)


@pytest.mark.parametrize(("table", "name"), [(table, name) for table in TABLES for name in table_of(table)])
def test_every_component_can_be_configured_and_is_described(table, name):
    signature = signature_of(table_of(table)[name])
    fixed = {"dataloaders:DATASETS": Data, "networks:GATES": Gate}.get(table)
    for argument in signature.types:
        assert re.search(rf"\b{argument}\b", signature.docstring), (
            f"{table} {name}: {argument} is not described"
        )
        assert argument not in (fixed.fixed_keys() if fixed else {}), f"{table} {name}: {argument} is taken"
        assert argument not in ("name", "type", "component")
    required = [argument for argument in signature.types if argument not in signature.defaults]
    arguments = {argument: 1 if argument == "class_id" else "x" for argument in required}
    if table != "dataloaders:DATASETS":
        assert component(
            table,
            name,
            key="type" if table in ("networks:GATES", "networks:ENSEMBLES") else "name",
            **arguments,
        )
