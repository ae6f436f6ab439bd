"""Which images are worth looking at, and small pictures of them: image, truth, before, after, int8.

1. Three groups, each with its own order, no image twice: those that lost most of their old classes' pixels against the
   parent (without a parent, those with most wrong pixels); those whose new classes were missed most; the typical ones,
   next to the median.
2. A mask is drawn over its image in colours that the colour-blind can tell apart, as far as there are so many, and each
   large region bears the number that its class has in the legend. Background and void are left as they are.
3. Pictures are WebP where Pillow can write it, else JPEG, as `data:` URIs. A smaller `Quality` is tried until they fit.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, features

from edge_ilseg.checkpoint import ClassRecord
from edge_ilseg.data.dataset import Dataset
from edge_ilseg.devices.drawing import draw_text, load_style, text_width_px
from edge_ilseg.devices.overlay import percent_text
from edge_ilseg.images import resize_mask
from edge_ilseg.metrics import VOID
from edge_ilseg.report.blocks import LegendEntry, Shot, Strip
from edge_ilseg.report.scoring import Eye, ImageScore, Role, read_pair
from edge_ilseg.scenario import evaluation_lookup

LARGEST_PX = 280
ALPHA = 0.62
COARSE_PX = 80
SMALLEST_SHARE = 0.005
"""Classes with less of the picture are left out of legends."""
GROUPS = ("Lost most", "New classes, missed most", "Typical")
HUES = (
    *((213, 94, 0), (86, 180, 233), (240, 228, 66), (0, 114, 178)),
    *((0, 158, 115), (230, 159, 0), (204, 121, 167), (60, 60, 60)),
)
"""Okabe and Ito, neighbours far apart."""


class Choice(NamedTuple):
    """An image that is to be shown, and why."""

    group: str
    image_id: str
    reason: str


class Taken(NamedTuple):
    """An image and its masks at the size of the largest thumbnail, before they are encoded."""

    choice: Choice
    image_HWC: NDArray[np.uint8]
    masks: dict[str, NDArray[np.uint8]]
    """By title: `truth`, and the roles of the models; channels, uint8, H x W, 255 for void."""


class Quality(NamedTuple):
    """How large and how fine a thumbnail is, and the share of the images that is shown."""

    width_px: int
    webp: int
    share: float


LADDER = (
    *(Quality(LARGEST_PX, 76, 1.0), Quality(220, 70, 1.0), Quality(176, 62, 1.0), Quality(176, 55, 0.5)),
    *(Quality(140, 50, 0.5), Quality(120, 45, 0.25)),
)


def choose_images(scores: Sequence[ImageScore], most: int) -> tuple[Choice, ...]:
    """At most `most` images, a third of each group, in the groups' order (rule 1); pure."""
    role: Role = "after" if any("after" in score.all_pixels for score in scores) else "int8"
    taken: set[str] = set()
    chosen: list[Choice] = []
    rankings = (_lost_most(scores, role), _missed_most(scores, role), _typical(scores, role))
    ranked = [ranking for ranking in rankings if ranking]
    for place, ranking in enumerate(ranked):
        room = (most - len(chosen)) // (len(ranked) - place)
        fresh = [choice for choice in ranking if choice.image_id not in taken][: max(room, 0)]
        chosen += fresh
        taken |= {choice.image_id for choice in fresh}
    return tuple(chosen)


def _lost_most(scores: Sequence[ImageScore], role: Role) -> list[Choice]:
    rows: list[tuple[float, str, str]] = []
    for score in scores:
        share = score.all_pixels[role].value if role in score.all_pixels else None
        before, after = score.old_pixels.get("before"), score.old_pixels.get(role)
        if before is not None and after is not None and before.value is not None and after.value is not None:
            lost = before.value - after.value
            shares = f"{100 * before.value:.0f} % before, {100 * after.value:.0f} % after"
            rows.append((-lost, score.image_id, f"old classes: {shares} of the pixels right"))
        elif before is None and share is not None:
            rows.append((share, score.image_id, f"{100 * share:.0f} % of the pixels right"))
    return [Choice(GROUPS[0], image_id, text) for _, image_id, text in sorted(rows)]


def _missed_most(scores: Sequence[ImageScore], role: Role) -> list[Choice]:
    rows = []
    for score in scores:
        before, share = score.old_pixels.get("before"), score.new_pixels.get(role)
        if before is None or share is None or share.pixels < 0.02 * score.all_pixels[role].pixels:
            continue
        value = share.value or 0.0
        rows.append((value, score.image_id, f"{100 * value:.0f} % of the new classes' pixels right"))
    return [Choice(GROUPS[1], image_id, text) for _, image_id, text in sorted(rows)]


def _typical(scores: Sequence[ImageScore], role: Role) -> list[Choice]:
    values = {score.image_id: score.all_pixels[role].value for score in scores if role in score.all_pixels}
    known = {image_id: value for image_id, value in values.items() if value is not None}
    if not known:
        return []
    middle = median(known.values())
    order = sorted(known, key=lambda image_id: (abs(known[image_id] - middle), image_id))
    return [Choice(GROUPS[2], image_id, f"{100 * known[image_id]:.0f} % of the pixels right") for image_id in order]


def take_pictures(
    choices: Sequence[Choice], eyes: Sequence[Eye], dataset: Dataset, class_names: Sequence[str]
) -> tuple[Taken, ...]:
    """Look at the chosen images once more, and keep what the thumbnails need.

    Raises:
        DataError: an image is gone since it was scored.
        BundleError: a model cannot be run.
    """
    lookup = evaluation_lookup(dataset.info.classes, dataset.info.background, class_names)
    taken = []
    for choice in choices:
        image_HWC, labels_HW = read_pair(dataset, choice.image_id)
        height_px, width_px = image_HWC.shape[:2]
        scale = min(1.0, LARGEST_PX / max(width_px, height_px))
        size = (max(round(height_px * scale), 1), max(round(width_px * scale), 1))
        masks = {"truth": resize_mask(lookup[labels_HW], *size)}
        masks.update({eye.role: resize_mask(eye.mask(image_HWC), *size) for eye in eyes})
        small = Image.fromarray(np.ascontiguousarray(image_HWC)).resize(size[::-1], Image.Resampling.LANCZOS)
        taken.append(Taken(choice, np.array(small), masks))
    return tuple(taken)


def fit_strips(
    taken: Sequence[Taken], classes: Sequence[ClassRecord], background: str | None, room_bytes: int
) -> tuple[tuple[tuple[str, Strip], ...], str]:
    """(group, strip) of as many pictures, as large, as there is room for; and what was left out (rule 3)."""
    for quality in LADDER:
        kept = _first_of_each_group(taken, quality.share)
        strips = tuple((item.choice.group, draw_strip(item, classes, background, quality)) for item in kept)
        used_bytes = sum(len(shot.uri) + len(shot.alt) + 200 for _, strip in strips for shot in strip.shots)
        if used_bytes <= room_bytes:
            left_out = len(taken) - len(kept)
            notes = [f"{left_out} of {len(taken)} images are left out"] if left_out else []
            notes += ["pictures are smaller"] if quality != LADDER[0] else []
            return strips, f"To keep the page small: {', '.join(notes)}." if notes else ""
    return (), f"The pictures of {len(taken)} images are left out: there is no room for them under the size limit."


def _first_of_each_group(taken: Sequence[Taken], share: float) -> list[Taken]:
    kept = []
    for group in GROUPS:
        members = [item for item in taken if item.choice.group == group]
        kept += members[: max(int(len(members) * share), 1)]
    return kept


def draw_strip(item: Taken, classes: Sequence[ClassRecord], background: str | None, quality: Quality) -> Strip:
    """The thumbnails of one image, and a legend of the classes that are in any of them."""
    colors = colors_of(classes, background)
    image = _shrunk(Image.fromarray(item.image_HWC), quality.width_px)
    shots = [_shot("image", image, f"Image {item.choice.image_id}", quality)]
    shares = {title: _shares(mask_HW, len(classes)) for title, mask_HW in item.masks.items()}
    present = [channel for channel, _ in _largest(np.max(list(shares.values()), axis=0))]
    painted = [channel for channel in present if classes[channel].name != background]
    numbers = {channel: place for place, channel in enumerate(painted, start=1)}
    for title, mask_HW in item.masks.items():
        picture = paint(image, resize_mask(mask_HW, image.height, image.width), colors, numbers)
        text = ", ".join(f"{classes[channel].name} {percent_text(share)}" for channel, share in _largest(shares[title]))
        shots.append(_shot(title, picture, f"{title} of {item.choice.image_id}: {text or 'nothing'}", quality))
    legend = [
        LegendEntry(hex_color(colors[channel]), f"{numbers[channel]} {classes[channel].name}") for channel in painted
    ]
    return Strip(f"{item.choice.image_id}: {item.choice.reason}", shots, legend)


def _shares(mask_HW: NDArray[np.uint8], class_count: int) -> NDArray[np.float64]:
    counts = np.bincount(mask_HW[mask_HW != VOID], minlength=class_count)
    return counts / max(int(counts.sum()), 1)


def _largest(shares: NDArray[np.float64]) -> list[tuple[int, float]]:
    order = np.argsort(-shares, kind="stable")
    return [(int(channel), float(shares[channel])) for channel in order if shares[channel] >= SMALLEST_SHARE]


def colors_of(classes: Sequence[ClassRecord], background: str | None) -> dict[int, tuple[int, int, int]]:
    """The page's colour of each channel but the background's (rule 2): the newest classes get the first hues.

    From the ninth class on a hue comes again, lighter, and from the seventeenth on darker.
    """
    channels = [channel for channel, item in enumerate(classes) if item.name != background]
    channels.sort(key=lambda channel: (-classes[channel].step, channel))
    return {channel: _hue(place) for place, channel in enumerate(channels)}


def _hue(place: int) -> tuple[int, int, int]:
    hue, turn = HUES[place % len(HUES)], place // len(HUES) % 3
    if not turn:
        return hue
    red, green, blue = (round(0.5 * level + 0.5 * (255, 0)[turn - 1]) for level in hue)
    return red, green, blue


def hex_color(color: tuple[int, int, int]) -> str:
    """`(255, 0, 16)` to `#ff0010`."""
    return "#" + "".join(f"{level:02x}" for level in color)


def _shrunk(image: Image.Image, width_px: int) -> Image.Image:
    scale = min(1.0, width_px / max(image.size))
    if scale == 1.0:
        return image
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(size, Image.Resampling.LANCZOS)


def paint(
    image: Image.Image,
    mask_HW: NDArray[np.uint8],
    colors: Mapping[int, tuple[int, int, int]],
    numbers: Mapping[int, int],
) -> Image.Image:
    """The image under the colours of a mask, each large region with its class's number (rule 2).

    Args:
        image: RGB.
        mask_HW: channels, uint8, of the image's size.
        colors: of the channels that are painted.
        numbers: of the channels that bear one.
    """
    palette = np.zeros((256, 3), dtype=np.float64)
    alpha = np.zeros((256, 1), dtype=np.float64)
    for channel, color in colors.items():
        palette[channel], alpha[channel] = color, ALPHA
    pixels_HWC = np.asarray(image, dtype=np.float64)
    grey_HWC = pixels_HWC.mean(axis=2, keepdims=True) * 0.85 + 20  # colours of the image would tint the classes'
    under_HWC = np.where(alpha[mask_HW] > 0, grey_HWC, pixels_HWC)
    mixed_HWC = alpha[mask_HW] * palette[mask_HW] + (1 - alpha[mask_HW]) * under_HWC
    painted = Image.fromarray(np.clip(np.rint(mixed_HWC), 0, 255).astype(np.uint8))
    for channel, place in numbers.items():
        _write_number(painted, mask_HW == channel, str(place))
    return painted


def _write_number(painted: Image.Image, region_HW: NDArray[np.bool_], text: str) -> None:
    """Write the number where the region is thickest, if it has room there."""
    style = load_style(max(painted.width // 18, 9))
    row, column, radius_px = thickest_point(region_HW)
    width_px = text_width_px(text, style)
    if radius_px < 0.6 * style.height_px:
        return
    draw = ImageDraw.Draw(painted)
    half_px = style.height_px * 0.62
    box = (column - width_px / 2 - 3, row - half_px, column + width_px / 2 + 3, row + half_px)
    draw.rounded_rectangle(box, radius=3, fill=(255, 255, 255))
    draw_text(draw, column - width_px / 2, row, text, style, (20, 20, 20))


def thickest_point(region_HW: NDArray[np.bool_]) -> tuple[int, int, int]:
    """Row and column of a pixel that is farthest from the region's edge, and about how far, px; by erosion.

    A large region is looked at coarsely: every n-th pixel of every n-th row.
    """
    stride = -(-max(region_HW.shape) // COARSE_PX)
    left = np.pad(region_HW[::stride, ::stride], 1)
    depth_px = 0
    kept = left
    while left.any():
        kept, depth_px = left, depth_px + 1
        inner = left[1:-1, 1:-1] & left[:-2, 1:-1] & left[2:, 1:-1] & left[1:-1, :-2] & left[1:-1, 2:]
        left = np.pad(inner, 1)
    rows, columns = np.nonzero(kept)
    if not len(rows):
        return 0, 0, 0
    middle = len(rows) // 2
    return (int(rows[middle]) - 1) * stride, (int(columns[middle]) - 1) * stride, depth_px * stride


def _shot(title: str, image: Image.Image, alt: str, quality: Quality) -> Shot:
    buffer = io.BytesIO()
    kind = "webp" if features.check("webp") else "jpeg"
    if kind == "webp":
        image.save(buffer, format="WEBP", quality=quality.webp, method=4)
    else:
        image.save(buffer, format="JPEG", quality=quality.webp, optimize=True)
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Shot(title, uri, alt, image.width, image.height)
