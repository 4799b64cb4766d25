"""`benchmarks/record.py`: cells of one folder are of one teacher."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest

from stepwell.data.spec import InputSpec
from stepwell.errors import RunDirError
from stepwell.models.card import Architecture, Card, save_model
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
        (lambda given: segmentation.trained(given, given.files), r"another folder for cells \(--cells\)"),
        (scalekd.trained_teacher, "move these cells away"),
    ],
)
def test_no_teacher_is_trained_that_the_cells_would_not_take(tmp_path, train, way_out):
    """The cells are in the repository, and what has trained their teacher is not."""
    given = Namespace(files=tmp_path, out=tmp_path / "out", cells=segmentation.CELLS, device="cpu")
    with pytest.raises(SystemExit, match=rf"give its folder \(--teacher\), or {way_out}"):
        train(given)
    assert not given.out.exists()
