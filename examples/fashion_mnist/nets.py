"""The two small nets, as PyTorch modules. Definition only: training and export are in `train.py`.

Both take `image` float32 [N, 1, 28, 28], 0..1, and give `logits` float32 [N, 10]. The mean/std normalisation
is part of the net, so a caller on the device need not know it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Of the 58,000 images trained on, pixel / 255.
MEAN = 0.2860
STD = 0.3530
CLASS_COUNT = 10


class Normalise(nn.Module):
    """(x - mean) / std.

    The convolution behind it pads with zeros *after* this step, so folding the subtraction into its bias
    would change the border pixels: whoever cleans the graph up must leave it, or pad first.
    """

    def forward(self, image: Tensor) -> Tensor:
        return (image - MEAN) / STD


class ConvBn(nn.Sequential):
    """Convolution without bias, then BatchNorm; ReLU on top unless told not to. Same padding."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        relu: bool = True,
    ) -> None:
        padding = kernel // 2
        conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, groups=groups, bias=False)
        parts: list[nn.Module] = [conv, nn.BatchNorm2d(channels_out)]
        super().__init__(*parts, *([nn.ReLU()] if relu else []))


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a strided 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvBn(channels_in, channels_out, stride=stride), ConvBn(channels_out, channels_out, relu=False)
        )
        same_shape = stride == 1 and channels_in == channels_out
        self.shortcut: nn.Module = nn.Identity()
        if not same_shape:
            self.shortcut = ConvBn(channels_in, channels_out, kernel=1, stride=stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, CLASS_COUNT)]


def _separable(channels_in: int, channels_out: int, stride: int = 1) -> list[nn.Module]:
    """A depthwise 3x3 and a pointwise 1x1 convolution (MobileNet, arXiv 1704.04861)."""
    depthwise = ConvBn(channels_in, channels_in, stride=stride, groups=channels_in)
    return [depthwise, ConvBn(channels_in, channels_out, kernel=1)]


def resnet8() -> nn.Sequential:
    """The layout of MLPerf Tiny's ResNet8 (16, 32, 64 channels), for one input channel of 28x28."""
    blocks = [Residual(16, 16, stride=1), Residual(16, 32, stride=2), Residual(32, 64, stride=2)]
    return nn.Sequential(Normalise(), ConvBn(1, 16), *blocks, *_head(64))


def mobilenet() -> nn.Sequential:
    """MobileNetV1 in miniature: four depthwise separable blocks, 28x28 down to 7x7."""
    wide = [*_separable(16, 32), *_separable(32, 64, stride=2)]
    narrow = [*_separable(64, 64), *_separable(64, 128, stride=2)]
    return nn.Sequential(Normalise(), ConvBn(1, 16), *wide, *narrow, *_head(128))


class Recipe(NamedTuple):
    """One net, the file it becomes, and for how long it is trained unless the command line says otherwise."""

    build: Callable[[], nn.Sequential]
    file_name: str
    epochs: int


RECIPES = {
    "resnet": Recipe(resnet8, "resnet8.onnx", epochs=20),
    "mobilenet": Recipe(mobilenet, "mobilenet.onnx", epochs=15),
}
