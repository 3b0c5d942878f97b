"""What stands and drives on the road: each function paints one thing on a Canvas, image and label alike."""

import math
from collections.abc import Sequence

from dataloaders.scene_painter import ID, Canvas, Colour, Corner, shade

CAR, TRUCK, BICYCLE, PEDESTRIAN = ID["Car"], ID["Truck"], ID["Bicycle"], ID["Pedestrian"]
SIGN, BOARD, ELECTRONIC = ID["Traffic sign"], ID["Irrelevant signs"], ID["Electronic traffic"]
SIGNAL, SIGNAL_CORPUS, POLE, SIDEBAR = ID["Traffic signal"], ID["Signal corpus"], ID["Poles"], ID["Sidebars"]
ROAD_BLOCK, GRID, TRASH = ID["Road blocks"], ID["Grid structure"], ID["Obstacles / trash"]
BUILDING, NATURE = ID["Buildings"], ID["Nature object"]

DARK, STEEL, WHITE, WINDOW = (32, 33, 36), (140, 145, 150), (235, 235, 235), (60, 72, 86)
SKIN, BARK, HEADLAMP, TAIL_LAMP = (205, 165, 140), (74, 60, 48), (245, 240, 215), (190, 25, 25)
SIDES = (-1, 1)
DETAIL = 40.0  # metres: poles and other thin things farther away are not painted


def box(canvas, x, z, width, length, y0, y1, colour, paint):
    """Both flanks, then the face towards the camera, which covers the flank that can't be seen."""
    for side, light in ((-1, canvas.light.sun), (1, 2 - canvas.light.sun)):
        flank = shade(colour, 0.55 + 0.3 * light)
        canvas.flank(x + side * width / 2, z, z + length, y0, y1, flank, paint)
    canvas.face(x, z, width, y0, y1, shade(colour, 0.9), paint)


def wheels(canvas, x, z, axles, radius, paint):
    for side in SIDES:
        for axle in axles:
            canvas.disc(x + side, radius, z + axle, radius, DARK, paint)


def lamps(canvas, x, z, offset, width, y0, y1, oncoming):
    for side in SIDES:
        canvas.face(x + side * offset, z, width, y0, y1, HEADLAMP if oncoming else TAIL_LAMP)


def car(
    canvas: Canvas, x: float, z: float, colour: Colour, variant: int, oncoming: bool, height: float
) -> None:
    """A car of 1.8 x 4.3 m from behind, or from the front when it is oncoming."""
    paint, waist = CAR + 64 * variant, 0.58 * height
    front, back = (1.3, 4.0) if oncoming else (0.9, 3.6)  # ends of the cabin behind the face
    canvas.ground_patch(x - 1.0, x + 1.0, z - 0.2, z + 4.3, DARK)
    wheels(canvas, x, z, (0.75, 3.3), 0.33, paint)
    box(canvas, x, z, 1.8, 4.3, 0.28, waist, colour, paint)
    box(canvas, x, z + front, 1.48, back - front, waist, height, shade(colour, 0.95), paint)
    for side in SIDES:
        canvas.flank(x + side * 0.74, z + front + 0.2, z + back - 0.3, 0.62 * height, 0.93 * height, WINDOW)
    canvas.face(x, z + front, 1.3, 0.62 * height, 0.94 * height, WINDOW)
    lamps(canvas, x, z, 0.72, 0.25, 0.5, 0.72, oncoming)
    canvas.face(x, z, 0.52, 0.42, 0.54, WHITE)
    canvas.face(x, z, 1.8, 0.28, 0.38, DARK)


def truck(
    canvas: Canvas, x: float, z: float, colour: Colour, variant: int, oncoming: bool, length: float
) -> None:
    """A lorry: a large box on wheels; its cab is seen when it is oncoming."""
    paint = TRUCK + 64 * variant
    canvas.ground_patch(x - 1.3, x + 1.3, z - 0.2, z + length, DARK)
    box(canvas, x, z + 0.1, 2.25, length, 0.25, 1.1, (48, 48, 50), paint)
    box(canvas, x, z, 2.5, length, 1.0, 3.7, colour, paint)
    if oncoming:
        canvas.face(x, z, 2.5, 0.35, 3.1, shade(colour, 0.7), paint)
        canvas.face(x, z, 2.2, 1.6, 2.5, WINDOW)
    else:
        canvas.face(x, z, 0.06, 1.0, 3.7, shade(colour, 0.6))
    lamps(canvas, x, z, 0.95, 0.35, 0.6, 0.85, oncoming)


def bus(
    canvas: Canvas,
    x: float,
    z: float,
    colour: Colour,
    variant: int,
    oncoming: bool,
    length: float,
    height: float = 2.9,
) -> None:
    """A bus, or a delivery van when it is short: with windows; both are trucks to A2D2."""
    paint = TRUCK + 64 * variant
    canvas.ground_patch(x - 1.2, x + 1.2, z - 0.2, z + length, DARK)
    wheels(canvas, x, z, (1.3, length - 1.5), 0.45, paint)
    box(canvas, x, z, 2.3, length, 0.35, height, colour, paint)
    for side in SIDES:
        canvas.flank(x + side * 1.15, z + 0.4, z + length - 0.4, 0.5 * height, 0.85 * height, WINDOW)
    canvas.face(x, z, 2.0, 0.48 * height, 0.88 * height, WINDOW)
    lamps(canvas, x, z, 0.95, 0.3, 0.6, 0.85, oncoming)


def rider(canvas, x, z, waist, coat, paint):
    """Trunk and head of a person."""
    canvas.face(x, z, 0.54, waist, waist + 0.68, coat, paint)
    canvas.disc(x, waist + 0.83, z, 0.15, SKIN, paint)


def pedestrian(
    canvas: Canvas, x: float, z: float, coat: Colour, trousers: Colour, variant: int, step: float
) -> None:
    """A person of 1.8 m; `step` is the phase of the walk."""
    paint = PEDESTRIAN + 64 * variant
    for side in SIDES:
        foot = x + side * 0.22 * math.cos(step)
        leg = ((foot - 0.1, 0), (foot + 0.1, 0), (x + 0.14, 0.9), (x - 0.14, 0.9))
        canvas.polygon(leg, z, trousers, paint)
    rider(canvas, x, z, 0.8, coat, paint)


def bicycle(canvas: Canvas, x: float, z: float, colour: Colour, coat: Colour, variant: int) -> None:
    """A bicycle from behind and its rider, who is a pedestrian to A2D2."""
    paint = BICYCLE + 64 * variant
    canvas.face(x, z, 0.18, 0.0, 0.75, DARK, paint)
    canvas.face(x, z, 0.6, 0.85, 1.0, colour, paint)
    canvas.face(x, z, 0.24, 0.55, 0.9, colour, paint)
    rider(canvas, x, z, 0.9, coat, PEDESTRIAN + 64 * variant)


def tree(
    canvas: Canvas,
    x: float,
    z: float,
    height: float,
    radius: float,
    colour: Colour,
    blobs: Sequence[tuple[float, float, float]],
) -> None:
    """A trunk and a crown of discs; `blobs` are (x, y, radius) as shares of the crown's radius."""
    crown = height - radius
    canvas.face(x, z, 0.32, 0.0, crown, BARK, NATURE)
    for number, (dx, dy, share) in enumerate(blobs):
        leaves = shade(colour, 0.72 + 0.45 * number / len(blobs))
        canvas.disc(x + dx * radius, crown + dy * radius, z, share * radius, leaves, NATURE)


def conifer(canvas: Canvas, x: float, z: float, height: float, radius: float, colour: Colour) -> None:
    """Three triangles on a trunk, the upper ones smaller and lighter."""
    canvas.face(x, z, 0.4, 0.0, 1.5, BARK, NATURE)
    for number in range(3):
        low, high = height * (0.12 + 0.27 * number), height * min(0.55 + 0.27 * number, 1)
        wide = radius * (1 - 0.27 * number)
        triangle = ((x - wide, low), (x + wide, low), (x, high))
        canvas.polygon(triangle, z, shade(colour, 0.75 + 0.15 * number), NATURE)


def hedge(canvas: Canvas, x: float, z: float, length: float, height: float, colour: Colour) -> None:
    canvas.wall((x, z), (x + math.copysign(1.0, x), z), 0.0, height, shade(colour, 0.85), NATURE)
    canvas.flank(x, z, z + length, 0.0, height, colour, NATURE)


def fence(canvas: Canvas, x: float, z: float, length: float, height: float, colour: Colour) -> None:
    """Rods between two rails, a grid structure; A2D2 paints it as one area."""
    canvas.flank(x, z, z + length, 0.0, height, shade(colour, 0.62), GRID)
    if z + length - canvas.camera_z < 60:
        panes(canvas, (x, z), (x, z + length), 0.92 * height, int(3 * length), 1, shade(colour, 0.95))
    canvas.flank(x, z, z + length, 0.85 * height, height, colour)


def guard_rail(canvas: Canvas, x: float, z: float, length: float, colour: Colour) -> None:
    """A steel band on posts; below it the label stays what is seen through the gap."""
    canvas.flank(x, z, z + 0.25, 0.0, 0.5, shade(colour, 0.7), ROAD_BLOCK)
    canvas.flank(x, z, z + length, 0.38, 0.86, colour, ROAD_BLOCK)
    canvas.flank(x, z, z + length, 0.56, 0.66, shade(colour, 0.7))


def barrier(canvas: Canvas, x: float, z: float, length: float) -> None:
    """A red and white barrier around road works."""
    part = length / 5
    for number in range(5):
        colour = (200, 50, 40) if number % 2 else (225, 222, 215)
        canvas.flank(x, z + number * part, z + (number + 1) * part, 0.0, 0.95, colour, ROAD_BLOCK)


def bollard(canvas: Canvas, x: float, z: float) -> None:
    if z - canvas.camera_z < DETAIL:
        canvas.face(x, z, 0.26, 0.0, 1.0, (70, 66, 66), ROAD_BLOCK)


def noise_barrier(
    canvas: Canvas, x: float, z: float, length: float, height: float, colour: Colour, pane_rows: int
) -> None:
    """A wall along a motorway, plain between posts or with rows of panes like a house front."""
    panel_wall(canvas, (x, z), (x, z + length), height, colour, ROAD_BLOCK, 3, pane_rows)


def panel_wall(canvas, a, b, height, colour, paint, columns, pane_rows):
    """A wall over the ground line from a to b with rows of panes or, without, with posts."""
    sun = canvas.light.sun if a[0] > canvas.camera_x else 2 - canvas.light.sun
    light = 0.5 + 0.5 * sun if a[1] != b[1] else 0.85
    canvas.wall(a, b, 0.0, height, shade(colour, light), paint)
    distance = 0.5 * (a[1] + b[1]) - canvas.camera_z
    if pane_rows and distance < 75:
        panes(canvas, a, b, height, columns, pane_rows, shade(WINDOW, light))
    elif not pane_rows and distance < DETAIL:
        for number in range(columns):
            x, z = between(a, b, number / columns)
            canvas.flank(x, z, z + 0.25, 0.0, height, shade(colour, 0.75 * light))


def between(a: Corner, b: Corner, share: float) -> Corner:
    return a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])


def panes(canvas, a, b, height, columns, rows, colour):
    """A regular grid of panes over the wall from a to b."""
    quads = []
    for column in range(columns):
        start, end = between(a, b, (column + 0.22) / columns), between(a, b, (column + 0.78) / columns)
        if min(start[1], end[1]) > canvas.camera_z + 1.5:
            heights = ((height * (row + 0.3) / rows, height * (row + 0.78) / rows) for row in range(rows))
            quads += [canvas.quad(start, end, y0, y1) for y0, y1 in heights]
    canvas.fill(quads, colour, None, 0.5 * (a[1] + b[1]))


def house(
    canvas: Canvas,
    x: float,
    z: float,
    length: float,
    depth: float,
    height: float,
    colour: Colour,
    roof: Colour,
    floors: int,
    glass: bool,
    pitched: bool,
) -> None:
    """A building whose front stands along the road at x; it reaches `depth` metres away from the road."""
    back = x + math.copysign(depth, x)
    if pitched:
        ridge, peak = (x + back) / 2, height + 0.35 * depth
        gable = ((x, height), (back, height), (ridge, peak))
        canvas.polygon(gable, z + length, shade(colour, 0.85), BUILDING)
        canvas.polygon(gable, z, shade(colour, 0.85), BUILDING)
        corners = ((x, height, z), (x, height, z + length), (ridge, peak, z + length), (ridge, peak, z))
        canvas.fill([[canvas.pixel(*corner) for corner in corners]], roof, BUILDING, z)
    for a, b, width in (((x, z), (back, z), depth), ((x, z), (x, z + length), length)):
        panel_wall(canvas, a, b, height, colour, BUILDING, max(round(width / 2.8), 1), 0 if glass else floors)
        for floor in range(floors * glass):
            y = height * floor / floors
            canvas.wall(a, b, y, y + 0.18, shade(colour, 0.85))


def overpass(canvas: Canvas, _: float, z: float, x0: float, x1: float, colour: Colour) -> None:
    """A concrete bridge across the road, on pillars at x0 and x1."""
    for x in (x0, x1):
        canvas.face(x, z, 1.6, 0.0, 6.0, shade(colour, 0.8), BUILDING)
    canvas.wall((x0 - 40, z), (x1 + 40, z), 5.6, 7.6, colour, BUILDING)
    canvas.wall((x0 - 40, z), (x1 + 40, z), 5.6, 6.0, shade(colour, 0.6))


def pole(canvas: Canvas, x: float, z: float, height: float) -> None:
    """At least a pixel of the finished label wide, as annotators paint it."""
    if z - canvas.camera_z < DETAIL:
        canvas.face(x, z, max(0.3, 2 / canvas.scale(z)), 0.0, height, STEEL, POLE)


def lamp_post(canvas: Canvas, x: float, z: float, height: float) -> None:
    if z - canvas.camera_z < DETAIL:
        pole(canvas, x, z, height)
        reach = -math.copysign(1.6, x)
        canvas.wall((x, z), (x + reach, z), height - 0.16, height, STEEL, POLE)
        canvas.wall((x + reach, z), (x + 1.6 * reach, z), height - 0.3, height, (70, 72, 76), POLE)


def plate(canvas, x, z, y, width, height, colour, rim, paint):
    """A rectangular board with a rim and two lines of text."""
    canvas.face(x, z, width, y, y + height, rim, paint)
    inset = 0.09 * height
    canvas.face(x, z, width - 2 * inset, y + inset, y + height - inset, colour)
    for row in (0.3, 0.6):
        canvas.face(x - 0.03 * width, z, 0.57 * width, y + row * height, y + (row + 0.12) * height, rim)


def motorway_board(canvas: Canvas, x: float, z: float, width: float, colour: Colour) -> None:
    """A large sign board on two poles beside the road."""
    for side in SIDES:
        pole(canvas, x + side * 0.35 * width, z, 2.2)
    plate(canvas, x, z, 1.7, width, 0.7 * width, colour, WHITE, SIGN)


def shop_board(canvas: Canvas, x: float, z: float, colour: Colour) -> None:
    """Advertising that sticks out of a house front."""
    plate(canvas, x, z, 2.9, 1.3, 1.0, colour, WHITE, BOARD)


def round_sign(canvas: Canvas, x: float, z: float, height: float, colour: Colour, variant: int) -> None:
    """A speed limit or a prohibition on a pole."""
    pole(canvas, x, z, height)
    canvas.disc(x, height, z, 0.52, TAIL_LAMP, SIGN + 64 * variant)
    canvas.disc(x, height, z, 0.36, colour)


def warning_sign(canvas: Canvas, x: float, z: float, height: float, variant: int) -> None:
    pole(canvas, x, z, height)
    for size, colour, paint in ((0.68, TAIL_LAMP, SIGN + 64 * variant), (0.4, WHITE, None)):
        low = height - 0.6 * size
        canvas.polygon(((x - size, low), (x + size, low), (x, height + size)), z, colour, paint)


def gantry(
    canvas: Canvas,
    _: float,
    z: float,
    x0: float,
    x1: float,
    boards: Sequence[tuple[float, bool]],
    colour: Colour,
    variant: int,
) -> None:
    """Sign boards on a beam across the carriageway; `boards` are (x, electronic)."""
    for x in (x0, x1):
        canvas.face(x, z, 0.4, 0.0, 6.6, STEEL, POLE)
    canvas.wall((x0, z), (x1, z), 6.3, 6.7, STEEL, POLE)
    for x, electronic in boards:
        if electronic:
            plate(canvas, x, z, 5.5, 1.6, 1.6, (24, 24, 26), (40, 40, 42), ELECTRONIC)
            canvas.disc(x, 6.3, z, 0.45, (220, 60, 40))
        else:
            plate(canvas, x, z, 5.3, 2.9, 2.3, colour, WHITE, SIGN + 64 * variant)


def traffic_light(canvas: Canvas, x: float, z: float, lit: int, variant: int) -> None:
    """A black box on a pole with one lamp lit, from 0 (green) to 2 (red)."""
    pole(canvas, x, z, 2.4)
    canvas.face(x, z, 0.52, 2.3, 3.55, (28, 30, 28), SIGNAL_CORPUS)
    colour = ((50, 220, 120), (245, 180, 40), (235, 45, 40))[lit]
    canvas.disc(x, 2.55 + 0.38 * lit, z, 0.18, colour, SIGNAL + 64 * variant)


def reflector_post(canvas: Canvas, x: float, z: float) -> None:
    if z - canvas.camera_z < DETAIL:
        canvas.face(x, z, 0.22, 0.0, 1.0, (228, 228, 226), SIDEBAR)
        canvas.face(x, z, 0.22, 0.65, 0.85, DARK)


def litter_bin(canvas: Canvas, x: float, z: float, colour: Colour) -> None:
    canvas.face(x, z, 0.7, 0.0, 1.1, colour, TRASH)
    canvas.face(x, z, 0.7, 0.95, 1.1, shade(colour, 0.7))


def crossing(canvas: Canvas, _: float, z: float, x0: float, x1: float) -> None:
    """A zebra crossing; A2D2 paints the area and not the stripes."""
    canvas.ground_patch(x0, x1, z, z + 3, (84, 85, 88), ID["Zebra crossing"])
    for x in range(math.ceil(x0), math.floor(x1)):
        canvas.ground_patch(x, x + 0.5, z, z + 3, (214, 214, 210))
