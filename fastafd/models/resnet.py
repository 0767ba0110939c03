"""CIFAR-style residual networks, post- and pre-activation, with the state-dict keys that RobustBench uses.

A 3x3 stem without max-pooling, then stages that halve the resolution, a global average pool and one linear layer.
The pool is adaptive, so the same network with the same keys takes 32x32 and 64x64 images.
Sources: He et al. 2016 (arXiv 1512.03385, 1603.05027); the keys are those of RobustBench's `architectures/resnet.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)


def conv1x1(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(c_in, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        # On CPUs the weight's gradient of a 1x1 convolution with a stride overruns its memory in channels_last with
        # fewer than 16 channels (uxlfoundation/oneDNN issue 6035). Every other pixel without a stride is the same.
        self.every_other = stride == 2 and c_in < 16
        self.shortcut = projection(c_in, width, 1 if self.every_other else stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        skipped = x[:, :, ::2, ::2] if self.every_other else x
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(skipped))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv1x1(c_in, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv1x1(width, 4 * width), nn.BatchNorm2d(4 * width)
        self.shortcut = projection(c_in, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


def projection(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """The shortcut of a post-activation block: empty, or a 1x1 convolution and BatchNorm if the shape changes."""
    if stride == 1 and c_in == c_out:
        return nn.Sequential()
    return nn.Sequential(conv1x1(c_in, c_out, stride), nn.BatchNorm2d(c_out))


class PreActBlock(nn.Module):
    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), conv3x3(c_in, width, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv3x3(width, width)
        same = stride == 1 and c_in == width
        self.shortcut = nn.Sequential() if same else nn.Sequential(conv1x1(c_in, width, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out))) + self.shortcut(x)


class ResNet(nn.Module):
    """A ResNet from images (B,3,H,W) to logits (B,C). Stage i has `blocks[i]` blocks of width `widths[i]`.

    With `PreActBlock` there is no BatchNorm after the first convolution, but one before the pool.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck] | type[PreActBlock],
        blocks: Sequence[int],
        num_classes: int,
        widths: Sequence[int] = (64, 128, 256, 512),
    ):
        super().__init__()
        self.pre_activation = block is PreActBlock
        self.conv1 = conv3x3(3, widths[0])
        if not self.pre_activation:
            self.bn1 = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        self.stages = [f"layer{stage}" for stage in range(1, len(widths) + 1)]
        for name, count, width in zip(self.stages, blocks, widths, strict=True):
            layers = []
            for index in range(count):
                stride = 2 if index == 0 and name != "layer1" else 1
                layers.append(block(channels, width, stride))
                channels = width * block.expansion
            setattr(self, name, nn.Sequential(*layers))
        if self.pre_activation:
            self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        if not self.pre_activation:
            out = F.relu(self.bn1(out))
        for name in self.stages:
            out = getattr(self, name)(out)
        if self.pre_activation:
            out = F.relu(self.bn(out))
        return self.linear(out.mean(dim=(2, 3)))
