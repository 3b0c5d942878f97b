"""The classes of A2D2: 55 label colours -> 55 list entries, 38 categories or 11 groups."""

import json
from dataclasses import dataclass
from pathlib import Path

from dataloaders.frames import IGNORE
from engine.config import UserError

# Category, its group of the 11-class map (None: ignored there) and the colours of its numbered variants:
# "Car" has the list entries "Car 1" to "Car 4". Order as in A2D2's class_list.json; ids are positions.
CATEGORIES = (
    ("Car", "Car", "ff0000 c80000 960000 800000"),
    ("Bicycle", "Person", "b65906 963204 5a1e01 5a1e1e"),
    ("Pedestrian", "Person", "cc99ff bd499b ef59bf"),
    ("Truck", "Truck", "ff8000 c88000 968000"),
    ("Small vehicles", "Car", "00ff00 00c800 009600"),
    ("Traffic signal", "Info", "0080ff 1e1c9e 3c1c64"),
    ("Traffic sign", "Info", "00ffff 1edcdc 3c9dc7"),
    ("Utility vehicle", "Truck", "ffff00 ffffc8"),
    ("Sidebars", "Info", "e96400"),
    ("Speed bumper", "Info", "6e6e00"),
    ("Curbstone", "Nondrivable", "808000"),
    ("Solid line", "Lanes", "ffc125"),
    ("Irrelevant signs", "Blocker", "400040"),
    ("Road blocks", "Blocker", "b97a57"),
    ("Tractor", "Truck", "000064"),
    ("Non-drivable street", "Nondrivable", "8b636c"),
    ("Zebra crossing", "Info", "d23273"),
    ("Obstacles / trash", "Blocker", "ff0080"),
    ("Poles", "Blocker", "fff68f"),
    ("RD restricted area", "Nondrivable", "960096"),
    ("Animals", "Person", "ccff99"),
    ("Grid structure", "Blocker", "eea2ad"),
    ("Signal corpus", "Blocker", "212cb1"),
    ("Drivable cobblestone", "Drivable", "b432b4"),
    ("Electronic traffic", "Info", "ff46b9"),
    ("Slow drive area", "Nondrivable", "eee9bf"),
    ("Nature object", "Nature", "93fdc2"),
    ("Parking area", "Drivable", "9696c8"),
    ("Sidewalk", "Nondrivable", "b496c8"),
    ("Ego car", "Car", "48d1cc"),
    ("Painted driv. instr.", "Info", "c87dd2"),
    ("Traffic guide obj.", "Info", "9f79ee"),
    ("Dashed line", "Lanes", "8000ff"),
    ("RD normal street", "Drivable", "ff00ff"),
    ("Sky", "Sky", "87ceff"),
    ("Buildings", "Buildings", "f1e6ff"),
    ("Blurred area", None, "60458f"),
    ("Rain dirt", None, "352e52"),
)

GROUPS = {
    "Person": "ff0079",
    "Car": "ff0f0f",
    "Truck": "fe5301",
    "Drivable": "00ff00",
    "Nondrivable": "ffff00",
    "Blocker": "c0c0c0",
    "Info": "0000ff",
    "Sky": "80ffff",
    "Buildings": "530000",
    "Nature": "005000",
    "Lanes": "8000ff",
}


@dataclass(frozen=True)
class ClassMap:
    """Class names, the colour each is drawn in, and (label colour 0xRRGGBB, class id or 255) pairs."""

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ids: tuple[tuple[int, int], ...]


def list_entries() -> dict[str, tuple[str, str, str | None]]:
    """The 55 entries of the class list in order: name -> (colour "rrggbb", category, group)."""
    entries = {}
    for category, group, colours in CATEGORIES:
        variants = colours.split()
        for number, colour in enumerate(variants, start=1):
            name = f"{category} {number}" if len(variants) > 1 else category
            entries[name] = (colour, category, group)
    return entries


def class_map(num_classes: int, class_list: Path | None = None) -> ClassMap:
    """The map to 55, 38 or 11 classes; colours come from A2D2's class_list.json where it is given.

    Raises UserError when class_list.json is no mapping from "#rrggbb" to names of the 55 entries."""
    entries = list_entries()
    draw = {
        55: {name: colour for name, (colour, _, _) in entries.items()},
        38: {category: colours.split()[0] for category, _, colours in CATEGORIES},
        11: GROUPS,
    }[num_classes]
    classes = tuple(draw)
    class_of = {
        name: {55: name, 38: category, 11: group}[num_classes]
        for name, (_, category, group) in entries.items()
    }
    names = {int(colour, 16): name for name, (colour, _, _) in entries.items()}
    if class_list is not None:
        names = read_class_list(class_list)
    ids = {
        colour: classes.index(class_of[name]) if class_of[name] else IGNORE for colour, name in names.items()
    }
    return ClassMap(
        classes, tuple(rgb(int(colour, 16)) for colour in draw.values()), tuple(sorted(ids.items()))
    )


def read_class_list(path: Path) -> dict[int, str]:
    """class_list.json as colour 0xRRGGBB -> name of one of the 55 entries."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        names = {int(colour.removeprefix("#"), 16): name for colour, name in listed.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f'{path}: expected a JSON mapping of "#rrggbb" to class names ({error})') from None
    known = list_entries()
    for colour, name in names.items():
        if name not in known or not 0 <= colour < 1 << 24:
            raise UserError(
                f'{path}: "#{colour:06x}" is {name!r}, which is no class of A2D2; allowed: {", ".join(known)}'
            )
    return names


def rgb(colour: int) -> tuple[int, int, int]:
    """0xRRGGBB -> (r, g, b)."""
    return colour >> 16, colour >> 8 & 255, colour & 255
