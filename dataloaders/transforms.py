"""Frames at the network's input size: resizing, its inverse geometry, and random changes for training."""

import os
import random

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # read at import: no look-up of newer versions over the network

import albumentations
import cv2
import numpy as np
from albumentations.core.type_definitions import Targets

from dataloaders.frames import IGNORE

# Frames are spread over processes and threads; a pool of OpenCV's own in each of them only gets in the way.
cv2.setNumThreads(0)

# RGB of the area outside of the frame: the mean of ImageNet, close to 0 once the network has normalised it.
PADDING = (124, 116, 104)

# Streams of random numbers, as spawn keys of the run's seed: (ORDER, epoch) and (AUGMENTATION, epoch, index).
ORDER, AUGMENTATION = 0, 1


def valid_window(
    native_size: tuple[int, int], image_size: tuple[int, int], resize: str
) -> tuple[int, int, int, int]:
    """Where a frame of `native_size` lies inside the network's input: (top, left, height, width) in pixels.

    Sizes are (height, width). "squash" fills the input, "letterbox" keeps the aspect and centres the frame.
    To get back, cut this window out of the network's output and resize it to `native_size`."""
    if resize == "squash":
        return (0, 0, *image_size)
    zoom = min(image_size[0] / native_size[0], image_size[1] / native_size[1])
    height, width = (max(1, round(side * zoom)) for side in native_size)
    return (image_size[0] - height) // 2, (image_size[1] - width) // 2, height, width


def resize_image(image: np.ndarray, image_size: tuple[int, int], resize: str) -> np.ndarray:
    """RGB uint8 [h, w, 3] -> [H, W, 3]; means over areas where both sides shrink, linear elsewhere.

    The border of a letterbox is PADDING."""
    top, left, height, width = valid_window(image.shape[:2], image_size, resize)
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    inside = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return place(inside, top, left, image_size, PADDING)


def resize_label(labels: np.ndarray, image_size: tuple[int, int], resize: str) -> np.ndarray:
    """Class ids uint8 [h, w] -> [H, W] by the nearest id; the border of a letterbox is ignored (255)."""
    top, left, height, width = valid_window(labels.shape, image_size, resize)
    return place(nearest(labels, height, width), top, left, image_size, IGNORE)


def nearest(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The id under the centre of each new pixel. cv2.INTER_NEAREST takes the one under its corner instead,
    which moves labels by up to half a pixel against the image."""
    rows = (2 * np.arange(height) + 1) * labels.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * labels.shape[1] // (2 * width)
    return labels.take(rows, axis=0).take(columns, axis=1)


def place(inside: np.ndarray, top: int, left: int, size: tuple[int, int], fill) -> np.ndarray:
    """`inside` at (top, left) of an array of `size` that is `fill` elsewhere."""
    bottom, right = size[0] - top - inside.shape[0], size[1] - left - inside.shape[1]
    return cv2.copyMakeBorder(inside, top, bottom, left, right, cv2.BORDER_CONSTANT, value=fill)


class ScaleCrop(albumentations.DualTransform):
    """Zoom by a factor drawn evenly from `scale`, then cut `size` at a random place; only that is resized.

    Where the zoomed frame is smaller, the rest is PADDING in images and ignored (255) in labels."""

    _targets = (Targets.IMAGE, Targets.MASK)

    def __init__(self, size: tuple[int, int], scale: tuple[float, float], p: float = 1.0):
        super().__init__(p=p)
        self.size = tuple(size)
        self.scale = tuple(scale)

    def get_params_dependent_on_data(self, params, data) -> dict:
        scale = self.py_random.uniform(*self.scale)
        window, inside, corner = [], [], []
        for length, target in zip(params["shape"][:2], self.size, strict=True):
            taken = min(length, max(1, round(target / scale)))  # of the frame
            filled = min(target, max(1, round(length * scale)))  # of the result
            start = self.py_random.randint(0, length - taken)
            window.append(slice(start, start + taken))
            inside.append(filled)
            corner.append(self.py_random.randint(0, target - filled))
        return {"window": tuple(window), "inside": tuple(inside), "corner": tuple(corner)}

    def apply(self, img, window, inside, corner, **params) -> np.ndarray:
        # Linear also where it shrinks: down to half the size every pixel counts, 6 x faster than areas.
        resized = cv2.resize(img[window], inside[::-1], interpolation=cv2.INTER_LINEAR)
        return place(resized, *corner, self.size, PADDING)

    def apply_to_mask(self, mask, window, inside, corner, **params) -> np.ndarray:
        return place(nearest(mask[window], *inside), *corner, self.size, IGNORE)


class Color(albumentations.ImageOnlyTransform):
    """Brightness, contrast and saturation times a factor drawn from 1 +- `strength`, hue turned by up to
    `degrees`.

    Each of the four is linear in a pixel's RGB, so that together they cost one pass and clip once. Contrast
    keeps the mean luma of the image; saturation and hue keep the luma of each pixel."""

    # RGB -> YUV (ITU-R BT.601): luma, and two axes away from grey between which hue is an angle.
    LUMA = np.array([0.299, 0.587, 0.114])
    YUV = np.stack([LUMA, 0.492 * ([0, 0, 1] - LUMA), 0.877 * ([1, 0, 0] - LUMA)])

    def __init__(self, strength: float = 0.3, degrees: float = 18.0, p: float = 0.5):
        super().__init__(p=p)
        self.strength = strength
        self.degrees = degrees

    def get_params(self) -> dict[str, float]:
        factors = {
            name: self.py_random.uniform(1 - self.strength, 1 + self.strength)
            for name in ("brightness", "contrast", "saturation")
        }
        return factors | {"hue": self.py_random.uniform(-self.degrees, self.degrees)}

    def apply(self, img, brightness, contrast, saturation, hue, **params) -> np.ndarray:
        cosine, sine = np.cos(np.radians(hue)), np.sin(np.radians(hue))
        turn = np.diag([1.0, saturation, saturation]) @ [[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]
        mix = brightness * contrast * np.linalg.inv(self.YUV) @ turn @ self.YUV
        mean = self.LUMA @ cv2.mean(img)[:3]
        offset = np.full((3, 1), brightness * (1 - contrast) * mean)
        return cv2.transform(img, np.hstack([mix, offset]))


def augmentation(augment, image_size: tuple[int, int]) -> albumentations.Compose:
    """The random changes of training frames: scale-crop, left-right flip, colour, blur; "none" has none.

    `augment` has `scale` (smallest, largest zoom) and the probabilities `flip`, `color` and `blur`. Apply it
    with `augmented`: by itself the pipeline is not seeded."""
    if augment == "none":
        return albumentations.Compose([])
    return albumentations.Compose(
        [
            ScaleCrop(image_size, augment.scale),
            albumentations.HorizontalFlip(p=augment.flip),
            Color(p=augment.color),
            albumentations.GaussianBlur(sigma_limit=(0.3, 1.5), p=augment.blur),
        ]
    )


def only_flips(augment) -> bool:
    """Whether training frames are, bit for bit, cached frames or their mirror images."""
    if augment == "none":
        return True
    return tuple(augment.scale) == (1, 1) and not augment.color and not augment.blur


def augmented(
    pipeline: albumentations.Compose,
    image: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int,
    epoch: int,
    index: int,
) -> tuple[np.ndarray, np.ndarray]:
    """A frame (uint8 [H, W, 3] and [H, W]) as the pipeline changes it for sample `index` of `epoch`: the same
    in every process and in any order of calls. The inputs stay as they are.

    All transforms draw from one numpy and one python generator: `Compose.set_random_seed` would give each of
    them a generator of its own with the same seed, and two flips would always agree."""
    for_numpy, for_python = np.random.SeedSequence(seed, spawn_key=(AUGMENTATION, epoch, index)).spawn(2)
    python_seed = int.from_bytes(for_python.generate_state(4).tobytes(), "little")
    pipeline.set_random_state(np.random.default_rng(for_numpy), random.Random(python_seed))
    changed = pipeline(image=image, mask=labels)
    return changed["image"], changed["mask"]


def was_flipped(pipeline: albumentations.Compose) -> bool:
    """Whether `augmented` has just mirrored a frame: a transform's parameters are those of the last call,
    empty where chance left it out."""
    flips = (step for step in pipeline.transforms if isinstance(step, albumentations.HorizontalFlip))
    return any(step.params for step in flips)
