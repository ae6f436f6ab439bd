"""The segmentation network: encoder, decoder with growing classifiers, logits at the image's size.

1. Growing changes no old logit: a class keeps its channel and its weights, and the decoder gives the same bits for it.
   (Enlarged, they may differ in the last bit: torch enlarges fewer than 8 channels by another kernel on a CPU.)
   `init="background"` lowers the background's bias by design, and only that.
2. What is frozen, and with `set_batch_norm("eval")` every batch norm, stays in eval mode whoever calls `train()`.
3. State names are `encoder.<backbone's names>` and `decoder.<head's names>`; each step's classifier has its own
   tensors, `decoder.classifiers.<i>.steps.<k>.{weight,bias}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Self

import msgspec
from torch import Tensor, nn

from edge_ilseg.errors import ConfigError
from edge_ilseg.models.deeplab import DecoderBody, DeepLabV2, DeepLabV3
from edge_ilseg.models.efficientnet_lite import EfficientNetLite
from edge_ilseg.models.enlarge import enlarge
from edge_ilseg.models.freezing import frozen_modules
from edge_ilseg.models.head import GrowingClassifier, GrowInit, check_growth
from edge_ilseg.models.layers import BatchNorm2d, StagedEncoder
from edge_ilseg.models.resnet import ResNet
from edge_ilseg.models.spec import Backbone, Head, ModelSpec, aspp_rates
from edge_ilseg.models.tiny import Tiny

Decoder = DeepLabV2 | DeepLabV3
"""A decoder has `classifiers` and maps features to (logits, branches) at the features' size."""

BACKBONES: dict[Backbone, Callable[[int], StagedEncoder]] = {
    # name: output stride -> encoder
    "efficientnet_lite0": lambda output_stride: EfficientNetLite("efficientnet_lite0", output_stride),
    "efficientnet_lite1": lambda output_stride: EfficientNetLite("efficientnet_lite1", output_stride),
    "efficientnet_lite2": lambda output_stride: EfficientNetLite("efficientnet_lite2", output_stride),
    "resnet18": lambda output_stride: ResNet("resnet18", output_stride),
    "resnet50": lambda output_stride: ResNet("resnet50", output_stride),
    "resnet101": lambda output_stride: ResNet("resnet101", output_stride),
    "tiny": Tiny,
}

HEADS: dict[Head, Callable[[ModelSpec, int, Sequence[int], int], Decoder]] = {
    # name: spec, channels of the features, classes per step, channels for later ones -> decoder
    "deeplab_v2": lambda spec, channels, counts, reserved: DeepLabV2(channels, aspp_rates(spec), counts, reserved),
    "deeplab_v3": lambda spec, channels, counts, reserved: DeepLabV3(
        channels, spec.decoder_channels, aspp_rates(spec), counts, reserved, skip=spec.skip_classifier
    ),
}


class SegmentationOutput(NamedTuple):
    """What one forward pass gives. A tuple, so that wrappers for precision and several processes can walk it."""

    coarse_NCHW: Tensor
    """Logits at the features' size, float, N x K x h x w."""
    features_NCHW: Tensor
    """The encoder's output."""
    branches: tuple[Tensor, ...]
    """Outputs of the ASPP branches before they are merged; per-class logits with DeepLab v2."""
    stages: tuple[Tensor, ...]
    """Outputs of the encoder's stages, the last of them the features; the features alone where they were given."""
    height_px: int
    width_px: int
    """Of the image."""

    @property
    def logits_NCHW(self) -> Tensor:
        """Logits, float, N x K x H x W, enlarged to the image's size anew each time that one asks for them."""
        return enlarge(self.coarse_NCHW, self.height_px, self.width_px)


class TrunkOutput(NamedTuple):
    """What the first modules of a network give for a batch: all that the others need to go on from there."""

    x_NCHW: Tensor
    """Output of the stem or of the last stage among them."""
    stages: tuple[Tensor, ...]
    """Outputs of the encoder's stages among them."""
    body: DecoderBody | None
    """With the whole encoder and the decoder's body among them: what the classifiers go on from."""
    height_px: int
    width_px: int
    """Of the image."""


class SegmentationModel(nn.Module):
    """A network for the classes of all steps so far. Built by `build_model`.

    Attributes:
        spec: what it was built from.
        freeze: the cut point in force, see `set_frozen`.
    """

    def __init__(self, spec: ModelSpec, encoder: StagedEncoder, decoder: Decoder) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = encoder
        self.decoder = decoder
        self.freeze = "none"
        self._batch_norm: Literal["train", "eval"] = "train"

    @property
    def classifiers(self) -> tuple[GrowingClassifier, ...]:
        """The head's growing classifiers: one, two with `skip_classifier`, or with DeepLab v2 one per branch."""
        return tuple(item for item in self.decoder.classifiers if isinstance(item, GrowingClassifier))

    @property
    def class_counts(self) -> tuple[int, ...]:
        """Classes of each step, in channel order."""
        return self.classifiers[0].class_counts

    @property
    def class_count(self) -> int:
        """Classes of all steps."""
        return sum(self.class_counts)

    @property
    def reserved_count(self) -> int | None:
        """Channels that a preallocated head has left for later classes; None where the head grows."""
        classifier = self.classifiers[0]
        return (classifier.reserved_count or 0) if self.spec.preallocated_classes else None

    def encode(self, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Normalised images, float, N x 3 x H x W, to the output of each stage of the encoder.

        The last one are the features, N x C x ceil(H / s) x ceil(W / s).
        """
        return self.encoder.stage_outputs(images_NCHW)

    def decode(
        self,
        features_NCHW: Tensor,
        height_px: int,
        width_px: int,
        stages: tuple[Tensor, ...] | None = None,
        body: DecoderBody | None = None,
    ) -> SegmentationOutput:
        """Features to logits, for an image of `height_px` x `width_px`."""
        coarse_NCHW, branches = self.decoder.classify(body) if body else self.decoder(features_NCHW)
        return SegmentationOutput(coarse_NCHW, features_NCHW, branches, stages or (features_NCHW,), height_px, width_px)

    def forward(self, images_NCHW: Tensor) -> SegmentationOutput:
        """Normalised images, float, N x 3 x H x W of any size, to logits of that size."""
        stages = self.encode(images_NCHW)
        return self.decode(stages[-1], images_NCHW.shape[2], images_NCHW.shape[3], stages)

    def trunk(self, images_NCHW: Tensor, stages: int, *, with_body: bool = False) -> TrunkOutput:
        """The first modules alone: the stem, `stages` stages and, with all of them, the decoder's body."""
        x_NCHW = self.encoder.stem(images_NCHW)
        outputs = self.encoder.run_stages(x_NCHW, 0, stages)
        x_NCHW = outputs[-1] if outputs else x_NCHW
        body = self.decoder.body(x_NCHW) if with_body else None
        return TrunkOutput(x_NCHW, outputs, body, images_NCHW.shape[2], images_NCHW.shape[3])

    def tail(self, trunk: TrunkOutput) -> SegmentationOutput:
        """All other modules: `model.tail(model.trunk(images, n))` is `model(images)`."""
        rest = self.encoder.run_stages(trunk.x_NCHW, len(trunk.stages), len(self.encoder.stages))
        stages = trunk.stages + rest
        return self.decode(stages[-1], trunk.height_px, trunk.width_px, stages, trunk.body)

    def grow(self, new_count: int, init: GrowInit = "default", background_channel: int | None = None) -> None:
        """Append `new_count` channels for a new step (rule 1); `class_counts` gets one entry more.

        With `init="background"` (Cermelli et al., "Modeling the background", arXiv 2002.00718) the new classes copy the
        background's weights, and its bias b and theirs become b - log(new_count + 1), so that what was the
        probability of background is shared out evenly. With several classifiers that are summed, each takes its share.

        Raises:
            ConfigError: no class to add, no room in a preallocated head, or `background` without a background channel.
        """
        check_growth(new_count, init, background_channel, self.class_count, self.reserved_count)
        shift = math.log(new_count + 1) / len(self.classifiers)
        for classifier in self.classifiers:
            classifier.grow(new_count, init, background_channel=background_channel, background_shift=shift)
        self.train(self.training)

    def set_frozen(self, freeze: str) -> None:
        """Freeze everything before the cut point `freeze`, and nothing else: see `edge_ilseg.models.freezing`.

        Raises:
            ConfigError: an unknown cut point, or more stages than the encoder has.
        """
        frozen_modules(self, freeze)
        self.freeze = freeze
        self._apply_modes()

    def set_batch_norm(self, mode: Literal["train", "eval"]) -> None:
        """`eval`: no batch norm leaves eval mode (the paper's way); `train`: only the frozen ones stay there."""
        self._batch_norm = mode
        self._apply_modes()

    def _apply_modes(self) -> None:
        self.requires_grad_(True)
        for module in self.modules():
            if isinstance(module, BatchNorm2d):
                module.held = self._batch_norm == "eval"
        for frozen in frozen_modules(self, self.freeze):
            for parameter in frozen.parameters():
                parameter.requires_grad_(False)
                parameter.grad = None
            for module in frozen.modules():
                if isinstance(module, BatchNorm2d):
                    module.held = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Enter training or eval mode; what is frozen stays in eval mode (rule 2)."""
        super().train(mode)
        for frozen in frozen_modules(self, self.freeze):
            frozen.eval()
        return self


def with_skip_classifier(model: SegmentationModel) -> SegmentationModel:
    """The same network with a second classifier on the encoder's features, of weight 0: the logits stay as they are.

    Raises:
        ConfigError: its head has no place for one.
    """
    if model.spec.skip_classifier:
        return model
    spec = msgspec.structs.replace(model.spec, skip_classifier=True)
    changed = build_model(spec, model.class_counts).to(next(model.parameters()).device)
    changed.load_state_dict(model.state_dict(), strict=False)
    for parameter in changed.classifiers[1].parameters():
        nn.init.zeros_(parameter)
    return changed.train(model.training)


def build_model(spec: ModelSpec, class_counts: Sequence[int]) -> SegmentationModel:
    """Build the network of `spec` with random weights.

    Args:
        spec: backbone, head and input size.
        class_counts: classes of each step so far, in channel order.

    Raises:
        ConfigError: a step without a class, an unknown backbone or head, or dilations or a second classifier that do
            not fit the head.
    """
    if spec.skip_classifier and spec.head != "deeplab_v3":
        raise ConfigError(
            "this head has no second classifier",
            where="skip_classifier",
            found=f"true with {spec.head}",
            expected="deeplab_v3: the branches of deeplab_v2 read the encoder's features already",
            hint="set skip_classifier = false, or take the head deeplab_v3",
        )
    if not class_counts or min(class_counts) < 1:
        raise ConfigError(
            "every step needs at least one class",
            found=list(class_counts),
            hint="name at least one class for each step",
        )
    encoder = BACKBONES[spec.backbone](spec.output_stride)
    reserved = max(spec.preallocated_classes - sum(class_counts[1:]), 0)
    return SegmentationModel(spec, encoder, HEADS[spec.head](spec, encoder.out_channels, class_counts, reserved))
