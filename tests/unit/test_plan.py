"""Costs against numbers worked out by hand.

The example: candidates of scale 0.1, 0.2 ... 0.9 (sum 4.5), an assistant of 0.5, a student of 0.1. A forward
pass of the teacher costs 1 per image, a backward pass twice its forward.
"""

from dataclasses import replace

import pytest

from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.measure.cost import Costs, Epochs, epochs_in, expected_bill
from stepwell.stages.joint import scales_per_step

SCALES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
ONCE = Epochs(joint=1, distill=1)


def costs(config: CompressConfig, scales=SCALES, num_scored: int = 0, num_selection: int = 0) -> Costs:
    per_step = scales_per_step(scales, config)
    return Costs(scales, scales[0], per_step, 1, num_scored, num_selection, config.views)


def relative(epochs: Epochs = ONCE, scales=SCALES, **options) -> float:
    """Cost of a whole path in single steps."""
    config = make_config(CompressConfig, options)
    found = costs(config, scales)
    return sum(expected_bill(config, found, epochs).values()) / found.single_step(epochs.distill)


# With all candidates as the table of docs/method.md; with sandwich sampling worked out in the same way.
@pytest.mark.parametrize(
    ("ratio", "options"),
    [
        (1.0, {"path": "single-step"}),
        (11.8, {"path": "amd", "sampling": "all"}),
        (2.9, {"path": "amd", "sampling": "sandwich", "num_random": 1}),
        (4.2, {"path": "amd", "sampling": "sandwich", "num_random": 2}),
        (5.4, {"path": "amd", "sampling": "sandwich", "num_random": 3}),
        (17.9, {"path": "mmd-os"}),
    ],
)
def test_paths_cost_what_the_methods_table_says(ratio, options):
    assert relative(**options) == pytest.approx(ratio, abs=0.05)


def test_mmd_trains_an_assistant_and_a_student_for_every_candidate():
    # sum over 0.2 ... 0.9 of (1 + 3 s) + (s + 0.3), s summing to 4.4.
    assert relative(path="mmd") == pytest.approx((8 + 3 * 4.4 + 4.4 + 8 * 0.3) / 1.3)


def test_amd_by_hand_trains_a_student_for_every_candidate():
    joint = 1 + 3 * 4.5
    assert relative(path="amd-manual", sampling="all") == pytest.approx((joint + 4.4 + 8 * 0.3) / 1.3)


@pytest.mark.parametrize(
    ("path", "drop", "passes"),
    [
        # 1 -> 0.6 -> 0.3 -> 0.1
        ("takd", 1, (1 + 1.8) + (0.6 + 0.9) + (0.3 + 0.3)),
        ("dgkd", 0, (1 + 1.8) + (1.6 + 0.9) + (1.9 + 0.3)),
        # One of two, of three: the mean of what is left.
        ("dgkd", 1, (1 + 1.8) + (0.8 + 0.9) + (1.9 * 2 / 3 + 0.3)),
    ],
)
def test_chains(path, drop, passes):
    assert relative(path=path, drop=drop, scales=[0.1, 0.3, 0.6]) == pytest.approx(passes / 1.3)


# The last row of the table: all candidates, but the joint stage has only a share of the epochs.
@pytest.mark.parametrize(("share", "ratio"), [(0.1, 1.7), (0.142, 2.2), (0.2, 2.8), (0.25, 3.4), (0.5, 6.2)])
def test_a_shorter_joint_stage(share, ratio):
    found = relative(Epochs(joint=30 * share, distill=30), sampling="all")
    assert found == pytest.approx(ratio, abs=0.05)


def test_a_whole_run_with_scoring_and_judging():
    config = make_config(CompressConfig, {"sampling": "all"})
    found = costs(config, num_scored=200, num_selection=100)
    bill = expected_bill(config, found, Epochs(joint=2, distill=10))
    assert bill == pytest.approx(
        {"score": 600, "joint": 2 * 14.5, "select": 100 * 5.5, "distill": 10 * 0.8, "more assistants": 0}
    )


def test_a_loss_with_four_views_costs_four_times_and_its_first_training_too():
    plain, views = relative(path="single-step"), make_config(CompressConfig, {"feature_loss": "sskd"})
    found = costs(views)
    assert found.single_step(1) == pytest.approx(4 * 1.3)
    bill = expected_bill(
        make_config(CompressConfig, {"feature_loss": "sskd", "path": "single-step"}), found, ONCE
    )
    assert bill["distill"] == pytest.approx(1.25 * 4 * 1.3 * plain)


def test_a_teacher_that_nobody_looks_at_costs_nothing():
    alone = make_config(CompressConfig, {"logit_weight": 0, "feature_weight": 0})
    found = replace(costs(alone), taught=alone.taught)
    assert found.single_step(1) == pytest.approx(0.3)
    assert found.joint(1) == pytest.approx(costs(alone).joint(1) - 1)


def test_a_teacher_of_the_first_training_alone_costs_its_share():
    """AB trains the student first; without logits nothing looks at the teacher afterwards."""
    config = make_config(CompressConfig, {"feature_loss": "ab", "logit_weight": 0, "path": "single-step"})
    assert config.taught == pytest.approx(1 / 9)  # an eighth of the epochs, of nine eighths
    found = replace(costs(config), taught=config.taught)
    bill = expected_bill(config, found, ONCE)
    assert bill["distill"] == pytest.approx(found.num_train * (1 / 8 + 9 / 8 * 0.3))


def test_a_control_of_equal_compute_costs_what_the_run_costs():
    found = costs(make_config(CompressConfig, {}), num_scored=64, num_selection=32)
    bill = {"score": found.scoring, "joint": found.joint(3), "distill": found.step_down(5, 0.1, 0.5)}
    control = found.equal_compute_epochs(bill)
    # But for the scores, which the control needs too: it starts from the same slice.
    assert found.single_step(control) == pytest.approx(bill["joint"] + bill["distill"])
    assert control > 5


def test_minutes_become_epochs():
    # 12 s + 3 s per epoch of both: 10 minutes hold 40 of each.
    assert epochs_in(10, 12, 3) == pytest.approx(40)
