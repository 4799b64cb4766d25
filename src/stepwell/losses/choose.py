"""From a loss's name to what is called: one `match`, beside the records of `config/loss_facts.py`.

What is built is the loss itself, called as `arguments` (output.py) lays out by its record. A loss of the
user's own, FILE.py:FUNCTION, is made by FUNCTION(student, teacher) with an example `Output` of each and the
arguments that were given; it returns what is then called as loss(student, teacher, target), which may be an
`nn.Module`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from jaxtyping import Float
from torch import Tensor

from stepwell.config.loss_facts import FEATURE_LOSSES, LOGIT_LOSSES
from stepwell.config.options import LossOptions, TaskName
from stepwell.config.own_code import load_function
from stepwell.errors import ConfigError
from stepwell.losses.ab import AB
from stepwell.losses.adversarial import SKD
from stepwell.losses.arguments import given_arguments
from stepwell.losses.at import at_loss
from stepwell.losses.cc import CC
from stepwell.losses.cirkd import CIRKD, queue_bytes
from stepwell.losses.crd import CRD, bank_bytes
from stepwell.losses.cwd import CWD, cwd_loss
from stepwell.losses.dist import dist_loss
from stepwell.losses.dkd import dkd_loss
from stepwell.losses.embedding import embedding_loss
from stepwell.losses.feature import state_loss
from stepwell.losses.fitnet import FitNet
from stepwell.losses.fsp import fsp_loss
from stepwell.losses.ft import FT
from stepwell.losses.ifvd import ifvd_loss
from stepwell.losses.kept import Kept
from stepwell.losses.logit import binary_kd_loss, kd_loss
from stepwell.losses.nst import nst_loss
from stepwell.losses.observe import Observed
from stepwell.losses.ofa import OFA
from stepwell.losses.output import Output, TrainingImages, maps
from stepwell.losses.pixels import over_pixels
from stepwell.losses.pkt import pkt_loss
from stepwell.losses.pld import pld_loss
from stepwell.losses.projection import TIMES, ProjectedStates
from stepwell.losses.review import ReviewKD
from stepwell.losses.rkd import rkd_loss
from stepwell.losses.scalekd.loss import Parts, ScaleKD
from stepwell.losses.scalekd.stages import Stages
from stepwell.losses.sp import sp_loss
from stepwell.losses.sskd import SSKD
from stepwell.losses.taid import TAID
from stepwell.losses.vid import VID

Call = Callable[..., Tensor]
"""A function, or an `nn.Module` where the loss has parameters or a memory; returns a scalar."""


@dataclass(frozen=True)
class Pair:
    """The two models that a loss stands between.

    Attributes:
        student: What the student returns for two images; shapes are read from it.
        teacher: What the teacher returns for them.
        observed_teacher: The teacher itself; a loss must not keep it, but what `after` returns.
        blank: The two images that the outputs are of.
        training_images: What is known of all training images, for losses with a memory.
        is_other_student: Whether the student is of another architecture than the teacher.
        task: What both are for.
        stages: The last two stages of student and teacher, for a loss whose states are behind them.
        kept: Which channels of each of the teacher's states the student has; nothing where it has all.
    """

    student: Output
    teacher: Output
    observed_teacher: Observed
    blank: Float[Tensor, "two channels height width"]
    training_images: TrainingImages
    is_other_student: bool = False
    task: TaskName = "classification"
    stages: tuple[Stages, Stages] | None = None
    kept: Sequence[Kept | None] = ()

    def after(self, block: str) -> Callable[[Tensor], Output]:
        """The rest of the teacher behind `block`, borrowed: not saved, trained or decayed with the loss."""
        return self.observed_teacher.after(block, self.blank)


def logit_loss(options: LossOptions, pair: Pair) -> Call | None:
    """The loss that `options.logit_loss` names; None where its weight is 0.

    Raises:
        ConfigError: It does not take such an argument.
        ModelError: A function of the user's own cannot be found.
    """
    if not options.logit_weight:
        return None
    name, temperature = options.logit_loss, options.temperature
    made = partial(given_arguments, name, "--logit-args", options.logit_args)
    if pair.task == "segmentation" and name in LOGIT_LOSSES and options.logit_facts.masks == "too":
        of_rows = logit_loss(options, replace(pair, task="classification"))
        assert of_rows is not None
        return over_pixels(of_rows)
    match name:
        case "kd" if pair.task == "features":
            return made(embedding_loss)
        case "kd":
            loss = kd_loss if pair.task == "classification" else binary_kd_loss
            return made(loss, temperature=temperature)
        case "dkd":
            return made(dkd_loss, temperature=temperature)
        case "dist":
            return made(dist_loss, temperature=temperature)
        case "pld":
            return made(pld_loss, temperature=temperature)
        case "taid":
            return made(TAID)()
        case "cwd-logits":
            return made(cwd_loss)
        case _:
            assert name not in LOGIT_LOSSES, f"{name} has a record, but no case here"
            return made(load_function(name, "--logit-loss"))(pair.student, pair.teacher)


def feature_loss(options: LossOptions, pair: Pair) -> Call | None:
    """The loss that `options.feature_loss` names; None where its weight is 0, or there is nothing to compare.

    Raises:
        ConfigError: It does not take such an argument, or does not suit these models.
        ModelError: A function of the user's own cannot be found.
    """
    facts, name = options.feature_facts, options.feature_loss
    student, teacher = pair.student, pair.teacher
    if not options.feature_weight or (facts.needs_states and not student.states):
        return None
    if facts.needs_teacher_states and not teacher.states:
        return None
    projects = pair.is_other_student or (options.project_states and any(pair.kept))
    if facts.needs_maps or name == "ofa" or (name == "states" and projects):
        _check_square(name, pair)
    if facts.masks == "only":
        _check_maps(name, pair)
    made = partial(given_arguments, name, "--feature-args", options.feature_args)
    s_dim, t_dim = student.features.shape[1], teacher.features.shape[1]
    s_channels = [m.shape[1] for m in maps(student, teacher)] if facts.needs_maps else []
    t_channels = [m.shape[1] for m in maps(teacher, student)] if facts.needs_maps else []
    match name:
        case "states":
            if projects:
                times = TIMES if pair.is_other_student else 1.0
                return made(ProjectedStates, times=times)(
                    student.states, teacher.states, options.feature_scale
                )
            return made(state_loss, scale=options.feature_scale)
        case "fitnet":  # RepDistiller's hint is the middle one of its stages
            middle = len(s_channels) // 2
            return made(FitNet)(s_channels[middle], t_channels[middle])
        case "at":
            return made(at_loss)
        case "fsp":
            _check_fsp(s_channels, t_channels)
            return made(fsp_loss)
        case "nst":
            return made(nst_loss)
        case "ab":
            return made(AB)(s_channels, t_channels)
        case "ft":
            return made(FT)(s_channels[-1], t_channels[-1])
        case "vid":
            return made(VID)(s_channels, t_channels)
        case "review":
            return made(ReviewKD)(s_channels, t_channels)
        case "sp":
            return made(sp_loss)
        case "cc":
            return made(CC)(s_dim, t_dim)
        case "rkd":
            return made(rkd_loss)
        case "pkt":
            return made(pkt_loss)
        case "crd":
            return made(CRD)(
                s_dim, t_dim, pair.training_images.labels_of_classes, pair.training_images.num_images
            )
        case "sskd":
            return made(SSKD)(s_dim, t_dim)
        case "ofa":
            return made(OFA)([state.shape[1:] for state in student.states], teacher.logits.shape[1])
        case "cwd":
            return made(CWD)(s_dim, t_dim)
        case "skd":
            return made(SKD)(teacher.logits.shape[1])
        case "ifvd":
            return made(ifvd_loss)
        case "cirkd":
            return made(CIRKD)(s_dim, t_dim, teacher.logits.shape[1])
        case "scalekd":
            return _scalekd(parts_of(options.feature_args), pair)
        case _:
            assert name not in FEATURE_LOSSES, f"{name} has a record, but no case here"
            return made(load_function(name, "--feature-loss"))(student, teacher)


def _scalekd(parts: Parts, pair: Pair) -> ScaleKD:
    assert pair.stages is not None, "the states are those behind the stages"
    (student, teacher), tail, notes = pair.stages, None, []
    if parts.tpp:
        try:
            rest = pair.after(teacher.third.block)
            tail = lambda state: rest(state).states[-1]  # noqa: E731
        except ValueError as error:
            notes.append(f"the teacher's own parameters (tpp) are left out: {error}")
            parts = replace(parts, tpp=False)
    return ScaleKD(student, teacher, tail, parts, notes)


def parts_of(feature_args: Mapping[str, float]) -> Parts:
    """What `--feature-args` make of ScaleKD.

    Raises:
        ConfigError: It has no such part, or not with this value.
    """
    return given_arguments("scalekd", "--feature-args", feature_args, Parts)()


def _check_square(name: str, pair: Pair) -> None:
    """Of images that are not square, states that are no maps (B, C, H, W) do not say how they lie."""
    height, width = pair.blank.shape[2:]
    way_out = ", or leave --project-states out" if any(pair.kept) and name == "states" else ""
    for state in (*pair.student.states, *pair.teacher.states):
        shape = state.shape
        # One stride divides both sides, and each is rounded.
        is_map = len(shape) == 4 and abs(shape[2] * width - shape[3] * height) < max(height, width)
        if height != width and not is_map:
            raise ConfigError(
                f"--feature-loss {name} compares maps, and of images of {height} x {width} it cannot be told "
                f"how states of shape {tuple(shape[1:])} lie: take another loss, or square images{way_out}"
            )


def _check_maps(name: str, pair: Pair) -> None:
    """Of what a linear layer reads nobody can tell how it lies, and before it there may be no map at all."""
    for who, output in (("teacher", pair.teacher), ("student", pair.student)):
        if output.features.ndim != 4:
            raise ConfigError(
                f"--feature-loss {name} compares the maps that the last convolutions read, and the {who}'s "
                f"logits come from no convolution: let its last layer be nn.Conv2d(channels, classes, 1), or "
                f"take --logit-loss cwd-logits or dist"
            )


def memory_bytes(
    options: LossOptions, num_images: int, batch_size: int, last_map: tuple[int, int] = (0, 0)
) -> tuple[int, int]:
    """Bytes that the feature loss remembers, and that a step reads of that.

    Args:
        options: Which loss.
        num_images: Training images.
        batch_size: Images of a step.
        last_map: Of masks: classes, and channels of the map that the teacher's last convolution reads.
    """
    if not options.feature_weight:
        return 0, 0
    match options.feature_loss:
        case "crd":
            sizes = ("embed_dim", "num_negatives")
            given = {k: int(v) for k, v in options.feature_args.items() if k in sizes}
            return bank_bytes(num_images, batch_size, **given)
        case "cirkd":
            given = {k: int(v) for k, v in options.feature_args.items() if k == "num_pixels"}
            return queue_bytes(*last_map, batch_size, **given)
        case _:
            return 0, 0


def _check_fsp(s_channels: list[int], t_channels: list[int]) -> None:
    if len(s_channels) < 2:
        raise ConfigError("--feature-loss fsp goes from one state to the next, and there is only one")
    if s_channels != t_channels:
        raise ConfigError(
            f"--feature-loss fsp compares states of equal channels, and the student's have "
            f"{s_channels}, the teacher's {t_channels}; vid or review take any"
        )
