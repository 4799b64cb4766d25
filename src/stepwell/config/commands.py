"""The options of every command, put together from the groups of options.py.

Each is a flat list of names, which serves Python keywords, command line flags and `config.yaml` alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stepwell.config.base import Count, Fraction, Positive, Seed, flag_of
from stepwell.config.cache_options import CacheOptions, check_cache
from stepwell.config.cut_options import CutOptions
from stepwell.config.extra_options import ExtraOptions, check_extras, sizes_beside
from stepwell.config.model_options import StartOptions, StudentOptions
from stepwell.config.options import (
    PROBE_EPOCHS,
    DataOptions,
    LossOptions,
    Options,
    Suite,
    TaskOptions,
    TrainingOptions,
)
from stepwell.config.path_options import (
    GridOptions,
    JointOptions,
    PathOptions,
    ScoreOptions,
    SelectOptions,
    Way,
)
from stepwell.config.recipe_options import RecipeOptions, check_recipe, check_recipe_with_losses
from stepwell.config.shard_options import ShardOptions, check_sharding

DEFAULT_BUDGET = 60.0
MOST_SHARED = 0.95
"""Of a budget, what joint training and the assistant's own may take together."""
TUNE_FACTORS = (0.4, 1.0, 2.5)
"""What --tune multiplies the learning rate by."""
MOST_RATES = 8
DEFAULT_EPOCHS = 30.0
"""Of `train`, where no length is given."""


# Fields come in the order of the bases from last to first: in the help, and in config.yaml.
class CompressConfig(
    CacheOptions,
    ShardOptions,
    ExtraOptions,
    PathOptions,
    SelectOptions,
    JointOptions,
    LossOptions,
    CutOptions,
    GridOptions,
    ScoreOptions,
    RecipeOptions,
    TrainingOptions,
    DataOptions,
    StudentOptions,
    TaskOptions,
):
    """All options of one compression run."""

    distill_lr: Positive | None = None
    """Peak learning rate of every distillation from one model to a smaller one; `lr` if not given."""
    control: Literal["equal_compute", "equal_epochs", "none"] = "none"
    """Also distil the same student straight from the teacher, with the compute (or the epochs) of the whole
    run, and hand out the one that does better on the selection images."""
    tune: bool = False
    """Before the run, try three learning rates around --lr (0.4, 1 and 2.5 times it), each in a short
    training of the single step that is judged on the selection images, and take the best for every training.
    Each costs a twentieth of the budget, which is on the bill."""
    tune_lrs: tuple[Positive, ...] = ()
    """The same with these learning rates."""
    latency_threads: Count = 1
    """Threads of onnxruntime when latency is measured."""
    preset: Literal["default", "quick", "long", "paper"] = "default"
    """`quick` and `long`: a fourth and four times of the usual budget. `paper`: Algorithm 1 as printed (all
    candidates in every step, as many epochs together as in the last step, raw feature distances, NPSD)."""

    @property
    def budget(self) -> float | None:
        """Cost of the path in epochs of a single step; None where epochs or minutes say how long it is."""
        if self.epochs is None and self.minutes is None:
            return self.budget_epochs or DEFAULT_BUDGET
        return None

    @property
    def rates_to_try(self) -> tuple[float, ...]:
        """Learning rates that are tried before the run, rising; none where --lr is simply taken."""
        if self.tune_lrs:
            return tuple(sorted(set(self.tune_lrs)))
        return tuple(float(f"{factor * self.lr:.6g}") for factor in TUNE_FACTORS) if self.tune else ()

    @model_validator(mode="after")
    def _one_rate_for_all(self) -> Self:
        if self.tune_lrs and not 2 <= len(set(self.tune_lrs)) <= MOST_RATES:
            raise ValueError(
                f"--tune-lrs tries 2 to {MOST_RATES} learning rates, each for a twentieth of the budget; "
                f"a single one is --lr"
            )
        for name in ("joint_lr", "distill_lr"):
            if self.rates_to_try and getattr(self, name) is not None:
                raise ValueError(
                    f"--tune finds one learning rate for every training: leave out {flag_of(name)}, or --tune"
                )
        return self

    @model_validator(mode="after")
    def _search_needs_a_budget(self) -> Self:
        if self.shares == "search" and self.macs is self.params is self.latency_ms is None:
            raise ValueError(
                "--shares search looks for the shares that suit a budget: give --macs, --params or "
                "--latency-ms"
            )
        if self.drop_blocks and self.importance == "l1":
            raise ValueError("--drop-blocks needs the importance of blocks: leave --importance gradient")
        if self.drop_blocks and self.min_heads_per_layer:
            raise ValueError(
                "--min-heads-per-layer keeps heads in every block, --drop-blocks not: leave one out"
            )
        return self

    @property
    def reads_latency_table(self) -> bool:
        """Whether the search of shares needs to know what widths take on this machine."""
        return self.shares == "search" and self.latency_ms is not None

    @property
    def stretches(self) -> int:
        """Of the last step: one for each snapshot of the assistant, and one for the finished one."""
        return 1 + (self.snapshots if self.path == "amd" else 0)

    @model_validator(mode="after")
    def _something_is_left_for_the_student(self) -> Self:
        shared = self.joint_share + self.assistant_share
        if self.path == "amd" and self.epochs is None and self.assistant_share and shared > MOST_SHARED:
            raise ValueError(
                f"--joint-share {self.joint_share:g} and --assistant-share {self.assistant_share:g} leave "
                f"nothing for the student: together at most {MOST_SHARED:g}"
            )
        return self

    @model_validator(mode="after")
    def _a_classifier_of_its_own(self) -> Self:
        if self.probe_epochs != PROBE_EPOCHS and not self.probe:
            raise ValueError("--probe-epochs is the length of --probe: give it, too")
        if self.probe and self.student_init == "teacher":
            raise ValueError(
                "--student-init teacher copies the teacher's classifier before --probe trains it: train it "
                "first (stepwell train --probe), and give its folder as --teacher"
            )
        return self

    @property
    def minutes_of_path(self) -> float | None:
        """The share of `minutes` that the path has: a control and a baseline take as much again, each."""
        return None if self.minutes is None else self.minutes / self.equal_trainings

    @property
    def equal_trainings(self) -> int:
        """How many times a run pays for the path: once for itself, control and baseline."""
        return 1 + (self.control != "none") + (self.baseline is not None)

    @property
    def num_more_sizes(self) -> int:
        """Sizes of the ladder besides the student, whose own keep ratio a budget may not have found yet."""
        if not self.ladder or any((self.macs, self.params, self.latency_ms)):
            return len(self.ladder)
        return len(sizes_beside(self.keep_ratio or min(self.ladder), self))

    @model_validator(mode="after")
    def _extras(self) -> Self:
        budgets = (self.keep_ratio, self.macs, self.params, self.latency_ms)
        check_extras(self, self.path, self.keep_ratio, self.student, is_budgeted=any(budgets))
        return self

    @model_validator(mode="after")
    def _recipe(self) -> Self:
        check_recipe(self, self.batch_size)
        check_recipe_with_losses(self, self)
        check_cache(self)
        check_sharding(self)
        return self


class CompareConfig(CompressConfig):
    """All options of a comparison: those of `compress`, which all its runs share, and what differs."""

    paths: tuple[Way, ...] = ("single-step", "amd")
    """Ways down that are compared."""
    logit_losses: tuple[str, ...] = ()
    """Losses on the logits that are compared, each with every path; `--logit-loss` if not given."""
    feature_losses: tuple[str, ...] = ()
    """Losses on states or features, likewise."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Every arm runs once with each."""
    lrs: tuple[Positive, ...] = ()
    """Learning rates that every arm tries with the first seed; the best on the selection images is used for
    the others. `--lr` if not given."""
    controls: bool = True
    """Beside every path of more than one step a single step with the same compute; beside ScaleKD the logits
    alone."""
    jobs: Count = 1
    """Runs side by side, each in a process of its own."""
    suite: Suite | None = None
    """A named comparison that mirrors a published table, with teacher and data; `--paths` and losses are
    then its own."""
    scale: Literal["cpu", "gpu", "paper"] = "cpu"
    """Size of a suite: hours on two cores, on one GPU, or the published recipe."""
    encoder_weights: Path | None = None
    """Of `--suite segmentation`: its teacher's encoder starts from this file of a classifier's weights; from
    random ones if not given."""

    @model_validator(mode="after")
    def _extras(self) -> Self:  # in place of a run's
        for flag, given in (("--ladder", self.ladder), ("--baseline", self.baseline)):
            if given:
                raise ValueError(f"{flag} is for compress: a comparison trains students alone")
        check_extras(self, self.path, self.keep_ratio, self.student, is_budgeted=True)  # refused above
        return self

    @model_validator(mode="after")
    def _one_search(self) -> Self:
        if self.lrs and self.rates_to_try:
            raise ValueError("--lrs and --tune both search the learning rate: give one of them")
        return self


class TrainConfig(RecipeOptions, TrainingOptions, DataOptions, StartOptions):
    """All options of fine-tuning a teacher."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the target that is spread over all classes."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of each layer as a multiple of that of the layer after it, the classifier's being `lr`;
    0.65 to 0.85 keep what a pre-trained transformer knows. 1 trains all layers alike."""
    probe: bool = False
    """Train the classifier alone, on the frozen features of what is loaded: a linear probe, which makes a
    teacher of a model without classes (DINOv2, MAE, CLIP) at a third of the price of training all of it."""

    @model_validator(mode="before")
    @classmethod
    def _has_a_length(cls, values: dict[str, Any]) -> dict[str, Any]:
        is_given = any(values.get(name) is not None for name in ("epochs", "minutes"))
        return values if is_given else {**values, "epochs": DEFAULT_EPOCHS}

    @model_validator(mode="after")
    def _recipe(self) -> Self:
        check_recipe(self, self.batch_size)
        if self.probe and self.weights is None and not self.pretrained:
            raise ValueError(
                "--probe trains a classifier on features that are there: leave --no-pretrained out"
            )
        if self.probe and self.layer_decay != 1:
            raise ValueError("--probe trains one layer, and --layer-decay is for many: give one of them")
        return self


class DemoConfig(Options):
    """Options of the demonstration."""

    out_dir: Path = Path("runs/demo")
    """Where data, teacher and compressed model go."""
    seed: Seed = 0
    """Seed of everything random."""
    effort: Positive = 1.0
    """Multiplies all epochs; 0.1 is a quick look."""
    device: str = "auto"
    """cpu, cuda, ...; `auto` takes the GPU if there is one."""


class InspectConfig(Options):
    """Options of `stepwell inspect`."""

    run: Path
    """Directory of a finished run."""
    latency_ms: Positive | None = None
    """Also say which of its models to take, if one image may take so many milliseconds."""
    json_: bool = False
    """Print result.json instead of tables."""
    all: bool = False
    """Also export and time every rung of the ladder."""
    teacher: str = ""
    """FILE.py:FACTORY that builds the full-width model, with --all on a model that is not timm's."""
    features: bool = False
    """Draw what the teacher's features are made of, and how much of them is found in the student's, stage by
    stage: RUN/features.svg."""
    beside: tuple[Path, ...] = ()
    """Other runs with the same teacher, drawn beside it with --features, such as one without DFM."""

    @model_validator(mode="after")
    def _beside_what(self) -> Self:
        if self.beside and not self.features:
            raise ValueError("--beside compares features: give --features, too")
        others = {"--json": self.json_, "--all": self.all, "--latency-ms": self.latency_ms is not None}
        if self.features and (flags := [flag for flag, given in others.items() if given]):
            raise ValueError(f"--features draws one thing and {flags[0]} asks for another: give one of them")
        return self


class ExportConfig(Options):
    """Options of `stepwell export`."""

    run: Path
    """Directory of a finished run; --keep and --all want one with a trained ladder."""
    keep_ratio: Fraction | None = None
    """Which rung of the ladder to hand out; the student, if neither this nor --all is given."""
    all: bool = False
    """Hand out every rung."""
    format: Literal["onnx", "safetensors", "torch-export"] = "onnx"
    """`onnx` (dynamic batch, opset 18), `safetensors` (a model directory for stepwell.load) or
    `torch-export` (a .pt2 program, loads without stepwell)."""
    opset: Annotated[int, Field(ge=18)] | None = None
    """Version of ONNX's operators; 18 if not given, which onnxruntime reads since 1.14. For `onnx` only."""
    out_dir: Path | None = None
    """Folder for the files; RUN/exports if not given."""
    teacher: str = ""
    """FILE.py:FACTORY that builds the full-width model, where it is not timm's."""


class PredictConfig(Options):
    """Options of `stepwell predict`."""

    model: Path
    """A student directory, or a run that holds one."""
    images: tuple[Path, ...]
    """Image files, or folders of them."""
    top: Count = 3
    """How many classes to name per image."""
    out_dir: Path | None = None
    """Of a model for masks: folder for the masks in colours and the overlays; `predictions` if not given."""
    white_level: Positive | None = None
    """Value of white in images of more than 8 bits or of floats; that of the training images if not given."""
    teacher: str = ""
    """FILE.py:FACTORY that builds the full-width model, where it is not timm's."""
