"""What stands and drives on the road: each function paints one thing on a Canvas, image and label alike."""

import math
from collections.abc import Sequence

from dataloaders.scene_painter import ID, Canvas, Colour, Corner

CAR, TRUCK, SMALL_VEHICLE = ID["Car"], ID["Truck"], ID["Small vehicles"]
BICYCLE, PEDESTRIAN = ID["Bicycle"], ID["Pedestrian"]
SIGN, SIGNAL, SIGNAL_CORPUS = ID["Traffic sign"], ID["Traffic signal"], ID["Signal corpus"]
BOARD, ELECTRONIC, SIDEBAR, POLE = ID["Irrelevant signs"], ID["Electronic traffic"], ID["Sidebars"], ID["Poles"]
ROAD_BLOCK, GRID, TRASH = ID["Road blocks"], ID["Grid structure"], ID["Obstacles / trash"]
BUILDING, NATURE = ID["Buildings"], ID["Nature object"]

DARK, STEEL, WHITE, WINDOW = (32, 33, 36), (140, 145, 150), (235, 235, 235), (60, 72, 86)


def shade(colour: Colour, factor: float) -> tuple[float, ...]:
    return tuple(min(channel * factor, 255.0) for channel in colour)


def box(canvas: Canvas, x: float, z: float, width: float, length: float, y0: float, y1: float, colour: Colour,
        paint: int) -> None:  # fmt: skip
    """Both flanks, then the face towards the camera, which covers the flank that cannot be seen."""
    for side, light in ((-1, canvas.light.sun), (1, 2 - canvas.light.sun)):
        edge = x + side * width / 2
        canvas.wall((edge, z), (edge, z + length), y0, y1, shade(colour, 0.55 + 0.3 * light), paint)
    canvas.wall((x - width / 2, z), (x + width / 2, z), y0, y1, shade(colour, 0.9), paint)


def car(canvas: Canvas, x: float, z: float, colour: Colour, variant: int, oncoming: bool, height: float = 1.45) -> None:
    width, length, paint = 1.8, 4.3, CAR + 64 * variant
    canvas.ground_patch(x - 1.0, x + 1.0, z - 0.2, z + length, DARK, None)
    for side in (-1, 1):
        for axle in (0.75, 3.3):
            canvas.disc(x + side * 0.86, 0.32, z + axle, 0.33, DARK, paint)
    box(canvas, x, z, width, length, 0.28, 0.58 * height, colour, paint)
    front, back = (0.9, 3.6) if not oncoming else (1.3, 4.0)
    box(canvas, x, z + front, 0.82 * width, back - front, 0.58 * height, height, shade(colour, 0.95), paint)
    for side in (-1, 1):  # side windows
        edge = x + side * 0.415 * width
        canvas.wall((edge, z + front + 0.2), (edge, z + back - 0.3), 0.62 * height, 0.93 * height, WINDOW, None)
    canvas.wall((x - 0.36 * width, z + front), (x + 0.36 * width, z + front), 0.62 * height, 0.94 * height, WINDOW, None)
    if canvas.scale(z) > 6:
        lamp = (245, 240, 215) if oncoming else (190, 25, 25)
        for side in (-1, 1):
            canvas.wall((x + side * 0.6, z), (x + side * 0.85, z), 0.5, 0.72, lamp, None)
        canvas.wall((x - 0.26, z), (x + 0.26, z), 0.42, 0.54, WHITE, None)
        canvas.wall((x - 0.9, z), (x + 0.9, z), 0.28, 0.38, DARK, None)


def truck(canvas: Canvas, x: float, z: float, colour: Colour, variant: int, oncoming: bool, length: float = 11.0,
          height: float = 3.7) -> None:  # fmt: skip
    """A lorry: a large box on wheels; towards the camera the cab when it is oncoming."""
    width, paint = 2.5, TRUCK + 64 * variant
    canvas.ground_patch(x - 1.3, x + 1.3, z - 0.2, z + length, DARK, None)
    box(canvas, x, z + 0.1, 0.9 * width, length, 0.25, 1.1, (48, 48, 50), paint)
    box(canvas, x, z, width, length, 1.0, height, colour, paint)
    if oncoming:
        canvas.wall((x - 1.25, z), (x + 1.25, z), 0.35, 0.85 * height, shade(colour, 0.7), paint)
        canvas.wall((x - 1.1, z), (x + 1.1, z), 1.6, 2.5, WINDOW, None)
    else:
        canvas.wall((x - 0.03, z), (x + 0.03, z), 1.0, height, shade(colour, 0.6), None)
        for side in (-1, 1):
            canvas.wall((x + side * 0.8, z), (x + side * 1.15, z), 0.6, 0.85, (190, 25, 25), None)


def bus(canvas: Canvas, x: float, z: float, colour: Colour, variant: int, oncoming: bool, length: float = 10.0,
        height: float = 2.9) -> None:  # fmt: skip
    """A bus or a delivery van (short and low) with windows; A2D2 counts both as trucks."""
    width, paint = 2.3, TRUCK + 64 * variant
    canvas.ground_patch(x - 1.2, x + 1.2, z - 0.2, z + length, DARK, None)
    for side in (-1, 1):
        for axle in (1.3, length - 1.5):
            canvas.disc(x + side * 1.1, 0.42, z + axle, 0.45, DARK, paint)
    box(canvas, x, z, width, length, 0.35, height, colour, paint)
    for side in (-1, 1):
        edge = x + side * width / 2
        canvas.wall((edge, z + 0.4), (edge, z + length - 0.4), 0.5 * height, 0.85 * height, WINDOW, None)
    canvas.wall((x - 1.0, z), (x + 1.0, z), 0.48 * height, 0.88 * height, WINDOW, None)
    lamp = (245, 240, 215) if oncoming else (190, 25, 25)
    for side in (-1, 1):
        canvas.wall((x + side * 0.8, z), (x + side * 1.1, z), 0.6, 0.85, lamp, None)


def pedestrian(canvas: Canvas, x: float, z: float, coat: Colour, trousers: Colour, variant: int, step: float) -> None:
    paint = PEDESTRIAN + 64 * variant
    for side in (-1, 1):
        foot = x + side * 0.22 * math.cos(step)
        canvas.fill(
            [[canvas.pixel(px, py, z) for px, py in ((foot - 0.1, 0), (foot + 0.1, 0), (x + 0.14, 0.9), (x - 0.14, 0.9))]],
            trousers, paint, z,
        )  # fmt: skip
    canvas.wall((x - 0.27, z), (x + 0.27, z), 0.8, 1.48, coat, paint)
    canvas.disc(x, 1.63, z, 0.15, (205, 165, 140), paint)


def bicycle(canvas: Canvas, x: float, z: float, colour: Colour, coat: Colour, variant: int, ridden: bool) -> None:
    paint = BICYCLE + 64 * variant
    canvas.wall((x - 0.09, z), (x + 0.09, z), 0.0, 0.75, DARK, paint)
    canvas.wall((x - 0.3, z), (x + 0.3, z), 0.85, 1.0, colour, paint)
    canvas.wall((x - 0.12, z), (x + 0.12, z), 0.55, 0.9, colour, paint)
    if ridden:
        canvas.wall((x - 0.26, z), (x + 0.26, z), 0.9, 1.55, coat, PEDESTRIAN + 64 * variant)
        canvas.disc(x, 1.7, z, 0.15, (205, 165, 140), PEDESTRIAN + 64 * variant)


def motorbike(canvas: Canvas, x: float, z: float, colour: Colour, variant: int) -> None:
    paint = SMALL_VEHICLE + 64 * variant
    canvas.wall((x - 0.13, z), (x + 0.13, z), 0.0, 0.6, DARK, paint)
    canvas.wall((x - 0.34, z), (x + 0.34, z), 0.45, 1.0, colour, paint)
    canvas.wall((x - 0.42, z), (x + 0.42, z), 1.0, 1.12, DARK, paint)


def tree(canvas: Canvas, x: float, z: float, height: float, radius: float, colour: Colour,
         blobs: Sequence[tuple[float, float, float]]) -> None:  # fmt: skip
    """A trunk and a crown of discs; `blobs` are (x, y, radius) as shares of the crown's radius."""
    canvas.wall((x - 0.16, z), (x + 0.16, z), 0, height - radius, (74, 60, 48), NATURE)
    for number, (dx, dy, share) in enumerate(blobs):
        light = 0.72 + 0.45 * number / len(blobs)
        center = height - radius + dy * radius
        canvas.disc(x + dx * radius, center, z, share * radius, shade(colour, light), NATURE)


def conifer(canvas: Canvas, x: float, z: float, height: float, radius: float, colour: Colour) -> None:
    canvas.wall((x - 0.2, z), (x + 0.2, z), 0, 1.5, (70, 56, 45), NATURE)
    for number in range(3):
        low, high = height * (0.12 + 0.27 * number), height * min(0.55 + 0.27 * number, 1)
        wide = radius * (1 - 0.27 * number)
        corners = ((x - wide, low), (x + wide, low), (x, high))
        canvas.fill([[canvas.pixel(px, py, z) for px, py in corners]], shade(colour, 0.75 + 0.15 * number), NATURE, z)


def fence(canvas: Canvas, x: float, z: float, length: float, height: float, colour: Colour) -> None:
    """Rods between two rails, a grid structure; A2D2 paints it as one area."""
    canvas.wall((x, z), (x, z + length), 0.0, height, shade(colour, 0.62), GRID)
    if canvas.scale(z + length) > 5:
        rods = int(3 * length)
        panes(canvas, (x, z), (x, z + length), 0.92 * height, rods, 1, shade(colour, 0.95))
    canvas.wall((x, z), (x, z + length), 0.85 * height, height, colour, None)


def guard_rail(canvas: Canvas, x: float, z: float, length: float, colour: Colour) -> None:
    """A steel band on posts; the gap below it stays what is seen through it."""
    a, b = (x, z), (x, z + length)
    canvas.wall(a, (x, z + 0.25), 0.0, 0.5, shade(colour, 0.7), ROAD_BLOCK)
    canvas.wall(a, b, 0.38, 0.86, colour, ROAD_BLOCK)
    canvas.wall(a, b, 0.56, 0.66, shade(colour, 0.7), None)


def panel_wall(canvas: Canvas, a: Corner, b: Corner, height: float, colour: Colour, paint: int, columns: int,
               pane_rows: int, pane: Colour) -> None:  # fmt: skip
    """A noise barrier or a house front: a plain wall with posts, or with rows of panes."""
    sun = canvas.light.sun if a[0] > canvas.camera_x else 2 - canvas.light.sun
    light = 0.5 + 0.5 * sun if a[1] != b[1] else 0.85
    canvas.wall(a, b, 0.0, height, shade(colour, light), paint)
    distance = 0.5 * (a[1] + b[1]) - canvas.camera_z
    if pane_rows and distance < 75:
        panes(canvas, a, b, height, columns, pane_rows, shade(pane, light))
    elif not pane_rows and distance < 45:
        for number in range(columns):
            share = number / columns
            post = (a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1]))
            end = (post[0], post[1] + 0.25)
            canvas.wall(post, end, 0.0, height, shade(colour, 0.75 * light), None)


def panes(canvas: Canvas, a: Corner, b: Corner, height: float, columns: int, rows: int, colour: Colour) -> None:
    """A regular grid of windows over the wall from a to b."""
    near = canvas.camera_z + 1.5
    quads = []
    for column in range(columns):
        ends = []
        for share in ((column + 0.22) / columns, (column + 0.78) / columns):
            ends.append((a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])))
        if min(ends[0][1], ends[1][1]) < near:
            continue
        for row in range(rows):
            y0, y1 = height * (row + 0.3) / rows, height * (row + 0.78) / rows
            (xa, za), (xb, zb) = ends
            quads.append(
                [canvas.pixel(xa, y0, za), canvas.pixel(xb, y0, zb), canvas.pixel(xb, y1, zb), canvas.pixel(xa, y1, za)]
            )
    if quads:
        canvas.fill(quads, colour, None, 0.5 * (a[1] + b[1]))


def house(canvas: Canvas, x: float, z: float, length: float, depth: float, height: float, colour: Colour,
          roof: Colour, pane: Colour, floors: int, glass: bool, pitched: bool) -> None:  # fmt: skip
    """A building whose front stands along the road at x; it reaches `depth` metres away from the road."""
    back = x + math.copysign(depth, x)
    if pitched:
        ridge, peak = (x + back) / 2, height + 0.35 * depth
        for distance in (z + length, z):
            gable = [canvas.pixel(x, height, distance), canvas.pixel(back, height, distance), canvas.pixel(ridge, peak, distance)]
            canvas.fill([gable], shade(colour, 0.85), BUILDING, distance)
        if z > canvas.camera_z + 2:
            corners = ((x, height, z), (x, height, z + length), (ridge, peak, z + length), (ridge, peak, z))
            canvas.fill([[canvas.pixel(*corner) for corner in corners]], roof, BUILDING, z)
    columns = max(round(length / 2.6), 1)
    for a, b, count in (((x, z), (back, z), max(round(depth / 3), 1)), ((x, z), (x, z + length), columns)):
        panel_wall(canvas, a, b, height, colour, BUILDING, count, 0 if glass else floors, pane)
        if glass:
            for floor in range(floors):
                y = height * floor / floors
                canvas.wall(a, b, y, y + 0.18, shade(colour, 0.85), None)


def overpass(canvas: Canvas, _: float, z: float, x0: float, x1: float, colour: Colour) -> None:
    """A concrete bridge across the road."""
    for x in (x0, x1):
        canvas.wall((x - 0.8, z), (x + 0.8, z), 0.0, 6.0, shade(colour, 0.8), BUILDING)
    canvas.wall((x0 - 40, z), (x1 + 40, z), 5.6, 7.6, colour, BUILDING)
    canvas.wall((x0 - 40, z), (x1 + 40, z), 5.6, 6.0, shade(colour, 0.6), None)


def pole(canvas: Canvas, x: float, z: float, height: float, colour: Colour = STEEL, width: float = 0.3) -> None:
    """At least one pixel of the finished label wide, as annotators paint it; not painted beyond 28 m."""
    if z - canvas.camera_z < 28:
        half = max(width / 2, 1.0 / canvas.scale(z))
        canvas.wall((x - half, z), (x + half, z), 0.0, height, colour, POLE)


def lamp_post(canvas: Canvas, x: float, z: float, height: float) -> None:
    pole(canvas, x, z, height)
    reach = -math.copysign(1.6, x)
    canvas.wall((x, z), (x + reach, z), height - 0.16, height, STEEL, POLE)
    canvas.wall((x + reach, z), (x + 1.6 * reach, z), height - 0.3, height, (70, 72, 76), POLE)


def plate(canvas: Canvas, x: float, z: float, y: float, width: float, height: float, colour: Colour, rim: Colour,
          paint: int) -> None:  # fmt: skip
    """A rectangular board with a rim."""
    canvas.wall((x - width / 2, z), (x + width / 2, z), y, y + height, rim, paint)
    inset = 0.09 * height
    canvas.wall((x - width / 2 + inset, z), (x + width / 2 - inset, z), y + inset, y + height - inset, colour, None)
    for row in (0.3, 0.6):
        canvas.wall((x - 0.32 * width, z), (x + 0.25 * width, z), y + row * height, y + (row + 0.12) * height, rim, None)


def round_sign(canvas: Canvas, x: float, z: float, height: float, colour: Colour, variant: int) -> None:
    """A speed limit or a prohibition on a pole."""
    pole(canvas, x, z, height)
    canvas.disc(x, height, z, 0.52, (190, 30, 35), SIGN + 64 * variant)
    canvas.disc(x, height, z, 0.36, colour, None)


def warning_sign(canvas: Canvas, x: float, z: float, height: float, variant: int) -> None:
    pole(canvas, x, z, height)
    for size, colour, paint in ((0.68, (190, 30, 35), SIGN + 64 * variant), (0.4, WHITE, None)):
        corners = ((x - size, height - 0.6 * size), (x + size, height - 0.6 * size), (x, height + size))
        canvas.fill([[canvas.pixel(px, py, z) for px, py in corners]], colour, paint, z)


def gantry(canvas: Canvas, _: float, z: float, x0: float, x1: float, boards: Sequence[tuple[float, float, bool]],
           colour: Colour, variant: int) -> None:  # fmt: skip
    """Sign boards on a beam across the carriageway; `boards` are (x, width, electronic)."""
    for x in (x0, x1):
        canvas.wall((x - 0.2, z), (x + 0.2, z), 0.0, 6.6, STEEL, POLE)
    canvas.wall((x0, z), (x1, z), 6.3, 6.7, STEEL, POLE)
    for x, width, electronic in boards:
        if electronic:
            plate(canvas, x, z, 5.5, 1.6, 1.6, (24, 24, 26), (40, 40, 42), ELECTRONIC)
            canvas.disc(x, 6.3, z, 0.45, (220, 60, 40), None)
        else:
            plate(canvas, x, z, 5.3, width, 2.3, colour, WHITE, SIGN + 64 * variant)


def traffic_light(canvas: Canvas, x: float, z: float, lit: int, variant: int) -> None:
    """Three lamps in a black box on a pole; `lit` is 0 (green) to 2 (red)."""
    pole(canvas, x, z, 2.4)
    canvas.wall((x - 0.26, z), (x + 0.26, z), 2.3, 3.55, (28, 30, 28), SIGNAL_CORPUS)
    colour = ((50, 220, 120), (245, 180, 40), (235, 45, 40))[lit]
    canvas.disc(x, 2.55 + 0.38 * lit, z, 0.18, colour, SIGNAL + 64 * variant)


def reflector_post(canvas: Canvas, x: float, z: float) -> None:
    if z - canvas.camera_z < 45:
        canvas.wall((x - 0.11, z), (x + 0.11, z), 0.0, 1.0, (228, 228, 226), SIDEBAR)
        canvas.wall((x - 0.11, z), (x + 0.11, z), 0.65, 0.85, DARK, None)


def barrier(canvas: Canvas, x: float, z: float, length: float, first: Colour, second: Colour) -> None:
    """A construction barrier in two alternating colours."""
    part = length / 5
    for number in range(5):
        start = z + number * part
        canvas.wall((x, start), (x, start + part), 0.0, 0.95, first if number % 2 else second, ROAD_BLOCK)


def hedge(canvas: Canvas, x: float, z: float, length: float, height: float, colour: Colour) -> None:
    canvas.wall((x, z), (x + math.copysign(1.0, x), z), 0.0, height, shade(colour, 0.85), NATURE)
    canvas.wall((x, z), (x, z + length), 0.0, height, colour, NATURE)


def noise_barrier(canvas: Canvas, x: float, z: float, length: float, height: float, colour: Colour,
                  pane_rows: int, pane: Colour) -> None:  # fmt: skip
    """A wall along the motorway, plain between posts or with rows of panes like a house front."""
    panel_wall(canvas, (x, z), (x, z + length), height, colour, ROAD_BLOCK, 3, pane_rows, pane)


def bollard(canvas: Canvas, x: float, z: float, colour: Colour) -> None:
    if z - canvas.camera_z < 40:
        canvas.wall((x - 0.13, z), (x + 0.13, z), 0.0, 1.0, colour, ROAD_BLOCK)


def bin_or_bag(canvas: Canvas, x: float, z: float, colour: Colour) -> None:
    canvas.wall((x - 0.35, z), (x + 0.35, z), 0.0, 1.05, colour, TRASH)
    canvas.wall((x - 0.38, z), (x + 0.38, z), 0.95, 1.1, shade(colour, 0.7), None)


def motorway_board(canvas: Canvas, x: float, z: float, width: float, colour: Colour) -> None:
    """A large sign board on two poles beside the road."""
    for side in (-0.35, 0.35):
        pole(canvas, x + side * width, z, 2.2, width=0.2)
    plate(canvas, x, z, 1.7, width, 0.7 * width, colour, (235, 235, 235), SIGN)


def shop_board(canvas: Canvas, x: float, z: float, colour: Colour) -> None:
    """Advertising that sticks out of a house front."""
    plate(canvas, x, z, 2.9, 1.3, 1.0, colour, (235, 235, 235), BOARD)


def crossing(canvas: Canvas, _: float, z: float, x0: float, x1: float) -> None:
    """A zebra crossing from kerb to kerb."""
    canvas.ground_patch(x0, x1, z, z + 3, (84, 85, 88), ID["Zebra crossing"])
    for x in range(math.ceil(x0), math.floor(x1)):
        canvas.ground_patch(x, x + 0.5, z, z + 3, (214, 214, 210), None)
