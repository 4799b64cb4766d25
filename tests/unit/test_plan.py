"""Costs against numbers worked out by hand.

The example: candidates of scale 0.1, 0.2 ... 0.9 (sum 4.5), an assistant of 0.5, a student of 0.1. A forward
pass of the teacher costs 1 per image, a backward pass twice its forward.
"""

import pytest

from stepwell.config import JointOptions
from stepwell.stages.joint import scales_per_step
from stepwell.stages.plan import Costs, Epochs, epochs_in

SCALES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
ASSISTANT = 4


def costs(options: JointOptions, num_train: int = 1, num_scored: int = 0, num_selection: int = 0) -> Costs:
    return Costs(SCALES, SCALES[0], scales_per_step(SCALES, options), num_train, num_scored, num_selection)


def test_all_candidates_in_every_step():
    found = costs(JointOptions(sampling="all"))
    assert found.joint_epoch == pytest.approx(14.5)  # 1 + 3 * 4.5
    assert found.distill_epoch(ASSISTANT) == pytest.approx(0.8)  # 0.5 + 3 * 0.1
    assert found.single_step_epoch == pytest.approx(1.3)  # 1 + 3 * 0.1
    once = Epochs(joint=1, distill=1)
    assert found.total(once, ASSISTANT) == pytest.approx(15.3)
    assert round(found.vs_single_step(once, ASSISTANT), 1) == 11.8
    assert found.equal_compute_epochs(once, ASSISTANT) == pytest.approx(15.3 / 1.3)


# The student and k of the eight others, whose mean scale is 0.55.
@pytest.mark.parametrize(
    ("num_random", "joint", "ratio"), [(1, 2.95, 2.9), (2, 4.6, 4.2), (3, 6.25, 5.4), (8, 14.5, 11.8)]
)
def test_sandwich(num_random, joint, ratio):
    found = costs(JointOptions(sampling="sandwich", num_random=num_random))
    assert found.joint_epoch == pytest.approx(joint)
    assert round(found.vs_single_step(Epochs(joint=1, distill=1), ASSISTANT), 1) == ratio


# The table's last row: all candidates, but the joint stage has only a share of the epochs.
@pytest.mark.parametrize(("share", "ratio"), [(0.1, 1.7), (0.142, 2.2), (0.2, 2.8), (0.25, 3.4), (0.5, 6.2)])
def test_a_shorter_joint_stage(share, ratio):
    found = costs(JointOptions(sampling="all"), num_train=50_000)
    assert round(found.vs_single_step(Epochs(joint=30 * share, distill=30), ASSISTANT), 1) == ratio


def test_a_whole_run_with_scoring_and_judging():
    found = costs(JointOptions(sampling="all"), num_train=1000, num_scored=200, num_selection=100)
    # 3 * 200 to score, (1 + 4.5) * 100 to judge, 2 * 14500 joint, 10 * 800 of distillation.
    expected = 600 + 550 + 29_000 + 8_000
    epochs = Epochs(joint=2, distill=10)
    assert found.total(epochs, ASSISTANT) == pytest.approx(expected)
    assert found.vs_single_step(epochs, ASSISTANT) == pytest.approx(expected / 13_000)
    assert found.equal_compute_epochs(epochs, ASSISTANT) == pytest.approx(expected / 1300)


def test_a_control_of_equal_compute_costs_what_the_run_costs():
    found = costs(JointOptions(), num_train=640, num_scored=64, num_selection=32)
    epochs = Epochs(joint=3, distill=5)
    control = found.equal_compute_epochs(epochs, 2)
    assert control * found.single_step_epoch == pytest.approx(found.total(epochs, 2))
    assert control > epochs.distill


def test_minutes_become_epochs():
    # 12 s + 3 s per epoch of both: 10 minutes hold 40 of each.
    assert epochs_in(10, 12, 3) == pytest.approx(40)
