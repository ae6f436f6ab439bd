"""Generated scenes: eight kinds of textured object that occlude each other, on textured backgrounds. Nothing on disk.

1. The pixels of a scene depend on (seed, image id, size) alone, through PCG64.
2. They are the same on every machine: floating point is float64 and uses only `+ - * /`, comparisons, `abs` and
   `floor`, whose results IEEE 754 fixes; no sine, no root, no matrix product.
3. A kind is told by its shape. Colour and texture are tendencies: with `TENDENCY` a kind's own, else anything.
4. An image usually shows one to three kinds, so that steps of class-incremental learning find images of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_ilseg.data.dataset import DatasetInfo
from edge_ilseg.data.splits import filled, select_split
from edge_ilseg.errors import ConfigError, DataError
from edge_ilseg.images import Color, default_colors

Floats = NDArray[np.float64]
TENDENCY = 0.75
REPEAT = 0.45
"""Chance that a further object is of a kind that the scene has already."""
MIN_SIDE_PX, MAX_SIDE_PX = 16, 4096

# Normals of a star's five lines, (cos, sin) of 90 + 72 k degrees, and their distance from the centre, cos 72 degrees.
_STAR_NORMALS = (
    (0.0, -1.0),
    (0.9510565162951535, -0.30901699437494745),
    (0.5877852522924731, 0.8090169943749475),
    (-0.5877852522924731, 0.8090169943749475),
    (-0.9510565162951535, -0.30901699437494745),
)
_STAR_DISTANCE = 0.30901699437494745
_ROOT_3_HALVES = 0.8660254037844386


def _disk(u: Floats, v: Floats) -> NDArray[np.bool_]:
    return u * u + v * v <= 0.8


def _square(u: Floats, v: Floats) -> NDArray[np.bool_]:
    return np.maximum(abs(u), abs(v)) <= 0.75


def _triangle(u: Floats, v: Floats) -> NDArray[np.bool_]:
    return (v >= -0.5) & (_ROOT_3_HALVES * abs(u) + 0.5 * v <= 0.5)


def _ring(u: Floats, v: Floats) -> NDArray[np.bool_]:
    radius = u * u + v * v
    return (radius <= 0.9) & (radius >= 0.3)


def _cross(u: Floats, v: Floats) -> NDArray[np.bool_]:
    return (np.minimum(abs(u), abs(v)) <= 0.25) & (np.maximum(abs(u), abs(v)) <= 0.9)


def _star(u: Floats, v: Floats) -> NDArray[np.bool_]:
    """Inside at least four of five half-planes: the pentagon and its tips."""
    inside = np.zeros(u.shape, dtype=np.int8)
    for x, y in _STAR_NORMALS:
        inside += x * u + y * v <= _STAR_DISTANCE
    return inside >= 4


def _bar(u: Floats, v: Floats) -> NDArray[np.bool_]:
    return (abs(u) <= 1.25) & (abs(v) <= 0.3)


def _crescent(u: Floats, v: Floats) -> NDArray[np.bool_]:
    shifted = u - 0.5
    return (u * u + v * v <= 1.0) & (shifted * shifted + v * v > 0.6)


class Kind(msgspec.Struct, frozen=True):
    """A kind of object: its outline in coordinates where 1 is the object's radius, its usual colour and texture."""

    covers: Callable[[Floats, Floats], NDArray[np.bool_]]
    color: Color
    texture: int


_PLAIN, _BANDS, _CHECKER, _DOTS = range(4)
KINDS: dict[str, Kind] = {
    "disk": Kind(_disk, (205, 75, 70), _PLAIN),
    "square": Kind(_square, (75, 115, 205), _BANDS),
    "triangle": Kind(_triangle, (85, 180, 90), _DOTS),
    "ring": Kind(_ring, (215, 190, 75), _CHECKER),
    "cross": Kind(_cross, (175, 85, 195), _PLAIN),
    "star": Kind(_star, (230, 140, 55), _BANDS),
    "bar": Kind(_bar, (80, 190, 195), _DOTS),
    "crescent": Kind(_crescent, (205, 205, 215), _CHECKER),
}
CLASSES = ("background", *KINDS)
ALIASES = {"circle": "disk", "disc": "disk", "moon": "crescent", "plus": "cross", "stripe": "bar", "box": "square"}
_MAX_REACH = 1.3  # the bar's corner, in radii


class _Object(msgspec.Struct, frozen=True, eq=False):
    """One object of a scene, ready to draw: where it is and what it looks like."""

    label: int
    center: tuple[float, float]
    radius_px: float
    turn: tuple[float, float]
    color: Floats
    second_color: Floats
    texture: int
    cell: float


class Shapes:
    """Generated scenes with ids such as `train-00012`; see the rules on top.

    Args:
        root: None; there is nothing on disk.
        seed: another seed, other scenes.
        train, val, test: images in each split.
        height_px, width_px: size of every image.
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        seed: int = 0,
        train: int = 600,
        val: int = 100,
        test: int = 200,
        height_px: int = 96,
        width_px: int = 96,
    ) -> None:
        if root is not None:
            raise ConfigError(
                "the data set 'shapes' is generated and reads no folder",
                found=f"root {root}",
                hint="leave the root out",
            )
        for name, count in (("train", train), ("val", val), ("test", test)):
            if not 0 <= count <= 99999:
                raise ConfigError(
                    f"the option {name!r} is out of range",
                    found=count,
                    expected="0 to 99999 images",
                    hint=f"give {name} a number in this range",
                )
        for name, side in (("height_px", height_px), ("width_px", width_px)):
            if not MIN_SIDE_PX <= side <= MAX_SIDE_PX:
                raise ConfigError(
                    f"the option {name!r} is out of range",
                    found=side,
                    expected=f"{MIN_SIDE_PX} to {MAX_SIDE_PX} px",
                    hint=f"give {name} a number in this range",
                )
        self._seed = seed
        self._height, self._width = height_px, width_px
        counts = {"train": train, "val": val, "test": test}
        self._splits = {name: tuple(f"{name}-{i:05d}" for i in range(count)) for name, count in counts.items()}
        self._info = DatasetInfo(
            kind="shapes",
            classes=CLASSES,
            background="background",
            colors=default_colors(len(CLASSES)),
            aliases=ALIASES,
            splits=filled(self._splits),
        )

    @property
    def info(self) -> DatasetInfo:
        """Background and the eight kinds of object."""
        return self._info

    def ids(self, split: str) -> tuple[str, ...]:
        """Ids such as `val-00003`."""
        return select_split(split, self._splits, "the generated data set 'shapes'")

    def read_image(self, image_id: str) -> NDArray[np.uint8]:
        """Draw the image, uint8, H x W x 3, RGB."""
        rng, objects = self._scene(image_id)
        image_HWC = _background(rng, self._height, self._width)
        for item in objects:
            box, u, v = self._local(item)
            covered = KINDS[CLASSES[item.label]].covers(u, v)
            image_HWC[box][covered] = _painted(item, u, v)[covered]
        image_HWC += (rng.random(image_HWC.shape) - 0.5) * 28.0
        return np.floor(image_HWC.clip(0.0, 255.0) + 0.5).astype(np.uint8)

    def open_image(self, image_id: str) -> Image.Image:
        """The same in Pillow's memory."""
        return Image.fromarray(self.read_image(image_id))

    def read_labels(self, image_id: str) -> NDArray[np.uint8]:
        """Draw the label ids, uint8, H x W."""
        _, objects = self._scene(image_id)
        labels_HW = np.zeros((self._height, self._width), dtype=np.uint8)
        for item in objects:
            box, u, v = self._local(item)
            labels_HW[box][KINDS[CLASSES[item.label]].covers(u, v)] = item.label
        return labels_HW

    def _scene(self, image_id: str) -> tuple[np.random.Generator, list[_Object]]:
        """The objects from back to front, and the generator, which goes on with the background and the noise."""
        split, _, number = image_id.partition("-")
        if not (number.isdigit() and image_id in (f"{name}-{int(number):05d}" for name in self._splits)):
            raise DataError(
                f"no such generated image {image_id!r}",
                expected="an id such as 'train-00012'",
                found=f"split {split!r}",
                hint="take an id that a split of this data set lists",
            )
        digest = hashlib.sha256(f"shapes:{self._seed}:{image_id}".encode()).digest()
        rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
        labels = [int(rng.integers(1, len(CLASSES)))]
        for _ in range(int(rng.integers(0, 4))):
            again = rng.random() < REPEAT
            labels.append(labels[int(rng.integers(len(labels)))] if again else int(rng.integers(1, len(CLASSES))))
        return rng, [_object(rng, label, self._height, self._width) for label in labels]

    def _local(self, item: _Object) -> tuple[tuple[slice, slice], Floats, Floats]:
        """The box around an object, and the object's own coordinates of the pixels in it."""
        reach = item.radius_px * _MAX_REACH + 1.0
        y, x = item.center
        top, bottom = max(0, int(y - reach)), min(self._height, int(y + reach) + 1)
        left, right = max(0, int(x - reach)), min(self._width, int(x + reach) + 1)
        dy = ((np.arange(top, bottom) + 0.5 - y) / item.radius_px)[:, None]
        dx = ((np.arange(left, right) + 0.5 - x) / item.radius_px)[None, :]
        cos, sin = item.turn
        return (slice(top, bottom), slice(left, right)), cos * dx + sin * dy, cos * dy - sin * dx


def _object(rng: np.random.Generator, label: int, height: int, width: int) -> _Object:
    kind = KINDS[CLASSES[label]]
    side = float(min(height, width))
    half_angle = rng.random() * 2.0 - 1.0  # tan(angle / 2): a rational point of the circle, -90 to 90 degrees
    square = half_angle * half_angle
    flip = 1.0 if rng.random() < 0.5 else -1.0
    usual_color, usual_texture = rng.random() < TENDENCY, rng.random() < TENDENCY
    jitter, free = (rng.random(3) - 0.5) * 80.0, 30.0 + rng.random(3) * 200.0
    color = np.array(kind.color, dtype=np.float64) + jitter if usual_color else free
    contrast = 45.0 + rng.random() * 40.0
    return _Object(
        label=label,
        center=((0.1 + 0.8 * rng.random()) * height, (0.1 + 0.8 * rng.random()) * width),
        radius_px=side * (0.18 + 0.16 * rng.random()),
        turn=(flip * (1.0 - square) / (1.0 + square), flip * 2.0 * half_angle / (1.0 + square)),
        color=color,
        second_color=color + (contrast if rng.random() < 0.5 else -contrast),
        texture=kind.texture if usual_texture else int(rng.integers(4)),
        cell=0.3 + 0.25 * rng.random(),
    )


def _painted(item: _Object, u: Floats, v: Floats) -> Floats:
    """The object's surface, H x W x 3: two colours in its texture, lighter towards one side."""
    a, b = u / item.cell, v / item.cell
    if item.texture == _BANDS:
        second = a - np.floor(a) < 0.5
    elif item.texture == _CHECKER:
        second = (a - np.floor(a) < 0.5) ^ (b - np.floor(b) < 0.5)
    elif item.texture == _DOTS:
        da, db = a - np.floor(a) - 0.5, b - np.floor(b) - 0.5
        second = da * da + db * db < 0.09
    else:
        second = np.zeros(u.shape, dtype=np.bool_)
    shade = 1.0 + 0.15 * v
    return np.where(second[:, :, None], item.second_color, item.color) * shade[:, :, None]


def _background(rng: np.random.Generator, height: int, width: int) -> Floats:
    """A gradient between two colours, clouds, and bands or a checkerboard of low contrast, float64, H x W x 3."""
    y, x = ((np.arange(height) + 0.5) / height)[:, None], ((np.arange(width) + 0.5) / width)[None, :]
    first, second = 30.0 + rng.random(3) * 190.0, 30.0 + rng.random(3) * 190.0
    lean, amplitude, bands = rng.random(), rng.random() * 30.0, 3.0 + rng.random() * 7.0
    slant = rng.random() * 2.0 - 1.0
    a, b = (y + slant * x) * bands, (x - slant * y) * bands
    pattern = (a - np.floor(a) < 0.5) ^ (b - np.floor(b) < 0.5) if rng.random() < 0.5 else a - np.floor(a) < 0.5
    mix = lean * y + (1.0 - lean) * x
    grey = _clouds(rng, height, width) * 50.0 + np.where(pattern, amplitude, -amplitude)
    return first + mix[:, :, None] * (second - first) + grey[:, :, None]


def _clouds(rng: np.random.Generator, height: int, width: int, cells: int = 6) -> Floats:
    """Smooth noise, -0.5..0.5: a coarse random grid, interpolated linearly."""
    grid = rng.random((cells + 1, cells + 1)) - 0.5
    y, x = np.arange(height) * (cells / height), np.arange(width) * (cells / width)
    row, column = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    along_y = (y - row)[:, None]
    rows = grid[row] * (1.0 - along_y) + grid[row + 1] * along_y
    along_x = (x - column)[None, :]
    clouds_HW: Floats = rows[:, column] * (1.0 - along_x) + rows[:, column + 1] * along_x
    return clouds_HW
