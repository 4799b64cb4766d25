"""What a suite runs at one scale, and the sizes of the suite of masks; those of the others: scales.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What training reaches on one H100, roughly, by what most of the operations are of.
TRANSFORMER_MACS_PER_SECOND = 1e14  # a quarter of its peak in bf16
CNN_MACS_PER_SECOND = 2e13
CIFAR_CNN_MACS_PER_SECOND = 2e12  # convolutions of few channels keep a GPU waiting


@dataclass(frozen=True)
class Size:
    """What a suite runs at one scale.

    Attributes:
        model: The teacher, a model of timm.
        model_args: Its arguments.
        student: What stands for a student of another shape: the ViT of fewer layers, the smaller CNN.
        student_args: Its arguments.
        train: How the teacher is trained.
        compress: What all arms share.
        depth_keep: Share of the units with the operations of the ViT of fewer layers.
        teacher_top1: What the teacher's published figure is.
        macs_per_second: Roughly what one H100 reaches with these models.
        other_teachers: Models of timm with their arguments, where the student has several teachers.
    """

    model: str
    model_args: dict[str, str]
    student: str
    student_args: dict[str, str]
    train: dict[str, Any]
    compress: dict[str, Any]
    depth_keep: float = 0.0
    teacher_top1: float | None = None
    macs_per_second: float = TRANSFORMER_MACS_PER_SECOND
    other_teachers: tuple[tuple[str, dict[str, str]], ...] = ()


_MASKS = {"batch_size": 8, "lr": 1e-3}
_MASKS_TRAIN = {**_MASKS, "label_smoothing": 0.0}
SIZES_OF_MASKS = {
    "cpu": Size(
        "torchvision:deeplabv3_mobilenet_v3_large",
        {},
        "",
        {},
        {**_MASKS_TRAIN, "epochs": 60, "image_size": "192x256"},
        {**_MASKS, "keep_ratio": 0.15, "budget_epochs": 30, "image_size": "192x256"},
    ),
    "gpu": Size(
        "torchvision:deeplabv3_resnet50",
        {},
        "",
        {},
        {**_MASKS_TRAIN, "epochs": 100, "precision": "bf16"},
        {**_MASKS, "keep_ratio": 0.15, "budget_epochs": 100, "precision": "bf16"},
    ),
    # 40,000 steps of 16 images; their rate falls by a power of 0.9, which is nearly a line.
    "paper": Size(
        "torchvision:deeplabv3_resnet101",
        {},
        "",
        {},
        {},
        {
            "keep_ratio": 0.15,
            "epochs": 215,
            "batch_size": 16,
            "optimizer": "sgd",
            "lr": 0.02,
            "weight_decay": 5e-4,
            "schedule": "linear",
            "image_size": "512x1024",
            "precision": "bf16",
        },
        teacher_top1=78.07,
        macs_per_second=CNN_MACS_PER_SECOND,
    ),
}
