"""What may not be given together where the assistant has a training or snapshots of its own, or a probe."""

from __future__ import annotations

import pytest

from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.errors import ConfigError
from stepwell.measure.cost import Costs
from stepwell.stages.select import Point, rule_values

TEACHER = Point(1.0, 0.95)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"assistant_share": 0.5},
            "--assistant-share 0.5 leave nothing for the student",
        ),
        ({"probe_epochs": 3.0}, "--probe-epochs is the length of --probe: give it, too"),
        (
            {"probe": True, "student": "resnet18", "student_init": "teacher"},
            "--student-init teacher copies the teacher's classifier before --probe trains it",
        ),
    ],
)
def test_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        make_config(CompressConfig, given)


@pytest.mark.parametrize("given", [{"joint_share": 0.97}, {"assistant_share": 0.5, "epochs": 3.0}])
def test_allowed(given):
    make_config(CompressConfig, given)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({}, "thrift"),
        ({"budget_epochs": 5.0}, "thrift"),
        ({"minutes": 5.0}, "thrift"),
        ({"epochs": 5.0}, "performance"),
        ({"epochs": 5.0, "rule": "thrift"}, "thrift"),
        ({"epochs": 5.0, "preset": "paper"}, "npsd"),
        ({"preset": "paper"}, "npsd"),
    ],
)
def test_the_rule_fits_the_length(given, rule):
    """A cheap assistant saves epochs of a budget, and none where all trainings have as many."""
    assert make_config(CompressConfig, given).rule == rule


def test_a_last_step_has_stretches_on_the_path_that_reads_snapshots():
    assert make_config(CompressConfig, {"snapshots": 2}).stretches == 3
    assert make_config(CompressConfig, {"snapshots": 2, "path": "auto"}).stretches == 1


def test_a_pretraining_of_fixed_length_comes_before_every_stretch():
    config = make_config(CompressConfig, {"feature_loss": "ft", "first_epochs": 5.0})
    costs = Costs(config, [0.1, 0.5], 0.1, num_train=100, num_selection=10)
    once, in_three = costs.step_down(12, 0.1, [0.5]), 3 * costs.step_down(4, 0.1, [0.5])
    assert in_three - once == pytest.approx(2 * costs.step_down(0, 0.1, [0.5]))


def test_rules_of_size_look_at_the_student_of_another_architecture():
    ladder = [Point(s, 0.5) for s in (0.1, 0.25, 0.5, 0.75)]
    assert rule_values(ladder, TEACHER, "nearest-2.5", 0.3)[3] == pytest.approx(0.0)
    with_slice, with_other = (rule_values(ladder, TEACHER, "thrift", student)[1] for student in (None, 0.3))
    assert with_slice == rule_values(ladder, TEACHER, "thrift", 0.1)[1]
    assert with_slice is not None
    assert with_other is not None
    assert with_other < with_slice
