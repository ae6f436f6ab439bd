"""A head in closed form: features of a frozen trunk are summed up class by class, and ridge regression is solved.

1. The features of a pixel are the encoder's and the merged ones of the decoder's body, side by side: what the two
   classifiers of DeepLab v3 with `skip_classifier` read. The encoder's come first.
2. They are enlarged bilinearly to a grid of 1/4 of the image, as logits are enlarged to the image; a linear head and
   bilinear enlarging commute, so what is fitted on the grid is what the network computes there. Labels are those at the
   cells' centres. Images are as the device sees them, and mirrored ones count as well where training flips.
3. Void is left out. Where the setup hides old classes in the new images, so is the background of these images: any of
   its pixels may be of an old class. The background then keeps what it was at step 0.
4. Sums are float64; the trunk runs in float32 without tensor cores' rounding, as in scoring.
5. The head is a function of the sums alone: neither the order nor the number of the steps that brought them counts.

Sources: ridge regression on frozen features, its sums kept from step to step: Zhuang et al., ACIL, arXiv 2205.14922;
second moments and class sums: McDonnell et al., RanPAC, arXiv 2307.02251. Here for the pixels of a segmentation head.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from edge_ilseg.config import Geometry
from edge_ilseg.data.step_view import StepView
from edge_ilseg.errors import ConfigError, TrainingError
from edge_ilseg.feature_statistics import FeatureStatistics, pack, unpack
from edge_ilseg.images import resize_image, resize_mask
from edge_ilseg.metrics import VOID
from edge_ilseg.models.deeplab import DeepLabV3
from edge_ilseg.models.freezing import trunk_sha256
from edge_ilseg.models.normalization import normalize
from edge_ilseg.models.segmentation import SegmentationModel
from edge_ilseg.progress import ProgressCallback, no_progress

CELL_PX = 4
"""Side of a grid cell (rule 2)."""
LOGIT_SCALE = 10.0
"""Factor of the fitted scores, which are about 0 and 1: as logits they would make every softmax flat. It changes no
mask; cross-validated likelihood is best near it (docs/adr/0012)."""
TRAIN_TRUNK_AGAIN = "train the step that the trunk comes from again"
SMALLEST_VARIANCE = 1e-10
"""Of a feature, relative to its mean square: what is below is rounding, and the feature gets no weight."""


def has_closed_form(model: SegmentationModel) -> bool:
    """Whether the head is what the closed form fits: 1x1 classifiers on what one trunk gives."""
    return isinstance(model.decoder, DeepLabV3)


def feature_count(model: SegmentationModel) -> int:
    """d: the encoder's channels and the merged ones (rule 1)."""
    return model.encoder.out_channels + model.spec.decoder_channels


@torch.no_grad()
def collect_statistics(
    model: SegmentationModel,
    view: StepView,
    classes: tuple[str, ...],
    *,
    flip: bool,
    geometry: Geometry = "stretch",
    hidden_channel: int | None = None,
    progress: ProgressCallback = no_progress,
) -> FeatureStatistics:
    """Sum up the features of a step's images, on the device that the model is on (rules 1 to 4).

    Args:
        model: its trunk; what its classifiers are does not matter.
        view: the images, and their labels in channels.
        classes: names of all channels.
        flip: count the mirrored images as well.
        geometry: `stretch`: at the model's input size; `native`: at the image's own.
        hidden_channel: the background's, where old classes hide under it (rule 3).
        progress: told the share of images that are done.

    Raises:
        ConfigError: the head has no closed form.
        DataError: an image or a mask cannot be used.
    """
    if not has_closed_form(model):
        raise _no_closed_form(model)
    model.eval()
    spec, device = model.spec, next(model.parameters()).device
    sums_device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    side = feature_count(model) + 1
    sums_CDD = torch.zeros(len(classes), side, side, dtype=torch.float64, device=sums_device)
    for done, image_id in enumerate(view.image_ids, start=1):
        image_HWC, labels_HW = view.read(image_id)
        if geometry == "stretch":
            image_HWC = resize_image(image_HWC, spec.input_height_px, spec.input_width_px)
        height, width = (max(1, image_side // CELL_PX) for image_side in image_HWC.shape[:2])
        labels_hw = torch.from_numpy(resize_mask(labels_HW, height, width)).to(sums_device)
        if hidden_channel is not None:
            labels_hw = labels_hw.masked_fill(labels_hw == hidden_channel, VOID)
        images = [image_HWC, image_HWC[:, ::-1]] if flip else [image_HWC]
        features_NDhw = pixel_features(model, torch.from_numpy(np.stack(images)).to(device), height, width)
        add_moments(sums_CDD, features_NDhw[0].to(sums_device), labels_hw)
        if flip:
            add_moments(sums_CDD, features_NDhw[1].to(sums_device), labels_hw.flip(1))
        progress("summing up features", done / len(view))
    return FeatureStatistics(classes, trunk_sha256(model), len(view), pack(sums_CDD.cpu().numpy()))


def pixel_features(model: SegmentationModel, images_NHWC: Tensor, height: int, width: int) -> Tensor:
    """uint8 images to what the classifiers read, float32 N x d x height x width (rules 1, 2 and 4)."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=cudnn.enabled, deterministic=cudnn.deterministic, allow_tf32=False):
        trunk = model.trunk(normalize(images_NHWC, model.spec), len(model.encoder.stages), with_body=True)
    if trunk.body is None:
        raise ValueError("a trunk without a body")
    features_NDhw = torch.cat([trunk.x_NCHW, trunk.body.merged_NCHW], dim=1)
    return F.interpolate(features_NDhw, size=(height, width), mode="bilinear", align_corners=False)


def add_moments(sums_CDD: Tensor, features_Dhw: Tensor, labels_hw: Tensor) -> None:
    """Add x x^T, x = [features; 1], of every pixel to the sums of its class; void is left out.

    Args:
        sums_CDD: float64, C x (d + 1) x (d + 1), changed in place.
        features_Dhw: float, d x h x w.
        labels_hw: uint8 channels, 255 for void.
    """
    x_PD = features_Dhw.flatten(1).T.to(sums_CDD.dtype)
    x_PD = torch.cat([x_PD, x_PD.new_ones(len(x_PD), 1)], dim=1)
    labels_P = labels_hw.flatten()
    for channel in range(len(sums_CDD)):
        own_PD = x_PD[labels_P == channel]
        if len(own_PD):
            sums_CDD[channel] += own_PD.T @ own_PD


def fit_head(
    statistics: FeatureStatistics, ridge: float, balance: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weighted ridge regression of the one-hot labels on standardised features, with a free intercept.

    With n_c pixels of class c, their sum s_c and moments M_c, weights w_c = n_c^-balance (scaled so that the weighted
    pixels sum to 1), mean mu = sum_c w_c s_c, covariance S = sum_c w_c M_c - mu mu^T, p_c = w_c n_c, and D the diagonal
    of S:

        W_c = (S + ridge * D)^-1 (w_c s_c - p_c mu)        b_c = p_c - W_c mu

    which minimises sum over the pixels of w * |W x + b - onehot|^2 + ridge * sum of W^2 * D. As the penalty is on
    standardised features, the result does not depend on the scale of any of them.

    Args:
        statistics: of all images so far.
        ridge: > 0, relative to each feature's variance.
        balance: 0: every pixel counts the same; 1: every class does.

    Returns:
        Weights, float64 C x d, and bias, float64 C: scores of about 0 and 1.

    Raises:
        TrainingError: a class has no pixel, a sum is not finite, or the features do not vary.
    """
    pixels_C = statistics.pixels_C
    empty = [name for name, count in zip(statistics.classes, pixels_C, strict=True) if count < 1]
    if empty:
        raise TrainingError(
            "a class has no pixel to fit its scores to",
            found=f"{', '.join(empty)}: no grid cell of {CELL_PX} x {CELL_PX} pixels has it at its centre",
            hint="add images that show it larger, or enlarge the input of the network",
        )
    if not np.isfinite(statistics.moments_CP).all():
        raise TrainingError("a sum of features is not finite", hint=TRAIN_TRUNK_AGAIN)
    weights_C = pixels_C**-balance / (pixels_C ** (1 - balance)).sum()
    moments_DD = unpack(weights_C @ statistics.moments_CP)
    mean_d = moments_DD[:-1, -1]
    share_C = weights_C * pixels_C
    covariance_dd = moments_DD[:-1, :-1] - np.outer(mean_d, mean_d)
    target_Cd = weights_C[:, None] * statistics.sums_Cd - np.outer(share_C, mean_d)
    variance_d = np.diag(covariance_dd)
    varies_d = variance_d > SMALLEST_VARIANCE * np.diag(moments_DD)[:-1]
    if not varies_d.any():
        raise TrainingError(
            "the features do not vary: there is nothing to tell the classes by",
            found="variance 0",
            hint=TRAIN_TRUNK_AGAIN,
        )
    scale_d = np.sqrt(variance_d, where=varies_d, out=np.ones_like(variance_d))
    kept = np.ix_(varies_d, varies_d)
    system = (covariance_dd / np.outer(scale_d, scale_d))[kept] + ridge * np.eye(int(varies_d.sum()))
    weight_Cd = np.zeros_like(target_Cd)
    weight_Cd[:, varies_d] = _solve(system, (target_Cd / scale_d)[:, varies_d].T).T / scale_d[varies_d]
    return weight_Cd, share_C - weight_Cd @ mean_d


def _solve(system_dd: NDArray[np.float64], right_dC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Solve a symmetric positive definite system by Cholesky's decomposition.

    Raises:
        TrainingError: it is not positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(system_dd))
    if failed:
        raise TrainingError(
            "the system of the closed form is singular",
            found=f"the leading minor of order {int(failed)} is not positive",
            hint="a larger ridge: --set ridge=0.1",
        )
    solved: NDArray[np.float64] = torch.cholesky_solve(torch.from_numpy(right_dC), lower).numpy()
    return solved


@torch.no_grad()
def install_head(model: SegmentationModel, weight_Cd: NDArray[np.float64], bias_C: NDArray[np.float64]) -> None:
    """Make the fitted scores the logits of the model, `LOGIT_SCALE` times, old classes' too.

    Args:
        model: with both classifiers; the trunk and whatever else it has stay as they are.
        weight_Cd: on the encoder's features, then on the merged ones (rule 1).
        bias_C: goes to the first classifier; the second one's is 0.
    """
    merged, skip = model.classifiers
    split = model.encoder.out_channels
    parts = ((merged, weight_Cd[:, split:], bias_C), (skip, weight_Cd[:, :split], np.zeros_like(bias_C)))
    for classifier, weight, bias in parts:
        start = 0
        for conv in classifier.convs:
            rows = slice(start, start + conv.out_channels)
            conv.weight.copy_(torch.from_numpy(LOGIT_SCALE * weight[rows])[:, :, None, None])
            if conv.bias is not None:
                conv.bias.copy_(torch.from_numpy(LOGIT_SCALE * bias[rows]))
            start = rows.stop


def _no_closed_form(model: SegmentationModel) -> ConfigError:
    return ConfigError(
        "this head has no closed form: its dilated 3x3 branches are no 1x1 classifiers on one set of features",
        where="head",
        found=model.spec.head,
        expected="deeplab_v3",
        hint="take a method with gradients (--method), or make the workspace with --head deeplab_v3",
    )
