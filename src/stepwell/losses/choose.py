"""From a loss's name to a function of two outputs: which tensors each loss of this folder takes.

A loss itself knows tensors only; here is the one place that knows what comes from where. A loss of the
user's own, FILE.py:FUNCTION, is called as FUNCTION(student, teacher) with an example `Output` of each and the
arguments that were given; it returns what is then called as loss(student, teacher, target), which may be an
`nn.Module`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from stepwell.errors import ConfigError
from stepwell.losses.ab import AB
from stepwell.losses.at import at_loss
from stepwell.losses.cc import CC
from stepwell.losses.crd import CRD
from stepwell.losses.dist import dist_loss
from stepwell.losses.dkd import dkd_loss
from stepwell.losses.feature import state_loss
from stepwell.losses.fitnet import FitNet
from stepwell.losses.fsp import fsp_loss
from stepwell.losses.ft import FT
from stepwell.losses.logit import kd_loss
from stepwell.losses.nst import nst_loss
from stepwell.losses.ofa import OFA
from stepwell.losses.output import Output, Target, TrainingImages
from stepwell.losses.pkt import pkt_loss
from stepwell.losses.pld import pld_loss
from stepwell.losses.projection import Projections, as_map
from stepwell.losses.review import ReviewKD
from stepwell.losses.rkd import rkd_loss
from stepwell.losses.sp import sp_loss
from stepwell.losses.sskd import SSKD, rotations
from stepwell.losses.taid import TAID
from stepwell.losses.vid import VID
from stepwell.options import NEED_STATES, LossOptions
from stepwell.own_code import is_own_code, load_function

Call = Callable[[Output, Output, Target], Tensor]


class Loss(nn.Module):
    """One term of the loss, as a function of two outputs.

    Args:
        call: Given student's output, teacher's output and target, returns a scalar.
        own: Its parameters and state, if it has any.
        first: A training that comes before: of the `student` by this loss alone (which then falls silent), or
            of the loss's `own` parameters by `first_call`.
        first_call: What `own` minimises.
        views: Makes the images that both models see from those of the batch, which stay the first of them.
    """

    def __init__(
        self,
        call: Call,
        own: nn.Module | None = None,
        *,
        first: Literal["student", "own"] | None = None,
        first_call: Call | None = None,
        views: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.call, self.own, self.first_call = call, own, first_call or call
        self.first: Literal["student", "own"] | None = first
        self._views = views

    def views(self, images: Tensor) -> Tensor:
        """The images that both models see."""
        return images if self._views is None else self._views(images)

    def forward(self, student: Output, teacher: Output, target: Target) -> Tensor:
        """The scalar, before its weight."""
        return self.call(student, teacher, target)


def logit_loss(options: LossOptions, student: Output, teacher: Output) -> Loss:
    """The loss that `options.logit_loss` names.

    Args:
        options: Its name, temperature and arguments.
        student: An example, for a loss of the user's own.
        teacher: Likewise.

    Raises:
        ConfigError: It does not take such an argument.
        ModelError: A function of the user's own cannot be found.
    """
    name, temperature = options.logit_loss, options.temperature
    made = partial(_made, name, "--logit-args", options.logit_args)
    match name:
        case "kd":
            kd = made(kd_loss, temperature=temperature)
            return Loss(lambda s, t, _: kd(s.logits, t.logits))
        case "dkd":
            dkd = made(dkd_loss, temperature=temperature)
            return Loss(lambda s, t, target: dkd(s.logits, t.logits, target.labels))
        case "dist":
            dist = made(dist_loss, temperature=temperature)
            return Loss(lambda s, t, _: dist(s.logits, t.logits))
        case "pld":
            pld = made(pld_loss, temperature=temperature)
            return Loss(lambda s, t, target: pld(s.logits, t.logits, target.labels))
        case "taid":
            taid = made(TAID)()
            return Loss(lambda s, t, target: taid(s.logits, t.logits, target.progress), taid)
        case _:
            return _own(made(load_function(name, "--logit-loss"))(student, teacher))


def feature_loss(
    options: LossOptions, student: Output, teacher: Output, images: TrainingImages, projected: bool
) -> Loss:
    """The loss that `options.feature_loss` names.

    Args:
        options: Its name and arguments.
        student: An example: shapes are read from it.
        teacher: Likewise.
        images: For losses with a memory.
        projected: Whether the two are of different architectures: then `states` learns projections.

    Raises:
        ConfigError: It does not take such an argument, or does not suit these models.
        ModelError: A function of the user's own cannot be found.
    """
    name = options.feature_loss
    made = partial(_made, name, "--feature-args", options.feature_args)
    if name == "states":
        return _states(options, student, teacher, projected)
    if is_own_code(name):
        return _own(made(load_function(name, "--feature-loss"))(student, teacher))
    if name in NEED_STATES and name != "ofa":
        return _map_loss(made, name, maps(student, teacher), maps(teacher, student))
    s_dim, t_dim = student.features.shape[1], teacher.features.shape[1]
    match name:
        case "cc":
            cc = made(CC)(s_dim, t_dim)
            return Loss(lambda s, t, _: cc(s.features, t.features), cc)
        case "rkd":
            rkd = made(rkd_loss)
            return Loss(lambda s, t, _: rkd(s.features, t.features))
        case "pkt":
            pkt = made(pkt_loss)
            return Loss(lambda s, t, _: pkt(s.features, t.features))
        case "crd":
            # Images without labels are all of one class: then every other image is a negative.
            labels = images.labels if images.labels is not None and len(images.labels.unique()) > 1 else None
            crd = made(CRD)(s_dim, t_dim, labels, images.num_images)
            return Loss(lambda s, t, target: crd(s.features, t.features, target.indices), crd)
        case "sskd":
            sskd = made(SSKD)(s_dim, t_dim)
            return Loss(
                lambda s, t, target: sskd(s.features, t.features, s.logits, t.logits, target.labels),
                sskd,
                first="own",
                first_call=lambda _, t, target: sskd.pretraining_loss(t.features),
                views=rotations,
            )
        case "ofa":
            ofa = made(OFA)([state.shape[1:] for state in student.states], teacher.logits.shape[1])
            return Loss(lambda s, t, target: ofa(s.states, s.logits, t.logits, target.labels), ofa)
        case _:
            raise AssertionError(f"options.py checks the names, and {name} is none of them")


def _map_loss(
    made: Callable[..., Any], name: str, s_maps: Sequence[Tensor], t_maps: Sequence[Tensor]
) -> Loss:
    """A loss on hidden states as maps; the examples say how many channels each has."""
    s_channels, t_channels = [m.shape[1] for m in s_maps], [m.shape[1] for m in t_maps]
    match name:
        case "fitnet":
            # RepDistiller's hint is the middle one of its stages.
            middle = len(s_maps) // 2
            fitnet = made(FitNet)(s_channels[middle], t_channels[middle])
            return Loss(lambda s, t, _: fitnet(maps(s, t)[middle], maps(t, s)[middle]), fitnet)
        case "at":
            return _of_maps(made(at_loss))
        case "fsp":
            if len(s_channels) < 2:
                raise ConfigError("--feature-loss fsp goes from one state to the next, and there is only one")
            if s_channels != t_channels:
                raise ConfigError(
                    f"--feature-loss fsp compares states of equal channels, and the student's have "
                    f"{s_channels}, the teacher's {t_channels}; vid or review take any"
                )
            return _of_maps(made(fsp_loss), first="student")
        case "nst":
            return _of_maps(made(nst_loss))
        case "ab":
            return _of_maps(made(AB)(s_channels, t_channels), first="student")
        case "vid":
            return _of_maps(made(VID)(s_channels, t_channels))
        case "review":
            return _of_maps(made(ReviewKD)(s_channels, t_channels))
        case "ft":
            ft = made(FT)(s_channels[-1], t_channels[-1])
            return Loss(
                lambda s, t, _: ft(maps(s, t)[-1], maps(t, s)[-1]),
                ft,
                first="own",
                first_call=lambda s, t, _: ft.pretraining_loss(maps(t, s)[-1]),
            )
        case "sp":
            sp = made(sp_loss)
            return Loss(lambda s, t, _: sp(maps(s, t)[-1], maps(t, s)[-1]))
        case _:
            raise AssertionError(f"options.py checks the names, and {name} is none of them")


def maps(one: Output, other: Output) -> list[Tensor]:
    """The states of `one` as maps, as many as both have: paired from the end, where the classifiers read."""
    count = min(len(one.states), len(other.states))
    return [as_map(state) for state in one.states[len(one.states) - count :]]


def _states(options: LossOptions, student: Output, teacher: Output, projected: bool) -> Loss:
    scale = options.feature_scale
    if not projected:
        return Loss(lambda s, t, _: state_loss(s.states, t.states, scale))
    projections = Projections(student.states, teacher.states)

    def call(s: Output, t: Output, _: Target) -> Tensor:
        ours, theirs = projections(s.states, t.states)
        return state_loss(ours, theirs, scale)

    return Loss(call, projections)


def _of_maps(
    loss: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor], first: Literal["student"] | None = None
) -> Loss:
    own = loss if isinstance(loss, nn.Module) else None
    return Loss(lambda s, t, _: loss(maps(s, t), maps(t, s)), own, first=first)


def _made(name: str, option: str, given: dict[str, float], loss: Callable[..., Any], **fixed: Any) -> Any:  # noqa: ANN401
    """`loss` with the arguments that the user gave; those with a default may be given."""
    parameters = inspect.signature(loss).parameters.values()
    known = {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in fixed}
    for argument in given:
        if argument not in known:
            raise ConfigError(f"{option} {argument}: the loss {name} takes {', '.join(known) or 'none'}")
    values = {
        argument: value if known[argument] is None else type(known[argument])(value)
        for argument, value in given.items()
    }
    return partial(loss, **fixed, **values)


def _own(loss: Call) -> Loss:
    return Loss(loss, loss if isinstance(loss, nn.Module) else None)
