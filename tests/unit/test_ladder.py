"""Any rung from the files of a run: the same bits as in the run, and one clear line where there is none."""

import pytest
import torch

from stepwell.config.commands import CompressConfig
from stepwell.errors import ModelError
from stepwell.measure.size import num_params
from stepwell.models.card import Architecture, Card, load, save_model
from stepwell.models.ladder import Ladder, load_rung, rungs
from stepwell.pruning.families import find_groups
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units
from stepwell.pruning.units import Candidate
from stepwell.run.run_dir import RunDir, StageResult
from tiny import ARGS, NUM_CLASSES, SPEC, group_sizes, random_images, tiny_vit

RATIOS = [0.1, 0.4, 0.7]


def card(widths: dict[str, int]) -> Card:
    return Card(
        architecture=Architecture(source="timm", name="vit_tiny_patch16_224", args=ARGS),
        widths=widths,
        classes=[str(i) for i in range(NUM_CLASSES)],
        input=SPEC,
    )


def finished_run(path, teacher, teacher_widths: dict[str, int], stage_name: str = "grid") -> SharedWeights:
    """The stages that a ladder needs, with weights as if they had been trained."""
    sizes = {g.name: g.num_units for g in find_groups(teacher)}
    ladder = [
        Candidate(
            r, {name: int(r * n) // (8 if n > 8 else 1) * (8 if n > 8 else 1) for name, n in sizes.items()}
        )
        for r in RATIOS
    ]
    shared = SharedWeights(teacher, find_groups(teacher), dict(teacher.named_parameters()), ladder)
    with torch.no_grad():
        for parameter in shared.parameters.values():
            parameter += 0.1 * torch.randn_like(parameter)
    run = RunDir.open(path, CompressConfig())
    with run.stage(stage_name, Ladder) as stage:
        stage.result = Ladder(teacher=card(teacher_widths), candidates=ladder)
    tensors = {name: p.detach() for name, p in shared.parameters.items()}
    with run.stage("joint", StageResult) as stage:
        stage.result = StageResult(tensors=tensors)
    return shared


def test_runs_of_older_versions_have_their_ladder_under_another_name(tmp_path):
    shared = finished_run(tmp_path, tiny_vit(), {}, "ladder")
    images = random_images(3)
    with torch.no_grad():
        assert torch.equal(load_rung(tmp_path, 0.4)[0](images), shared.extract(1)(images))
    assert rungs(tmp_path) == RATIOS


@pytest.mark.parametrize(("index", "keep_ratio"), list(enumerate(RATIOS))[1:])
def test_a_rung_is_what_was_trained(tmp_path, index, keep_ratio):
    shared = finished_run(tmp_path / "run", tiny_vit(), {})
    model, its_card = load_rung(tmp_path / "run", keep_ratio + 0.004)
    images = random_images(3)
    with torch.no_grad():
        assert torch.equal(model(images), shared.extract(index)(images))
    assert not model.training
    assert its_card.widths == shared.candidates[index].widths
    # And its card is enough to open it again.
    save_model(tmp_path, model, its_card)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(images), model(images))


def test_the_smallest_rung_is_the_student_that_was_handed_out(tmp_path):
    shared = finished_run(tmp_path / "run", tiny_vit(), {})
    student = shared.extract(0)
    with torch.no_grad():
        student.head.bias += 1
    (tmp_path / "run" / "student").mkdir()
    save_model(tmp_path / "run" / "student", student, card(shared.candidates[0].widths))
    images = random_images(3)
    with torch.no_grad():
        assert torch.equal(load_rung(tmp_path / "run", 0.1)[0](images), student(images))
        assert torch.equal(load_rung(tmp_path / "run", 0.4)[0](images), shared.extract(1)(images))


def test_a_student_can_be_compressed_again(tmp_path):
    """Its own widths, an empty layer among them, are part of every rung's card."""
    model = tiny_vit()
    first = {"blocks.0.attn": 2, "blocks.0.mlp": 0, "blocks.1.mlp": 24}
    skeleton = build_skeleton(model, find_groups(model), first)
    student = fill(
        skeleton, leading_units(dict(model.named_parameters()), skeleton, find_groups(model), first)
    )
    shared = finished_run(tmp_path / "run", student.eval(), first)
    rung, its_card = load_rung(tmp_path / "run", 0.7)
    images = random_images(3)
    with torch.no_grad():
        assert torch.equal(rung(images), shared.extract(2)(images))
    assert its_card.widths == {
        **{name: int(0.7 * n) // 8 * 8 for name, n in group_sizes(model).items() if name.endswith("mlp")},
        **{name: 2 for name in group_sizes(model) if name.endswith("attn")},
        "blocks.0.attn": 1,
        "blocks.0.mlp": 0,
        "blocks.1.mlp": 16,
    }
    assert num_params(rung) == num_params(shared.skeletons[2])


def test_the_start_of_a_student_is_not_handed_out_for_it(tmp_path):
    """The smallest rung has been trained jointly, but not distilled yet."""
    finished_run(tmp_path / "run", tiny_vit(), {})
    with pytest.raises(ModelError, match=r"run has no student yet, .*with the same compress command"):
        load_rung(tmp_path / "run", 0.1)


def test_what_is_not_there_is_said_in_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"has no trained ladder \(yet\): run stepwell compress on it"):
        load_rung(tmp_path, 0.1)
    assert rungs(tmp_path) == []
    finished_run(tmp_path / "run", tiny_vit(), {})
    assert rungs(tmp_path / "run") == RATIOS
    with pytest.raises(ModelError, match=r"has no rung at keep 0\.5; there are: 0\.1, 0\.4, 0\.7"):
        load_rung(tmp_path / "run", 0.5)
