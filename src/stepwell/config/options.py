"""Every group of options: typed, frozen, documented with its unit, in one place.

A function takes the group that it needs, where one will do; commands.py puts them together for the commands.
Nothing here imports torch: `stepwell --help` must be quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stepwell.config.base import (
    LENGTHS,
    Amount,
    Count,
    Fraction,
    ImageSize,
    NotNegative,
    Positive,
    Seed,
    flag_of,
)
from stepwell.config.loss_facts import FEATURE_LOSSES, LOGIT_LOSSES, LossFacts, feature_facts, logit_facts
from stepwell.config.own_code import is_own_code
from stepwell.errors import did_you_mean

Augment = Literal["auto", "none", "affine", "crop", "resized-crop"]
Schedule = Literal["cosine", "linear", "cosine-restarts"]
MetricOption = Literal["auto", "top1", "mAP", "mIoU", "cosine", "likelihood"]
TaskName = Literal["classification", "multi-label", "segmentation", "features"]
"""What a model is for: one class for each image, or as many as there are in it, or one for each pixel, or an
embedding."""

Suite = Literal[
    "losses", "candidates", "optimizer", "weights", "depth", "steps",
    "resnet-pair", "wrn-pair", "vgg-pair", "imagenet-pair", "scalekd", "teacher-size", "several-teachers",
    "segmentation",
]  # fmt: skip

PROBE_EPOCHS = 10.0


class Options(BaseModel):
    """Base of all option groups: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DataOptions(Options):
    """Where the images are and how they are fed."""

    data: str = ""
    """Image folder (train/CLASS/* with val/ and/or test/, or one folder of classes, or a flat folder of
    images with metadata.csv or without labels), a folder of tar shards, or a data set of timm such as
    torch/cifar10 or hfds/NAME."""
    task: Literal["auto", TaskName] = "auto"
    """`classification`: one class for each image. `multi-label`: as many as it has, or none; read from lists
    or columns of 0 and 1 in a table. `segmentation`: one class for each pixel; images/ and masks/ beside each
    other. `features`: an embedding, with or without labels. `auto` takes what data and teacher say."""
    data_root: Path | None = None
    """Where a data set of timm lies on disk (torch/cifar10 and the like)."""
    selection_data: Path | None = None
    """A folder of classes to choose the assistant on, instead of val/ beside test/, or of a tenth of the
    training images."""
    class_order: Path | None = None
    """A file with the names of the classes in the teacher's order, one a line, where that is not found out
    by names or by trying the usual orders; `train` numbers the classes in this order."""
    class_list: Path | None = None
    """Of masks: a file with their classes, with columns name and, where wanted, index, colour (or r,g,b) and
    ignore; classes.csv beside images/ and masks/ if not given, else the numbers in the masks."""
    ignore_index: tuple[Annotated[int, Field(ge=0, le=65535)], ...] = ()
    """Numbers in masks whose pixels count nowhere, neither in training nor in figures; 255 always does."""
    image_column: str | None = None
    """Column of the images in hfds/NAME; found by its type if not given."""
    label_column: str | None = None
    """Column of the labels in hfds/NAME; found by its type if not given."""
    white_level: Positive | None = None
    """Value of white in images of more than 8 bits or of floats, such as 4095 for 12 bits; found on the
    training images if not given."""
    skip_names: tuple[str, ...] = ()
    """Names of folders and files to leave out, such as masks or '*_mask.png'."""
    skip_bad_images: bool = False
    """Leave out images that cannot be decoded, and count them, instead of stopping at the first."""
    augment: Augment = "auto"
    """Training augmentation: `affine` (small rotations, shifts and scales; no flip), `crop` (shift by up to
    an eighth, flip), `resized-crop` (timm's ImageNet recipe), `none`; `auto` is `crop` up to 64 pixels and
    `resized-crop` above. Of masks `resized-crop`: scaled by half to double, cropped, mirrored, colours
    jittered."""
    batch_size: Count = 64
    """Images per step, of all processes together."""
    image_size: ImageSize | None = None
    """Height and width that images are scaled to, for a model that takes any (a CNN), as 224 or 192x256; by
    default its own, and with masks the images' size up to 512 pixels."""
    mean: tuple[float, ...] = ()
    """Mean that images are normalised by, of pixels in 0..1: one number, or one for each channel; by default
    what the model says, or ImageNet's."""
    std: tuple[Positive, ...] = ()
    """Standard deviation that images are normalised by, likewise."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that decode images; sets that fit in memory are decoded once and need none."""


class TrainingOptions(Options):
    """How every training stage runs."""

    epochs: Positive | None = None
    """Passes over the training images, of each training stage; need not be whole."""
    minutes: Positive | None = None
    """Wall-clock budget of all training together; sets the epochs by timing a few steps first."""
    lr: Positive = 1e-3
    """Peak learning rate."""
    weight_decay: NotNegative = 0.05
    """Decay of weight matrices; norms, biases, position tables and LayerScale have none."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9."""
    schedule: Schedule = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of the steps in which the learning rate rises linearly."""
    clip_norm: NotNegative = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    seed: Seed = 0
    """Seed of everything random."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Number format of forward passes in training; weights stay fp32. tf32 lets a GPU round what it
    multiplies, in both passes; elsewhere it is fp32. fp16 is for GPUs without bf16: its loss is scaled, and
    a step in which a loss or a gradient overflows is left out."""
    compile: bool = False
    """Let torch.compile make code of each model's passes in training: of each candidate, student and teacher
    once, when it first runs, which takes up to minutes for each. Weights differ by rounding. Needs a C++
    compiler, on a GPU Triton."""
    gradient_checkpointing: bool = False
    """Keep of each block of what is trained (candidates, students, or the model of `train`) its input alone,
    and compute the rest a second time for the gradients: less memory for about a third more time, and the
    same result."""
    shard_optimizer: bool = False
    """Of several processes let each hold a part of the optimizer's state (ZeRO, stage 1) and not all of it:
    less memory for one more exchange in each step, and the same result. Does nothing in a single one."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, ...; `auto` takes a CUDA GPU if there is one. Never mps, which lacks double
    precision and is untried: name it."""
    threads: Count | None = None
    """CPU threads of torch; torch's own choice if not given. Very small models are fastest on 1."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [name for name in LENGTHS if getattr(self, name, None) is not None]
        if len(given) > 1:
            flags = " and ".join(flag_of(name) for name in given)
            raise ValueError(f"{flags} each say how long the run is: give one of them")
        return self

    @model_validator(mode="after")
    def _one_way_to_keep_less(self) -> Self:
        if self.compile and self.gradient_checkpointing:
            raise ValueError(
                "--compile decides by itself what is computed again: leave out --gradient-checkpointing"
            )
        return self

    @model_validator(mode="after")
    def _no_clock_foresees(self) -> Self:
        if self.compile and self.minutes is not None:
            instead = "--budget-epochs" if hasattr(self, "budget_epochs") else "--epochs"
            raise ValueError(
                f"--compile takes a while for each model, which no clock foresees: give {instead} instead of "
                f"--minutes"
            )
        return self


class LossOptions(Options):
    """loss = task_weight * CE + logit_weight * LOGIT + feature_weight * FEATURE."""

    logit_loss: str = "kd"
    """On the logits: kd (T^2 KL, AMD's), dkd, dist, pld or taid; of masks kd, dist or cwd-logits; or
    FILE.py:FUNCTION. Choosing one also sets the weights and the temperature that its authors use, where none
    are given."""
    feature_loss: str = "states"
    """On hidden states: states (squared distance, AMD's; ten times that for a student of another
    architecture), fitnet, at, fsp, nst, ab, ft, vid, review, sp, ofa or scalekd (for --student alone); on the
    features before the classifier: cc, rkd, pkt, crd or sskd, and of masks cwd, skd, ifvd or cirkd; or
    FILE.py:FUNCTION."""
    logit_args: dict[str, float] = {}
    """Arguments of the logit loss as name=value, such as beta=6 for dkd."""
    feature_args: dict[str, float] = {}
    """Arguments of the feature loss as name=value, such as num_negatives=4096 for crd."""

    task_weight: NotNegative = 1.0
    """Weight of the cross-entropy with the labels; 0 needs no labels."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the labels' target that is spread over all classes, in that cross-entropy."""
    class_weights: tuple[Positive, ...] = ()
    """For masks: what a pixel of each class counts in the cross-entropy, in the order of the classes."""
    logit_weight: NotNegative = 1.0
    """Weight of the loss on the logits; the paper's alpha."""
    feature_weight: NotNegative = 1.0
    """Weight of the loss on hidden states or features; the paper's beta."""
    temperature: Positive = 1.0
    """Softens both probability vectors in the loss on the logits."""
    loss_warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training over which the weights of the losses on logits and features rise from 0."""
    first_epochs: Positive | None = None
    """Epochs of the pretraining that comes before with ab and fsp (the student's features), ft and sskd (the
    loss's own parts); by default an eighth of the stage's epochs, a quarter with sskd, as in the
    literature."""
    feature_layers: tuple[int, ...] | None = None
    """Blocks, from 0, whose outputs are compared; by default six spread evenly, the last among them."""
    feature_scale: Literal["teacher-power", "raw"] = "teacher-power"
    """Divide each layer's squared error by the mean square of the teacher's states, or leave it raw."""
    project_states: bool = False
    """With --cut all: compare all of the teacher's channels with a learned projection of the student's, which
    is dropped at delivery; by default the channels that the student kept."""

    @property
    def logit_facts(self) -> LossFacts:
        """What is known of the loss on the logits."""
        return logit_facts(self.logit_loss)

    @property
    def feature_facts(self) -> LossFacts:
        """What is known of the loss on hidden states or features."""
        return feature_facts(self.feature_loss)

    def observed(self, blocks: tuple[str, ...]) -> tuple[str, ...]:
        """Of the blocks that can be compared those whose states are kept: all where a term reads states, else
        the last, whose mean stands for the features of a model without a linear layer."""
        terms = ((self.logit_weight, self.logit_facts), (self.feature_weight, self.feature_facts))
        read = any(weight and (facts.needs_states or "outputs" in facts.reads) for weight, facts in terms)
        return blocks if read else blocks[-1:]

    @property
    def views(self) -> int:
        """Images that the losses make of each."""
        return self.feature_facts.views if self.feature_weight else 1

    @property
    def pretraining(self) -> Literal["student", "loss"] | None:
        """What is trained before the student, by a training of its own; None where there is none."""
        return self.feature_facts.pretraining if self.feature_weight else None

    def pretraining_epochs(self, epochs: float) -> float:
        """Epochs of the pretraining before a training of `epochs`; 0 where there is none."""
        if self.pretraining is None:
            return 0.0
        return self.first_epochs or epochs * self.feature_facts.pretraining_share

    @property
    def looks_at_teacher(self) -> bool:
        """Whether any term of the student's training itself needs the teacher."""
        feature = self.feature_weight and not self.feature_facts.is_silent_after_pretraining
        return bool(self.logit_weight or feature)

    @model_validator(mode="after")
    def _known(self) -> Self:
        for name, given, known in (
            ("logit_loss", self.logit_loss, LOGIT_LOSSES),
            ("feature_loss", self.feature_loss, FEATURE_LOSSES),
        ):
            if given not in known and not is_own_code(given):
                hint = did_you_mean(given, known) or f"; there are {', '.join(known)}"
                raise ValueError(f"no {name} {given!r}{hint}")
        return self

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if self.task_weight == self.logit_weight == self.feature_weight == 0:
            raise ValueError("task_weight, logit_weight and feature_weight are all 0: nothing to learn")
        if self.feature_facts.is_silent_after_pretraining and self.task_weight == self.logit_weight == 0:
            raise ValueError(
                f"{self.feature_loss} trains the features first and is then silent: leave task_weight or "
                f"logit_weight above 0"
            )
        return self


class TaskOptions(Options):
    """What is to be done, and where the result goes."""

    teacher: str = ""
    """What to compress: a timm model name (its pretrained weights are downloaded), the folder of a finished
    run or of a student, or FILE.py:FACTORY, a function that returns the module."""
    teacher_weights: Path | None = None
    """Weights for the teacher: a file of safetensors or of torch.save (nothing in it is executed), an index
    of several files, or a folder with one of these."""
    weights_key: str | None = None
    """Which of the weights in that file, if it holds several, such as state_dict or teacher; by default the
    averaged ones, as timm takes them."""
    model_args: dict[str, str] = {}
    """Arguments of timm's create_model as key=value, such as img_size=32 patch_size=4."""
    keep_ratio: Fraction | None = None
    """Fraction of the heads, of the FFN neurons or of the convolution filters that the student keeps, in
    (0, 1); 0.1 if no other budget is given."""
    macs: Amount | None = None
    """Budget instead of --keep: multiply-accumulates per image, such as 1.8G, or 10% of the teacher's."""
    params: Amount | None = None
    """Budget instead of --keep: parameters, such as 9M, or 10% of the teacher's."""
    latency_ms: Positive | None = None
    """Budget instead of --keep: milliseconds per image (onnxruntime, CPU, batch 1), measured on exported
    candidates before anything is trained."""
    probe: bool = False
    """First give --teacher, a model of timm without classes or with others, a linear classifier for those of
    the folder, trained on its frozen features (a linear probe). A stage of the run, and on its bill; `train
    --probe` does it once for several runs."""
    probe_epochs: Positive = PROBE_EPOCHS
    """Passes over the images of that training."""
    out_dir: Path | None = None
    """Run directory; the same command on an unfinished one resumes where it stopped."""

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [n for n in ("keep_ratio", "macs", "params", "latency_ms") if getattr(self, n) is not None]
        if len(given) > 1:
            flags = " and ".join(flag_of(name) for name in given)
            raise ValueError(f"{flags} are each a budget: give one of them")
        return self
