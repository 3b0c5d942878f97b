"""A pinhole view of a flat, curved road, and the canvas that paints image and label at once."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from dataloaders.a2d2_classes import CATEGORIES

SUPERSAMPLE = (
    2  # images are painted at twice the size and averaged; labels keep every second pixel: hard edges
)
NEAR = 1.2  # metres: nothing nearer is painted
FAR = 240.0
SUBPIXEL_BITS = 4
WHITE_BALANCE = 0.8  # how far the camera turns the mean colour to grey: 1 is all the way
CLASS_BITS = 63  # a label value is a class id plus 64 times the number of one of its colour variants
ID = {category: number for number, (category, _, _) in enumerate(CATEGORIES)}

Colour = Sequence[float]  # (red, green, blue) in [0, 255]
Corner = tuple[float, float]  # (x, z) on the ground, metres


def shade(colour: Colour, factor: float) -> tuple[float, ...]:
    """The colour, darker or lighter."""
    return tuple(min(channel * factor, 255.0) for channel in colour)


@dataclass(frozen=True)
class Light:
    """Weather, light and camera of one recording; drawn by `draw_light` alike for every kind of road."""

    exposure: float  # mean grey value that the camera's exposure control reaches
    warmth: float  # > 0 reddish, < 0 bluish
    tint: float
    contrast: float
    sun: float  # brightness of walls that face left; those that face right get 2 - sun
    haze: float  # 1/m
    haze_colour: tuple[float, float, float]
    sky_top: tuple[float, float, float]
    clouds: float
    rain: int  # number of streaks
    noise: float  # standard deviation of the sensor noise, grey values


def draw_light(random: np.random.Generator) -> Light:
    """Weather and light: one distribution for all roads, so that no gate can tell a subset by its light."""
    kind = random.choice(("clear", "overcast", "fog", "dusk"), p=(0.4, 0.35, 0.1, 0.15))
    grey = random.uniform(190, 225)
    sky_top = {
        "clear": (random.uniform(70, 130), random.uniform(130, 170), random.uniform(195, 235)),
        "overcast": (grey - 25, grey - 20, grey - 10),
        "fog": (grey, grey, grey),
        "dusk": (random.uniform(70, 110), random.uniform(70, 105), random.uniform(120, 160)),
    }[kind]
    haze_colour = (random.uniform(215, 240), random.uniform(160, 190), random.uniform(130, 165))
    return Light(
        exposure=random.uniform(90, 140) * (0.8 if kind == "dusk" else 1.0),
        warmth=random.normal(0.05 if kind == "dusk" else 0.0, 0.05),
        tint=random.normal(0.0, 0.02),
        contrast=random.uniform(0.85, 1.1),
        sun=random.uniform(0.75, 1.25),
        haze={"clear": 0.001, "overcast": 0.003, "fog": 0.014, "dusk": 0.003}[kind]
        * random.uniform(0.5, 1.5),
        haze_colour=haze_colour if kind == "dusk" else (grey + 5, grey + 10, grey + 15),
        sky_top=sky_top,
        clouds=random.uniform(0, 40) if kind != "fog" else 0.0,
        rain=int(random.integers(30, 90)) if kind == "overcast" and random.random() < 0.5 else 0,
        noise=random.uniform(1.5, 6.0),
    )


@dataclass(frozen=True)
class Strip:
    """Ground of one kind along the road, from the strip before it to `right` (x in metres)."""

    right: float
    paint: int
    colour: tuple[float, float, float]
    grain: float = 6.0  # amplitude of the texture, grey values
    cells: float = 8.0  # texture cells a metre
    joint: float = math.inf  # metres between dark joints across the road


@dataclass(frozen=True)
class Line:
    """A painted line along the road: solid, or `dash` metres of paint every `period` metres."""

    x: float
    width: float
    paint: int
    colour: tuple[float, float, float]
    dash: float = 0.0
    period: float = 0.0


@dataclass
class Canvas:
    """Image and label under one camera. Coordinates: x metres to the right of the driven lane's middle, y
    metres above the road, z metres along the road from where the recording began.

    The methods that paint take `paint`, a label value; without it the label stays: shade and decoration."""

    size: tuple[int, int]  # (height, width) of the finished frame
    light: Light
    camera_x: float
    camera_z: float
    curvature: float  # 1/m, > 0 bends to the right
    horizon: float  # as a share of the height
    camera_height: float = 1.5
    image: np.ndarray = field(init=False)
    labels: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        height, width = (SUPERSAMPLE * side for side in self.size)
        self.image = np.empty((height, width, 3), np.uint8)
        self.labels = np.zeros((height, width), np.uint8)
        self.focal = 0.85 * width  # about 60 degrees, as the front camera of A2D2
        self.middle = width / 2
        self.horizon_row = self.horizon * height
        self.first_ground_row = math.ceil(self.horizon_row + self.focal * self.camera_height / FAR)

    def pixel(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Column and row of a point; points behind the near plane are moved onto it."""
        distance = max(z - self.camera_z, NEAR)
        scale = self.focal / distance
        bend = 0.5 * self.curvature * distance * distance
        column = self.middle + scale * (x - self.camera_x + bend)
        return column, self.horizon_row + scale * (self.camera_height - y)

    def scale(self, z: float) -> float:
        """Pixels a metre at z."""
        return self.focal / max(z - self.camera_z, NEAR)

    def hazy(self, colour: Colour, distance: float) -> tuple[float, ...]:
        share = math.exp(-self.light.haze * distance)
        return tuple(c * share + h * (1 - share) for c, h in zip(colour, self.light.haze_colour, strict=True))

    def fill(self, polygons: Sequence[Sequence], colour: Colour, paint: int | None, z: float) -> None:
        """Fills polygons, lists of (column, row), whose haze is that of z."""
        if not polygons:
            return
        points = [np.array(polygon) * (1 << SUBPIXEL_BITS) for polygon in polygons]
        points = [polygon.round().astype(np.int32) for polygon in points]
        cv2.fillPoly(self.image, points, self.hazy(colour, z - self.camera_z), cv2.LINE_8, SUBPIXEL_BITS)
        if paint is not None:
            cv2.fillPoly(self.labels, points, paint, cv2.LINE_8, SUBPIXEL_BITS)

    def disc(
        self, x: float, y: float, z: float, radius: float, colour: Colour, paint: int | None = None
    ) -> None:
        """A circle that faces the camera. Not painted behind the near plane."""
        if z < self.camera_z + NEAR:
            return
        column, row = self.pixel(x, y, z)
        center, pixels = (round(column), round(row)), max(round(radius * self.scale(z)), 1)
        cv2.circle(self.image, center, pixels, self.hazy(colour, z - self.camera_z), -1)
        if paint is not None:
            cv2.circle(self.labels, center, pixels, paint, -1)

    def polygon(self, corners: Sequence[Corner], z: float, colour: Colour, paint: int | None) -> None:
        """A shape at z that faces the camera; corners are (x, y). Not painted behind the near plane."""
        if z > self.camera_z + NEAR:
            self.fill([[self.pixel(x, y, z) for x, y in corners]], colour, paint, z)

    def face(
        self, x: float, z: float, width: float, y0: float, y1: float, colour: Colour, paint: int | None = None
    ) -> None:
        """An upright rectangle around x that faces the camera."""
        self.wall((x - width / 2, z), (x + width / 2, z), y0, y1, colour, paint)

    def flank(
        self, x: float, z0: float, z1: float, y0: float, y1: float, colour: Colour, paint: int | None = None
    ) -> None:
        """An upright rectangle along the road."""
        self.wall((x, z0), (x, z1), y0, y1, colour, paint)

    def wall(
        self, a: Corner, b: Corner, y0: float, y1: float, colour: Colour, paint: int | None = None
    ) -> None:
        """An upright rectangle over the ground line from a to b, cut at the near plane."""
        clipped = self.clip(a, b)
        if clipped:
            a, b = clipped
            self.fill([self.quad(a, b, y0, y1)], colour, paint, 0.5 * (a[1] + b[1]))

    def quad(self, a: Corner, b: Corner, y0: float, y1: float) -> list[tuple[float, float]]:
        """Pixels of the corners of an upright rectangle over the ground line from a to b."""
        return [
            self.pixel(a[0], y0, a[1]), self.pixel(b[0], y0, b[1]),
            self.pixel(b[0], y1, b[1]), self.pixel(a[0], y1, a[1]),
        ]  # fmt: skip

    def clip(self, a: Corner, b: Corner) -> tuple[Corner, Corner] | None:
        """The part of the ground line from a to b in front of the near plane, None where there is none."""
        near = self.camera_z + NEAR
        if a[1] < near and b[1] < near:
            return None
        if a[1] < near or b[1] < near:
            share = (near - a[1]) / (b[1] - a[1])
            cut = (a[0] + share * (b[0] - a[0]), near)
            return (cut, b) if a[1] < near else (a, cut)
        return a, b

    def ground_patch(
        self, x0: float, x1: float, z0: float, z1: float, colour: Colour, paint: int | None = None
    ) -> None:
        """A rectangle lying on the road."""
        z0 = max(z0, self.camera_z + NEAR)
        if z1 > z0:
            corners = [self.pixel(x, 0.0, z) for x, z in ((x0, z0), (x1, z0), (x1, z1), (x0, z1))]
            self.fill([corners], colour, paint, z0)

    def sky(self, noise: np.ndarray) -> None:
        """Everything above the horizon: a gradient with clouds. `noise` is that of `noise_texture`."""
        rows = self.first_ground_row
        share = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None] ** 0.7
        top, bottom = (np.float32(colour) for colour in (self.light.sky_top, self.light.haze_colour))
        shift = int(self.camera_z / 8) % 64
        clouds = cv2.resize(
            noise[:24, shift : shift + 48], (self.image.shape[1], rows), interpolation=cv2.INTER_CUBIC
        )
        gradient = top * (1 - share) + bottom * share + self.light.clouds * np.maximum(clouds, 0)[..., None]
        self.image[:rows] = np.minimum(gradient, 255)
        self.labels[:rows] = ID["Sky"]

    def hills(self, share: float, colour: Colour, noise: np.ndarray) -> None:
        """A wooded ridge along the horizon, `share` of the height tall."""
        height, width = self.labels.shape
        ridge = noise[7, (np.arange(33) + int(self.camera_z / 15)) % 256] * 0.35 + 0.75
        top = zip(np.linspace(0, width, 33), self.horizon_row - ridge * share * height, strict=True)
        foot = self.horizon_row + 4
        self.fill([[(0, foot), *top, (width, foot)]], colour, ID["Nature object"], self.camera_z + 150)

    def ground(self, strips: Sequence[Strip], lines: Sequence[Line], noise: np.ndarray) -> None:
        """Everything below the horizon, pixel by pixel from the cross-section of the road."""
        first = self.first_ground_row
        rows = np.arange(first, self.image.shape[0], dtype=np.float32)[:, None] + 0.5
        columns = np.arange(self.image.shape[1], dtype=np.float32)[None] + 0.5
        distance = self.focal * self.camera_height / (rows - self.horizon_row)  # [R, 1]
        bend = 0.5 * self.curvature * distance**2
        x = (columns - self.middle) * (distance / self.focal) + self.camera_x - bend
        z = distance + self.camera_z
        kind = np.searchsorted(np.float32([strip.right for strip in strips[:-1]]), x)

        def per_pixel(values: Iterable) -> np.ndarray:
            return np.float32(list(values))[kind]

        cells = per_pixel(strip.cells for strip in strips)
        texture = noise[(z * cells).astype(np.int32) & 255, (x * cells).astype(np.int32) & 255]
        fade = 1 / (1 + (distance / 14) ** 2)
        shade = texture * per_pixel(strip.grain for strip in strips) * fade
        shade -= 38 * (z % per_pixel(strip.joint for strip in strips) < 0.12) * (distance < 40)
        colour = per_pixel(strip.colour for strip in strips) + shade[..., None]
        labels = np.uint8([strip.paint for strip in strips])[kind]
        for line in lines:
            painted = np.abs(x - line.x) < line.width / 2
            if line.period:
                painted &= z % line.period < line.dash
            colour[painted] = line.colour
            labels[painted] = line.paint
        share = np.exp(-self.light.haze * distance)[..., None]
        colour = colour * share + np.float32(self.light.haze_colour) * (1 - share)
        self.image[first:] = np.clip(colour, 0, 255)
        self.labels[first:] = labels

    def finish(self, random: np.random.Generator, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The frame as the camera stores it: image uint8 [H, W, 3] RGB and label values uint8 [H, W]."""
        height, width = self.size
        labels = self.labels[::SUPERSAMPLE, ::SUPERSAMPLE].copy()
        image = cv2.resize(self.image, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
        leaves = np.tile(noise, (height // 256 + 1, width // 256 + 1))[:height, :width]
        image += (14 * leaves * ((labels & CLASS_BITS) == ID["Nature object"]))[..., None]
        light = self.light
        means = image.mean((0, 1))
        image *= (means.mean() / means) ** WHITE_BALANCE
        image = (image - image.mean()) * light.contrast + 110
        image *= np.float32([1 + light.warmth, 1 + light.tint, 1 - light.warmth])
        for _ in range(light.rain):
            column, row, length = random.integers(0, (width, height, height // 10 + 1))
            streak = image[row : row + length, column]
            streak += 0.25 * (200 - streak)
        image = np.maximum(image, 0)
        image *= light.exposure / image.mean()
        image += light.noise * random.standard_normal(image.shape, dtype=np.float32)
        return np.clip(image, 0, 255).astype(np.uint8), labels


def noise_texture() -> np.ndarray:
    """A tile of fine and coarse noise, float32 [256, 256] in about [-1, 1]; always the same one."""
    random = np.random.default_rng(0)
    tile = np.zeros((256, 256), np.float32)
    for cells, weight in ((16, 0.3), (64, 0.3), (256, 0.4)):
        layer = random.uniform(-1, 1, (cells, cells)).astype(np.float32)
        tile += weight * cv2.resize(layer, (256, 256), interpolation=cv2.INTER_LINEAR)
    return tile / np.abs(tile).max()
