"""One recording while it is laid out, and what roads of every kind have: woods, houses, signs, traffic."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from dataloaders import scene_things as things
from dataloaders.scene_painter import Colour, Light, Line, Strip, draw_light

VIEW = 110.0  # metres: things farther away are not painted
FRAMES_PER_SCENE = 8

CONCRETE, ASPHALT, GRAVEL, GUTTER = (172, 168, 160), (74, 75, 80), (148, 132, 112), (128, 118, 96)
WHITE, KERB_WHITE, YELLOW, STEEL = (232, 232, 228), (206, 205, 198), (214, 176, 70), (150, 156, 162)
GREEN, DRY, BRICK, SLABS = (92, 124, 58), (150, 122, 82), (152, 98, 80), (158, 156, 152)
BLUE, SIGN_GREEN, RED, WIRE = (38, 78, 170), (40, 120, 70), (180, 40, 50), (112, 128, 100)
SUMMER, OLIVE = ((80, 116, 56), (110, 128, 60)), ((96, 110, 58),)
AUTUMN = ((150, 110, 50), (96, 104, 50), (124, 84, 52))
CARS = (
    *((190, 192, 196), (40, 42, 48), (120, 124, 130), (236, 236, 234)),
    *((150, 30, 34), (44, 66, 120), (96, 100, 88)),
)
LORRIES = ((236, 236, 232), (60, 90, 160), (176, 40, 40), (220, 160, 50), (70, 130, 90), (150, 152, 158))
PLASTER = (
    *((216, 200, 166), (200, 170, 140), (190, 196, 200)),
    *((206, 186, 190), (180, 190, 160), (224, 220, 210)),
)
SHEDS = ((126, 96, 74), (150, 90, 76), (136, 146, 152), (112, 120, 110))
COATS = ((160, 40, 50), (40, 50, 90), (60, 60, 64), (210, 200, 190), (70, 110, 80), (200, 140, 60))


@dataclass(frozen=True)
class Thing:
    """Something on the road: `draw(canvas, x, z)` paints it.

    Among the vehicles of the own carriageway (`on_road`) what is nearer hides the rest; elsewhere it is the
    distance from the driven lane, since a ray from the camera meets what stands farther out later."""

    x: float
    z: float
    draw: Callable
    length: float  # metres along the road
    speed: float  # metres a frame
    on_road: bool


@dataclass
class Scene:
    """A stretch of road with its weather, and the drive along it.

    `random` serves the layout only; `steps` is the range of metres that the camera moves a frame, `bend` the
    largest curvature in 1/m, `hills` the range of the hills on the horizon, share of the height."""

    random: np.random.Generator
    steps: tuple[float, float]
    bend: float
    hills: tuple[float, float]
    strips: list[Strip] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    things: list[Thing] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Light, weather and camera come first, so that they have nothing to do with the road."""
        self.light: Light = draw_light(self.random)
        self.horizon = self.random.uniform(0.42, 0.5)
        self.camera_x = self.random.uniform(-0.4, 0.4)
        self.hill_colour = self.vary((70, 96, 66), 20)
        self.step = self.random.uniform(*self.steps)
        self.curvature = self.random.uniform(-self.bend, self.bend)
        self.hill = self.random.uniform(*self.hills)
        self.reach = VIEW + FRAMES_PER_SCENE * self.step  # how far the road has to be furnished

    def add(
        self, draw: Callable, x: float, z: float, *, speed: float = 0.0, on_road: bool = False, **look
    ) -> None:
        self.things.append(
            Thing(float(x), float(z), partial(draw, **look), look.get("length", 12.0), speed, on_road)
        )

    def add_row(self, draw: Callable, x: float, start: float, end: float, every: float, **look) -> None:
        """Pieces that join: each begins where the one before it ends."""
        for z in np.arange(start, end, every):
            self.add(draw, x, z, length=every, **look)

    def vary(self, colour: Colour, spread: float = 12.0) -> tuple[float, ...]:
        """The colour, lighter or darker and a little shifted."""
        level = self.random.uniform(-spread, spread)
        shift = self.random.uniform(-0.3, 0.3, 3) * spread
        return tuple(np.clip(np.array(colour) + level + shift, 5, 250).tolist())

    def pick(self, options: tuple):
        return options[self.random.integers(len(options))]

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)

    def variant(self) -> int:
        """Which of the numbered colours of a class ("Car 1", "Car 2", ...) a thing gets."""
        return int(self.random.integers(3))

    def places(self, low: float, high: float, start: float = -8.0) -> Iterator[float]:
        """Positions along the road, `low` to `high` metres apart."""
        z = start + self.random.uniform(0, high)
        while z < self.reach:
            yield z
            z += self.random.uniform(low, high)


def woods(scene: Scene, x: float, low: float, high: float, conifers: float) -> None:
    """Trees every `low` to `high` metres at x and a little behind; `conifers` is their share."""
    for z in scene.places(low, high):
        place = x + np.sign(x) * scene.random.uniform(0, 4)
        if scene.chance(conifers):
            height, radius = scene.random.uniform(7, 13), scene.random.uniform(1.6, 2.6)
            colour = scene.vary((52, 84, 56))
            scene.add(things.conifer, place, z, height=height, radius=radius, colour=colour)
        else:
            leaf_tree(scene, place, z, SUMMER)


def leaf_tree(scene: Scene, x: float, z: float, leaves: tuple) -> None:
    height = scene.random.uniform(4.5, 8)
    angles = scene.random.uniform(0, 2 * np.pi, 6)
    blobs = [(0.0, 0.0, 0.8), *((0.55 * np.cos(a), 0.45 * np.sin(a), 0.5) for a in angles)]
    colour = scene.vary(scene.pick(leaves))
    scene.add(things.tree, x, z, height=height, radius=0.36 * height, colour=colour, blobs=blobs)


def barns(scene: Scene, x: float) -> None:
    """Farms and sheds beside a motorway: wood or corrugated iron without windows."""
    for z in scene.places(24, 50, start=10):
        shape = {
            "length": scene.random.uniform(14, 26),
            "depth": 14.0,
            "height": scene.random.uniform(5.5, 9),
        }
        colour, roof = scene.vary(scene.pick(SHEDS)), scene.vary((120, 62, 50))
        pitched = scene.chance(0.7)
        look = {"colour": colour, "roof": roof, "floors": 0, "glass": False, "pitched": pitched}
        scene.add(things.house, x, z, **shape, **look)


def fronts(scene: Scene, x: float, gap: float, low: float, high: float) -> None:
    """Houses `low` to `high` metres tall along the road, `gap` of them left out; glass mirrors the sky."""
    sky = 0.45 * np.array(scene.light.sky_top) + 0.55 * np.array(scene.light.haze_colour)
    z = scene.random.uniform(-20, -8)
    while z < scene.reach:
        if scene.chance(gap):
            if scene.chance(0.5):
                leaf_tree(scene, x + np.sign(x) * 3, z + 3, OLIVE)
            z += scene.random.uniform(4, 9)
            continue
        length, height, glass = (
            scene.random.uniform(8, 16),
            scene.random.uniform(low, high),
            scene.chance(0.28),
        )
        look = {
            "colour": scene.vary(sky if glass else scene.pick((*PLASTER, BRICK)), 10),
            "roof": scene.vary((136, 70, 56)),
            "floors": max(round(height / 3.2), 1),
            "glass": glass,
            "pitched": not glass and scene.chance(0.5),
        }
        scene.add(things.house, x, z, length=length, depth=10.0, height=height, **look)
        if scene.chance(0.45):
            colour = scene.vary(scene.pick((BLUE, SIGN_GREEN, RED)))
            scene.add(things.shop_board, x - np.sign(x) * 0.7, z + scene.random.uniform(1, 6), colour=colour)
        z += length


def signs(scene: Scene, x: float, low: float, high: float, boards: float) -> None:
    """Warnings and prohibitions at x; `boards` is the share of large blue ones."""
    for z in scene.places(low, high):
        if scene.chance(boards):
            width, colour = scene.random.uniform(2.2, 3.4), scene.vary(BLUE)
            scene.add(things.motorway_board, x + 0.7, z, width=width, colour=colour)
        elif scene.chance(0.4):
            scene.add(things.warning_sign, x, z, height=2.4, variant=scene.variant())
        else:
            colour = scene.pick((WHITE, (40, 80, 170)))
            scene.add(things.round_sign, x, z, height=2.4, colour=colour, variant=scene.variant())


def parked(scene: Scene, x: float) -> None:
    """A row of parked cars and delivery vans."""
    for z in scene.places(5.4, 8):
        if scene.chance(0.12):
            continue
        look = {"variant": scene.variant(), "oncoming": scene.chance(0.3)}
        if scene.chance(0.15):
            colour = scene.vary(scene.pick(LORRIES))
            scene.add(things.bus, x, z, length=5.6, height=2.5, colour=colour, **look)
        else:
            colour, height = scene.vary(scene.pick(CARS)), scene.random.uniform(1.4, 1.75)
            scene.add(things.car, x, z, colour=colour, height=height, **look)


def traffic(
    scene: Scene, x: float, oncoming: bool, gaps: tuple[float, float], lorry: Callable, share: float
) -> None:
    """Vehicles in the lane at x, `gaps` metres apart; `share` of them are painted by `lorry`."""
    for z in scene.places(*gaps, start=10):
        look = {"variant": scene.variant(), "oncoming": oncoming}
        speed = -scene.random.uniform(3, 6) if oncoming else scene.step + scene.random.uniform(-0.5, 0.5)
        if scene.chance(share):
            draw, colour = lorry, scene.vary(scene.pick(LORRIES))
            look["length"] = scene.random.uniform(8, 12)
        else:
            draw, colour = things.car, scene.vary(scene.pick(CARS))
            look["height"] = scene.random.uniform(1.4, 1.75)
        scene.add(draw, x, z, speed=speed, on_road=not oncoming, colour=colour, **look)
