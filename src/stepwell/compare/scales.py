"""The three sizes of a suite, and what is made ready for it.

cpu     scikit-learn's digits: hours on two cores for all suites together
gpu     CIFAR-10 (`--data`), a ViT of 10.7 M parameters or the pairs of CNNs, one GPU
paper   the published recipe: what it takes and what was published; runs with --teacher and --data
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from stepwell.compare.architectures import loss_passes, published_pairs
from stepwell.compare.arms import Arm, given, given_to_runs
from stepwell.compare.sizes import SIZES_OF_MASKS, Size
from stepwell.compare.suites import ARMS, OF_MASKS, OTHER_ARCHITECTURE, PAIRS
from stepwell.config.base import flag_of
from stepwell.config.commands import CompareConfig, CompressConfig, TrainConfig
from stepwell.config.files import make_config, over
from stepwell.config.options import Suite
from stepwell.data.digits import MODEL, MODEL_ARGS, write_digits
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError
from stepwell.measure.cost import Costs
from stepwell.measure.size import count_macs
from stepwell.models import segmenters
from stepwell.models.input import input_spec
from stepwell.models.timm_models import create_without_memory, parse_model_args
from stepwell.paths import path_of
from stepwell.paths.from_labels import train
from stepwell.paths.plan import epochs_of
from stepwell.pruning.families import find_groups
from stepwell.pruning.ranking import uniform_scores
from stepwell.pruning.skeleton import build_skeleton
from stepwell.pruning.units import Group
from stepwell.run.progress import say
from stepwell.stages.grid import make_grid
from stepwell.tasks.outputs import as_logits

_VIT_GPU = {"img_size": "32", "patch_size": "4", "embed_dim": "384", "depth": "12", "num_heads": "6"}
_GPU = {"epochs": 40, "batch_size": 256, "lr": 1e-3, "augment": "crop", "precision": "bf16"}
_DIGITS = {"batch_size": 64, "augment": "affine"}
# Every training has the same epochs here, as in the papers, so a small assistant saves nothing.
_EQUAL_EPOCHS = {"rule": "performance"}
VIT = {
    "cpu": Size(
        MODEL,
        MODEL_ARGS,
        MODEL,
        {**MODEL_ARGS, "depth": "1"},
        {"epochs": 60, "batch_size": 32, "lr": 2e-3, "augment": "affine"},
        {**_DIGITS, **_EQUAL_EPOCHS, "keep_ratio": 0.1, "epochs": 20, "lr": 4e-3},
        depth_keep=0.17,
    ),
    "gpu": Size(
        MODEL,
        _VIT_GPU,
        MODEL,
        {**_VIT_GPU, "depth": "2"},
        {**_GPU, "epochs": 100},
        {**_GPU, "keep_ratio": 0.1},
        depth_keep=0.16,
    ),
    # Epochs and batch are ours: the supplementary does not say.
    "paper": Size(
        "vit_base_patch16_224",
        {},
        "vit_base_patch16_224",
        {"depth": "2"},
        {},
        {"preset": "paper", "keep_ratio": 0.1, "epochs": 100, "batch_size": 256, "precision": "bf16"},
        depth_keep=0.15,
        teacher_top1=89.33,
    ),
}
_CNN_TRAIN = {
    "cpu": {**_DIGITS, "epochs": 15, "lr": 2e-3, "image_size": 8},
    "gpu": {"epochs": 100, "batch_size": 128, "lr": 2e-3, "augment": "crop"},
    "paper": {},
}
_CNN_COMPRESS = {
    "cpu": {**_DIGITS, **_EQUAL_EPOCHS, "epochs": 10, "lr": 2e-3, "image_size": 8},
    "gpu": {"epochs": 60, "batch_size": 128, "lr": 2e-3, "augment": "crop"},
    # RepDistiller's, with a cosine instead of three steps.
    "paper": {"optimizer": "sgd", "lr": 0.05, "weight_decay": 5e-4, "epochs": 240, "batch_size": 64},
}
_IMAGENET = Size(
    "resnet34",
    {},
    "resnet18",
    {},
    {},
    {
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 1e-4,
        "epochs": 100,
        "batch_size": 256,
        "keep_ratio": 0.5,
    },
    teacher_top1=PAIRS["imagenet-pair"].published,
    macs_per_second=2e13,
)
_OTHER_ARCHITECTURE = {
    # Maps of 4 x 4 and 2 x 2 positions, an eighth of the teacher's parameters.
    "cpu": replace(
        VIT["cpu"],
        student="resnet18",
        student_args={"layers": "(1,1,1,1)", "channels": "(8,8,8,16)", "output_stride": "8"},
    ),
    "gpu": replace(VIT["gpu"], student="cifar_resnet20", student_args={}),
    # The traditional recipe, with a cosine instead of three steps.
    "paper": replace(
        _IMAGENET,
        model="swin_large_patch4_window7_224",
        student="resnet50",
        teacher_top1=86.24,
        macs_per_second=1e14,
    ),
}
OF_THE_TEACHER = (
    "data", "data_root", "selection_data", "skip_bad_images", "image_size", "class_list", "ignore_index",
    "precision", "device", "threads", "workers",
)  # fmt: skip
"""Options of the comparison that the training of its teacher takes over: which images, and on what."""
CONTROLLED: frozenset[Suite] = frozenset({"steps", "depth", *PAIRS})
"""Suites with single steps beside paths that cost more."""
NUM_TRAIN = {"CIFAR-100": 50_000, "ImageNet": 1_281_167, "Cityscapes": 2_975}


def size_of(suite: Suite, scale: str) -> Size:
    """The models and the recipe of `suite` at `scale`.

    Raises:
        ConfigError: ImageNet has no small size.
    """
    if suite == OTHER_ARCHITECTURE:  # nothing is cut
        size = _OTHER_ARCHITECTURE[scale]
        return replace(size, compress={k: v for k, v in size.compress.items() if k != "keep_ratio"})
    if suite == OF_MASKS:
        return SIZES_OF_MASKS[scale]
    if suite not in PAIRS:
        size = VIT[scale]
        keep_ratio = size.depth_keep if suite == "depth" else size.compress["keep_ratio"]
        return replace(size, compress={**size.compress, "keep_ratio": keep_ratio})
    if suite == "imagenet-pair":
        if scale != "paper":
            raise ConfigError("--suite imagenet-pair needs --scale paper: it is about ImageNet")
        return _IMAGENET
    pair = PAIRS[suite]
    args = {"in_chans": "1"} if scale == "cpu" else {}  # digits are gray
    if scale == "paper" and suite == "resnet-pair":
        args = {"shortcut": "B"}  # those of the comparisons on CIFAR-100
    compress = {**_CNN_COMPRESS[scale], "keep_ratio": pair.keep_ratio}
    return Size(
        pair.teacher,
        args,
        pair.student,
        args,
        _CNN_TRAIN[scale],
        compress,
        teacher_top1=pair.published,
        macs_per_second=2e12,  # convolutions of few channels keep a GPU waiting
    )


def prepared(suite: Suite, config: CompareConfig, out: Path) -> tuple[list[Arm], CompareConfig]:
    """The arms of a suite, and the options with its data and its teacher, which is trained if it is missing.

    Raises:
        ConfigError: The scale needs images that were not given.
    """
    size = size_of(suite, config.scale)
    asked = given(config)
    if suite == OF_MASKS and not config.data:
        raise ConfigError(f"--suite {suite} needs --data, a folder with images/ and masks/, such as CamVid's")
    if config.scale == "cpu" and not config.data:
        write_digits(out / "digits")
        asked["data"] = str(out / "digits")
    if not asked.get("data"):
        images = "the images" if config.scale == "paper" else "a folder of CIFAR-10's images"
        raise ConfigError(f"--suite {suite} --scale {config.scale} needs --data, {images}")
    if config.scale == "paper" and not config.teacher:
        raise ConfigError(f"--suite {suite} --scale paper needs --teacher, a trained {size.model}")
    values = over(size.compress, asked)
    # Arms that are all AMD are controls of each other.
    values["controls"] = config.controls and (suite in CONTROLLED or "controls" in asked)
    if not config.teacher:
        teacher = out / "teacher"
        recipe = {
            "model": size.model,
            "model_args": size.model_args,
            "pretrained": False,
            "out_dir": teacher,
            **size.train,
            **{name: asked[name] for name in OF_THE_TEACHER if name in asked},
        }
        say(train(make_config(TrainConfig, recipe)))
        values["teacher"] = str(teacher)
    return filled(suite, size), make_config(CompareConfig, values)


def filled(suite: Suite, size: Size) -> list[Arm]:
    """The arms of a suite, with the students that they stand for."""
    arms = []
    for arm in ARMS[suite]:
        options = dict(arm.options)
        if suite in PAIRS or suite == OTHER_ARCHITECTURE:
            options |= {"student": size.student, "student_args": size.student_args}
        elif options.get("student") == "depth":
            options |= {
                "student": size.student,
                "student_args": size.student_args,
                "student_init": "teacher",
            }
        arms.append(Arm(arm.name, options, arm.published))
    return arms


def paper(suite: Suite, config: CompareConfig) -> str:
    """The published recipe of a suite, its numbers, and how many GPU-hours one seed would take.

    Args:
        suite: Which one.
        config: Its options take the place of the suite's.
    """
    size = size_of(suite, "paper")
    values = over(size.compress, given_to_runs(config))
    sets = ["Cityscapes"] if suite == OF_MASKS else ["CIFAR-100", "ImageNet"]
    if suite in PAIRS or suite == OTHER_ARCHITECTURE:
        sets = ["ImageNet"] if suite in ("imagenet-pair", OTHER_ARCHITECTURE) else ["CIFAR-100"]
    macs = count_macs(*_model(size.model, size.model_args))
    other_student = count_macs(*_model(size.student, size.student_args)) / macs if size.student else 1.0
    arms = filled(suite, size)
    hours = {
        arm.name: [
            _passes(suite, arm, other_student, values, NUM_TRAIN[name]) * macs / size.macs_per_second / 3600
            for name in sets
        ]
        for arm in arms
    }
    rows = [(arm.name, hours[arm.name], arm.published) for arm in arms]
    if config.controls and suite in CONTROLLED:
        paths = [hours[arm.name] for arm in arms if not arm.is_single_step]
        rows.append(("controls of equal compute", [sum(column) for column in zip(*paths, strict=True)], None))
    rows.append(("all", [sum(column) for column in zip(*(row[1] for row in rows), strict=True)], None))
    head = f"  {'GPU-hours for one seed':<30}" + "".join(f"{name:>11}" for name in [*sets, "published"])
    lines = [f"suite {suite}, the published recipe: {size.model}, {_words(values)}", "", head]
    for name, figures, published in rows:
        numbers = "".join(f"{figure:>11.2f}" for figure in figures)
        lines.append(f"  {name:<30}{numbers}" + ("" if published is None else f"{published:>9.2f} %"))
    lines += [
        "",
        f"Published on {sets[0]}, with a teacher of {size.teacher_top1} %. Counted operations, at "
        f"{size.macs_per_second:.0e} MACs per second; every rate of --lrs comes on top.",
        "It runs with --teacher and --data: a trained teacher and the images.",
        *(["", *published_pairs()] if suite == OTHER_ARCHITECTURE else []),
    ]
    return "\n".join(lines)


def _passes(suite: Suite, arm: Arm, other_student: float, values: Mapping[str, Any], num_train: int) -> float:
    """Cost of one run of `arm`, in forward passes of the teacher; a student of another shape has a share."""
    config = make_config(CompressConfig, {**values, **arm.options})
    path = path_of(config.path)
    scales = [_share(suite, ratio) for ratio in path.rungs(values.get("keep_ratio", 1.0), config)]
    student = other_student if config.student else scales[0]
    size, loss = size_of(suite, "paper"), 0.0
    if config.feature_weight and config.feature_facts.reads_stages:
        loss = loss_passes(size.student, size.model, config.feature_args)
    costs = Costs(config, scales, student, num_train, num_train // 10, loss)
    return sum(path.bill(costs, epochs_of(costs, path.bill, config), config).values())


@cache
def _share(suite: Suite, keep_ratio: float) -> float:
    """Share of the operations of a candidate: of a transformer its units', of a CNN counted."""
    if suite not in PAIRS:
        return keep_ratio
    model, spec, groups, macs = _teacher(suite)
    (candidate,) = make_grid(groups, uniform_scores(groups), [keep_ratio], CompressConfig())
    return count_macs(build_skeleton(model, groups, candidate.widths), spec) / macs


@cache
def _teacher(suite: Suite) -> tuple[nn.Module, InputSpec, list[Group], int]:
    """The published teacher of a suite, its input, what can be cut, its operations."""
    size = size_of(suite, "paper")
    model, spec = _model(size.model, size.model_args)
    return model, spec, find_groups(model), count_macs(model, spec)


def _model(name: str, args: dict[str, str]) -> tuple[nn.Module, InputSpec]:
    """A model with 100 classes, without memory for its weights, and its input; of masks, Cityscapes'."""
    if segmenters.is_named(name):
        model = segmenters.build(name, {"num_classes": 19, **parse_model_args(args)})
        spec = replace(segmenters.input_spec(model), size=(512, 1024))
        return as_logits(model, "maps"), spec
    model = create_without_memory(name, {**parse_model_args(args), "num_classes": 100})
    return model, input_spec(model)


def _words(options: Mapping[str, Any]) -> str:
    return " ".join(f"{flag_of(name)} {value}" for name, value in options.items())
