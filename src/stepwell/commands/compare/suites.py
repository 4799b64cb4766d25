"""Comparisons that mirror published tables, at three sizes.

    cpu     scikit-learn's digits: hours on two cores for all suites together
    gpu     CIFAR-10 (`--data`), a ViT of 10.7 M parameters, one GPU
    paper   the published recipe: what it takes and what was published; runs with --teacher and --data

Published figures are those of AMD's supplementary (ViT-B or CNNs on CIFAR-100); at `cpu` and `gpu` the data,
the models and the epochs are others, so only the order of the rows can be compared with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepwell.commands import train
from stepwell.commands.compare.arms import Arm, given
from stepwell.commands.demo import MODEL, MODEL_ARGS, write_digits
from stepwell.config import CompareConfig, CompressConfig, TrainConfig, make_config
from stepwell.errors import ConfigError
from stepwell.options import Suite, flag_of
from stepwell.stages.grid import rungs_of_path
from stepwell.stages.joint import scales_per_step
from stepwell.stages.plan import Costs, Epochs, expected_bill
from stepwell.training.progress import say

CNN_LOSSES = {
    "fitnet": 71.60,
    "at": 71.78,
    "sp": 71.48,
    "vid": 71.71,
    "rkd": 71.48,
    "pkt": 71.44,
    "ab": 71.49,
    "ft": 71.52,
    "crd": 71.68,
}
"""Table 7, ResNet-56 to ResNet-20: feature losses beside cross-entropy alone."""

ARMS: dict[Suite, tuple[Arm, ...]] = {
    # Table 4.
    "losses": (
        Arm("all three terms", {}, 80.19),
        Arm("no labels", {"task_weight": 0.0}, 78.32),
        Arm("no logits", {"logit_weight": 0.0}, 78.01),
        Arm("no hidden states", {"feature_weight": 0.0}, 75.24),
        Arm("DKD on the logits", {"logit_loss": "dkd"}, 80.22),
    ),
    # Table 5.
    "candidates": tuple(
        Arm(f"{m} candidates", {"num_candidates": m, "grid": "between"}, published)
        for m, published in ((1, 78.39), (3, 79.46), (6, 79.84), (9, 80.19), (15, 80.22))
    ),
    # Table 3: of SGD and of AdamW at 0.3 the table says that they fail.
    "optimizer": tuple(
        Arm(f"{optimizer}, {lr:g}, {schedule}", {"optimizer": optimizer, "lr": lr, "schedule": schedule})
        for optimizer in ("adamw", "sgd")
        for lr in (3e-1, 3e-2, 3e-3, 3e-4)
        for schedule in ("linear", "cosine", "cosine-restarts")
    ),
    # Around alpha = beta = 1.
    "weights": tuple(
        Arm(f"logits {logit:g}, states {feature:g}", {"logit_weight": logit, "feature_weight": feature})
        for logit in (0.3, 1.0, 3.0)
        for feature in (0.1, 1.0, 10.0)
    ),
    # Table 1: the same operations by fewer units, or by fewer layers.
    "depth": (
        Arm("pruned, KD", {"path": "single-step", "feature_weight": 0.0}, 60.13),
        Arm("pruned, DKD", {"path": "single-step", "feature_weight": 0.0, "logit_loss": "dkd"}, 70.26),
        Arm("pruned, CRD", {"path": "single-step", "feature_loss": "crd"}, 78.40),
        Arm("pruned, TAKD", {"path": "takd", "feature_weight": 0.0}, 71.02),
        Arm("pruned, MMD", {"path": "mmd"}, 80.25),
        Arm("pruned, AMD", {"path": "amd"}, 80.23),
        Arm("fewer layers, KD", {"path": "single-step", "feature_weight": 0.0, "student": "depth"}, 59.85),
        Arm(
            "fewer layers, DKD",
            {"path": "single-step", "feature_weight": 0.0, "logit_loss": "dkd", "student": "depth"},
            69.10,
        ),
        Arm("fewer layers, CRD", {"path": "single-step", "feature_loss": "crd", "student": "depth"}, 74.15),
        Arm("fewer layers, TAKD", {"path": "takd", "feature_weight": 0.0, "student": "depth"}, 69.73),
    ),
    # Table 2.
    "steps": (
        Arm("single-step", {"path": "single-step"}),
        Arm("amd", {"path": "amd"}, 80.19),
        Arm("amd, two assistants", {"path": "amd", "num_assistants": 2}),
        Arm("amd, best of all students", {"path": "amd-manual"}),
        Arm("takd", {"path": "takd"}),
        Arm("dgkd", {"path": "dgkd"}),
        Arm("mmd", {"path": "mmd"}, 80.11),
        Arm("mmd-os", {"path": "mmd-os"}, 80.10),
    ),
    # Table 7, ResNet-56 to ResNet-20.
    "cnn-pairs": (
        Arm("student alone", {"path": "single-step", "logit_weight": 0.0, "feature_weight": 0.0}, 69.63),
        Arm(
            "kd",
            {
                "path": "single-step",
                "feature_weight": 0.0,
                "task_weight": 0.1,
                "logit_weight": 0.9,
                "temperature": 4.0,
            },
            70.66,
        ),
        *(
            Arm(loss, {"path": "single-step", "feature_loss": loss, "logit_weight": 0.0}, published)
            for loss, published in CNN_LOSSES.items()
        ),
        Arm(
            "sskd",
            {
                "path": "single-step",
                "feature_loss": "sskd",
                "task_weight": 0.1,
                "logit_weight": 0.9,
                "temperature": 4.0,
            },
            71.49,
        ),
        Arm("takd", {"path": "takd", "feature_weight": 0.0}, 70.77),
        Arm("dgkd", {"path": "dgkd", "feature_weight": 0.0}, 71.92),
        Arm("amd", {"path": "amd"}, 71.95),
    ),
}


@dataclass(frozen=True)
class Size:
    """What a suite runs at one scale.

    Attributes:
        model: The teacher, a model of timm.
        train: How the teacher is trained.
        compress: What all arms share.
        shallow: Arguments of the student with fewer layers.
    """

    model: str
    model_args: dict[str, str]
    train: dict[str, Any]
    compress: dict[str, Any]
    shallow: dict[str, str]


_VIT_GPU = {"img_size": "32", "patch_size": "4", "embed_dim": "384", "depth": "12", "num_heads": "6"}
SIZES: dict[tuple[str, str], Size] = {
    ("vit", "cpu"): Size(
        MODEL,
        MODEL_ARGS,
        {"epochs": 60, "batch_size": 32, "lr": 2e-3, "augment": "affine"},
        {"keep_ratio": 0.1, "epochs": 20, "batch_size": 64, "lr": 4e-3, "augment": "affine"},
        {**MODEL_ARGS, "depth": "1"},
    ),
    ("vit", "gpu"): Size(
        MODEL,
        _VIT_GPU,
        {"epochs": 100, "batch_size": 256, "lr": 1e-3, "augment": "crop", "precision": "bf16"},
        {
            "keep_ratio": 0.1,
            "epochs": 40,
            "batch_size": 256,
            "lr": 1e-3,
            "augment": "crop",
            "precision": "bf16",
        },
        {**_VIT_GPU, "depth": "2"},
    ),
    ("cnn", "cpu"): Size(
        "cifar_resnet56",
        {"in_chans": "1"},
        {"epochs": 15, "batch_size": 64, "lr": 2e-3, "augment": "affine", "image_size": 8},
        {"epochs": 10, "batch_size": 64, "lr": 2e-3, "augment": "affine", "image_size": 8},
        {},
    ),
    # Epochs and batch of the ViT are ours: the supplementary does not say. The CNNs' are RepDistiller's, with
    # a cosine instead of three steps.
    ("vit", "paper"): Size(
        "vit_base_patch16_224",
        {},
        {},
        {"preset": "paper", "keep_ratio": 0.1, "epochs": 100, "batch_size": 256, "precision": "bf16"},
        {"depth": "2"},
    ),
    ("cnn", "paper"): Size(
        "cifar_resnet56",
        {},
        {},
        {"optimizer": "sgd", "lr": 0.05, "weight_decay": 5e-4, "epochs": 240, "batch_size": 64},
        {},
    ),
    ("cnn", "gpu"): Size(
        "cifar_resnet56",
        {},
        {"epochs": 100, "batch_size": 128, "lr": 2e-3, "augment": "crop"},
        {"epochs": 60, "batch_size": 128, "lr": 2e-3, "augment": "crop"},
        {},
    ),
}


def prepared(suite: Suite, config: CompareConfig, out: Path) -> tuple[list[Arm], CompareConfig]:
    """The arms of a suite, and the options with its data and its teacher, which is trained if it is missing.

    Raises:
        ConfigError: The scale needs images that were not given.
    """
    kind = "cnn" if suite == "cnn-pairs" else "vit"
    size = SIZES[kind, config.scale]
    asked = given(config)
    if config.scale == "cpu" and not config.data:
        write_digits(out / "digits")
        asked["data"] = str(out / "digits")
    if not asked.get("data"):
        raise ConfigError(
            f"--suite {suite} --scale {config.scale} needs --data, a folder of CIFAR-10's images"
        )
    values = {**size.compress, **asked}
    # The arms of the others differ in something else than their compute, or are controls of each other.
    values["controls"] = suite == "steps" and config.controls
    if not config.teacher:
        teacher = out / "teacher"
        recipe = {
            "model": size.model,
            "model_args": size.model_args,
            "pretrained": False,
            "data": asked["data"],
            "out_dir": teacher,
            **{name: asked[name] for name in ("device", "threads", "workers") if name in asked},
            **size.train,
        }
        say(train.run(make_config(TrainConfig, recipe)))
        values["teacher"] = str(teacher)
    return [_filled(arm, kind, size) for arm in ARMS[suite]], make_config(CompareConfig, values)


def _filled(arm: Arm, kind: str, size: Size) -> Arm:
    """An arm with the student that it stands for."""
    options = dict(arm.options)
    if kind == "cnn":
        options |= {"student": "cifar_resnet20", "student_args": size.model_args, "keep_ratio": 0.3}
    elif options.get("student") == "depth":
        options |= {"student": size.model, "student_args": size.shallow, "student_init": "teacher"}
    return Arm(arm.name, options, arm.published)


GPU_MACS_PER_SECOND = {"vit": 1e14, "cnn": 2e12}
"""Roughly what one H100 reaches: a quarter of its peak in bf16; little on convolutions of few channels."""


def paper(suite: Suite) -> str:
    """The published recipe of a suite, its numbers, and how many GPU-hours one seed would take."""
    kind = "cnn" if suite == "cnn-pairs" else "vit"
    size, macs, num_train = SIZES[kind, "paper"], {"vit": 17.6e9, "cnn": 0.125e9}[kind], 50_000
    lines = [f"suite {suite}, as published, on CIFAR-100: {size.model}, {_words(size.compress)}", ""]
    total = 0.0
    for arm in ARMS[suite]:
        options = {**size.compress, **_filled(arm, kind, size).options}
        config = make_config(CompressConfig, options)
        scales = rungs_of_path(0.1, config)  # of a transformer about the shares of its operations
        per_step = scales_per_step(scales, config)
        costs = Costs(scales, scales[0], per_step, num_train, 2048, num_train // 10, config.views)
        epochs = Epochs(joint=config.epochs, distill=config.epochs)
        passes = sum(expected_bill(config, costs, epochs).values())
        hours = passes * macs / GPU_MACS_PER_SECOND[kind] / 3600
        total += hours
        published = "" if arm.published is None else f"published {arm.published:.2f} %"
        lines.append(f"  {arm.name:<34}{hours:>8.2f} GPU-hours  {published}".rstrip())
    lines += [
        "",
        f"{total:.1f} GPU-hours for one seed, at {GPU_MACS_PER_SECOND[kind]:.0e} MACs per second.",
        "It runs with --teacher and --data: a trained teacher and the images.",
    ]
    return "\n".join(lines)


def _words(options: dict[str, Any]) -> str:
    return " ".join(f"{flag_of(name)} {value}" for name, value in options.items())
