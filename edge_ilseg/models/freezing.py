"""Freezing parts of a network: where to cut, which modules that means, and a hash that proves nothing moved.

1. A frozen parameter has no gradient, and a frozen batch norm is held in eval mode: an optimiser step leaves both
   bit-identical, weight decay and momentum included.
2. `encoder_sha256` covers every parameter and buffer of the encoder, batch norm statistics included.

This module imports no torch, so that a configuration can be checked without it.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Literal

import msgspec

from edge_ilseg.errors import ConfigError, choice_hint

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edge_ilseg.models.segmentation import SegmentationModel

CutName = Literal["none", "stem", "stages", "encoder", "all_but_head"]
ENCODER_STAGES: dict[str, int] = {
    # backbone: stages behind its stem
    "efficientnet_lite0": 7,
    "efficientnet_lite1": 7,
    "efficientnet_lite2": 7,
    "resnet18": 4,
    "resnet50": 4,
    "resnet101": 4,
    "tiny": 3,
}
CUT_POINTS = ("none", "stem", "stages:<n>", "encoder", "all_but_head")


class CutPoint(msgspec.Struct, frozen=True):
    """Everything before this point is frozen."""

    name: CutName
    stages: int = 0
    """With `stages`: how many, counted from the stem, which is frozen with them."""


def parse_freeze(text: str) -> CutPoint:
    """Parse `none`, `stem`, `stages:<n>` (n >= 1), `encoder` or `all_but_head`.

    Raises:
        ConfigError: anything else.
    """
    match text:
        case "none" | "stem" | "encoder" | "all_but_head":
            return CutPoint(text)
    if (stages := re.fullmatch(r"stages:([1-9][0-9]?)", text)) is not None:
        return CutPoint("stages", int(stages[1]))
    hint = "write the number of stages, as in 'stages:2'" if text.startswith("stages") else None
    raise ConfigError(
        "unknown cut point",
        where="freeze",
        found=repr(text),
        expected=", ".join(CUT_POINTS),
        hint=hint or choice_hint(text, ("none", "stem", "stages:1", "encoder", "all_but_head")),
    )


def is_encoder_frozen(freeze: str, backbone: str) -> bool:
    """Whether `freeze` leaves nothing of the encoder of `backbone` to train: it is then the parent's, bit by bit.

    Raises:
        ConfigError: an unknown cut point.
    """
    cut = parse_freeze(freeze)
    all_stages = cut.name == "stages" and cut.stages >= ENCODER_STAGES[backbone]
    return cut.name in ("encoder", "all_but_head") or all_stages


def frozen_modules(model: SegmentationModel, freeze: str) -> list[nn.Module]:
    """The modules of `model` that `freeze` freezes, outermost only; their parameters and batch norms are all frozen.

    Raises:
        ConfigError: an unknown cut point, or more stages than the encoder has.
    """
    cut = parse_freeze(freeze)
    if cut.name == "none":
        return []
    if cut.name == "encoder":
        return [model.encoder]
    if cut.name == "all_but_head":
        # The classifiers are the head; everything else in the decoder is frozen with the encoder.
        decoder = [module for name, module in model.decoder.named_children() if name != "classifiers"]
        return [model.encoder, *decoder]
    if cut.stages > len(model.encoder.stages):
        raise ConfigError(
            "the encoder has fewer stages",
            where="freeze",
            found=freeze,
            expected=f"at most stages:{len(model.encoder.stages)} for {model.spec.backbone}",
            hint="freeze fewer, or all of them: --freeze encoder",
        )
    return [model.encoder.stem, *list(model.encoder.stages)[: cut.stages]]


def encoder_sha256(model: SegmentationModel) -> str:
    """SHA-256 over the encoder's state, sorted by name: name, dtype, shape and bytes of every tensor (rule 2)."""
    return _state_sha256(model.encoder.state_dict())


def trunk_sha256(model: SegmentationModel) -> str:
    """The same over everything but the classifiers: what `all_but_head` freezes."""
    state = model.state_dict()
    return _state_sha256({name: state[name] for name in state if not name.startswith("decoder.classifiers.")})


def _state_sha256(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
