"""What only a GPU can show; each test is left out, by name, where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import get_args

import pytest
import torch
from small_world import KEEP, QUICK, StopAt, Stopped, figures, result_of, stepwell, student_weights, watched

from stepwell import load
from stepwell.config.loss_facts import FEATURE_LOSSES, LOGIT_LOSSES
from stepwell.config.path_options import Way
from stepwell.measure.size import num_params

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

SLICING = [path for path in get_args(Way) if path not in ("scalekd", "curriculum")]
# ScaleKD is for students of another architecture alone.
ON_STATES = [n for n, facts in FEATURE_LOSSES.items() if not facts.between_slices and facts.masks != "only"]
ON_LOGITS = [n for n, facts in LOGIT_LOSSES.items() if facts.masks != "only"]
GPU = ("--device", "cuda", "--task-weight", "1")


@pytest.fixture
def words(teacher, data, tmp_path):
    return ("--teacher", teacher, "--data", data, "--out", tmp_path / "out", *QUICK, *GPU)


@pytest.mark.parametrize("path", SLICING)
def test_every_path_in_bf16(words, tmp_path, quick, path):
    stepwell("compress", *words, "--path", path, "--precision", "bf16")
    result = result_of(tmp_path / "out")
    assert result.hardware["training device"] == torch.cuda.get_device_name()
    assert 0 < result.student.num_params < result.teacher.num_params
    assert all(weight.isfinite().all() for weight in student_weights(tmp_path / "out").values())


@pytest.mark.parametrize("loss", ON_LOGITS)
def test_every_loss_on_logits_in_bf16(words, tmp_path, quick, loss):
    stepwell("compress", *words, "--logit-loss", loss, "--precision", "bf16")


@pytest.mark.parametrize("loss", ON_STATES)
def test_every_loss_on_states_in_bf16(words, tmp_path, quick, loss):
    stepwell("compress", *words, "--feature-loss", loss, "--precision", "bf16")


@pytest.mark.parametrize(
    "options",
    [
        ("--precision", "fp16"),
        ("--precision", "tf32"),
        ("--precision", "bf16", "--compile"),
        ("--precision", "bf16", "--gradient-checkpointing"),
        ("--precision", "bf16", "--cache-teacher", "1", "--feature-weight", "0"),
        ("--precision", "fp16", "--cache-teacher", "1", "--cache-top", "2", "--feature-weight", "0"),
        ("--precision", "bf16", "--shard-optimizer"),
    ],
    ids=" ".join,
)
def test_what_makes_training_faster_or_smaller(words, tmp_path, quick, options):
    stepwell("compress", *words, *options)
    assert all(weight.isfinite().all() for weight in student_weights(tmp_path / "out").values())
    assert torch.get_float32_matmul_precision() == "highest"  # outside of trainings


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize("options", [(), ("--shard-optimizer", "--shard-teacher")], ids=["plain", "shards"])
def test_two_gpus_come_to_what_one_comes_to(words, tmp_path, quick, options):
    """Over nccl; in fp32, to what another order of sums leaves."""
    stepwell("compress", *words)
    out = tmp_path / "two"
    given = (*words[:4], "--out", out, *QUICK, "--task-weight", "1", *options)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "-m", "stepwell", "compress")
    subprocess.run([sys.executable, *map(str, (*launcher, *given))], check=True, timeout=600)
    ours, theirs = student_weights(out), student_weights(tmp_path / "out")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("path", [("amd",), ("single-step", "--repair")])
def test_a_narrower_stream(words, tmp_path, quick, path):
    stepwell("compress", *words, "--cut", "all", "--precision", "bf16", "--path", *path)
    assert load(tmp_path / "out").embed_dim < 24


@pytest.mark.parametrize("path", ["amd", "scalekd"])
def test_student_of_another_architecture(words, tmp_path, quick, path):
    stepwell("compress", *words, "--student", "test_resnet", "--precision", "bf16", "--path", path)


def test_first_training_equals_that_of_the_cpu(teacher, data, tmp_path, quick):
    """The same images, order and starting weights: after a few steps in fp32 the losses agree."""
    logs = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        stepwell("compress", "--teacher", teacher, "--data", data, "--out", out, *QUICK, "--device", device)
        files = {name: out / "stages" / name / "result.json" for name in ("grid", "distill")}
        stages = {name: json.loads(file.read_text())["result"] for name, file in files.items()}
        logs[device] = stages["distill"]["losses"]["loss"]
        logs[device, "grid"] = stages["grid"]
    assert logs["cuda", "grid"] == logs["cpu", "grid"]
    assert logs["cuda"] == pytest.approx(logs["cpu"], rel=0.05)


def test_stopped_and_resumed(words, tmp_path, quick):
    """GPU arithmetic may differ in the last bits from one run to the next; the course is the same."""
    with pytest.raises(Stopped):
        watched(StopAt("distill", 4), *words)
    stepwell("compress", *words)
    resumed = figures(tmp_path / "out")
    again = tmp_path / "again"
    stepwell("compress", *words[:4], "--out", again, *QUICK, *GPU)
    unbroken = figures(again)
    assert resumed["student"]["num_params"] == unbroken["student"]["num_params"]
    ours, theirs = student_weights(tmp_path / "out"), student_weights(again)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3)


def test_delivered_with_everything(words, tmp_path):
    """With ONNX files, times and a report; and what was trained on the GPU loads on the CPU."""
    out = tmp_path / "out"
    stepwell("compress", *words, "--precision", "bf16", "--control", "equal_compute")
    result = result_of(out)
    student = load(out / "student")
    assert next(student.parameters()).device.type == "cpu"
    assert num_params(student) == result.student.num_params
    assert (out / "student/model.onnx").stat().st_size > 0
    assert result.keep_ratio == KEEP
    for command in (("inspect", out), ("export", out, "--keep", "0.4"), ("doctor", "--teacher", words[1])):
        stepwell(*command)
