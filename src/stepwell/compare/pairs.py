"""The published pairs of ScaleKD: what its authors set by hand for each, and what they report.

Fan et al., NeurIPS 2024: the configurations at commit 5ba1f04 of the authors' code, the accuracies of their
Table 3. Nothing of this is needed for a run: stages, widths, grids and heads are read from the models
(losses/scalekd/stages.py). docs/pairs.md puts both side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from stepwell.losses.scalekd.loss import PUBLISHED_POSITIONS

Two = tuple[int, int]
"""At stage 3 and at stage 4."""

_DEFAULT_HEADS = (8, 8)


@dataclass(frozen=True)
class PublishedPair:
    """A configuration.

    Attributes:
        name: Teacher and student, as the paper calls them.
        teacher: The model of timm, with `teacher_args`.
        student: Likewise; empty where timm has no name for it.
        student_channels: Of the student's maps.
        teacher_channels: Of the teacher's states.
        grids: Height, which is also the width, of the queries.
        positions: Of the student's maps.
        num_heads: Of the projectors.
        softmax_scale: Of their attention.
        weights: Of the view of the features as they are, and of the one without their mean.
        image_size: Height and width.
        strategy: The training recipe: 100 epochs of SGD, or 300 of LAMB or AdamW.
        baseline: Top-1 on ImageNet-1k without a teacher, where it is reported.
        top1: With it.
        layer_norm: Whether the projectors have a LayerNorm of the student's map, and no BatchNorm.
        is_pilot: Without a divergence of logits, and with one view at stage 4. The files also ask for queries
            of its own there, which are made and never read: the code always passes it the tail's outputs.
        taught_twice: The student's name, where figures of two teachers are known.
        trouble: What is wrong in the published file.
    """

    name: str
    teacher: str
    student: str
    student_channels: Two
    teacher_channels: Two
    grids: Two
    positions: Two
    num_heads: Two = _DEFAULT_HEADS
    softmax_scale: float = 5.0
    weights: tuple[float, float] = (0.08, 0.06)
    image_size: int = 224
    strategy: Literal["traditional", "advanced"] = "advanced"
    baseline: float | None = None
    top1: float | None = None
    teacher_args: Mapping[str, object] = field(default_factory=dict)
    student_args: Mapping[str, object] = field(default_factory=dict)
    layer_norm: bool = False
    is_pilot: bool = False
    taught_twice: str = ""
    trouble: str = ""

    def feature_args(self) -> dict[str, float]:
        """The configuration as `--feature-args`, where it is other than what is chosen by itself."""
        scaled = self.grids[1] ** 2 / PUBLISHED_POSITIONS
        args: dict[str, float] = {
            "softmax_scale": self.softmax_scale,
            "num_heads_3": self.num_heads[0],
            "num_heads_4": self.num_heads[1],
            "original": self.weights[0] * scaled,
            "alternative": self.weights[1] * scaled,
        }
        if self.layer_norm:
            args["layer_norm"] = 1.0
        if self.is_pilot:
            args["alternative_4"] = 0.0
        return args

    def options(self) -> dict[str, object]:
        """The configuration as options of `compress`, beside the path."""
        weights = {"task_weight": 1.0, "logit_weight": 0.0} if self.is_pilot else {}
        return {**weights, "feature_args": self.feature_args()}


_S, _B, SWIN_L = (f"swin_{size}_patch4_window7_224" for size in ("small", "base", "large"))
_EVA = "eva_large_patch14_196"  # the authors take these weights at 224
TEACHER_TOP1 = {SWIN_L: 86.24, _EVA: 88.58}
"""On ImageNet-1k, as the authors give it, by the model of timm."""

_AT_224 = {"img_size": 224}
_NO_CLASS = {"class_token": False, "global_pool": "avg"}
_OF_L, _PYRAMID, _PLAIN = (768, 1536), (14, 7), (14, 14)
_EVA_WEIGHTS = (0.016, 0.008)
_R50 = (1024, 2048)

PAIRS: tuple[PublishedPair, ...] = (
    PublishedPair(
        "Swin-S -> ResNet-50",
        _S,
        "resnet50",
        _R50,
        (384, 768),
        _PYRAMID,
        _PYRAMID,
        (3, 6),
        strategy="traditional",
        is_pilot=True,
    ),
    PublishedPair(
        "Swin-B -> ResNet-50",
        _B,
        "resnet50",
        _R50,
        (512, 1024),
        _PYRAMID,
        _PYRAMID,
        (8, 16),
        strategy="traditional",
        trouble="gives one number as softmax_scale, of which the loss reads two, and so cannot run",
    ),
    PublishedPair(
        "Swin-L -> ResNet-50",
        SWIN_L,
        "resnet50",
        _R50,
        _OF_L,
        _PYRAMID,
        _PYRAMID,
        (16, 24),
        strategy="traditional",
    ),
    PublishedPair(
        "Swin-L -> MobileNetV1",
        SWIN_L,
        "mobilenetv1_100",
        (512, 1024),
        _OF_L,
        _PYRAMID,
        _PYRAMID,
        (16, 24),
        strategy="traditional",
    ),
    PublishedPair(
        "Swin-S -> ResNet-50, again",
        _S,
        "resnet50",
        _R50,
        (384, 768),
        _PYRAMID,
        _PYRAMID,
        (3, 6),
        strategy="traditional",
        is_pilot=True,
        trouble="lies among the advanced ones, is traditional, and names Swin-L's weights for a Swin-S",
    ),
    PublishedPair(
        "Swin-L -> ResNet-50, advanced",
        SWIN_L,
        "resnet50d",
        _R50,
        _OF_L,
        _PYRAMID,
        _PYRAMID,
        (16, 24),
        baseline=78.64,
        top1=82.03,
        taught_twice="ResNet-50",
    ),
    PublishedPair(
        "Swin-L -> MobileNetV1, advanced",
        SWIN_L,
        "mobilenetv1_100",
        (512, 1024),
        _OF_L,
        _PYRAMID,
        _PYRAMID,
        (16, 24),
        baseline=72.10,
        top1=75.15,
    ),
    PublishedPair(
        "Swin-L -> ConvNeXt-T",
        SWIN_L,
        "convnext_tiny",
        (384, 768),
        _OF_L,
        _PYRAMID,
        _PYRAMID,
        (8, 16),
        1.0,
        baseline=82.14,
        top1=84.16,
    ),
    PublishedPair(
        "Swin-L -> Swin-T",
        SWIN_L,
        "swin_tiny_patch4_window7_224",
        (384, 768),
        _OF_L,
        _PYRAMID,
        _PYRAMID,
        (24, 48),
        1.0,
        baseline=81.18,
        top1=83.80,
        layer_norm=True,
    ),
    PublishedPair(
        "Swin-L -> Mixer-S/16",
        SWIN_L,
        "mixer_s16_224",
        (512, 512),
        _OF_L,
        _PYRAMID,
        _PLAIN,
        baseline=74.02,
        top1=78.63,
    ),
    PublishedPair(
        "Swin-L -> Mixer-B/16",
        SWIN_L,
        "mixer_b16_224",
        (768, 768),
        _OF_L,
        _PYRAMID,
        _PLAIN,
        baseline=76.44,
        top1=81.96,
        taught_twice="Mixer-B",
    ),
    PublishedPair(
        "Swin-L -> ViT-S/16",
        SWIN_L,
        "deit_small_patch16_224",
        (384, 384),
        _OF_L,
        _PYRAMID,
        _PLAIN,
        baseline=79.90,
        top1=83.93,
        student_args=_NO_CLASS,
    ),
    PublishedPair(
        "Swin-L -> ViT-B/16",
        SWIN_L,
        "deit_base_patch16_224",
        (768, 768),
        _OF_L,
        _PYRAMID,
        _PLAIN,
        baseline=81.80,
        top1=85.53,
        taught_twice="ViT-B",
        student_args=_NO_CLASS,
    ),
    PublishedPair(
        "BEiT-L/14 -> ResNet-50",
        _EVA,
        "resnet50d",
        _R50,
        (1024, 1024),
        (16, 16),
        _PYRAMID,
        softmax_scale=0.2,
        weights=_EVA_WEIGHTS,
        baseline=78.64,
        top1=82.34,
        taught_twice="ResNet-50",
        teacher_args=_AT_224,
    ),
    PublishedPair(
        "BEiT-L/14 -> Mixer-B/14",
        _EVA,
        "",
        (768, 768),
        (1024, 1024),
        (16, 16),
        (16, 16),
        softmax_scale=1.0,
        weights=_EVA_WEIGHTS,
        baseline=76.62,
        top1=82.89,
        taught_twice="Mixer-B",
        teacher_args=_AT_224,
    ),
    PublishedPair(
        "BEiT-L/14 -> ViT-B/14",
        _EVA,
        "deit_base_patch16_224",
        (768, 768),
        (1024, 1024),
        (16, 16),
        (16, 16),
        softmax_scale=1.0,
        weights=_EVA_WEIGHTS,
        baseline=82.02,
        top1=86.43,
        taught_twice="ViT-B",
        teacher_args=_AT_224,
        student_args={**_NO_CLASS, "patch_size": 14},
        trouble="gives the loss an argument, alpha_jfd, that it does not take, and so cannot run",
    ),
    PublishedPair(
        "BEiT-L/14 -> EVA-02-S/14 at 336",
        "eva_large_patch14_336",
        "eva02_small_patch14_336",
        (384, 384),
        (1024, 1024),
        (24, 24),
        (24, 24),
        softmax_scale=1.0,
        weights=(0.008, 0.004),
        image_size=336,
    ),
)
"""All 17, the pilots of the smallest teacher among them."""
