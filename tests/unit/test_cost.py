"""Costs against numbers worked out by hand.

The example: candidates of scale 0.1, 0.2 ... 0.9 (sum 4.5), an assistant of 0.5, a student of 0.1. A forward
pass of the teacher costs 1 per image, a backward pass twice its forward.
"""

from dataclasses import replace

import pytest

from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.measure.cost import Costs, Epochs, OtherTeacher, Seconds, candidates_per_step, epochs_in
from stepwell.models.ladder import Ladder
from stepwell.paths import path_of
from stepwell.pruning.units import Candidate
from stepwell.setting.rungs import slice_of_teacher, teacher_of
from stepwell.stages.distill import distill
from tiny import group_sizes, random_batches, setting, tiny_vit

SCALES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
ONCE = Epochs(joint=1, distill=1)


def costs(
    scales=SCALES, num_train: int = 1, num_selection: int = 0, loss: float = 0.0, student=None,
    pretraining_loss: float = 0.0, **options,
) -> Costs:  # fmt: skip
    config = make_config(CompressConfig, options)
    student = scales[0] if student is None else student
    return Costs(config, scales, student, num_train, num_selection, loss, pretraining_loss)


def bill_of(found: Costs, epochs: Epochs = ONCE) -> dict[str, float]:
    return path_of(found.options.path).bill(found, epochs, found.options)


def relative(epochs: Epochs = ONCE, scales=SCALES, **options) -> float:
    """Cost of a whole path in single steps, without the scores and the selection."""
    found = costs(scales, **options)
    passes = sum(value for stage, value in bill_of(found, epochs).items() if stage != "score")
    return passes / found.single_step(epochs.distill)


# --- paths


def test_several_teachers_cost_what_each_of_them_does():
    """Two others of half and a fourth of the best's operations, each with projections of its own."""
    others = [OtherTeacher(0.5, loss=0.2), OtherTeacher(0.25, loss=0.1)]
    options = {"path": "curriculum", "student": "resnet18", "teacher": "best", "teachers": ("a", "b")}
    found = replace(
        costs([0.1], num_train=1000, num_selection=100, loss=0.3),
        options=make_config(CompressConfig, options),
        other_teachers=others,
    )
    bill = bill_of(found, Epochs(joint=0, distill=10))
    assert bill == pytest.approx(
        {
            "score": 0,
            "arrange": (1000 + 100) * (1 + 0.5 + 0.25),
            "other teachers": 10 * 1000 * (0.5 + 0.3 + 0.2 + 0.25 + 0.3 + 0.1),
            "distill": 10 * 1000 * (1 + 0.3 + 0.3),
        }
    )
    # All of it is what a control may spend.
    assert found.equal_compute_epochs(bill) == pytest.approx(sum(bill.values()) / 1600)


def test_a_probe_is_on_the_bill_and_no_control_is_charged_with_it():
    found = costs([0.1], num_train=1000, num_selection=100, probe=True, probe_epochs=4, keep_best=2)
    assert found.probing == 4 * 1000 + 3 * 100
    assert costs([0.1], num_train=1000).probing == 0
    bill = {"probe": found.probing, "score": 7.0, "distill": found.single_step(5)}
    assert found.equal_compute_epochs(bill) == pytest.approx(5)


def test_a_student_that_is_mapped_runs_on_the_scored_images_too_when_it_is_measured():
    plain = costs([0.1, 0.5], num_train=1000, num_selection=100, keep_best=2)
    mapped = replace(plain, is_mapped=True)
    assert plain.measuring(0.1) == pytest.approx(0.1 * 100)
    assert mapped.measuring(0.1) == pytest.approx(0.1 * 1100)
    assert mapped.keeping_best(4, 0.1) == pytest.approx(2 * 0.1 * 1100)
    assert mapped.keeping_best(4, 0.5) == pytest.approx(2 * 0.5 * 100)  # a slice, which is not mapped


# With all candidates as the table of docs/method.md; with sandwich sampling worked out in the same way.
@pytest.mark.parametrize(
    ("ratio", "options"),
    [
        (1.0, {"path": "single-step"}),
        (11.8, {"path": "amd", "sampling": "all"}),
        (2.9, {"path": "amd", "sampling": "sandwich", "num_random": 1}),
        (4.2, {"path": "amd", "sampling": "sandwich", "num_random": 2}),
        (5.4, {"path": "amd", "sampling": "sandwich", "num_random": 3}),
        (16.4, {"path": "amd-manual", "sampling": "all"}),
        (7.5, {"path": "amd-manual"}),
        (21.5, {"path": "mmd"}),
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


# 1000 training images, 100 selection images; 200 images are scored.
@pytest.mark.parametrize(
    ("path", "bill"),
    [
        ("single-step", {"distill": 10 * 1000 * 1.3}),
        (
            "amd",
            {
                "joint": 2 * 1000 * 14.5,
                "select": 100 * 5.5,
                "distill": 10 * 1000 * 0.8,
                "more assistants": 0,
                "more sizes": 0,
            },
        ),
        (
            "amd-manual",
            {
                "joint": 2 * 1000 * 14.5,
                "select": 100 * 5.5,
                "students": 10 * 1000 * (4.4 + 8 * 0.3),
                "choose": 100 * 8 * 0.1,
            },
        ),
        (
            "mmd",
            {
                "assistants": 10 * 1000 * (8 + 3 * 4.4),
                "students": 10 * 1000 * (4.4 + 8 * 0.3),
                "choose": 100 * 8 * 0.1,
            },
        ),
        (
            "mmd-os",
            {
                "assistants": 10 * 1000 * (9 + 3 * 4.5),
                "select": 100 * 5.5,
                "distill": 10 * 1000 * 0.8,
            },
        ),
    ],
)
def test_a_whole_run_with_scores_and_selection(path, bill):
    found = costs(path=path, sampling="all", num_train=1000, num_selection=100, score_images=200)
    assert bill_of(found, Epochs(joint=2, distill=10)) == pytest.approx({"score": 600, **bill})


@pytest.mark.parametrize("length", [{"budget_epochs": 20}, {"epochs": 10}])
def test_auto_costs_what_amd_does_and_a_second_look_at_the_candidates(length):
    found = costs(path="auto", num_train=1000, num_selection=100, **length)
    assert bill_of(found, Epochs(joint=2, distill=10)) == pytest.approx(
        {
            "score": found.scoring,
            "pilot": 0.2 * found.joint(2),
            "pilot look": 100 * (0.1 + 0.8 + 0.9),
            "joint": 0.8 * found.joint(2),
            "select": 100 * 5.5,
            "distill": 10 * 1000 * 0.8,
        }
    )


def test_rates_that_are_tried_cost_a_twentieth_of_the_budget_each():
    found = costs(num_train=1000, num_selection=100, tune_lrs=(1e-4, 1e-3, 1e-2), budget_epochs=40)
    assert found.tuning == pytest.approx(0.15 * found.single_step(40))
    assert found.trial_epochs == pytest.approx(2 - 100 * 0.1 / (1000 * 1.3))
    assert costs(tune=True, epochs=40).trial_epochs == pytest.approx(2)
    assert costs(budget_epochs=40).tuning == costs(tune=True, minutes=3).tuning == 0
    assert costs(tune=True, lr=1e-3).options.rates_to_try == (4e-4, 1e-3, 2.5e-3)


def test_assistants_in_a_row_cost_a_training_each():
    # Below the middle one, of 0.5, one of half its scale.
    bill = bill_of(costs(num_assistants=3), Epochs(joint=1, distill=10))
    assert bill["more assistants"] == pytest.approx(2 * 10 * (0.5 + 3 * 0.25))


def test_every_further_size_costs_what_the_students_last_step_does():
    sized = bill_of(costs(path="amd", ladder=(0.1, 0.3, 0.5)), Epochs(joint=1, distill=10))
    assert sized["more sizes"] == pytest.approx(2 * sized["distill"])
    # Of a budget in operations the student's ratio is not known yet: each size is taken for a further one.
    assert costs(ladder=(0.1, 0.3), macs="10%", keep_ratio=None).options.num_more_sizes == 2


def test_no_more_images_are_scored_than_there_are():
    assert costs(num_train=100, score_images=200).scoring == 3 * 100
    assert costs(num_train=300, score_images=200).scoring == 3 * 200


def test_a_student_of_another_architecture_has_a_scale_of_its_own():
    found = costs(student=0.02)
    assert found.single_step(5) == pytest.approx(5 * (1 + 3 * 0.02))
    assert bill_of(found)["distill"] == pytest.approx(0.5 + 3 * 0.02)
    # The smallest candidate is trained jointly all the same.
    assert bill_of(found)["joint"] == bill_of(costs())["joint"]


# --- losses


def test_a_loss_with_four_views_costs_four_times_and_so_does_its_pretraining():
    found = costs(feature_loss="sskd", path="single-step")
    # Only the teacher runs in the pretraining, for a quarter of the epochs.
    assert found.single_step(1) == pytest.approx(4 * 1.3 + 1 / 4 * 4 * 1)
    assert bill_of(found)["distill"] == found.single_step(1)
    # The smallest candidate and one other, of 0.55 on average.
    assert found.joint(8) == pytest.approx(8 * 4 * (1 + 3 * 0.65) + 2 * 4 * 1)


def test_a_teacher_that_nobody_looks_at_costs_nothing():
    alone, taught = costs(logit_weight=0, feature_weight=0), costs()
    assert alone.single_step(1) == pytest.approx(0.3)
    assert alone.joint(1) == pytest.approx(taught.joint(1) - 1)


def test_a_teacher_of_the_pretraining_alone_costs_its_share():
    """AB trains the student first; without logits nothing looks at the teacher afterwards."""
    found = costs(feature_loss="ab", logit_weight=0, path="single-step")
    assert bill_of(found)["distill"] == pytest.approx(1 / 8 + 9 / 8 * 0.3)


@pytest.mark.parametrize("loss", [0.0, 0.25])
def test_a_pretraining_of_the_student_costs_as_much_for_each_image_as_the_training(loss):
    found = costs(feature_loss="ab", pretraining_loss=loss, num_train=50)
    # The loss that trains the student first is silent afterwards.
    assert found.single_step(16) == pytest.approx(50 * (16 * 1.3 + 2 * (1.3 + loss)))
    assert found.step_down(16, 0.2, [0.5]) == pytest.approx(50 * (16 * (0.5 + 0.6) + 2 * (0.5 + 0.6 + loss)))
    everyone = costs(feature_loss="ab", pretraining_loss=loss, num_train=50, sampling="all")
    assert everyone.joint(16) == pytest.approx(50 * (16 * 14.5 + 2 * (14.5 + 9 * loss)))


@pytest.mark.parametrize(("name", "share", "views"), [("ft", 1 / 8, 1), ("sskd", 1 / 4, 4)])
@pytest.mark.parametrize("loss", [0.0, 0.25])
def test_in_a_pretraining_of_the_loss_only_the_teacher_runs(name, share, views, loss):
    before = {"loss": loss, "pretraining_loss": 2 * loss}
    found = costs(feature_loss=name, num_train=50, **before)
    first = 16 * share
    assert found.single_step(16) == pytest.approx(
        50 * (16 * (views * 1.3 + loss) + first * (views + 2 * loss))
    )
    # Of three teachers, one left out: their mean, twice; a loss with each.
    taught = (1 + 0.6 + 0.3) * 2 / 3
    assert found.step_down(16, 0.1, [1.0, 0.6, 0.3], drop=1) == pytest.approx(
        50 * (16 * (views * (taught + 0.3) + 2 * loss) + first * (views * taught + 2 * 2 * loss))
    )
    everyone = costs(feature_loss=name, num_train=50, sampling="all", **before)
    # What is trained then is the same for all nine.
    assert everyone.joint(16) == pytest.approx(
        50 * (16 * (views * 14.5 + 9 * loss) + first * (views + 2 * loss))
    )


@pytest.mark.parametrize(("name", "student_runs"), [("ab", 1), ("ft", 0)])
def test_the_length_of_the_pretraining_can_be_fixed(name, student_runs):
    found = costs(feature_loss=name, first_epochs=3)
    for epochs in (1, 10, 100):
        assert found.single_step(epochs) == pytest.approx(1.3 * epochs + 3 * (1 + student_runs * 0.3))


def test_a_weight_of_0_leaves_views_and_pretraining_out():
    for name in ("ab", "ft", "sskd"):
        assert costs(feature_loss=name, feature_weight=0).single_step(1) == pytest.approx(1.3)


def test_what_a_loss_computes_itself_is_counted_for_every_model_of_a_step():
    found = costs(loss=0.2, num_train=10)
    assert found.single_step(2) == pytest.approx(10 * 2 * (1.3 + 0.2))
    # The smallest candidate and one other, of 0.55 on average.
    assert candidates_per_step(SCALES, found.options) == (pytest.approx(0.65), 2)
    assert found.joint(2) == pytest.approx(10 * 2 * (1 + 3 * 0.65 + 2 * 0.2))
    assert costs(loss=0.2, logit_weight=0, feature_weight=0).single_step(1) == pytest.approx(0.3)


@pytest.mark.parametrize("drop", [0, 1, 2, 5])
def test_of_teachers_that_are_left_out_the_mean_of_the_others_is_counted(drop):
    found, kept = costs(loss=0.2, num_train=10), {0: 3, 1: 2, 2: 1, 5: 1}[drop]
    passes = found.step_down(2, 0.1, [1.0, 0.6, 0.3], drop)
    assert passes == pytest.approx(10 * 2 * (1.9 * kept / 3 + 0.3 + kept * 0.2))


@pytest.mark.parametrize("name", ["states", "fitnet", "ab", "ft", "sskd"])
def test_a_stage_costs_what_ran(tmp_path, name):
    """Images that the teacher and the student were shown while training, counted by hooks."""
    teacher = tiny_vit()
    s = setting(tmp_path, teacher, random_batches(5, 4), feature_loss=name)
    candidate = Candidate(0.5, {group: size // 2 for group, size in group_sizes(teacher).items()})
    order = {group: list(range(size)) for group, size in group_sizes(teacher).items()}
    ladder = Ladder(teacher=s.card({}), candidates=[candidate], scales=[0.4], order=order)
    student, shown = slice_of_teacher(s, ladder, 0), {"teacher": 0, "student": 0}

    def count(role: str):
        def hook(module, inputs) -> None:
            if len(inputs[0]) > 2:  # else these are the blank images that shapes are read from
                shown[role] += len(inputs[0])

        return hook

    teacher.register_forward_pre_hook(count("teacher"))
    student.model.register_forward_pre_hook(count("student"))
    distill(s, ladder, "distill", [teacher_of(s)], student, epochs=8.0)
    passes = shown["teacher"] + 3 * 0.4 * shown["student"]
    assert s.run.stages["distill"].passes == pytest.approx(passes)
    assert shown["student"] < shown["teacher"] or name not in ("ft", "sskd")


# --- equal compute, and time


def test_a_control_of_equal_compute_costs_what_the_run_costs():
    found = costs(num_train=64, num_selection=32)
    bill = {"score": found.scoring, "joint": found.joint(3), "distill": found.step_down(5, 0.1, [0.5])}
    control = found.equal_compute_epochs(bill)
    # But for the scores, which the control needs too: it starts from the same slice.
    assert found.single_step(control) == pytest.approx(bill["joint"] + bill["distill"])
    assert control > 5


@pytest.mark.parametrize("path", ["amd", "single-step", "mmd"])
def test_evaluations_in_between_are_counted_and_the_control_pays_for_its_own(path):
    """10 images every half epoch, of every model that is trained alone."""
    plain, found = (
        costs(num_train=100, num_selection=10, path=path, **more) for more in ({}, {"keep_best": 0.5})
    )
    assert found.single_step(3) == pytest.approx(plain.single_step(3) + 6 * 10 * 0.1)
    assert found.joint(3) == plain.joint(3)
    bill, extra = bill_of(found), sum(bill_of(found).values()) - sum(bill_of(plain).values())
    # mmd trains eight candidates, and a student below each.
    models = {"amd": 0.1, "single-step": 0.1, "mmd": sum(SCALES[1:]) + 8 * 0.1}[path]
    assert extra == pytest.approx(2 * 10 * models)
    epochs = found.equal_compute_epochs(bill)
    assert found.single_step(epochs) == pytest.approx(sum(bill.values()) - bill["score"])


@pytest.mark.parametrize("name", ["states", "ab", "ft", "sskd"])
@pytest.mark.parametrize("first_epochs", [None, 1.5])
@pytest.mark.parametrize("path", ["amd", "mmd", "takd", "single-step"])
def test_equal_compute_holds_for_every_loss_and_path(name, first_epochs, path):
    options = {"path": path, "feature_loss": name, "first_epochs": first_epochs}
    found = costs([0.1, 0.4, 0.7], num_train=100, num_selection=10, loss=0.15, **options)
    bill = bill_of(found, Epochs(joint=12, distill=8))
    control = found.equal_compute_epochs(bill)
    assert found.single_step(control) == pytest.approx(sum(bill.values()) - bill["score"], rel=1e-12)
    if path == "single-step":
        assert control == pytest.approx(8, rel=1e-12)


def test_a_control_with_a_pretraining_longer_than_the_run_keeps_something_for_the_training():
    found = costs(feature_loss="ab", first_epochs=100)
    assert found.equal_compute_epochs({"score": 3.0, "distill": 13.0}) == pytest.approx(0.05 * 13 / 1.3)


def test_minutes_become_epochs():
    # 12 s + 3 s per epoch of both: 10 minutes hold 40 of each.
    assert epochs_in(10, Seconds(12) + Seconds(3)) == pytest.approx(40)
    assert epochs_in(10, Seconds(15)) == pytest.approx(40)
    assert epochs_in(10, Seconds(15, before=150)) == pytest.approx(30)
    assert epochs_in(1, Seconds(15, before=150)) == pytest.approx(0.2)  # something is left


@pytest.mark.parametrize("score_images", [4, 100])
def test_statistics_that_are_recomputed_are_on_the_bill(score_images):
    """One forward pass of every candidate on the scored images, where the models have BatchNorm."""
    plain = costs(num_train=10, score_images=score_images)
    found = replace(plain, has_statistics=True)
    scored = min(score_images, 10)
    assert found.joint(2) - plain.joint(2) == pytest.approx(scored * sum(SCALES))
    assert found.single_step(2) == plain.single_step(2)
    for path, recomputed in {
        "takd": 0.1,
        "dgkd": 0.1,
        "mmd-os": 0.1,
        "mmd": 8 * 0.1,
        "single-step": 0,
    }.items():
        scales = [0.1, 0.5] if path in ("takd", "dgkd") else SCALES
        without = costs(scales, num_train=10, score_images=score_images, path=path)
        bills = [sum(bill_of(c).values()) for c in (replace(without, has_statistics=True), without)]
        assert bills[0] - bills[1] == pytest.approx(scored * recomputed)
