"""What every stage of a run will take, before it is begun: its bill, by operations and then by the clock.

How long the trainings are is settled by operations, as in the run; what they take, by a calibration. Within
`--minutes` it is the other way round: they are as long as the clock allows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from stepwell.config.commands import CompressConfig
from stepwell.measure.clocked import ClockedCosts, Price
from stepwell.measure.cost import Costs, charged
from stepwell.models.ladder import Ladder
from stepwell.paths import path_of
from stepwell.paths.calibration import Calibration, calibrated
from stepwell.paths.path import READ_BY, Path, middle
from stepwell.paths.plan import epochs_of
from stepwell.setting.bill import BASELINE_STAGE, CONTROL_STAGE, PROBE_STAGE
from stepwell.setting.setting import Setting
from stepwell.stages.grid import size_indices

_ROUNDS = 6
"""In which a length is found that ends in time; each is within some percent of what the last was off."""


@dataclass(frozen=True)
class Images:
    """How many images a run has.

    Attributes:
        train: To train on.
        selection: To select on.
        test: To test on.
    """

    train: int
    selection: int
    test: int


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        stages: By name, in their order.
        share: Images of a step on one device.
        timed: Images of the steps that were timed.
    """

    stages: dict[str, Price]
    share: int
    timed: int

    @property
    def total(self) -> Price:
        """All stages, one after another."""
        return sum(self.stages.values(), Price(0.0))


def forecast(
    s: Setting, ladder: Ladder, images: Images, devices: int = 1, bytes_per_second: float = 1e10
) -> Forecast:
    """Time the parts of a run for some seconds each, and add them up.

    Args:
        s: What the run works with; of its images there may be others, or fewer.
        ladder: Its candidates.
        images: How many there will be.
        devices: How many share each batch.
        bytes_per_second: What each can send to the next.
    """
    way = path_of(s.config.path)
    clock = calibrated(s, ladder, way, images.train, devices, bytes_per_second)
    counted = replace(s.costs(ladder.scales), num_train=images.train, num_selection=images.selection)
    if s.config.minutes_of_path is not None:
        counted = _in_time(counted, s.config, clock, way)
    stages = _stages_of_path(counted, clock, way)
    config, spent = counted.options, _counted(counted, way)
    if config.control != "none":
        epochs = counted.equal_compute_epochs(spent)
        if config.control == "equal_epochs":
            epochs = sum(price.epochs for name, price in stages.items() if name in spent)
        stages[CONTROL_STAGE] = _price(_by_clock(counted, clock).single_step(epochs))
    if s.baseline is not None:
        its = replace(
            s.baseline.costs(ladder.scales),
            options=config,
            num_train=images.train,
            num_selection=images.selection,
        )
        beside = calibrated(s.baseline, ladder, way, images.train, devices, bytes_per_second)
        epochs = its.equal_compute_epochs(spent)
        stages[BASELINE_STAGE] = _price(_by_clock(its, beside).single_step(epochs))
    if config.probe:
        stages = {PROBE_STAGE: _price(_by_clock(counted, clock).probing), **stages}
    stages["deliver"] = _delivering(s, ladder, clock, counted, images)
    return Forecast({name: p for name, p in stages.items() if p}, clock.share, clock.batch_size)


def _stages_of_path(counted: Costs, clock: Calibration, way: Path) -> dict[str, Price]:
    """The bill of the path, and the trials of `--tune` before it."""
    config = counted.options
    epochs = epochs_of(counted, way.bill, config)
    bill = way.bill(_by_clock(counted, clock), epochs, config)
    stages = {"score": bill.pop("score", 0.0), "tune": _by_clock(counted, clock).tuning, **bill}
    return {name: _price(price) for name, price in stages.items()}


def _counted(counted: Costs, way: Path) -> dict[str, float]:
    """The same by operations, as far as a control and a baseline are measured against it."""
    config = counted.options
    bill = way.bill(counted, epochs_of(counted, way.bill, config), config) | {"tune": counted.tuning}
    return {name: passes for name, passes in bill.items() if name != "more sizes"}


def _in_time(counted: Costs, config: CompressConfig, clock: Calibration, way: Path) -> Costs:
    """The run as long as `--minutes` allow: with the budget of operations that takes so long."""
    seconds = 60 * (config.minutes_of_path or 0.0)
    budget = seconds / _by_clock(counted, clock).single_step(1)
    for _ in range(_ROUNDS):
        counted = replace(counted, options=_of_budget(config, budget))
        budget *= seconds / charged(_stages_of_path(counted, clock, way))
    return replace(counted, options=_of_budget(config, budget))


def _of_budget(config: CompressConfig, epochs: float) -> CompressConfig:
    return config.model_copy(update={"minutes": None, "budget_epochs": max(epochs, 1e-3)})


def _delivering(s: Setting, ladder: Ladder, clock: Calibration, counted: Costs, images: Images) -> Price:
    """Figures of every model, and the files of those that are handed out."""
    config, way = s.config, path_of(s.config.path)
    number = images.selection + images.test
    assistants = 0 if way.is_one_step else config.num_assistants
    if config.path in READ_BY["assistants"]:
        assistants = 0 if config.ladder else len(ladder.scales) - 1  # which are sizes, then
    sizes = [ladder.scales[i] for i in size_indices([c.keep_ratio for c in ladder.candidates], config)]
    handed_out = [counted.student, *sizes]
    measured = [1.0, *[middle(counted)] * assistants, *handed_out]
    measured += [counted.student] * ((config.control != "none") + (s.baseline is not None))
    found = sum((clock.figures(scale, number) for scale in measured), Price(0.0))
    found = sum((clock.file() for _ in handed_out), found)
    # Weights and an ONNX file of each.
    files = sum(8.0 * clock.num_params(scale) for scale in handed_out)
    return found + Price(0.0, kept=files)


def _by_clock(counted: Costs, clock: Calibration) -> ClockedCosts:
    return ClockedCosts.of(counted, clock)


def _price(seconds: float) -> Price:
    return seconds if isinstance(seconds, Price) else Price(seconds)
