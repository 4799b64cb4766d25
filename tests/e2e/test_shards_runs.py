"""A folder and the same images in tar shards come to the same student, also where the run was killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_world import (
    MODEL,
    TIMM,
    StopAt,
    Stopped,
    assert_same_weights,
    figures,
    stepwell,
    student_weights,
    watched,
    write_shards,
)

from stepwell.data.shards import INDEX


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return write_shards(data, tmp_path_factory.mktemp("shards"))


def test_a_killed_run_on_shards_ends_as_one_on_the_folder(reference, words, data, shards, tmp_path, quick):
    on_shards = [str(shards) if word == str(data) else word for word in words]
    with pytest.raises(Stopped):
        watched(StopAt("distill", 2), *on_shards[1:])
    assert (shards / "train" / INDEX).is_file()
    stepwell(*on_shards)
    assert_same_weights(student_weights(tmp_path / "out"), student_weights(reference))
    ours, theirs = figures(tmp_path / "out"), figures(reference)
    assert ours["data"].pop("source") == str(shards)
    assert theirs["data"].pop("source") == str(data)
    assert ours == theirs


def test_workers_read_shards(data, shards, tmp_path):
    """Decoded anew in every epoch, by processes."""
    words = ("--model", TIMM, *MODEL, "--no-pretrained", "--augment", "resized-crop", "--epochs", 1)
    for name, images in (("folder", data), ("shards", shards)):
        stepwell("train", *words, "--data", images, "--out", tmp_path / name, "--workers", 2)
    ours, theirs = (
        load_file(tmp_path / name / "teacher" / "model.safetensors") for name in ("shards", "folder")
    )
    assert_same_weights(ours, theirs)


def test_a_broken_shard_stops_the_command(compress_fails, tmp_path):
    broken = tmp_path / "images" / "train" / "0.tar"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no tar file")
    assert f"cannot read shard {broken} (" in compress_fails(data=tmp_path / "images")
