"""A training that was stopped and resumes ends with the very weights and log of one that was not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from stepwell.config.commands import CompressConfig
from stepwell.config.files import to_yaml
from stepwell.config.options import LossOptions, TrainingOptions
from stepwell.errors import RunDirError
from stepwell.losses.distillation import make_distillation
from stepwell.losses.output import Output
from stepwell.run import checkpoint
from stepwell.run.run_dir import RunDir, Stage
from stepwell.training.lesson import Lesson
from stepwell.training.loop import Course, Trained, fit
from tiny import NUM_CLASSES, FixedTrain, no_autocast, pair, random_batches

STEPS_PER_EPOCH, EPOCHS = 5, 5.0


@pytest.fixture(autouse=True)
def after_every_step(monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(checkpoint, "TIMES_AS_LONG", 0)


class Stopped(BaseException):
    pass


class Model(nn.Module):
    """With statistics, with a memory that no gradient moves, and with random numbers in every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(random_batches(1, 1)[0].images.numel(), 6),
            nn.BatchNorm1d(6),
            nn.Dropout(0.3),
        )
        self.head = nn.Linear(6, NUM_CLASSES)
        self.register_buffer("memory", torch.zeros(NUM_CLASSES))


class Classify:
    """A step that stops the training at one of its calls."""

    def __init__(self, model: Model, stop_at: int | None = None) -> None:
        self.model, self.stop_at, self.seen = model, stop_at, []

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def __call__(self, batch, step, progress):
        if step == self.stop_at:
            raise Stopped
        self.seen.append((step, round(progress, 6), float(batch.images[0, 0, 0, 0])))
        logits = self.model.head(self.model.body(batch.images)) + self.model.memory
        loss = F.cross_entropy(logits, batch.labels)
        loss.backward()
        self.model.memory.mul_(0.9).add_(0.1 * logits.detach().mean(dim=0))
        return {"loss": loss.detach()}


def feed() -> FixedTrain:
    return FixedTrain(random_batches(STEPS_PER_EPOCH, 6))


def train(step: Classify, file: Path | None, epochs: float = EPOCHS, **options) -> Trained:
    values = TrainingOptions(**{"weight_decay": 0.1, "clip_norm": 1.0, **options})
    course = Course("test", step.parameters(), epochs, lr=0.05, modules=[step.model], checkpoint=file)
    return fit(course, step, feed(), values)


def content(file: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The record and the tensors of a checkpoint."""
    with safe_open(file, "pt") as saved:
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        return json.loads(saved.metadata()["record"]), tensors


def same(ours: Model, theirs: Model) -> None:
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize("stop_at", [1, 4, 5, 10, 13, 24])
@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd"}, {"schedule": "cosine-restarts"}])
def test_it_resumes_to_the_very_same_end(tmp_path, stop_at, options):
    """Within an epoch, at its end, within a stretch of the log, at its end, before the last step."""
    undisturbed = Classify(Model())
    expected = train(undisturbed, None, **options)
    file = tmp_path / "stage" / "main.safetensors"
    first = Classify(Model(), stop_at)
    with pytest.raises(Stopped):
        train(first, file, **options)
    second = Classify(Model())
    found = train(second, file, **options)
    same(second.model, undisturbed.model)
    assert first.seen + second.seen == undisturbed.seen
    assert (found.step, found.losses, found.lr) == (expected.step, expected.losses, expected.lr)
    assert (found.num_steps, found.epochs) == (expected.num_steps, expected.epochs)


def test_stopped_again_and_again(tmp_path):
    undisturbed = Classify(Model())
    train(undisturbed, None)
    for stop_at in (3, 4, 17):
        with pytest.raises(Stopped):
            train(Classify(Model(), stop_at), tmp_path / "stage" / "main.safetensors")
    last = Classify(Model())
    train(last, tmp_path / "stage" / "main.safetensors")
    assert [step for step, *_ in last.seen] == list(range(17, 25))
    same(last.model, undisturbed.model)


def test_stopped_after_the_last_step(tmp_path, monkeypatch):
    undisturbed = Classify(Model())
    expected = train(undisturbed, None)

    written = []

    def write_and_stop(*paths):
        replace(*paths)
        written.append(paths)
        if len(written) == EPOCHS * STEPS_PER_EPOCH:
            raise Stopped

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", write_and_stop)
        with pytest.raises(Stopped):
            train(Classify(Model()), tmp_path / "stage" / "main.safetensors")
    step = Classify(Model())
    found = train(step, tmp_path / "stage" / "main.safetensors")
    assert not step.seen
    same(step.model, undisturbed.model)
    assert found.losses == expected.losses


def test_without_the_optimizers_state_it_would_not(tmp_path):
    """So the tests above can fail."""
    undisturbed = Classify(Model())
    train(undisturbed, None)
    file = tmp_path / "stage" / "main.safetensors"
    with pytest.raises(Stopped):
        train(Classify(Model(), 10), file)
    record, tensors = content(file)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer/")}
    assert len(rest) < len(tensors)
    checkpoint.save_file(rest, file, {"record": json.dumps(record)})
    second = Classify(Model())
    train(second, file)
    assert not torch.equal(second.model.head.weight, undisturbed.model.head.weight)


def test_it_resumes_for_as_many_steps_as_it_was_begun_with(tmp_path):
    """`--minutes` is measured again in each call."""
    file = tmp_path / "stage" / "main.safetensors"
    with pytest.raises(Stopped):
        train(Classify(Model(), 10), file)
    step = Classify(Model())
    trained = train(step, file, epochs=99.0)
    assert trained.num_steps == EPOCHS * STEPS_PER_EPOCH


@pytest.mark.parametrize("stop_in", ["first", "main"])
def test_the_training_that_comes_first_is_not_repeated(tmp_path, stop_in):
    options = LossOptions(feature_loss="fsp", first_epochs=2.0)  # trains the student first
    example = Output(torch.zeros(2, 2), [torch.zeros(2, 3, 4, 4)] * 2, torch.zeros(2, 3))

    def both(first: Classify, main: Classify, folder: Path) -> None:
        loss = make_distillation(options, pair(example, example), seed=0)
        courses = Lesson([], [loss], no_autocast()).courses(
            Stage("test", folder), main.parameters(), options,
            epochs=3.0, lr=0.05, no_decay=frozenset(), modules=[main.model],
        )  # fmt: skip
        for course in courses:
            step = first if loss.phase == "pretraining" else main
            fit(course, step, feed(), TrainingOptions(weight_decay=0.1))

    def steps(stop_first: int | None = None, stop_main: int | None = None) -> tuple[Classify, Classify]:
        model = Model()
        return Classify(model, stop_first), Classify(model, stop_main)

    undisturbed = steps()
    both(*undisturbed, tmp_path / "undisturbed")
    with pytest.raises(Stopped):
        both(*(steps(7) if stop_in == "first" else steps(None, 7)), tmp_path / "stopped")
    first, main = steps()
    both(first, main, tmp_path / "stopped")
    same(main.model, undisturbed[1].model)
    assert [step for step, *_ in first.seen] == ([7, 8, 9] if stop_in == "first" else [])
    assert [step for step, *_ in main.seen] == list(range(0 if stop_in == "first" else 7, 15))


def test_moments_are_laid_out_as_their_parameter(tmp_path):
    """Files hold plain tensors, and fused optimizers on a GPU refuse moments with other strides."""
    weight = nn.Parameter(torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    moments = {}
    for again in (False, True):
        optimizer = torch.optim.AdamW([weight], fused=True)
        keep = checkpoint.Checkpoint(tmp_path / "x.safetensors", {"weight": weight}, [])
        if again:
            assert keep.restore(optimizer) is not None
        else:
            weight.grad = torch.randn_like(weight)
            optimizer.step()
            keep.save(optimizer, {"step": 1}, {})
        moments[again] = optimizer.state[weight]["exp_avg"]
    assert moments[True].stride() == weight.stride()
    assert torch.equal(moments[True], moments[False])


def test_a_module_may_put_another_tensor_in_a_buffers_place(tmp_path):
    """`self.memory = ...`, as in many a loss of one's own."""

    class Replacing(Classify):
        def __call__(self, *words):
            losses = super().__call__(*words)
            self.model.memory = self.model.memory * 1.0
            return losses

    undisturbed = Replacing(Model())
    train(undisturbed, None)
    with pytest.raises(Stopped):
        train(Replacing(Model(), 10), tmp_path / "stage" / "main.safetensors")
    second = Replacing(Model())
    train(second, tmp_path / "stage" / "main.safetensors")
    same(second.model, undisturbed.model)


def test_numbers_that_are_drawn_do_not_depend_on_what_was_drawn_before():
    first, second = Classify(Model()), Classify(Model())
    train(first, None)
    torch.rand(7)
    train(second, None)
    same(second.model, first.model)


def test_what_layers_share_and_shapes_alone_are_kept_once_or_not_at_all():
    body = nn.Linear(2, 2)
    tied = nn.ModuleList([body, body, nn.Linear(2, 2, device="meta"), nn.BatchNorm1d(2)])
    tied[3].register_buffer("constant", torch.ones(1).expand(4))
    found = checkpoint.changed_by_training({"0.weight": body.weight}, [tied])
    names = ["0.bias", *(f"3.{name}" for name in ("weight", "bias", "running_mean", "running_var"))]
    assert list(found) == ["0.weight", *(f"module 0: {name}" for name in names),
                           "module 0: 3.num_batches_tracked"]  # fmt: skip
    assert not any(tensor.is_meta for tensor in found.values())


# --- the file


def test_it_is_written_once_a_minute_and_seldom_if_that_takes_long(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 60.0)
    monkeypatch.setattr(checkpoint, "TIMES_AS_LONG", 20)
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    weight = nn.Parameter(torch.zeros(2))
    keep = checkpoint.Checkpoint(tmp_path / "stage" / "main.safetensors", {"weight": weight}, [])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    written = []

    def slow(*arguments):
        written.append(now[0])
        now[0] += 10.0
        save(*arguments)

    save = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", slow)
    while now[0] < 600:
        if keep.is_due():
            keep.save(optimizer, {}, {})
        now[0] += 1
    assert written == [60.0, 270.0, 480.0]


def test_a_damaged_file_is_one_clear_line(tmp_path):
    file = tmp_path / "stage" / "main.safetensors"
    with pytest.raises(Stopped):
        train(Classify(Model(), 10), file)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(RunDirError, match=r"main.safetensors is damaged.*; remove it"):
        train(Classify(Model()), file)


def test_half_a_file_never_has_the_name(tmp_path, monkeypatch):
    file = tmp_path / "stage" / "main.safetensors"
    with pytest.raises(Stopped):
        train(Classify(Model(), 10), file)
    before = file.read_bytes()

    def fails(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    with pytest.raises(RunDirError, match="No space left"):
        train(Classify(Model()), file)
    assert file.read_bytes() == before
    assert [left.name for left in file.parent.iterdir()] == [file.name]


def test_a_stage_counts_the_time_of_all_its_calls_and_leaves_nothing(tmp_path):
    run = RunDir(tmp_path)
    (tmp_path / "stages").mkdir()
    file = run.checkpoints("joint") / "main.safetensors"
    with pytest.raises(Stopped):
        train(Classify(Model(), 10), file)
    record, tensors = content(file)
    checkpoint.save_file(tensors, file, {"record": json.dumps({**record, "seconds": 1000.0})})
    with run.stage("joint", Trained) as stage:
        assert stage.is_new
        stage.result = train(Classify(Model()), file)
    assert 1000 < stage.result.seconds < 1100
    assert run.stages["joint"].seconds == stage.result.seconds
    assert [path.name for path in (tmp_path / "stages").iterdir()] == ["joint"]
    # Killed between finishing the stage and removing its checkpoints.
    file.parent.mkdir()
    (tmp_path / "config.yaml").write_text(to_yaml(CompressConfig()))
    RunDir.open(tmp_path, CompressConfig())
    assert [path.name for path in (tmp_path / "stages").iterdir()] == ["joint"]
