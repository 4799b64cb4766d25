"""The three sizes of a suite, and what is made ready for it.

cpu     scikit-learn's digits: hours on two cores for all suites together
gpu     CIFAR-10 (`--data`), a ViT of 10.7 M parameters or the pairs of CNNs, one GPU
paper   the published recipe, which paper.py prints; runs with --teacher and --data
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepwell.compare.arms import Arm, given
from stepwell.compare.pairs import SWIN_L, TEACHER_TOP1
from stepwell.compare.sizes import (
    CIFAR_CNN_MACS_PER_SECOND,
    CNN_MACS_PER_SECOND,
    SIZES_OF_MASKS,
    TRANSFORMER_MACS_PER_SECOND,
    Size,
)
from stepwell.compare.suites import ARMS, OF_MASKS, PAIRS, SEVERAL_TEACHERS, TEACHER_SIZE, TO_OTHERS
from stepwell.compare.teacher_sizes import MODELS
from stepwell.config.commands import CompareConfig, TrainConfig
from stepwell.config.files import make_config, over
from stepwell.config.options import Suite
from stepwell.data.digits import MODEL, MODEL_ARGS, write_digits
from stepwell.errors import ConfigError
from stepwell.paths.from_labels import train
from stepwell.run.distributed import from_main
from stepwell.run.progress import say

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
    macs_per_second=CNN_MACS_PER_SECOND,
)
_OTHER_ARCHITECTURE = {
    # Maps of 4 x 4 and 2 x 2 positions, an eighth of the teacher's parameters.
    "cpu": replace(
        VIT["cpu"],
        student="resnet18",
        student_args={"layers": "(1,1,1,1)", "channels": "(8,8,8,16)", "output_stride": "8"},
    ),
    "gpu": replace(VIT["gpu"], student="cifar_resnet20", student_args={}),
    # examples/scalekd/traditional.yaml: the traditional recipe, with a cosine instead of three steps.
    "paper": replace(
        _IMAGENET,
        compress={**_IMAGENET.compress, "warmup": 0.0, "clip_norm": 0.0, "augment": "resized-crop"},
        model=SWIN_L,
        student="resnet50",
        teacher_top1=TEACHER_TOP1[SWIN_L],
        macs_per_second=TRANSFORMER_MACS_PER_SECOND,
    ),
}
_SEVERAL_TEACHERS = {
    # Both are smaller than the best: one of its own kind, one of another.
    "cpu": replace(
        VIT["cpu"],
        train={**VIT["cpu"].train, "image_size": int(MODEL_ARGS["img_size"])},  # a CNN has no size of its own
        other_teachers=(
            (MODEL, {**MODEL_ARGS, "depth": "2"}),
            # Digits are gray; a student is told so by itself.
            (
                _OTHER_ARCHITECTURE["cpu"].student,
                {**_OTHER_ARCHITECTURE["cpu"].student_args, "in_chans": "1"},
            ),
        ),
    ),
    "gpu": replace(VIT["gpu"], other_teachers=((MODEL, {**_VIT_GPU, "depth": "6"}), ("cifar_resnet56", {}))),
    "paper": replace(
        VIT["paper"],
        model="vit_small_patch16_224",
        teacher_top1=None,
        other_teachers=(("vit_tiny_patch16_224", {}), ("resnet50", {})),
    ),
}
OF_THE_TEACHER = (
    "data", "data_root", "selection_data", "skip_bad_images", "image_size", "class_list", "ignore_index",
    "precision", "compile", "gradient_checkpointing", "shard_optimizer", "device", "threads", "workers",
    "encoder_weights",
)  # fmt: skip
"""Options of the comparison that the training of its teacher takes over: which images, and on what."""
CONTROLLED: frozenset[Suite] = frozenset({"steps", "depth", SEVERAL_TEACHERS, *TO_OTHERS, *PAIRS})
"""Suites with cheap arms beside dear ones."""


def size_of(suite: Suite, scale: str) -> Size:
    """The models and the recipe of `suite` at `scale`.

    Raises:
        ConfigError: ImageNet has no small size.
    """
    if suite in TO_OTHERS:  # nothing is cut
        size = _OTHER_ARCHITECTURE[scale]
        return replace(size, compress={k: v for k, v in size.compress.items() if k != "keep_ratio"})
    if suite == OF_MASKS:
        return SIZES_OF_MASKS[scale]
    if suite not in PAIRS:
        size = _SEVERAL_TEACHERS[scale] if suite == SEVERAL_TEACHERS else VIT[scale]
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
        macs_per_second=CIFAR_CNN_MACS_PER_SECOND,
    )


def prepared(suite: Suite, config: CompareConfig, out: Path) -> tuple[list[Arm], CompareConfig]:
    """The arms of a suite, and the options with its data and its teacher, which is trained if it is missing.

    Raises:
        ConfigError: The scale needs images that were not given.
    """
    size = size_of(suite, config.scale)
    asked = given(config)
    if suite == TEACHER_SIZE and config.scale == "paper":
        raise ConfigError(
            "--suite teacher-size --scale paper is a plan: leave out --data and --teacher to read it, and "
            "run stepwell compress for each teacher"
        )
    if suite == TEACHER_SIZE and config.teacher:
        raise ConfigError("--suite teacher-size trains its teachers of three sizes: leave out --teacher")
    if suite == OF_MASKS and not config.data:
        raise ConfigError(f"--suite {suite} needs --data, a folder with images/ and masks/, such as CamVid's")
    if config.scale == "cpu" and not config.data:
        from_main(lambda: write_digits(out / "digits"))
        asked["data"] = str(out / "digits")
    if not asked.get("data"):
        images = "the images" if config.scale == "paper" else "a folder of CIFAR-10's images"
        raise ConfigError(f"--suite {suite} --scale {config.scale} needs --data, {images}")
    if config.scale == "paper" and not config.teacher:
        raise ConfigError(f"--suite {suite} --scale paper needs --teacher, a trained {size.model}")
    values = over(size.compress, asked)
    # Arms that are all AMD are controls of each other.
    values["controls"] = config.controls and (suite in CONTROLLED or "controls" in asked)
    if size.other_teachers and not config.teachers and (config.scale == "paper" or config.teacher):
        names = ", ".join(name for name, _ in size.other_teachers)
        raise ConfigError(f"--suite {suite} needs --teachers beside --teacher, such as {names}, trained")
    arms = filled(suite, size)
    if suite == TEACHER_SIZE:
        teachers = {
            name: _trained(model, args, out / f"teacher-{name}", size, asked)
            for name, (model, args) in MODELS[config.scale].items()
        }
        arms = [
            replace(arm, options={**arm.options, "teacher": teachers[arm.options["teacher"]]})
            if "teacher" in arm.options
            else arm
            for arm in arms
        ]
        values["teacher"] = teachers["middle"]
    elif not config.teacher:
        values["teacher"] = _trained(size.model, size.model_args, out / "teacher", size, asked)
    if not config.teachers:
        values["teachers"] = tuple(
            _trained(*model, out / f"teacher-{number}", size, asked)
            for number, model in enumerate(size.other_teachers, start=2)
        )
    return arms, make_config(CompareConfig, values)


def _trained(model: str, args: dict[str, str], folder: Path, size: Size, asked: Mapping[str, Any]) -> str:
    """The folder of a teacher, which is trained if it is missing."""
    recipe = {
        "model": model,
        "model_args": args,
        "pretrained": False,
        "out_dir": folder,
        **size.train,
        **{name: asked[name] for name in OF_THE_TEACHER if name in asked},
    }
    say(train(make_config(TrainConfig, recipe)))
    return str(folder)


def filled(suite: Suite, size: Size) -> list[Arm]:
    """The arms of a suite, with the students that they stand for."""
    arms = []
    for arm in ARMS[suite]:
        options = dict(arm.options)
        if suite in PAIRS or suite in TO_OTHERS:
            options |= {"student": size.student, "student_args": size.student_args}
        elif options.get("student") == "depth":
            options |= {
                "student": size.student,
                "student_args": size.student_args,
                "student_init": "teacher",
            }
        arms.append(replace(arm, options=options))
    return arms
