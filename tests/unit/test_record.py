"""`benchmarks/record.py`: cells of one folder are of one teacher."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest

from stepwell.data.spec import InputSpec
from stepwell.errors import RunDirError
from stepwell.measure.size import num_params
from stepwell.models.card import Architecture, Card, save_model
from stepwell.models.segmenters import build
from tiny import tiny_vit

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import scalekd
import segmentation
from record import one_teacher

CARD = Card(
    architecture=Architecture(source="factory", name="tiny"),
    widths={},
    classes=list("abcde"),
    input=InputSpec((16, 16), 3, (0.5,) * 3, (0.5,) * 3),
    provenance={"data_fingerprint": "some images"},
)


def test_cells_are_of_one_teacher_and_its_images(tmp_path):
    for folder, seed, images in (("a", 0, "some images"), ("b", 1, "some images"), ("c", 0, "others")):
        card = CARD.model_copy(update={"provenance": {"data_fingerprint": images}})
        (tmp_path / folder).mkdir()
        save_model(tmp_path / folder, tiny_vit(seed=seed), card)
    one_teacher(tmp_path / "a", tmp_path / "cells")
    one_teacher(tmp_path / "a", tmp_path / "cells")
    for other in ("b", "c"):
        with pytest.raises(RunDirError, match=r"of another teacher, or of other images, than .*--teacher"):
            one_teacher(tmp_path / other, tmp_path / "cells")


@pytest.mark.parametrize(
    ("train", "way_out"),
    [
        (lambda given: segmentation.trained(given, given.files), r"give its folder .* for cells \(--cells\)"),
        (scalekd.trained_teacher, r"give its folder \(--teacher\), or move these cells away"),
    ],
)
def test_no_teacher_is_trained_that_the_cells_would_not_take(tmp_path, train, way_out):
    """The cells are in the repository, and what has trained their teacher is not."""
    given = Namespace(files=tmp_path, out=tmp_path / "out", cells=segmentation.CELLS, device="cpu")
    with pytest.raises(SystemExit, match=way_out):
        train(given)
    assert not given.out.exists()


def test_the_teachers_parameters_are_those_of_its_model():
    pytest.importorskip("segmentation_models_pytorch")
    args = {**segmentation.TEACHER["model_args"], "num_classes": len(segmentation.CLASSES)}
    assert num_params(build(segmentation.TEACHER["model"], args)) == segmentation.TEACHER_PARAMS


def test_words_beside_the_table_follow_from_the_cells():
    cells = {"labels": (50.0, 2.0), "single-step": (51.0, 2.0), "amd": (52.0, 0.5)}
    assert segmentation._in_words(0.3, told(cells)) == (
        "At 0.3 no arm is clearly ahead of another: 50.0 to 52.0, with 95 % intervals over images of about "
        "±1.5; AMD's 52.0 stands against single-step (+1.0) and labels (+2.0)."
    )
    apart = {"labels": (40.0, 1.0), "single-step": (44.0, 1.0)}
    assert "At 0.15 single-step is clearly ahead of labels" in segmentation._in_words(0.15, told(apart))
    assert segmentation._in_words(0.15, told({"kd": (40.0, 1.0)})) == ""
    rest = [arm for arm in (*segmentation.ARMS, segmentation.EQUAL_COMPUTE) if arm not in cells]
    found = {(0.3, arm): of_arm for arm, of_arm in told(cells).items()}
    missing = segmentation._not_run(found)
    assert missing.startswith(f"Not run: {', '.join(rest)} at 0.3; labels, kd, dist, ")
    assert missing.endswith(" at 0.15; all 3 seeds of any arm.")


def told(cells: dict[str, tuple[float, float]]) -> dict[str, list[dict]]:
    return {arm: [{"top1": t, "top1_interval": (t - h, t + h)}] for arm, (t, h) in cells.items()}
