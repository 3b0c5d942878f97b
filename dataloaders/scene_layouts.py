"""What a highway, an urban and an ambiguous road consist of, and how one frame of it is painted. Writes no file.

The roads are made so that look and meaning disagree between the subsets: light concrete is the road of a highway but
the pavement or a traffic island in town, dark asphalt the shoulder of a highway but the road in town, a wall with panes
a noise barrier or a house front, a steel band a guard rail or a railing, a white strip an edge line or a kerb, a blue
board a sign or advertising, pale blue the sky or glass. Only the scene as a whole tells which."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from dataloaders import scene_things as things
from dataloaders.scene_painter import ID, Canvas, Light, Line, Strip, draw_light, noise_texture

VIEW = 110.0  # metres: things farther away are not painted
FRAMES_PER_SCENE = 8
NOISE = noise_texture()

CONCRETE, ASPHALT, GRAVEL = (172, 168, 160), (74, 75, 80), (148, 132, 112)
WHITE, KERB_WHITE, YELLOW = (232, 232, 228), (206, 205, 198), (214, 176, 70)
GREEN, DRY, BRICK, GREY_SLABS = (92, 124, 58), (150, 122, 82), (152, 98, 80), (158, 156, 152)
BLUE_SIGN, STEEL = (38, 78, 170), (150, 156, 162)
CAR_COLOURS = ((190, 192, 196), (40, 42, 48), (120, 124, 130), (236, 236, 234), (150, 30, 34), (44, 66, 120), (96, 100, 88))
BOX_COLOURS = ((236, 236, 232), (60, 90, 160), (176, 40, 40), (220, 160, 50), (70, 130, 90), (150, 152, 158))
PLASTER = ((216, 200, 166), (200, 170, 140), (190, 196, 200), (206, 186, 190), (180, 190, 160), (224, 220, 210))
COATS = ((160, 40, 50), (40, 50, 90), (60, 60, 64), (210, 200, 190), (70, 110, 80), (200, 140, 60))


@dataclass(frozen=True)
class Thing:
    """Something on the road: `draw(canvas, x, z)` paints it. Painted from the outer edge of the view towards the driven
    lane and from far to near: a ray from the camera meets what stands farther out later."""

    x: float
    z: float
    draw: Callable
    speed: float = 0.0  # metres a frame
    length: float = 0.0
    on_road: bool = False  # among the vehicles of the own carriageway only distance decides


@dataclass
class Scene:
    """One recording: a stretch of road with its weather, and the drive along it."""

    light: Light
    step: float  # metres the camera moves a frame
    curvature: float
    horizon: float
    camera_x: float
    hill: float  # height of wooded hills on the horizon, share of the height
    hill_colour: tuple[float, float, float]
    strips: list[Strip] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    things: list[Thing] = field(default_factory=list)

    @property
    def reach(self) -> float:
        """How far the road has to be furnished."""
        return VIEW + FRAMES_PER_SCENE * self.step


def vary(random: np.random.Generator, colour: tuple, spread: float = 12.0) -> tuple[float, float, float]:
    """The colour, lighter or darker and a little shifted."""
    level = random.uniform(-spread, spread)
    return tuple(float(np.clip(c + level + random.uniform(-0.3, 0.3) * spread, 5, 250)) for c in colour)


def pick(random: np.random.Generator, options: tuple):
    return options[random.integers(len(options))]


def chance(random: np.random.Generator, share: float) -> bool:
    return bool(random.random() < share)


def places(random: np.random.Generator, scene: Scene, low: float, high: float, start: float = -8.0):
    """Positions along the road, `low` to `high` metres apart."""
    z = start + random.uniform(0, high)
    while z < scene.reach:
        yield z
        z += random.uniform(low, high)


def new_scene(random: np.random.Generator, step: float, bend: float, hill: float) -> Scene:
    """A recording without road: weather, light and camera come from the same distributions in every subset."""
    return Scene(
        light=draw_light(random),
        step=step,
        curvature=random.uniform(-bend, bend),
        horizon=random.uniform(0.42, 0.5),
        camera_x=random.uniform(-0.4, 0.4),
        hill=hill,
        hill_colour=vary(random, (70, 96, 66), 20),
    )


def add(scene: Scene, draw: Callable, x: float, z: float, *, speed=0.0, on_road=False, **look) -> None:
    scene.things.append(Thing(x, z, partial(draw, **look), speed, look.get("length", 12.0), on_road))


def highway(random: np.random.Generator) -> Scene:
    """A wide carriageway of light concrete with shoulder, guard rails and verges, noise barriers and much sky."""
    scene = new_scene(random, random.uniform(8, 13), 0.002, random.uniform(0.02, 0.16))
    lane = 3.6
    right = lane * (0.5 + random.integers(0, 3))
    left = -lane * (0.5 + random.integers(0 if right > lane else 1, 3))
    road = vary(random, CONCRETE if chance(random, 0.85) else (128, 127, 126))
    verge, meadow = vary(random, pick(random, (GREEN, DRY))), vary(random, pick(random, (GREEN, DRY)))
    gutter, gravel = vary(random, (128, 118, 96)), vary(random, GRAVEL)
    edge, inner = right + 0.4, left - 0.9
    shoulder = edge + random.uniform(2.0, 3.2)
    path = shoulder + 0.45 + random.uniform(1.6, 2.6)
    behind = path + random.uniform(2.0, 4.0)
    far_edge = inner - 0.4 - random.uniform(3, 5)
    far = far_edge - lane * random.integers(2, 4) - 0.8
    scene.strips += [
        Strip(far, ID["Nature object"], meadow, 16, 6),
        Strip(far_edge, ID["RD normal street"], road, 4, 8, 5.0),
        Strip(inner - 0.4, ID["Nature object"], verge, 16, 6),
        Strip(inner, ID["Curbstone"], gutter),
        Strip(edge, ID["RD normal street"], road, 4, 8, 5.0),
        Strip(shoulder, ID["Non-drivable street"], vary(random, ASPHALT), 7),
        Strip(shoulder + 0.45, ID["Curbstone"], gutter),
        Strip(path, ID["Sidewalk"], gravel, 14, 10),
        Strip(behind, ID["Nature object"], verge, 16, 6),
        Strip(np.inf, ID["Nature object"], meadow, 16, 6),
    ]
    scene.lines += [Line(x, 0.35, ID["Solid line"], WHITE) for x in (left - 0.3, right + 0.1, far_edge - 0.5, far + 0.5)]
    scene.lines += [
        Line(x, 0.24, ID["Dashed line"], WHITE, 6.0, 15.0)
        for x in np.concatenate([np.arange(left + lane, right - 0.1, lane), np.arange(far + 0.8 + lane, far_edge - 1, lane)])
    ]
    steel = vary(random, STEEL)
    rails = [inner - 1.0] + [far_edge + 0.8] * chance(random, 0.5) + [path + 0.4] * chance(random, 0.7)
    for x in rails:
        for z in np.arange(-9, scene.reach, 9):
            add(scene, things.guard_rail, x, z, length=9.0, colour=steel)
    sides = ((behind + 1.0, 0.5), (far - 3.0, 0.5))
    for x, share in sides:
        if chance(random, share):
            look = {"height": random.uniform(3, 5.5), "colour": vary(random, pick(random, PLASTER)),
                    "pane_rows": int(random.integers(0, 3)), "pane": things.WINDOW}  # fmt: skip
            begin = random.uniform(-20, 50)
            for z in np.arange(begin, begin + random.uniform(60, 200), 8):
                add(scene, things.noise_barrier, x, z, length=8.0, **look)
        elif chance(random, 0.6):
            wire = vary(random, (112, 128, 100))
            for z in np.arange(-9, scene.reach, 9):
                add(scene, things.fence, x, z, length=9.0, height=1.9, colour=wire)
        woods(random, scene, x + np.sign(x) * 3, 7, 16, conifers=0.6)
        if chance(random, 0.8):
            barns(random, scene, x + np.sign(x) * random.uniform(4, 12))
    for z in places(random, scene, 24, 26):
        add(scene, things.reflector_post, path + 0.3, z)
    for z in places(random, scene, 30, 60):
        if chance(random, 0.5):
            add(scene, things.motorway_board, path + 1.6, z, width=random.uniform(2.2, 3.4), colour=vary(random, BLUE_SIGN))
        else:
            add(scene, things.round_sign, pick(random, (path + 0.9, inner - 1.6)), z, height=2.6, colour=WHITE, variant=0)
    if chance(random, 0.6):
        lanes = np.arange(left + lane / 2, right, lane)
        boards = [(x, 2.9, chance(random, 0.35)) for x in lanes if chance(random, 0.8)]
        for z in places(random, scene, 70, 110):
            add(scene, things.gantry, 0.0, z, on_road=True, x0=inner - 1.4, x1=path + 0.8, boards=boards,
                colour=vary(random, BLUE_SIGN), variant=0)  # fmt: skip
    if chance(random, 0.3):
        add(scene, things.overpass, 9.0, random.uniform(30, scene.reach), x0=far - 3, x1=behind, colour=vary(random, (150, 148, 142)))
    if chance(random, 0.5):
        for z in places(random, scene, 35, 40):
            add(scene, things.lamp_post, inner - 2.2, z, height=9.0)
    drive(random, scene, [(x, False) for x in np.arange(left + lane / 2, right, lane)], 14, 45, trucks=0.4, speed=2.0)
    drive(random, scene, [(x, True) for x in np.arange(far + 0.8 + lane / 2, far_edge - 1, lane)], 18, 50, trucks=0.4, speed=8.0)
    return scene


def urban(random: np.random.Generator) -> Scene:
    """A narrow street of dark asphalt between house fronts, with pavements, parked cars and people."""
    scene = new_scene(random, random.uniform(3.5, 7), 0.001, 0.0)
    lane = random.uniform(2.9, 3.3)
    road = vary(random, ASPHALT)
    paving = vary(random, pick(random, (CONCRETE, GREY_SLABS, BRICK)))
    street = ID["Drivable cobblestone"] if chance(random, 0.15) else ID["RD normal street"]
    cobbles = street != ID["RD normal street"]
    kerb, island = vary(random, KERB_WHITE, 8), random.uniform(1.2, 2.6) * chance(random, 0.55)
    bay_right, bay_left = 2.1 * chance(random, 0.6), 2.1 * chance(random, 0.6)
    right, left = lane / 2, -1.5 * lane - island
    walk_right, walk_left = random.uniform(2.6, 4.2, 2)
    front_right, front_left = right + bay_right + 0.3 + walk_right, left - bay_left - 0.3 - walk_left
    parking = ID["Parking area"]
    bay = vary(random, road, 6)
    surface = {"colour": vary(random, (112, 108, 104)) if cobbles else road, "grain": 30 if cobbles else 7,
               "cells": 5 if cobbles else 10}  # fmt: skip
    scene.strips += [
        Strip(front_left, ID["Nature object"], vary(random, GREEN), 16, 6),
        Strip(left - bay_left - 0.3, ID["Sidewalk"], paving, 6, 8, 0.9),
        Strip(left - bay_left, ID["Curbstone"], kerb),
        Strip(left, parking, bay, 8),
        Strip(-lane / 2 - island, street, **surface),
        Strip(-lane / 2 - 0.8 * island, ID["Curbstone"], kerb),
        Strip(-lane / 2 - 0.2 * island, ID["Non-drivable street"], vary(random, CONCRETE), 5, 8),
        Strip(-lane / 2, ID["Curbstone"], kerb),
        Strip(right, street, **surface),
        Strip(right + bay_right, parking, bay, 8),
        Strip(right + bay_right + 0.3, ID["Curbstone"], kerb),
        Strip(front_right, ID["Sidewalk"], paving, 6, 8, 0.9),
        Strip(np.inf, ID["Nature object"], vary(random, GREEN), 16, 6),
    ]
    if not island:
        scene.lines.append(Line(-lane / 2, 0.28, ID["Dashed line"], YELLOW, 3.0, 6.0))
    for x, wanted in ((right - 0.25, 0.7), (left + 0.25, 0.7)):
        if chance(random, wanted):
            scene.lines.append(Line(x, 0.2, ID["Solid line"], YELLOW))
    street_furniture(random, scene, right + bay_right + 0.3, front_right, front_left)
    for x, bay_width in ((right + bay_right / 2, bay_right), (left - bay_left / 2, bay_left)):
        if bay_width:
            park(random, scene, x)
    return scene


def ambiguous(random: np.random.Generator) -> Scene:
    """An arterial road in the suburbs: two lanes a side, guard rail and kerb, houses behind verge and hedge."""
    scene = new_scene(random, random.uniform(6, 10), 0.0015, random.uniform(0.0, 0.1))
    lane = 3.3
    right = lane * (0.5 + random.integers(0, 2))
    left = -lane * (0.5 + random.integers(0, 2))
    road = vary(random, pick(random, (CONCRETE, ASPHALT, (118, 118, 118))))
    verge = vary(random, pick(random, (GREEN, DRY)))
    curb = vary(random, pick(random, (KERB_WHITE, (128, 118, 96))))
    apron = vary(random, pick(random, (CONCRETE, ASPHALT)))
    middle = random.uniform(1.5, 3)
    far_edge = left - 0.5 - middle
    far = far_edge - 2 * lane - 0.6
    margin = right + 0.4 + random.uniform(1.0, 2.0)
    walk = margin + 0.4 + random.uniform(0.8, 2.0)
    behind = walk + random.uniform(1.8, 2.8)
    slabs = vary(random, pick(random, (CONCRETE, GREY_SLABS, BRICK, GRAVEL)))
    scene.strips += [
        Strip(far - 2.5, ID["Nature object"], verge, 16, 6),
        Strip(far - 0.4, ID["Sidewalk"], slabs, 6, 8, 0.9),
        Strip(far, ID["Curbstone"], curb),
        Strip(far_edge, ID["RD normal street"], road, 6),
        Strip(left - 0.9, ID["Nature object"], verge, 16, 6),
        Strip(left - 0.5, ID["Curbstone"], curb),
        Strip(right + 0.4, ID["RD normal street"], road, 6),
        Strip(margin, ID["Non-drivable street"], apron, 6),
        Strip(margin + 0.4, ID["Curbstone"], curb),
        Strip(walk, ID["Nature object"], verge, 16, 6),
        Strip(behind, ID["Sidewalk"], slabs, 6, 8, 0.9),
        Strip(np.inf, ID["Nature object"], vary(random, GREEN), 16, 6),
    ]
    paint = pick(random, (WHITE, YELLOW))
    scene.lines += [Line(x, 0.26, ID["Solid line"], paint) for x in (left - 0.1, right + 0.15)]
    dividers = [*np.arange(left + lane, right - 0.1, lane), far_edge - lane]
    scene.lines += [Line(x, 0.22, ID["Dashed line"], paint, 3.5, 9.0) for x in dividers]
    rail_at = pick(random, (left - 1.4, walk - 0.6))
    steel = vary(random, STEEL)
    for z in np.arange(-9, scene.reach, 9):
        add(scene, things.guard_rail, rail_at, z, length=9.0, colour=steel)
    for x in (behind + 0.6, far - 3.2):
        kind = pick(random, ("fence", "hedge", "barrier"))
        begin = random.uniform(-20, 30)
        colour = vary(random, {"fence": (112, 128, 100), "hedge": (66, 96, 50), "barrier": pick(random, PLASTER)}[kind])
        draw = {"fence": things.fence, "hedge": things.hedge, "barrier": things.noise_barrier}[kind]
        look = {"pane_rows": int(random.integers(0, 2)), "pane": things.WINDOW} if kind == "barrier" else {}
        height = {"fence": 1.5, "hedge": random.uniform(1.0, 2.0), "barrier": 3.0}[kind]
        for z in np.arange(begin, begin + random.uniform(50, 150), 8):
            add(scene, draw, x, z, length=8.0, height=height, colour=colour, **look)
        fronts(random, scene, x + np.sign(x) * random.uniform(3, 7), gap=0.45, low=5, high=11)
        woods(random, scene, x + np.sign(x) * 1.5, 9, 24, conifers=0.3)
    signs(random, scene, margin + 1.2, 16, 34, board=0.25)
    for z in places(random, scene, 26, 30):
        add(scene, things.lamp_post, walk - 0.3, z, height=7.0)
    drive(random, scene, [(x, False) for x in np.arange(left + lane / 2, right, lane)], 12, 40, trucks=0.3, speed=1.5)
    drive(random, scene, [(far_edge - lane * share, True) for share in (0.5, 1.5)], 14, 40, trucks=0.3, speed=6.0)
    return scene


def woods(random, scene: Scene, x: float, low: float, high: float, conifers: float) -> None:
    """Trees along the road at x and a little behind."""
    for z in places(random, scene, low, high):
        place = x + np.sign(x) * random.uniform(0, 4)
        if chance(random, conifers):
            add(scene, things.conifer, place, z, height=random.uniform(7, 13), radius=random.uniform(1.6, 2.6),
                colour=vary(random, (52, 84, 56)))  # fmt: skip
        else:
            leaf_tree(random, scene, place, z, pick(random, ((80, 116, 56), (110, 128, 60))))


def leaf_tree(random, scene: Scene, x: float, z: float, leaves: tuple) -> None:
    height = random.uniform(4.5, 8)
    angles = random.uniform(0, 2 * np.pi, 6)
    blobs = [(0.0, 0.0, 0.8), *((0.55 * np.cos(a), 0.45 * np.sin(a), 0.5) for a in angles)]
    add(scene, things.tree, x, z, height=height, radius=0.36 * height, colour=vary(random, leaves), blobs=blobs)


def barns(random, scene: Scene, x: float) -> None:
    """Farms and sheds beside a motorway: wood or corrugated iron, few windows."""
    for z in places(random, scene, 24, 50, start=10):
        colour = vary(random, pick(random, ((126, 96, 74), (150, 90, 76), (136, 146, 152), (112, 120, 110))))
        add(scene, things.house, x, z, length=random.uniform(14, 26), depth=14.0, height=random.uniform(5.5, 9),
            colour=colour, roof=vary(random, (120, 62, 50)), pane=things.WINDOW, floors=0, glass=False,
            pitched=chance(random, 0.7))  # fmt: skip


def fronts(random, scene: Scene, x: float, gap: float, low: float, high: float) -> None:
    """House fronts along the road at x; glass fronts mirror the sky."""
    z = random.uniform(-20, -8)
    while z < scene.reach:
        length = random.uniform(8, 16)
        if chance(random, gap):
            if chance(random, 0.5):
                leaf_tree(random, scene, x + np.sign(x) * 3, z + 3, (96, 110, 58))
            z += random.uniform(4, 9)
            continue
        glass = chance(random, 0.28)
        sky = 0.45 * np.array(scene.light.sky_top) + 0.55 * np.array(scene.light.haze_colour)
        height = random.uniform(low, high)
        colour = vary(random, tuple(sky) if glass else pick(random, (*PLASTER, BRICK)), 10)
        add(scene, things.house, x, z, length=length, depth=10.0, height=height, colour=colour,
            roof=vary(random, (136, 70, 56)), pane=things.WINDOW, floors=max(round(height / 3.2), 1), glass=glass,
            pitched=not glass and chance(random, 0.5))  # fmt: skip
        if chance(random, 0.45):
            board = pick(random, (BLUE_SIGN, (40, 120, 70), (180, 40, 50)))
            add(scene, things.shop_board, x - np.sign(x) * 0.7, z + random.uniform(1, 6), colour=vary(random, board))
        z += length


def street_furniture(random, scene: Scene, kerb: float, front_right: float, front_left: float) -> None:
    """Everything on the pavements and in front of the houses of a street."""
    left_kerb = -kerb if front_left > -kerb else front_left + 2.4
    for x in (front_right, front_left):
        fronts(random, scene, x, gap=0.1, low=7, high=19)
    for x, out in ((kerb, 1), (left_kerb, -1)):
        if chance(random, 0.55):
            leaves = pick(random, ((150, 110, 50), (96, 104, 50), (124, 84, 52)))
            for z in places(random, scene, 9, 18):
                leaf_tree(random, scene, x + out * 0.9, z, leaves)
        for z in places(random, scene, 5, 16):
            coat, trousers = vary(random, pick(random, COATS)), vary(random, (56, 58, 70))
            add(scene, things.pedestrian, x + out * random.uniform(0.8, 2.0), z, speed=random.uniform(-0.5, 0.7), coat=coat,
                trousers=trousers, variant=int(random.integers(3)), step=random.uniform(0, 3))  # fmt: skip
        begin = random.uniform(0, scene.reach)
        kind = pick(random, ("railing", "railing", "railing", "bollards", "works", "works"))
        for z in np.arange(begin - 60, begin + 60, 6.0):
            if kind == "railing":
                add(scene, things.fence, x + out * 0.25, z, length=6.0, height=0.95, colour=vary(random, STEEL, 4))
            elif kind == "bollards":
                for dz in (0, 2, 4):
                    add(scene, things.bollard, x + out * 0.3, z + dz, colour=(70, 66, 66))
            elif kind == "works":
                add(scene, things.barrier, x + out * 0.2, z, length=6.0, first=(200, 50, 40), second=(225, 222, 215))
        for z in places(random, scene, 20, 50):
            add(scene, things.bin_or_bag, x + out * 1.2, z, colour=vary(random, pick(random, ((60, 70, 66), (180, 120, 50)))))
        for z in places(random, scene, 22, 28):
            add(scene, things.lamp_post, x + out * 0.5, z, height=6.0)
    signs(random, scene, kerb + 0.5, 10, 24, board=0.0)
    for z in places(random, scene, 45, 90):
        if chance(random, 0.7):
            add(scene, things.crossing, 1000.0, z, x0=left_kerb, x1=kerb)
        lit, variant = int(random.integers(3)), int(random.integers(3))
        for x in (kerb + 0.4, left_kerb - 0.4):
            add(scene, things.traffic_light, x, z + 1, lit=lit, variant=variant)
    for z in places(random, scene, 25, 60):
        add(scene, things.bicycle, kerb - 0.9, z, speed=1.5, colour=vary(random, pick(random, CAR_COLOURS)),
            coat=vary(random, pick(random, COATS)), variant=int(random.integers(4)), ridden=True, )  # fmt: skip
    drive(random, scene, [(0.0, False), (left_kerb + 3.6, True)], 18, 60, trucks=0.25, speed=1.0, town=True)


def signs(random, scene: Scene, x: float, low: float, high: float, board: float) -> None:
    for z in places(random, scene, low, high):
        variant = int(random.integers(3))
        if chance(random, board):
            add(scene, things.motorway_board, x + 1.2, z, width=2.4, colour=vary(random, BLUE_SIGN))
        elif chance(random, 0.4):
            add(scene, things.warning_sign, x, z, height=2.4, variant=variant)
        else:
            colour = pick(random, (WHITE, (40, 80, 170)))
            add(scene, things.round_sign, x, z, height=2.4, colour=colour, variant=variant)


def park(random, scene: Scene, x: float) -> None:
    """A row of parked cars and delivery vans."""
    for z in places(random, scene, 5.4, 8):
        variant = int(random.integers(3))
        if chance(random, 0.15):
            add(scene, things.bus, x, z, length=5.6, height=2.5, colour=vary(random, pick(random, BOX_COLOURS)),
                variant=variant, oncoming=chance(random, 0.5))  # fmt: skip
        elif chance(random, 0.85):
            add(scene, things.car, x, z, colour=vary(random, pick(random, CAR_COLOURS)), variant=variant,
                oncoming=chance(random, 0.3), height=random.uniform(1.4, 1.75))  # fmt: skip


def drive(random, scene: Scene, lanes: list, low: float, high: float, trucks: float, speed: float, town=False) -> None:
    """Traffic: `lanes` are (x, oncoming); `speed` metres a frame relative to the road, towards the camera if oncoming."""
    for x, oncoming in lanes:
        for z in places(random, scene, low, high, start=10):
            variant, colour = int(random.integers(3)), vary(random, pick(random, CAR_COLOURS))
            pace = -speed if oncoming else scene.step + random.uniform(-0.5, 0.5)
            vehicle = {"variant": variant, "oncoming": oncoming}
            if chance(random, trucks):
                draw = things.bus if town else things.truck
                look = {"colour": vary(random, pick(random, BOX_COLOURS)), "length": random.uniform(8, 12)}
            else:
                draw, look = things.car, {"colour": colour, "height": random.uniform(1.4, 1.75)}
            add(scene, draw, x, z, speed=pace, on_road=not oncoming, **vehicle, **look)


SUBSETS = {"highway": highway, "urban": urban, "ambiguous": ambiguous}


def paint(scene: Scene, frame: int, size: tuple[int, int], random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Frame number `frame` of a scene: image uint8 [H, W, 3] RGB and label values uint8 [H, W]."""
    sway = 0.15 * np.sin(frame)
    canvas = Canvas(size, scene.light, scene.camera_x + sway, scene.step * frame, scene.curvature, scene.horizon)
    canvas.sky(NOISE, ID["Sky"])
    if scene.hill:
        hills(canvas, scene)
    canvas.ground(scene.strips, scene.lines, NOISE)
    shown = []
    for thing in scene.things:
        z = thing.z + thing.speed * frame
        if canvas.camera_z - thing.length < z < canvas.camera_z + VIEW:
            shown.append((0.0 if thing.on_road else abs(thing.x - canvas.camera_x), z, thing))
    for _, z, thing in sorted(shown, key=lambda item: item[:2], reverse=True):
        thing.draw(canvas, thing.x, z)
    return canvas.finish(random, NOISE)


def hills(canvas: Canvas, scene: Scene) -> None:
    """A wooded ridge along the horizon."""
    height, width = canvas.labels.shape
    ridge = NOISE[7, (np.arange(33) + int(canvas.camera_z / 15)) % 256] * 0.35 + 0.75
    top = canvas.horizon_row - ridge * scene.hill * height
    columns = np.linspace(0, width, 33)
    outline = [(0, canvas.horizon_row + 4), *zip(columns, top, strict=True), (width, canvas.horizon_row + 4)]
    canvas.fill([outline], scene.hill_colour, ID["Nature object"], canvas.camera_z + 150)
