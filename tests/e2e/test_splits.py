"""Which images decide what: three splits that share none, and images without labels or folders."""

from __future__ import annotations

import pytest
import torch
from small_world import (
    CLASSES,
    QUICK,
    Recorder,
    config_of,
    data_of,
    result_of,
    stepwell,
    watched,
    write_images,
)

from stepwell.cli import main
from stepwell.data.batches import EvalBatches
from stepwell.data.images import ImageSet
from stepwell.data.splits import resolve_data
from stepwell.models.card import read_card
from stepwell.paths.begin import begin

pytestmark = pytest.mark.usefixtures("no_pickle")


def identities(images: ImageSet) -> set[str]:
    return {images.reader.identity(key) for key in images.keys}


def test_no_image_is_in_two_splits(finished):
    data = data_of(finished)
    train, selection, test = (identities(images) for images in (data.train, data.selection, data.test))
    assert not train & selection
    assert not train & test
    assert not selection & test
    result = result_of(finished).data
    assert (len(train), len(selection), len(test)) == (
        result.num_train,
        result.num_selection,
        result.num_test,
    )


def test_each_stage_is_shown_its_own_images_only(data, teacher, tmp_path, quick):
    """Weights see training images, the choice sees selection images, and only the end the test images."""
    out, seen = tmp_path / "out", Recorder()
    words = ("--teacher", teacher, "--data", data, "--out", out, *QUICK)
    images = resolve_data(config_of(*words))
    # All of them in one batch: a last one that is not full would be left out.
    watched(seen, *words, "--batch-size", len(images.train))
    splits = {"training": images.train, "selection": images.selection, "test": images.test}
    shown: dict[str, set[str]] = {}
    for (stage, split), indices in seen.shown.items():
        of_split = splits[split]
        names = {of_split.reader.identity(of_split.keys[i]) for i in indices}
        shown.setdefault(stage, set()).update(names)
    train, selection, test = (identities(images) for images in splits.values())
    assert shown.keys() == {"score", "joint", "select", "distill", "deliver", ""}
    assert shown["score"] == shown["joint"] == shown["distill"] == train
    assert shown["select"] == selection
    assert shown["deliver"] == selection | test
    assert shown[""] <= test  # the few on which the ONNX file is checked
    assert_no_training_repeats_another(seen, len(images.train))


def assert_no_training_repeats_another(seen: Recorder, num_images: int) -> None:
    joint, last = (seen.shown[stage, "training"][:num_images] for stage in ("joint", "distill"))
    assert sorted(joint) == sorted(last) == list(range(num_images))
    assert joint != last


def test_what_is_shown_by_the_name_of_a_split_are_its_images(data, teacher, tmp_path):
    """Compared pixel by pixel, for every kind of batches that a stage can take."""
    seen = Recorder()
    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "out", *QUICK)
    s = begin(config_of(*words, "--augment", "none", "--score-images", 20), observer=seen, exports=False)
    images = data_of(tmp_path / "out")
    for split, batches, of_split in (
        ("training", s.train.epoch(0), images.train),
        ("training", s.scored, images.train),
        ("selection", s.selection, images.selection),
        ("test", s.test, images.test),
    ):
        seen.shown.clear()
        pixels = torch.cat([batch.images for batch in batches])
        ((key, indices),) = seen.shown.items()
        assert key == ("", split)
        assert len(set(indices)) == len(indices) == len(pixels)
        plain = torch.cat([b.images for b in EvalBatches(of_split, s.spec, s.config, s.device)])
        assert torch.equal(pixels, plain[indices])


def test_a_batch_of_scored_images_holds_all_classes(data, teacher, tmp_path):
    """In the order of the folders it would hold one, and BatchNorm statistics would miss what is between."""
    words = ("--teacher", teacher, "--data", data, "--out", tmp_path / "out", *QUICK)
    s = begin(config_of(*words), exports=False)
    batches = [batch.labels.unique().tolist() for batch in s.scored if len(batch.labels) == 16]
    assert batches == [[0, 1, 2]] * 3


def test_the_teacher_was_not_trained_on_the_selection_images(finished, teacher):
    assert result_of(finished).data.teacher_saw_selection == "no"
    provenance = read_card(teacher / "teacher").provenance
    assert provenance["data_fingerprint"] == data_of(finished).fingerprint


# --- images of every kind


def test_images_without_labels(teacher, tmp_path, quick, capsys):
    images = write_images(tmp_path / "images", 60, seed=0, classes=())
    out = tmp_path / "out"
    words = ["compress", "--teacher", str(teacher), "--data", str(images), "--out", str(out), *QUICK]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "--task-weight 0" in error
    assert not out.exists()
    stepwell(*words, "--task-weight", "0")
    result = result_of(out)
    assert result.data.labels == "teacher"
    assert result.teacher.quality == 100
    assert any("no labels" in note for note in result.notes)
    assert read_card(out / "student").classes == list(CLASSES)
    assert set(result.histories["distill"].losses) == {"loss", "logit", "feature"}


def test_one_folder_of_classes_is_split_by_hash(data, teacher, tmp_path, quick):
    out = tmp_path / "out"
    stepwell("compress", "--teacher", teacher, "--data", data / "train", "--out", out, *QUICK)
    result = result_of(out)
    assert result.data.test_from == "a tenth by hash of the file name"
    assert result.data.num_train + result.data.num_selection + result.data.num_test == 60
    # The teacher has learnt from images that are test images now.
    assert result.data.teacher_saw_selection != "no"
