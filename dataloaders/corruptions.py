"""Common corruptions of images, severities 1 to 5: noise, blur, weather, digital. Labels stay as they are.

The 15 + 4 of Hendrycks and Dietterich 2019 (arXiv 1903.12261) with their published parameters, for images of
any size as in Michaelis et al. 2019 (arXiv 1907.07484): radii and noise are in pixels and grey levels whatever
the size, elastic displacements grow with it. Written from the descriptions. What differs from the original code:

- frost has no photographs of ice: its texture is drawn (`ice`), so its figures are not those of other libraries.
- glass_blur swaps as many neighbours as far apart, but in an order in which many swaps happen at once.
- zoom_blur, snow: zoomed about the exact centre. Results are rounded to the nearest grey level, not cut off.

elastic_transform and zoom_blur move things by a few pixels; labels are not moved with them, as in the originals.
"""

import hashlib
from importlib import import_module

import cv2
import numpy as np
from numpy.random import Generator

from dataloaders import CORRUPTIONS, EXTRA_CORRUPTIONS
from dataloaders.transforms import nearest
from engine.config import UserError

SEVERITIES = (1, 2, 3, 4, 5)
VERSION = 1  # raised when a corruption gives other pixels than before

GREY = np.array([0.299, 0.587, 0.114], np.float32)  # luma of red, green, blue
ICE = np.array([0.86, 0.95, 1.0], np.float32)
WATER = np.array([175, 238, 238], np.float32) / 255
MUD = np.array([63, 42, 20], np.float32) / 255


def corrupt(image: np.ndarray, corruption: str, severity: int, *, name: str, seed: int = 0) -> np.ndarray:
    """A corrupted copy of an RGB image, uint8 [H, W, 3].

    What is random depends on (seed, name of the image, corruption, severity) alone: not on the order of calls
    nor on what else is in a batch. Raises UserError for an unknown corruption or severity."""
    functions = CORRUPTIONS | EXTRA_CORRUPTIONS
    if corruption not in functions:
        raise UserError(f"corruptions: {corruption!r} is unknown; allowed: {', '.join(functions)}")
    if severity not in SEVERITIES:
        raise UserError(f"corruptions: severity {severity!r} is unknown; allowed: 1 to {SEVERITIES[-1]}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"corruptions: images are uint8 [H, W, 3], {name} is {image.dtype} {image.shape}")
    module, function = functions[corruption].split(":")
    digest = hashlib.sha256(f"{seed}/{corruption}/{severity}/{name}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(digest[:16], "big"))
    return getattr(import_module(module), function)(image, severity, random)


# Noise. Each corruption is a function (image uint8 [H, W, 3], severity 1..5, random) -> uint8 [H, W, 3].


def gaussian_noise(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Normal noise of the same deviation everywhere."""
    deviation = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return to_bytes(fractions(image) + deviation * normal(random, image.shape))


def shot_noise(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Counts of photons, Poisson: few at high severities."""
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return to_bytes(random.poisson(fractions(image) * photons).astype(np.float32) / photons)


def impulse_noise(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Salt and pepper: a share of the values, each colour by itself, becomes 0 or 255, half of it each."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    draw = random.random(image.shape, dtype=np.float32)
    noisy = np.where(draw < share, np.uint8(255), image)
    return np.where(draw < share / 2, np.uint8(0), noisy)


def speckle_noise(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Normal noise in proportion to the brightness."""
    deviation = (0.15, 0.2, 0.35, 0.45, 0.6)[severity - 1]
    return to_bytes(fractions(image) * (1 + deviation * normal(random, image.shape)))


# Blur


def gaussian_blur(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    return to_bytes(blurred(fractions(image), (1, 2, 3, 4, 6)[severity - 1]))


def defocus_blur(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Mean over a disk whose edge is smoothed."""
    radius, smoothing = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity - 1]
    rows, columns = np.ogrid[-radius - 2 : radius + 3, -radius - 2 : radius + 3]
    disk = (rows**2 + columns**2 <= radius**2).astype(np.float32)
    width = 3 if radius <= 8 else 5
    disk = cv2.GaussianBlur(disk, (width, width), smoothing)
    return cv2.filter2D(image, -1, disk / disk.sum())


def glass_blur(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Frosted glass: blurred, pixels swapped with near ones, blurred again."""
    deviation, reach, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity - 1]
    soft = blurred(fractions(image), deviation)
    source = shuffled(*image.shape[:2], reach, rounds, random)
    return to_bytes(blurred(soft.reshape(-1, 3)[source].reshape(soft.shape), deviation))


def motion_blur(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Smeared along a line of a random direction, up to 45 degrees from the horizontal."""
    radius, deviation = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    return smeared(image, radius, deviation, random.uniform(-45, 45))


def zoom_blur(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Mean of the image, once more of it, and of enlargements in small steps, about the centre."""
    step, count = ((0.01, 11), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11))[severity - 1]
    total = 2 * image.astype(np.float32)
    for index in range(1, count):
        total += zoomed(image, 1 + step * index)
    return to_bytes(total / (255 * (count + 1)))


# Weather


def snow(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Flakes that fall in two directions over an image that is paler than it was."""
    mean, deviation, zoom, threshold, radius, smear, kept = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity - 1]
    flakes = zoomed(mean + deviation * normal(random, image.shape[:2]), zoom)
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = smeared(flakes, radius, smear, random.uniform(-135, -45))[..., None]
    bright = fractions(image)
    pale = np.maximum(bright, 1.5 * (bright @ GREY)[..., None] + 0.5)
    return to_bytes(kept * bright + (1 - kept) * pale + flakes + flakes[::-1, ::-1])


def frost(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Ice on the pane, drawn instead of photographed (see `ice`), over an image that is darker than it was."""
    kept, added = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[severity - 1]
    return to_bytes(kept * fractions(image) + added * ice(*image.shape[:2], random))


def fog(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """A fractal of fog on top; the brightest value stays as bright as it was, so that contrast is lost."""
    thickness, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[severity - 1]
    bright = fractions(image)
    height, width = image.shape[:2]
    foggy = bright + thickness * plasma(max(height, width), decay, random)[:height, :width, None]
    return to_bytes(foggy * (bright.max() / (bright.max() + thickness)))


def spatter(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Drops of water on the lens (severities 1 to 3) or splashes of mud (4 and 5)."""
    mean, deviation, smoothing, threshold, strength = (
        (0.65, 0.3, 4, 0.69, 0.6),
        (0.65, 0.3, 3, 0.68, 0.6),
        (0.65, 0.3, 2, 0.68, 0.5),
        (0.65, 0.3, 1, 0.65, 1.5),
        (0.67, 0.4, 1, 0.65, 1.5),
    )[severity - 1]
    liquid = blurred(mean + deviation * normal(random, image.shape[:2]), smoothing)
    liquid = np.where(liquid < threshold, 0, liquid).clip(0, 1)
    if severity <= 3:
        drops = liquid * relief(liquid)
        drops *= strength / max(drops.max(), 1)  # nothing is spattered where no drop is
        return to_bytes(fractions(image) + drops[..., None] * WATER)
    splashes = blurred((liquid > threshold).astype(np.float32), strength)
    splashes = np.where(splashes < 0.8, 0, splashes)[..., None]
    return to_bytes(fractions(image) * (1 - splashes) + MUD * splashes)


# Light and colour. In HSV the value is the largest of red, green, blue, the saturation how far the smallest is below.


def brightness(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """More of HSV's value; hue and saturation stay."""
    more = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    bright = fractions(image)
    value = bright.max(axis=2, keepdims=True)
    brighter = np.minimum(value + more, 1)
    return to_bytes(np.where(value > 0, bright * (brighter / np.maximum(value, 1 / 255)), brighter))


def contrast(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Each colour nearer to its mean over the image."""
    kept = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    bright = fractions(image)
    mean = bright.mean(axis=(0, 1), dtype=np.float64).astype(np.float32)
    return to_bytes(mean + kept * (bright - mean))


def saturate(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Paler (1, 2) or more vivid (3 to 5) colours; where HSV's hue is not defined, at greys, it is red."""
    factor, more = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[severity - 1]
    bright = fractions(image)
    value = bright.max(axis=2, keepdims=True)
    below = value - bright  # saturation * value at its largest
    range_ = below.max(axis=2, keepdims=True)
    saturation = np.minimum(factor * range_ / np.maximum(value, 1 / 255) + more, 1)
    red = np.array([0, 1, 1], np.float32)
    share = np.where(range_ > 0, below / np.maximum(range_, 1 / 255), red)
    return to_bytes(value * (1 - saturation * share))


# Digital


def elastic_transform(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Every pixel from a place nearby, smoothly so; the reach grows with the size of the image."""
    height, width = image.shape[:2]
    strength = 250 * (0.05, 0.065, 0.085, 0.1, 0.12)[severity - 1]
    reach = 0.005 * height
    deviations = 0.01 * width, 0.01 * height
    window = [2 * int(3 * deviation + 0.5) + 1 for deviation in deviations]
    places = []
    for axis in np.meshgrid(np.arange(width), np.arange(height)):
        shifts = random.uniform(-reach, reach, (height, width)).astype(np.float32)
        smooth = cv2.GaussianBlur(shifts, window, *deviations, borderType=cv2.BORDER_REFLECT)
        places.append(axis.astype(np.float32) + strength * smooth)
    return cv2.remap(image, *places, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def pixelate(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    """Means over areas, each shown as a block."""
    scale = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    height, width = image.shape[:2]
    small = max(1, int(width * scale)), max(1, int(height * scale))
    return nearest(cv2.resize(image, small, interpolation=cv2.INTER_AREA), height, width)


def jpeg_compression(image: np.ndarray, severity: int, random: Generator) -> np.ndarray:
    quality = (25, 18, 15, 10, 7)[severity - 1]
    settings = [cv2.IMWRITE_JPEG_QUALITY, quality]
    _, file = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), settings)
    return cv2.imdecode(file, cv2.IMREAD_COLOR_RGB)


# Parts


def fractions(image: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [0, 1]."""
    return image.astype(np.float32) / 255


def to_bytes(bright: np.ndarray) -> np.ndarray:
    """Fractions -> uint8, clipped and rounded."""
    return (255 * bright.clip(0, 1) + 0.5).astype(np.uint8)


def normal(random: Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.standard_normal(shape, dtype=np.float32)


def blurred(field: np.ndarray, deviation: float) -> np.ndarray:
    """Gaussian blur of float32 [H, W, ...], cut off at 4 deviations, the border repeated."""
    window = 2 * int(4 * deviation + 0.5) + 1
    return cv2.GaussianBlur(field, (window, window), deviation, borderType=cv2.BORDER_REPLICATE)


def smeared(field: np.ndarray, radius: int, deviation: float, degrees: float) -> np.ndarray:
    """Each pixel the mean of those on a line of 2 * radius + 1 pixels that begins in it, weighted by half a bell
    curve; the border repeated. Of uint8 or float32 [H, W, ...]."""
    steps = np.arange(2 * radius + 1)
    angle = np.radians(degrees)
    across, down = (np.rint(steps * part(angle)).astype(int) for part in (np.cos, np.sin))
    line = np.zeros((np.ptp(down) + 1, np.ptp(across) + 1))
    np.add.at(line, (down - down.min(), across - across.min()), np.exp(-(steps**2) / (2 * deviation**2)))
    begin = int(-across.min()), int(-down.min())
    return cv2.filter2D(field, -1, line / line.sum(), anchor=begin, borderType=cv2.BORDER_REPLICATE)


def zoomed(field: np.ndarray, zoom: float) -> np.ndarray:
    """Enlarged about the centre and cut to the size it had, bilinear. Of uint8 or float32 [H, W, ...]."""
    height, width = field.shape[:2]
    shift = [(1 - zoom) * (side - 1) / 2 for side in (width, height)]
    matrix = np.array([[zoom, 0, shift[0]], [0, zoom, shift[1]]])
    return cv2.warpAffine(field, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)


def shuffled(height: int, width: int, reach: int, rounds: int, random: Generator) -> np.ndarray:
    """Flat indices int32 [H * W]: from where each pixel gets what it shows, after every pixel (but for a margin of
    `reach`) has been swapped with one at most `reach` rows and columns away, `rounds` times.

    Pixels 2 * reach apart in rows or columns choose among different partners, so all those are swapped at once."""
    source = np.arange(height * width, dtype=np.int32)
    for _ in range(rounds):
        for top in range(2 * reach, 0, -1):
            for left in range(2 * reach, 0, -1):
                rows = np.arange(reach + top, height - reach + 1, 2 * reach)
                columns = np.arange(reach + left, width - reach + 1, 2 * reach)
                pixels = (rows[:, None] * width + columns).ravel()
                down, across = random.integers(-reach, reach, (2, pixels.size))
                partners = pixels + down * width + across
                source[pixels], source[partners] = source[partners], source[pixels]
    return source


def plasma(size: int, decay: float, random: Generator) -> np.ndarray:
    """Random heights float32 [n, n] in [0, 1], n the next power of two: diamond-square (Fournier et al. 1982) on a
    torus. From one scale to the next finer one the random part shrinks by decay^2."""
    heights, spread = np.zeros((1, 1), np.float32), 1.0
    while len(heights) < size:
        finer = np.zeros((2 * len(heights),) * 2, np.float32)
        finer[::2, ::2] = heights
        centres = (heights + around(heights, -1, 0) + around(heights, 0, -1) + around(heights, -1, -1)) / 4
        centres += uniform(random, spread, centres.shape)
        finer[1::2, 1::2] = centres
        beside = heights + around(heights, 0, -1) + centres + around(centres, 1, 0)
        finer[::2, 1::2] = beside / 4 + uniform(random, spread, beside.shape)
        below = heights + around(heights, -1, 0) + centres + around(centres, 0, 1)
        finer[1::2, ::2] = below / 4 + uniform(random, spread, below.shape)
        heights, spread = finer, spread / decay**2
    heights -= heights.min()
    return heights / max(heights.max(), np.finfo(np.float32).tiny)


def around(field: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return np.roll(field, (rows, columns), axis=(0, 1))


def uniform(random: Generator, spread: float, shape: tuple[int, ...]) -> np.ndarray:
    return (spread * random.uniform(-1, 1, shape)).astype(np.float32)


def relief(liquid: np.ndarray) -> np.ndarray:
    """How drops [H, W] in [0, 1] catch the light: by the distance from their edges, lit from above left."""
    edges = cv2.Canny((255 * liquid).astype(np.uint8), 50, 150)
    distance = np.minimum(cv2.distanceTransform(255 - edges, cv2.DIST_L2, 5), 20)
    levels = cv2.equalizeHist(cv2.blur(distance, (3, 3)).astype(np.uint8))
    slope = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float32)
    return cv2.blur(cv2.filter2D(levels, cv2.CV_8U, slope), (3, 3)).astype(np.float32)


def ice(height: int, width: int, random: Generator) -> np.ndarray:
    """A texture like frost on a window, float32 [H, W, 3] in [0, 1], mean about 0.5: not a photograph.

    Ridges of smooth noise, at six scales from a fifth of the longer side down, stretched along a random
    direction, look like needles; one slow wave makes some places icier. Slightly blue."""
    longer = max(height, width)
    turned = cv2.getRotationMatrix2D((longer / 2, longer / 2), random.uniform(0, 180), 1.5)
    needles = np.zeros((longer, longer), np.float32)
    for octave in range(6):
        cells = 5 * 2**octave
        ridges = 1 - np.abs(smooth_noise(longer, (cells, max(2, cells // 3)), random))
        needles += 0.7**octave * ridges.clip(0, 1) ** 3
    needles = cv2.warpAffine(needles, turned, (longer, longer), borderMode=cv2.BORDER_REFLECT)
    needles *= 1 + 0.5 * smooth_noise(longer, (3, 3), random).clip(-1, 1)
    needles = needles[:height, :width]
    needles = (needles - needles.mean()) / max(float(needles.std()), 1e-6)
    return (0.5 + 0.2 * needles).clip(0, 1)[..., None] * ICE


def smooth_noise(size: int, cells: tuple[int, int], random: Generator) -> np.ndarray:
    """Normal numbers on a grid of rows and columns, cubic in between, float32 [size, size]."""
    return cv2.resize(normal(random, cells), (size, size), interpolation=cv2.INTER_CUBIC)
