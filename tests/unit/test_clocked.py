"""What a run takes by the clock: its arithmetic against plain references, with clocks that are made up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.data.batches import EvalBatches
from stepwell.data.feed import MEMORY_LIMIT
from stepwell.data.made_up import made_up
from stepwell.data.spec import InputSpec
from stepwell.measure import clock
from stepwell.measure.clocked import ClockedCosts, Price, all_reduce_seconds, price_of_step
from stepwell.measure.cost import Costs, Epochs, candidates_per_step
from stepwell.measure.estimate import Footprint
from stepwell.paths import path_of
from stepwell.training import timing
from stepwell.training.loop import Course
from tiny import CPU, FixedTrain, random_batches

SCALES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


@dataclass
class ByOperations:
    """A clock for which a forward pass of the teacher on one image takes a second, and nothing else any."""

    config: CompressConfig
    batch_size: int

    def scoring(self, num_images: float) -> Price:
        return Price(3 * num_images)

    def forward(self, scale: float) -> Price:
        return Price(scale)

    def joint_step(self) -> Price:
        return Price(self.batch_size * (1 + 3 * candidates_per_step(SCALES, self.config)[0]))

    def step(self, student: float, teachers: Sequence[float], drop: int) -> Price:
        kept = max(1, len(teachers) - drop) / len(teachers)
        return Price(self.batch_size * (kept * sum(teachers) + 3 * student))


@pytest.mark.parametrize(
    "options",
    [
        {"path": "amd"},
        {"path": "amd", "ladder": (0.1, 0.2, 0.5), "num_assistants": 2, "keep_best": 2.0},
        {"path": "amd", "tune": True, "assistant_share": 0.2},
        {"path": "amd", "sampling": "all", "epochs": 10.0},
        {"path": "auto"},
        {"path": "amd-manual"},
        {"path": "single-step", "keep_best": 1.0},
        {"path": "takd", "assistants": (0.6, 0.3)},
        {"path": "dgkd", "assistants": (0.6, 0.3)},
        {"path": "mmd"},
        {"path": "mmd-os"},
        {"path": "single-step", "probe": True},
    ],
)
def test_by_a_clock_that_counts_operations_every_bill_is_what_it_was(options):
    """Both are worked out by the path's own bill; a price has no say in what it says."""
    config = make_config(CompressConfig, {**options, "batch_size": 10})
    counted = Costs(config, SCALES, 0.1, num_train=1000, num_selection=100, has_statistics=True)
    by_clock = ClockedCosts.of(counted, ByOperations(config, 10))
    epochs, bill = Epochs(joint=12, distill=30), path_of(config.path).bill
    seconds = bill(by_clock, epochs, config)
    assert seconds == pytest.approx(bill(counted, epochs, config), rel=0.001)  # whole steps
    assert by_clock.tuning == pytest.approx(counted.tuning, rel=0.01)  # a clock knows whole steps
    assert by_clock.probing == pytest.approx(counted.probing)
    assert by_clock.trial_epochs == counted.trial_epochs if config.budget else True
    trained = sum(p.epochs for p in seconds.values() if isinstance(p, Price))
    assert trained >= 30


def test_a_step_counts_each_image_once_and_drops_the_last_batch():
    """1,005 images at batch 10 are 100 steps."""
    config = CompressConfig(batch_size=10, path="single-step")
    costs = ClockedCosts.of(Costs(config, [0.1], 0.1, 1005, 50), ByOperations(config, 10))
    assert costs.single_step(3) == pytest.approx(3 * 100 * 10 * 1.3)
    assert costs.single_step(3).epochs == 3


def test_parts_come_one_after_another():
    one = Price(2.0, memory=5, kept=1, passing=7, epochs=3, exchange=0.5)
    other = Price(1.0, memory=6, kept=2, passing=4, epochs=1, exchange=0.1)
    both = sum([one, other])
    assert (both, both.memory, both.kept, both.passing) == (3.0, 6, 3, 7)
    assert (both.epochs, both.exchange) == (4, pytest.approx(0.6))
    thrice = 3 * one
    assert (thrice, thrice.memory, thrice.kept, thrice.passing, thrice.epochs) == (6.0, 5, 3, 7, 9)
    # A tenth of a training still writes its files; none at all does not.
    assert ((0.1 * one).kept, (0.1 * one).memory) == (1, 5)
    nothing = one * 0
    assert (nothing, nothing.memory, nothing.kept, nothing.passing) == (0, 0, 0, 0)
    assert (1.0 + one, (1.0 + one).memory) == (3.0, 5)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_an_all_reduce_sends_what_a_ring_sends(devices):
    """The ring, chunk by chunk: each device hands on sums N - 1 times, and then results N - 1 times."""
    data = [[device * 100 + chunk for chunk in range(devices)] for device in range(devices)]
    wanted = [sum(column) for column in zip(*data, strict=True)]
    sent, chunk_bytes = 0.0, 600 / devices
    for phase, step in itertools.product(("sum", "hand on"), range(devices - 1)):
        moves = []
        for device in range(devices):
            chunk = (device - step + (phase == "hand on")) % devices
            moves.append((device, chunk, data[device][chunk]))
        for device, chunk, value in moves:
            after = (device + 1) % devices
            data[after][chunk] = value + (data[after][chunk] if phase == "sum" else 0)
        sent += chunk_bytes  # by each of them, at the same time
    assert data == [wanted] * devices
    assert all_reduce_seconds(600, devices, 100.0) == pytest.approx(sent / 100)


def test_the_exchange_comes_on_top_of_a_step():
    price = price_of_step(2.0, Footprint(10.0, 4.0, 8.0), 1000, devices=4, bytes_per_second=3000.0)
    assert price == pytest.approx(2.0 + 1.5 * 4000 / 3000)
    assert price.exchange == pytest.approx(2.0)
    assert price_of_step(2.0, Footprint(10.0, 4.0, 8.0), 1000, 1, 3000.0) == 2.0


# --- clocks


@dataclass
class Time:
    """A clock that only goes on when it is told to."""

    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time_stands_still(monkeypatch) -> Time:
    time = Time()
    monkeypatch.setattr(timing, "time", time)
    monkeypatch.setattr(clock, "time", time)
    return time


@pytest.mark.parametrize("most", [1, 3, 4, 50, 1000])
def test_what_comes_once_is_not_multiplied(time_stands_still, most):
    ran = []

    def run(number: int) -> None:
        ran.append(number)
        time_stands_still.sleep(0.3 + 0.05 * number)

    found = timing.seconds_of_all(run, most, CPU)
    assert found == pytest.approx(0.3 + 0.05 * most)
    assert sum(ran) <= max(7, most + 3)


@pytest.mark.parametrize("milliseconds", [0.01, 1.0, 40.0, 700.0])
def test_how_long_it_takes_to_time_a_model(time_stands_still, milliseconds):
    start = time_stands_still.now
    times = clock._times_ms(lambda: time_stands_still.sleep(milliseconds / 1000))
    assert times == pytest.approx([milliseconds] * len(times))
    assert clock.seconds_to_time(milliseconds / 1000) == pytest.approx(time_stands_still.now - start)


@dataclass
class SlowFeed(FixedTrain):
    """Batches of which each takes 0.2 seconds to come."""

    time: Time = field(default_factory=Time)

    def __init__(self, batches, time: Time) -> None:
        super().__init__(batches)
        self.device, self.time = CPU, time

    def epoch(self, epoch: int, first_step: int = 0, training: str = ""):
        for batch in super().epoch(epoch, first_step, training):
            self.time.sleep(0.2)
            yield batch


def test_a_step_is_timed_with_its_feed_and_without_its_warm_up(time_stands_still):
    layer, calls = nn.Linear(3, 1), []

    def step(batch, number: int, progress: float) -> dict[str, Tensor]:
        calls.append(number)
        time_stands_still.sleep(5.0 if number == 0 else 0.1)
        loss = layer(batch.images.mean((2, 3))).square().mean()
        loss.backward()
        return {"loss": loss.detach()}

    batches = SlowFeed(random_batches(4, 2), time_stands_still)
    course = Course("course", dict(layer.named_parameters()), epochs=100.0, lr=1e-3)
    options = CompressConfig(keep_best=1.0, accumulate=2)
    seconds, timed = timing.seconds_of_training_step(course, step, batches, options, options)
    assert seconds == pytest.approx(0.3)
    assert calls[-len(timed) - 1 :] == [*timed, timed.stop]
    assert 8 <= len(timed) <= 100


# --- images that are made up

SMALL = InputSpec((32, 32), 3, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("num_images", [300, 1_281_167])
def test_made_up_images_are_as_many_and_are_fed_in_the_same_way(tmp_path, num_images):
    data = made_up(tmp_path, num_images, [f"class {i}" for i in range(7)], SMALL, "classification")
    assert (len(data.train) == num_images) == (num_images == 300 or 3 * 32 * 32 * num_images > MEMORY_LIMIT)
    assert len(data.train) * 3 * 32 * 32 > MEMORY_LIMIT or num_images == 300
    assert set(data.train.labels) == set(range(7))
    assert len(data.selection) == min(num_images // 10, 2048)  # these fit in memory
    few = EvalBatches(data.train.subset(range(64)), SMALL, CompressConfig(batch_size=32), CPU)
    first, second = few
    assert first.images.shape == (32, 3, 32, 32)
    assert torch.equal(first.images, second.images)  # there are 32 files
    assert len({image.numpy().tobytes() for image in first.images}) == 32


def test_made_up_images_of_several_classes(tmp_path):
    data = made_up(tmp_path, 40, ["a", "b", "c"], SMALL, "multi-label")
    assert data.train.is_multi_label
    assert data.train.labels[:3] == ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    assert not made_up(tmp_path, 40, ["a"], SMALL, "features").labelled


def test_the_first_batches_are_those_of_all(tmp_path):
    data = made_up(tmp_path, 100, ["a", "b"], SMALL, "classification")
    batches = EvalBatches(data.train, SMALL, CompressConfig(batch_size=32), CPU)
    assert [batch.indices.tolist() for batch in batches.first(2)] == [
        batch.indices.tolist() for batch in itertools.islice(batches, 2)
    ]
    assert (len(batches.first(2)), len(batches.first(9)), len(batches)) == (2, 4, 4)
