"""What a highway, an urban and an ambiguous road consist of, and how a frame of one is painted.

Look and meaning disagree between highway and urban on purpose: light concrete is the road of a highway, but
the pavement or a traffic island in town; dark asphalt the shoulder of a highway, but the road in town; a wall
with panes a noise barrier or a house front; a steel band a guard rail or a railing; a white strip an edge
line or a kerb; a blue board a sign or advertising; pale blue sky or glass. The whole scene tells which."""

import numpy as np

from dataloaders import scene_things as things
from dataloaders.scene_furniture import (
    ASPHALT,
    AUTUMN,
    BLUE,
    BRICK,
    CARS,
    COATS,
    CONCRETE,
    DRY,
    GRAVEL,
    GREEN,
    GUTTER,
    KERB_WHITE,
    PLASTER,
    SLABS,
    STEEL,
    VIEW,
    WHITE,
    WIRE,
    YELLOW,
    Scene,
    barns,
    fronts,
    leaf_tree,
    parked,
    signs,
    traffic,
    woods,
)
from dataloaders.scene_painter import ID, Canvas, Line, Strip, noise_texture

NOISE = noise_texture()
NATURE, STREET, WALK = ID["Nature object"], ID["RD normal street"], ID["Sidewalk"]
CURB, CLOSED = ID["Curbstone"], ID["Non-drivable street"]
SOLID, DASHED = ID["Solid line"], ID["Dashed line"]


def highway(random: np.random.Generator) -> Scene:
    """A wide carriageway of light concrete: shoulder, guard rails, verges, noise barriers, much sky."""
    scene = Scene(random, steps=(8, 13), bend=0.002, hills=(0.02, 0.16))
    lane = 3.6
    right = lane * (0.5 + random.integers(0, 3))  # edges of the own carriageway
    left = -lane * (0.5 + random.integers(0 if right > lane else 1, 3))
    inner, edge = left - 0.9, right + 0.4
    shoulder = edge + random.uniform(2.0, 3.2)
    path = shoulder + 0.45 + random.uniform(1.6, 2.6)  # for maintenance
    behind = path + random.uniform(2.0, 4.0)
    far_edge = inner - 0.4 - random.uniform(3, 5)  # edges of the other carriageway
    far = far_edge - lane * random.integers(2, 4) - 0.8
    concrete = scene.vary(CONCRETE if scene.chance(0.85) else (128, 127, 126))
    road = {"paint": STREET, "colour": concrete, "grain": 4, "joint": 5.0}
    gutter = scene.vary(GUTTER)
    verge, meadow = (
        {"paint": NATURE, "colour": scene.vary(scene.pick((GREEN, DRY))), "grain": 16, "cells": 6}
        for _ in range(2)
    )
    scene.strips += [
        Strip(far, **meadow),
        Strip(far_edge, **road),
        Strip(inner - 0.4, **verge),
        Strip(inner, CURB, gutter),
        Strip(edge, **road),
        Strip(shoulder, CLOSED, scene.vary(ASPHALT), 7),
        Strip(shoulder + 0.45, CURB, gutter),
        Strip(path, WALK, scene.vary(GRAVEL), 14, 10),
        Strip(behind, **verge),
        Strip(np.inf, **meadow),
    ]
    scene.lines += [Line(x, 0.35, SOLID, WHITE) for x in (left - 0.3, right + 0.1, far_edge - 0.5, far + 0.5)]
    dividers = [*np.arange(left + lane, right - 0.1, lane), *np.arange(far + 0.8 + lane, far_edge - 1, lane)]
    scene.lines += [Line(x, 0.24, DASHED, WHITE, 6.0, 15.0) for x in dividers]

    steel = scene.vary(STEEL)
    for x, share in ((inner - 1.0, 1.0), (far_edge + 0.8, 0.5), (path + 0.4, 0.7)):
        if scene.chance(share):
            scene.add_row(things.guard_rail, x, -9, scene.reach, 9.0, colour=steel)
    for x in (behind + 1.0, far - 3.0):
        out = np.sign(x)
        if scene.chance(0.5):
            start, length = random.uniform(-20, 50), random.uniform(60, 200)
            height, panes = random.uniform(3, 5.5), int(random.integers(0, 3))
            colour = scene.vary(scene.pick(PLASTER))
            look = {"height": height, "colour": colour, "pane_rows": panes}
            scene.add_row(things.noise_barrier, x, start, start + length, 8.0, **look)
        elif scene.chance(0.6):
            scene.add_row(things.fence, x, -9, scene.reach, 9.0, height=1.9, colour=scene.vary(WIRE))
        woods(scene, x + 3 * out, 7, 16, conifers=0.6)
        if scene.chance(0.8):
            barns(scene, x + out * random.uniform(4, 12))
    for z in scene.places(24, 26):
        scene.add(things.reflector_post, path + 0.3, z)
    signs(scene, path + 0.9, 24, 50, boards=0.55)
    lanes = np.arange(left + lane / 2, right, lane)
    if scene.chance(0.6):
        boards = [(x, scene.chance(0.35)) for x in lanes]
        blue, ends = scene.vary(BLUE), {"x0": inner - 1.4, "x1": path + 0.8}
        for z in scene.places(70, 110):
            scene.add(things.gantry, 0.0, z, on_road=True, boards=boards, colour=blue, variant=0, **ends)
    if scene.chance(0.3):
        colour, z = scene.vary((150, 148, 142)), random.uniform(30, scene.reach)
        scene.add(things.overpass, 9.0, z, x0=far - 3, x1=behind, colour=colour)
    if scene.chance(0.5):
        for z in scene.places(35, 40):
            scene.add(things.lamp_post, inner - 2.2, z, height=9.0)
    for x in lanes:
        traffic(scene, x, False, (14, 45), things.truck, 0.4)
    for x in np.arange(far + 0.8 + lane / 2, far_edge - 1, lane):
        traffic(scene, x, True, (18, 50), things.truck, 0.4)
    return scene


def urban(random: np.random.Generator) -> Scene:
    """A narrow street of dark asphalt between house fronts, with pavements, parked cars and people."""
    scene = Scene(random, steps=(3.5, 7), bend=0.001, hills=(0, 0))
    lane = random.uniform(2.9, 3.3)
    island = random.uniform(1.2, 2.6) * scene.chance(0.55)
    bay_right, bay_left = 2.1 * scene.chance(0.6), 2.1 * scene.chance(0.6)
    right, left = lane / 2, -1.5 * lane - island
    kerb_right, kerb_left = right + bay_right + 0.3, left - bay_left - 0.3
    front_right, front_left = kerb_right + random.uniform(2.6, 4.2), kerb_left - random.uniform(2.6, 4.2)
    asphalt, kerb = scene.vary(ASPHALT), scene.vary(KERB_WHITE, 8)
    road = {"paint": STREET, "colour": asphalt, "grain": 7, "cells": 10}
    if scene.chance(0.15):
        stones = scene.vary((112, 108, 104))
        road = {"paint": ID["Drivable cobblestone"], "colour": stones, "grain": 30, "cells": 5}
    bay = {"paint": ID["Parking area"], "colour": scene.vary(asphalt, 6), "grain": 8}
    paving = {"paint": WALK, "colour": scene.vary(scene.pick((CONCRETE, SLABS, BRICK))), "joint": 0.9}
    garden = {"paint": NATURE, "colour": scene.vary(GREEN), "grain": 16, "cells": 6}
    scene.strips += [
        Strip(front_left, **garden),
        Strip(kerb_left, **paving),
        Strip(kerb_left + 0.3, CURB, kerb),
        Strip(left, **bay),
        Strip(-lane / 2 - island, **road),
        Strip(-lane / 2 - 0.8 * island, CURB, kerb),
        Strip(-lane / 2 - 0.2 * island, CLOSED, scene.vary(CONCRETE), 5),
        Strip(-lane / 2, CURB, kerb),
        Strip(right, **road),
        Strip(kerb_right - 0.3, **bay),
        Strip(kerb_right, CURB, kerb),
        Strip(front_right, **paving),
        Strip(np.inf, **garden),
    ]
    if not island:
        scene.lines.append(Line(-lane / 2, 0.28, DASHED, YELLOW, 3.0, 6.0))
    scene.lines += [Line(x, 0.2, SOLID, YELLOW) for x in (right - 0.25, left + 0.25) if scene.chance(0.7)]

    for kerb_x, front, out in ((kerb_right, front_right, 1), (kerb_left, front_left, -1)):
        fronts(scene, front, gap=0.1, low=7, high=19)
        pavement(scene, kerb_x, out)
    for x, width in ((right + 1.05, bay_right), (left - 1.05, bay_left)):
        if width:
            parked(scene, x)
    signs(scene, kerb_right + 0.5, 10, 24, boards=0.0)
    for z in scene.places(45, 90):
        if scene.chance(0.7):
            scene.add(things.crossing, 1000.0, z, x0=left, x1=right)
        lit, variant = int(random.integers(3)), scene.variant()
        for x in (kerb_right + 0.4, kerb_left - 0.4):
            scene.add(things.traffic_light, x, z + 1, lit=lit, variant=variant)
    for z in scene.places(25, 60):
        colours = {"colour": scene.vary(scene.pick(CARS)), "coat": scene.vary(scene.pick(COATS))}
        scene.add(things.bicycle, right - 0.6, z, speed=1.5, variant=scene.variant(), **colours)
    traffic(scene, 0.0, False, (18, 60), things.bus, 0.25)
    traffic(scene, -lane - island, True, (18, 60), things.bus, 0.25)
    return scene


def pavement(scene: Scene, kerb: float, out: int) -> None:
    """People, trees, lamps and whatever keeps cars off a pavement; `out`: 1 on the right, -1 on the left."""
    if scene.chance(0.55):
        leaves = (scene.pick(AUTUMN),)
        for z in scene.places(9, 18):
            leaf_tree(scene, kerb + out * 0.9, z, leaves)
    for z in scene.places(5, 16):
        clothes = {"coat": scene.vary(scene.pick(COATS)), "trousers": scene.vary((56, 58, 70))}
        step, speed = scene.random.uniform(0, 3), scene.random.uniform(-0.5, 0.7)
        x = kerb + out * scene.random.uniform(0.8, 2.0)
        scene.add(things.pedestrian, x, z, speed=speed, variant=scene.variant(), step=step, **clothes)
    middle = scene.random.uniform(0, scene.reach)
    kind = scene.pick(("railing", "railing", "bollards", "works", "none"))
    if kind == "railing":
        row = {"height": 0.95, "colour": scene.vary(STEEL)}
        scene.add_row(things.fence, kerb + out * 0.25, middle - 60, middle + 60, 6.0, **row)
    elif kind == "works":
        scene.add_row(things.barrier, kerb + out * 0.2, middle - 60, middle + 60, 6.0)
    elif kind == "bollards":
        for z in np.arange(middle - 60, middle + 60, 2.0):
            scene.add(things.bollard, kerb + out * 0.3, z)
    for z in scene.places(20, 50):
        colour = scene.vary(scene.pick(((60, 70, 66), (180, 120, 50))))
        scene.add(things.litter_bin, kerb + out * 1.2, z, colour=colour)
    for z in scene.places(22, 28):
        scene.add(things.lamp_post, kerb + out * 0.5, z, height=6.0)


def ambiguous(random: np.random.Generator) -> Scene:
    """An arterial road in the suburbs: two lanes a side, guard rail, kerb, houses behind verge and hedge."""
    scene = Scene(random, steps=(6, 10), bend=0.0015, hills=(0, 0.1))
    lane = 3.3
    right, left = lane * (0.5 + random.integers(0, 2)), -lane * (0.5 + random.integers(0, 2))
    far_edge = left - 0.5 - random.uniform(1.5, 3)
    far = far_edge - 2 * lane - 0.6
    margin = right + 0.4 + random.uniform(1.0, 2.0)
    walk = margin + 0.4 + random.uniform(0.8, 2.0)
    behind = walk + random.uniform(1.8, 2.8)
    road = {"paint": STREET, "colour": scene.vary(scene.pick((CONCRETE, ASPHALT, (118, 118, 118))))}
    verge = {"paint": NATURE, "colour": scene.vary(scene.pick((GREEN, DRY))), "grain": 16, "cells": 6}
    slabs = {"paint": WALK, "colour": scene.vary(scene.pick((CONCRETE, SLABS, BRICK, GRAVEL))), "joint": 0.9}
    curb = scene.vary(scene.pick((KERB_WHITE, GUTTER)))
    scene.strips += [
        Strip(far - 2.5, **verge),
        Strip(far - 0.4, **slabs),
        Strip(far, CURB, curb),
        Strip(far_edge, **road),
        Strip(left - 0.9, **verge),
        Strip(left - 0.5, CURB, curb),
        Strip(right + 0.4, **road),
        Strip(margin, CLOSED, scene.vary(scene.pick((CONCRETE, ASPHALT)))),
        Strip(margin + 0.4, CURB, curb),
        Strip(walk, **verge),
        Strip(behind, **slabs),
        Strip(np.inf, **verge),
    ]
    paint = scene.pick((WHITE, YELLOW))
    dividers = [*np.arange(left + lane, right - 0.1, lane), far_edge - lane]
    scene.lines += [Line(x, 0.26, SOLID, paint) for x in (left - 0.1, right + 0.15)]
    scene.lines += [Line(x, 0.22, DASHED, paint, 3.5, 9.0) for x in dividers]

    rail = scene.pick((left - 1.4, walk - 0.6))
    scene.add_row(things.guard_rail, rail, -9, scene.reach, 9.0, colour=scene.vary(STEEL))
    for x in (behind + 0.6, far - 3.2):
        out = np.sign(x)
        start = random.uniform(-20, 30)
        end, kind = start + random.uniform(50, 150), scene.pick(("fence", "hedge", "barrier"))
        if kind == "fence":
            scene.add_row(things.fence, x, start, end, 8.0, height=1.5, colour=scene.vary(WIRE))
        elif kind == "hedge":
            height, colour = random.uniform(1.0, 2.0), scene.vary((66, 96, 50))
            scene.add_row(things.hedge, x, start, end, 8.0, height=height, colour=colour)
        else:
            look = {"colour": scene.vary(scene.pick(PLASTER)), "pane_rows": int(random.integers(0, 2))}
            scene.add_row(things.noise_barrier, x, start, end, 8.0, height=3.0, **look)
        fronts(scene, x + out * random.uniform(3, 7), gap=0.45, low=5, high=11)
        woods(scene, x + 1.5 * out, 9, 24, conifers=0.3)
    signs(scene, margin + 1.2, 16, 34, boards=0.25)
    for z in scene.places(26, 30):
        scene.add(things.lamp_post, walk - 0.3, z, height=7.0)
    for x in np.arange(left + lane / 2, right, lane):
        traffic(scene, x, False, (12, 40), things.truck, 0.3)
    for share in (0.5, 1.5):
        traffic(scene, far_edge - lane * share, True, (14, 40), things.truck, 0.3)
    return scene


SUBSETS = {"highway": highway, "urban": urban, "ambiguous": ambiguous}


def paint_frame(
    scene: Scene, frame: int, size: tuple[int, int], random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Frame number `frame` of a scene: image uint8 [H, W, 3] RGB and label values uint8 [H, W].

    `random` serves rain and sensor noise only."""
    camera_x = scene.camera_x + 0.15 * np.sin(frame)
    canvas = Canvas(size, scene.light, camera_x, scene.step * frame, scene.curvature, scene.horizon)
    canvas.sky(NOISE)
    if scene.hill:
        canvas.hills(scene.hill, scene.hill_colour, NOISE)
    canvas.ground(scene.strips, scene.lines, NOISE)
    shown = []
    for number, thing in enumerate(scene.things):
        z = thing.z + thing.speed * frame
        if canvas.camera_z - thing.length < z < canvas.camera_z + VIEW:
            shown.append((0.0 if thing.on_road else abs(thing.x - camera_x), z, number))
    for _, z, number in sorted(shown, reverse=True):
        thing = scene.things[number]
        thing.draw(canvas, thing.x, z)
    return canvas.finish(random, NOISE)
