"""The classifier that grows (rules of edge_ilseg/models/head.py)."""

from __future__ import annotations

import pytest
import torch

from edge_ilseg.errors import ConfigError
from edge_ilseg.models.head import GrowingClassifier, GrowInit


def classifier(*class_counts: int) -> GrowingClassifier:
    torch.manual_seed(0)
    head = GrowingClassifier(8, class_counts)
    for conv in head.convs:
        torch.nn.init.normal_(conv.weight)
        assert conv.bias is not None
        torch.nn.init.normal_(conv.bias)
    return head


FEATURES = torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("init", ["default", "scaled"])
def test_old_classes_keep_their_channels_when_the_head_grows(init: GrowInit) -> None:
    head = classifier(3, 2)
    before_NCHW = head(FEATURES)
    head.grow(4, init)
    assert head.class_counts == (3, 2, 4)
    after_NCHW = head(FEATURES)
    assert after_NCHW.shape[1] == 9
    assert torch.equal(after_NCHW[:, :5], before_NCHW)


def test_the_old_steps_tensors_are_untouched_by_growing() -> None:
    head = classifier(3)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head.grow(2)
    after = head.state_dict()
    assert set(after) - set(before) == {"steps.1.weight", "steps.1.bias"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_background_init_shares_out_the_probability_of_background() -> None:
    head = classifier(3, 2)
    old_NCHW = head(FEATURES).softmax(dim=1)
    head.grow(4, "background", background_channel=3, background_shift=float(torch.log(torch.tensor(5.0))))
    new_NCHW = head(FEATURES).softmax(dim=1)
    torch.testing.assert_close(new_NCHW[:, [0, 1, 2, 4]], old_NCHW[:, [0, 1, 2, 4]])
    for channel in (3, 5, 6, 7, 8):
        torch.testing.assert_close(new_NCHW[:, channel], old_NCHW[:, 3] / 5)


def test_scaled_init_gives_new_rows_the_mean_norm_of_the_old() -> None:
    head = classifier(3, 2)
    old_norm = torch.cat([conv.weight.flatten(1).norm(dim=1) for conv in head.convs]).mean()
    head.grow(2, "scaled")
    new = head.convs[-1]
    torch.testing.assert_close(new.weight.flatten(1).norm(dim=1), old_norm.expand(2))
    assert not torch.equal(new.weight[0], new.weight[1])
    assert new.bias is not None
    biases = torch.cat([conv.bias for conv in head.convs[:-1] if conv.bias is not None])
    torch.testing.assert_close(new.bias, biases.mean().expand(2))


def test_default_init_is_small_and_unbiased() -> None:
    torch.manual_seed(0)
    head = GrowingClassifier(512, (1,))
    head.grow(64)
    new = head.convs[-1]
    assert new.bias is not None
    assert new.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not new.bias.any()


def test_new_classes_follow_the_dtype_and_train() -> None:
    head = classifier(2).double()
    head.grow(1, "background", background_channel=0)
    assert head.convs[-1].weight.dtype == torch.float64
    assert all(parameter.requires_grad for parameter in head.parameters())


def test_a_step_without_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one class"):
        classifier(2).grow(0)


@pytest.mark.parametrize("channel", [None, 2, -1])
def test_background_init_without_a_background_class_is_refused(channel: int | None) -> None:
    head = classifier(2)
    with pytest.raises(ConfigError, match="background class"):
        head.grow(1, "background", background_channel=channel)
    assert head.class_counts == (2,)


def test_reserved_channels_take_part_in_training_and_in_nothing_else() -> None:
    torch.manual_seed(0)
    head = GrowingClassifier(8, (3,), reserved=2)
    assert head.train()(FEATURES).shape[1] == 5
    assert head.eval()(FEATURES).shape[1] == 3
    assert head.class_counts == (3,)


def test_growing_a_preallocated_head_takes_reserved_channels_in_their_order() -> None:
    torch.manual_seed(0)
    head = GrowingClassifier(8, (3,), reserved=3)
    whole = head.train()(FEATURES)
    head.grow(2)
    assert (head.class_counts, head.reserved_count) == ((3, 2), 1)
    torch.testing.assert_close(head(FEATURES), whole)
    torch.testing.assert_close(head.eval()(FEATURES), whole[:, :5])
    with pytest.raises(ConfigError, match=r"no room for the new classes(.|\n)*preallocated_classes"):
        head.grow(2)
    head.grow(1)
    assert (head.class_counts, head.reserved) == ((3, 2, 1), None)
    torch.testing.assert_close(head.train()(FEATURES), whole)
