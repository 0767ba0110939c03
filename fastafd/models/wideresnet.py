"""Wide residual networks WRN-n-k for CIFAR-sized images, with the state-dict keys that RobustBench uses.

Pre-activation blocks in three stages of width 16k, 32k and 64k; WRN-34-10 therefore has 640 features.
Sources: Zagoruyko and Komodakis 2016 (arXiv 1605.07146); the keys are those of RobustBench's `wide_resnet.py`.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from fastafd.models.resnet import conv1x1, conv3x3


class WideBlock(nn.Module):
    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), conv3x3(c_in, width, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv3x3(width, width)
        self.convShortcut = None if c_in == width else conv1x1(c_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class Stage(nn.Module):
    def __init__(self, count: int, c_in: int, width: int, stride: int):
        super().__init__()
        first = WideBlock(c_in, width, stride)
        self.layer = nn.Sequential(first, *(WideBlock(width, width, 1) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-`depth`-`widen`, depth = 6n + 4, from images (B,3,H,W) to logits (B,C)."""

    def __init__(self, depth: int, widen: int, num_classes: int):
        super().__init__()
        count = (depth - 4) // 6
        self.conv1 = conv3x3(3, 16)
        self.block1 = Stage(count, 16, 16 * widen, 1)
        self.block2 = Stage(count, 16 * widen, 32 * widen, 2)
        self.block3 = Stage(count, 32 * widen, 64 * widen, 2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(out)).mean(dim=(2, 3)))
