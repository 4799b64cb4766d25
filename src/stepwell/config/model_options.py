"""Options of the models that are trained but are no teacher: where they start from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from stepwell.config.base import ImageSize, NotNegative, Positive
from stepwell.config.options import Options
from stepwell.config.own_code import is_own_code


class StudentOptions(Options):
    """A student of another architecture."""

    student: str | None = None
    """A timm model, or FILE.py:FACTORY, that becomes the student instead of the smallest candidate: the
    assistant teaches it, its hidden states through learned projections."""
    student_args: dict[str, str] = {}  # noqa: RUF012  (pydantic copies it)
    """Arguments of timm's create_model for the student, as key=value."""
    student_size: ImageSize | None = None
    """Height and width of the student's images, as 192 or 192x256, where the teacher stays whole (--path
    scalekd); by default the teacher's. The teacher sees the same images, resized to its own size."""
    student_pretrained: bool = False
    """Start the other student from timm's pretrained weights (downloaded) instead of random ones."""
    student_weights: Path | None = None
    """Start the other student from this file or folder of weights; a head of other classes starts fresh."""
    student_weights_key: str | None = None
    """Which of the weights in that file, if it holds several, as for --weights-key."""
    student_init: Literal["random", "teacher"] = "random"
    """`teacher` copies every tensor of the teacher that the student has too, by name and shape: of a student
    with fewer layers (--student-args depth=2) these are the teacher's first ones."""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        starts = {
            "--student-pretrained": self.student_pretrained,
            "--student-weights": self.student_weights is not None,
            "--student-init teacher": self.student_init == "teacher",
        }
        given = [flag for flag, is_given in starts.items() if is_given]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each say where the student starts: give one of them")
        if given and self.student is None:
            raise ValueError(f"{given[0]} is for a student of another architecture: name it with --student")
        if self.student_size is not None and self.student is None:
            raise ValueError(
                "--student-size is for a student of another architecture: name one with --student"
            )
        if self.student_weights_key is not None and self.student_weights is None:
            raise ValueError("--student-weights-key needs --student-weights")
        if self.student_pretrained and is_own_code(self.student):
            raise ValueError("--student-pretrained is for timm names: load weights in FILE.py:FACTORY itself")
        return self


class StartOptions(Options):
    """Which model is trained, from which weights, and where it goes."""

    model: str = ""
    """A timm model name, such as vit_tiny_patch16_224. For masks: torchvision:deeplabv3_resnet50 and its
    others, or smp:Unet and others of segmentation-models-pytorch."""
    model_args: dict[str, str] = {}  # noqa: RUF012  (pydantic copies it)
    """Arguments of timm's create_model as key=value, such as img_size=32 patch_size=4; of smp, such as
    encoder_name=resnet18."""
    out_dir: Path | None = None
    """Where the teacher goes; the same command on an unfinished one resumes where it stopped."""
    pretrained: bool = True
    """Start from timm's pretrained weights (downloaded); --no-pretrained starts from random ones."""
    weights: Path | None = None
    """Start from this file or folder of weights instead (see --teacher-weights of compress); a head of other
    classes is left out, and a position table for another image size is resampled."""
    weights_key: str | None = None
    """Which of the weights in that file, if it holds several, such as state_dict or teacher; by default the
    averaged ones, as timm takes them."""

    encoder_weights: Path | None = None
    """For masks: start the encoder from this file of a classifier's weights; with --no-pretrained or without
    it, the rest starts from random ones."""
    auxiliary_weight: NotNegative = 0.4
    """For masks: weight of the loss of a second head, where the model has one (torchvision's DeepLabV3 and
    FCN); it learns from the labels, and is left out of what is saved."""
    class_weights: tuple[Positive, ...] = ()
    """For masks: what a pixel of each class counts in the cross-entropy, in the order of the classes."""

    @model_validator(mode="after")
    def _key_of_weights(self) -> Self:
        if self.weights_key is not None and self.weights is None:
            raise ValueError(
                "--weights-key says which weights of a file to take: name the file with --weights"
            )
        return self
