"""The classifier that grows: one convolution per step, their outputs side by side.

1. A class keeps its channel for ever; the classes of step k follow those of step k - 1.
2. Growing changes no old weight. With `init="background"` the bias of the background channel changes, and nothing else.
3. Each step's weights are tensors of their own (`steps.<k>.weight`), so that an update ships only those that changed.
4. A preallocated head, the published code's, has channels for later classes from the start (`reserved.weight`). They
   take part in training, as classes that no pixel has, and in nothing else; growing makes them a step's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from edge_ilseg.errors import ConfigError

GrowInit = Literal["default", "background", "scaled"]
INIT_STD = 0.01  # DeepLab's: weights from N(0, 0.01^2), biases 0


class GrowingClassifier(nn.Module):
    """Class logits from features by one convolution per step.

    Args:
        in_channels: channels of the features.
        class_counts: classes of each step so far; at least one step.
        kernel: 1, or 3 for the dilated classifiers of DeepLab v2.
        dilation: of the 3x3 kernel; the padding keeps the size.
        reserved: channels for classes of later steps (rule 4).
    """

    def __init__(
        self, in_channels: int, class_counts: Sequence[int], *, kernel: int = 1, dilation: int = 1, reserved: int = 0
    ) -> None:
        super().__init__()
        self.in_channels, self.kernel, self.dilation = in_channels, kernel, dilation
        self.steps = nn.ModuleList(self._new_conv(count) for count in class_counts)
        self.reserved = self._new_conv(reserved) if reserved else None

    def _new_conv(self, count: int) -> nn.Conv2d:
        padding = self.kernel // 2 * self.dilation
        conv = nn.Conv2d(self.in_channels, count, self.kernel, padding=padding, dilation=self.dilation)
        nn.init.normal_(conv.weight, std=INIT_STD)
        nn.init.zeros_(_bias(conv))
        return conv

    @property
    def convs(self) -> tuple[nn.Conv2d, ...]:
        """The steps' convolutions in channel order."""
        return tuple(conv for conv in self.steps if isinstance(conv, nn.Conv2d))

    @property
    def class_counts(self) -> tuple[int, ...]:
        """Classes of each step."""
        return tuple(conv.out_channels for conv in self.convs)

    def forward(self, features_NCHW: Tensor) -> Tensor:
        """Features N x C x h x w to logits N x K x h x w; in training the reserved channels follow."""
        logits = [conv(features_NCHW) for conv in self.convs]
        if self.training and self.reserved is not None:
            logits.append(self.reserved(features_NCHW))
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)

    @torch.no_grad()
    def grow(
        self,
        new_count: int,
        init: GrowInit = "default",
        *,
        background_channel: int | None = None,
        background_shift: float = 0.0,
    ) -> None:
        """Append a convolution of `new_count` channels (rules 1 and 2).

        Args:
            new_count: classes to add, at least 1.
            init: `default`: the reserved weights; where none are reserved, weights from N(0, 0.01^2) and biases 0.
                `scaled`: a random direction with the mean norm of the old rows (the norms agree, as in the weight
                alignment of Zhao et al., arXiv 1911.07053) and the mean of the old biases. `background`: the row and
                bias of the background channel, less `background_shift`.
            background_channel: channel to copy; only for `background`, and needed there.
            background_shift: taken off the background's bias and the new ones, see `SegmentationModel.grow`.

        Raises:
            ConfigError: no class to add, or `background` without a background channel.
        """
        check_growth(new_count, init, background_channel, sum(self.class_counts), self.reserved_count)
        old = self.convs
        conv = self._take_reserved(new_count) if self.reserved else self._new_conv(new_count).to(old[0].weight)
        if init == "background":
            source, row = self._locate(background_channel or 0)
            _bias(source)[row] -= background_shift
            conv.weight.copy_(source.weight[row].expand_as(conv.weight))
            _bias(conv).copy_(_bias(source)[row].expand(new_count))
        elif init == "scaled":
            norm = torch.cat([item.weight.flatten(1).norm(dim=1) for item in old]).mean()
            own_norm = conv.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            conv.weight.mul_(norm / own_norm)
            _bias(conv).fill_(float(torch.cat([_bias(item) for item in old]).mean()))
        self.steps.append(conv)

    @property
    def reserved_count(self) -> int | None:
        """Channels that are left for later classes; None where the head was not preallocated."""
        return self.reserved.out_channels if self.reserved else None

    def _take_reserved(self, count: int) -> nn.Conv2d:
        """The first `count` reserved channels as a convolution of their own; the rest stay reserved."""
        reserved = self.reserved
        if reserved is None:
            raise ValueError("this head has no reserved channels")
        taken, left = self._new_conv(count).to(reserved.weight), reserved.out_channels - count
        taken.weight.copy_(reserved.weight[:count])
        _bias(taken).copy_(_bias(reserved)[:count])
        self.reserved = self._new_conv(left).to(reserved.weight) if left else None
        if self.reserved is not None:
            self.reserved.weight.copy_(reserved.weight[count:])
            _bias(self.reserved).copy_(_bias(reserved)[count:])
        return taken

    def _locate(self, channel: int) -> tuple[nn.Conv2d, int]:
        """The convolution that computes `channel`, and its row there."""
        for conv in self.convs:
            if channel < conv.out_channels:
                return conv, channel
            channel -= conv.out_channels
        raise IndexError(channel)


def _bias(conv: nn.Conv2d) -> Tensor:
    if conv.bias is None:
        raise ValueError("a classifier without bias")
    return conv.bias


def check_growth(
    new_count: int, init: GrowInit, background_channel: int | None, class_count: int, reserved: int | None = None
) -> None:
    """Raise `ConfigError` unless a classifier of `class_count` classes, with `reserved` ones, can grow like this."""
    if new_count < 1:
        raise ConfigError("a step adds at least one class", found=new_count, hint="name the new classes: --add-classes")
    if reserved is not None and new_count > reserved:
        raise ConfigError(
            "the preallocated head has no room for the new classes",
            found=f"{new_count} to add",
            expected=f"{reserved} at most",
            hint="train step 0 again with a larger preallocated_classes, or with 0: the head then grows",
        )
    if init == "background" and (background_channel is None or not 0 <= background_channel < class_count):
        raise ConfigError(
            "the new classes cannot start from the background class",
            found="no background class" if background_channel is None else f"channel {background_channel}",
            expected=f"a channel below {class_count}",
            hint="use init 'default' or 'scaled' with a data set that has no background",
        )
