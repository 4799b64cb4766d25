"""The small CNNs of the CIFAR literature, on which distillation methods have been compared for years.

ResNet (He et al. 2015, sec. 4.2), Wide ResNet (Zagoruyko and Komodakis 2016), and the VGG with batch norms
and one linear layer that comparisons of distillation use. Parameters bear the names of the checkpoints that
people have: the ResNets those of the usual CIFAR-10 ones, the others those of the usual CIFAR-100 ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["A", "B"]


class CifarNet(nn.Module):
    """What timm's tools expect of a model; a subclass makes the layers, and ends with `_finish`."""

    classifier_name: str

    num_features: int
    """Channels of the last map."""
    num_classes: int

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int) -> None:
        """Put in a new last layer; without classes the model returns the pooled features."""
        self.num_classes = num_classes
        layer = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        setattr(self, self.classifier_name, layer)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, not pooled."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify."""
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.forward_head(self.forward_features(x))

    def _finish(self, num_features: int, num_classes: int) -> None:
        self.num_features = num_features
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _conv3x3(inputs: int, outputs: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


class SubsampleShortcut(nn.Module):
    """Shortcut A: every other pixel, and as many channels of 0 before as after; no parameters.

    It is a projection whose weight is known, 1 where an output is an input and else 0, so that channels can
    be cut and sorted in it as in any other. Only then do files hold it: published checkpoints do not.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output; no fewer.
        stride: Step between the pixels that stay.
    """

    weight: Tensor

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        before = (outputs - inputs) // 2
        weight = F.pad(torch.eye(inputs), (0, 0, before, outputs - inputs - before))
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shrink the map."""
        # Picked, not multiplied out: it costs no operations.
        is_input, number = self.weight.max(dim=1)
        x = x[:, :, :: self.stride, :: self.stride].index_select(1, number)
        return x * is_input.to(x.dtype)[:, None, None]


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut: `relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output, and between the convolutions.
        stride: Of the first convolution.
        shortcut: Where the shapes differ: `A` pads with zeros, `B` is a 1x1 convolution with a norm.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or inputs != outputs:
            if shortcut == "A":
                self.shortcut = SubsampleShortcut(inputs, outputs, stride)
            else:
                conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(CifarNet):
    """ResNet for small images: three stages of basic blocks with 16, 32 and 64 channels.

    Args:
        depth: Layers with weights, 6 n + 2.
        shortcut: `A` is what He et al. used on CIFAR, `B` (`--model-args shortcut=B`) what comparisons of
            distillation on CIFAR-100 use.
        num_classes: Outputs.
        in_chans: Channels of the images.
    """

    classifier_name = "linear"

    def __init__(
        self, depth: int, shortcut: Shortcut = "A", num_classes: int = 10, in_chans: int = 3
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise TypeError(f"shortcut is 'A' or 'B', not {shortcut!r}")
        self.conv1 = _conv3x3(in_chans, 16)
        self.bn1 = nn.BatchNorm2d(16)
        inputs = 16
        for number, (width, stride) in enumerate([(16, 1), (32, 2), (64, 2)], start=1):
            blocks = [BasicBlock(inputs, width, stride, shortcut)]
            blocks += [BasicBlock(width, width, 1, shortcut) for _ in range((depth - 2) // 6 - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            inputs = width
        self._finish(inputs, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """The map after the last stage."""
        x = F.relu(self.bn1(self.conv1(x)))
        for number in (1, 2, 3):
            x = self.get_submodule(f"layer{number}")(x)
        return x


class PreActBlock(nn.Module):
    """Two convolutions, each after its norm: `conv2(relu(bn2(conv1(relu(bn1(x)))))) + x`.

    Where the shapes differ, the shortcut is a 1x1 convolution of `relu(bn1(x))`.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output, and between the convolutions.
        stride: Of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        differs = inputs != outputs or stride != 1
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if differs else None

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        active = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(active))))


class CifarWideResNet(CifarNet):
    """Wide ResNet for small images: three stages of pre-activation blocks with 16, 32 and 64 times `widen`.

    Args:
        depth: Layers with weights, 6 n + 4.
        widen: Factor on the channels of a ResNet.
        num_classes: Outputs.
        in_chans: Channels of the images.
    """

    classifier_name = "fc"

    def __init__(self, depth: int, widen: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_chans, 16)
        inputs = 16
        for number, (width, stride) in enumerate([(16, 1), (32, 2), (64, 2)], start=1):
            blocks = [PreActBlock(inputs, width * widen, stride)]
            blocks += [PreActBlock(width * widen, width * widen, 1) for _ in range((depth - 4) // 6 - 1)]
            self.add_module(f"block{number}", nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks))))
            inputs = width * widen
        self.bn1 = nn.BatchNorm2d(inputs)
        self._finish(inputs, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """The map after the last norm."""
        x = self.conv1(x)
        for number in (1, 2, 3):
            x = self.get_submodule(f"block{number}")(x)
        return F.relu(self.bn1(x))


class CifarVgg(CifarNet):
    """VGG for small images: five stages of 3x3 convolutions with norms, pooled after the first three.

    Args:
        stages: Channels of the convolutions of each stage.
        num_classes: Outputs.
        in_chans: Channels of the images.
    """

    classifier_name = "classifier"

    def __init__(self, stages: Sequence[Sequence[int]], num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        inputs = in_chans
        for number, widths in enumerate(stages):
            layers: list[nn.Module] = []
            for width in widths:
                layers += [_conv3x3(inputs, width, bias=True), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            self.add_module(f"block{number}", nn.Sequential(*layers))
        self.num_stages = len(stages)
        self._finish(inputs, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """The map after the last stage."""
        for number in range(self.num_stages):
            x = self.get_submodule(f"block{number}")(x)
            if number < 3:
                x = F.max_pool2d(x, 2)
        return x
