"""What each of two processes runs for test_processes.py: all checks in one launch, since importing torch
takes seconds. RANK and its like are in the environment; the words are the folder of results, teacher, images,
and the names of checks where not all are asked for.

Every check runs in both processes, which must come to the same place; what it finds goes to OUT/RANK.json.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from small_world import MODEL, QUICK, TIMM, StopAt, Stopped, config_of, stepwell, watched, write_shards
from torch import Tensor, nn

import conftest
from masks import write_masks
from stepwell.cli import main
from stepwell.config.commands import CompressConfig, TrainConfig
from stepwell.config.files import make_config
from stepwell.data.batches import Batch, EvalBatches, TrainBatches, images_per_process, part_of_batch
from stepwell.data.images import ImageSet
from stepwell.data.spec import InputSpec
from stepwell.data.splits import resolve_data
from stepwell.errors import ConfigError, DataError, LostProcessError
from stepwell.losses.choose import Pair
from stepwell.losses.distillation import make_distillation
from stepwell.losses.observe import Observed
from stepwell.losses.output import Output, Target, TrainingImages
from stepwell.measure.size import num_params
from stepwell.models.card import load, read_card
from stepwell.models.timm_models import create_timm
from stepwell.paths.from_labels import LabelStep
from stepwell.pruning.families import find_groups
from stepwell.run import checkpoint, distributed, graphs, processes
from stepwell.run.device import scaler_of
from stepwell.run.distributed import (
    LONGEST_EXCHANGE,
    LONGEST_WAIT,
    copy_from_main,
    from_main,
    from_main_with_tensors,
    joined,
    mean_gradients,
    talking,
    whole,
)
from stepwell.run.observer import Observer, Split
from stepwell.run.processes import alone, is_main, rank, world
from stepwell.run.sharded import Sharded
from stepwell.run.sharded_model import guard, in_parts, num_held
from stepwell.stages.score import importance_by_gradient
from stepwell.tasks import classification, embedding, multilabel, segmentation
from stepwell.tasks.task import task_of
from stepwell.training.answers import Answers, packed
from stepwell.training.handed_on import performance_of
from stepwell.training.loop import Course, fit
from stepwell.training.optimizer import make_optimizer, make_scheduler
from stepwell.training.recomputed import recomputed_blocks
from stepwell.training.statistics import recalibrate

CPU = torch.device("cpu")
MASK_SPEC = InputSpec((16, 24), 3, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "squash")
SGD = ("--optimizer", "sgd", "--lr", 0.05, "--weight-decay", 0.01)
SHARD = ("--shard-optimizer",)  # in a single process it does nothing
PARTS = ("--shard-teacher",)  # likewise
# What two processes must come to as one does.
RUNS: dict[str, tuple[object, ...]] = {
    "amd": (*QUICK, *SGD, "--control", "equal_epochs"),
    "mmd": (*QUICK, *SGD, "--path", "mmd", *PARTS),
    "memory": (*QUICK, *SGD, "--path", "single-step", "--feature-loss", "crd", "--logit-loss", "dist"),
    "relations": (
        *QUICK, *SGD, "--path", "single-step", "--feature-loss", "rkd", "--keep-best", 0.5, *SHARD, *PARTS
    ),
    "answers": (
        *QUICK, *SGD, "--feature-weight", 0, "--cache-teacher", 1, "--cache-top", 2, *PARTS,
        "--control", "equal_epochs",
    ),
}  # fmt: skip
TRAIN = ("--model", TIMM, *MODEL, "--no-pretrained", "--epochs", 3, "--batch-size", 16, *SGD)
MIXED = (
    *TRAIN, "--mixup", 0.8, "--cutmix", 1.0, "--accumulate", 2, "--ema", 0.9, "--random-erasing", 0.5, *SHARD
)  # fmt: skip
STOPPED_AT = ("distill", 4)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def check_who_is_who(out: Path, teacher: Path, data: Path) -> None:
    assert world() == 2
    assert joined([rank(), "x"]) == [0, "x", 1, "x"]
    assert from_main(lambda: (rank(), world(), "first")) == (0, 1, "first")  # alone, while it looks
    with alone():
        assert (rank(), world(), joined([3])) == (0, 1, [3])
    assert is_main() == (rank() == 0)


def check_one_that_hangs_is_noticed(out: Path, teacher: Path, data: Path) -> None:
    """By the clock of an exchange; while the first one works by itself, the others wait far longer."""
    host, waiting = (group._get_backend(CPU) for group in distributed._on_hosts())
    found = [group.options._timeout for group in (host, waiting)]  # pyright: ignore[reportAttributeAccessIssue]
    assert found == [LONGEST_EXCHANGE, LONGEST_WAIT]
    short = dist.new_group(backend="gloo", timeout=timedelta(seconds=1))
    if is_main():
        with pytest.raises(LostProcessError, match="another one has ended or does not answer"), talking():
            dist.all_reduce(torch.ones(1), group=short)
    from_main(lambda: None)  # the other one, which took no part, goes on after that


def check_an_error_of_the_first_is_one_of_all(out: Path, teacher: Path, data: Path) -> None:
    def fail() -> None:
        raise ConfigError("no such thing")

    with pytest.raises(ConfigError, match="no such thing"):
        from_main(fail)


def check_tensors_of_every_kind_are_told(out: Path, teacher: Path, data: Path) -> None:
    sent = {
        "scalar": torch.tensor(3),
        "flags": torch.tensor([True, False]),
        "half": torch.tensor([[1.5, 2.5]], dtype=torch.bfloat16),
        "nothing": torch.zeros(0, 4),
        "across": torch.arange(6.0).view(2, 3).T,
    }
    value, got = from_main_with_tensors(lambda: ("told", sent if is_main() else {}))
    assert value == "told"
    assert list(got) == list(sent)
    for name, tensor in sent.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


def check_a_gradient_of_one_process_counts_for_its_part(out: Path, teacher: Path, data: Path) -> None:
    """As in the whole batch, of which half the images do not use the parameter."""
    used, unused, half_used = (nn.Parameter(torch.ones(2)) for _ in range(3))
    used.grad = torch.full((2,), float(rank()))
    half_used.grad = torch.full((2,), 4.0) if rank() else None
    mean_gradients([used, unused, half_used])
    assert used.grad.tolist() == [0.5, 0.5]
    assert unused.grad is None
    assert half_used.grad is not None
    assert half_used.grad.tolist() == [2.0, 2.0]


def check_parts_are_those_of_pairs_where_images_are_mixed(out: Path, teacher: Path, data: Path) -> None:
    assert part_of_batch(8).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]][rank()]
    assert part_of_batch(8, mixes=True).tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]][rank()]


def check_a_batch_that_cannot_be_shared_is_refused(out: Path, teacher: Path, data: Path) -> None:
    words = ("--teacher", teacher, "--data", data, "--out", out / "none")
    for size, more, part in ((15, (), "equal parts: give a multiple of 2"), (6, ("--mixup", 1), "of 4")):
        with pytest.raises(ConfigError, match=part):
            watched(StopAt("score"), *words, *QUICK, "--batch-size", size, *more)
    with pytest.raises(ConfigError, match="a batch has at most the 53 training images"):
        images_per_process(make_config(CompressConfig, {"batch_size": 64}), 53)


def check_views_lie_behind_each_other(out: Path, teacher: Path, data: Path) -> None:
    part = torch.tensor([0.0, 1.0, 10.0, 11.0]) + 2 * rank()  # two views of two images
    assert whole(part, views=2).tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


def check_every_loss_is_that_of_the_whole_batch(out: Path, teacher: Path, data: Path) -> None:
    for logit, feature in (
        ("kd", "states"), ("dkd", "at"), ("dist", "sp"), ("taid", "cc"), ("pld", "rkd"), ("kd", "pkt"),
        ("kd", "crd"), ("kd", "sskd"), ("kd", "vid"), ("kd", "nst"), ("kd", "ofa"), ("kd", "fsp"),
    ):  # fmt: skip
        theirs = _three_steps(logit, feature)
        with alone():
            ours = _three_steps(logit, feature)
        for name, gradient in theirs.items():
            torch.testing.assert_close(gradient, ours[name], rtol=2e-4, atol=1e-5, msg=f"{feature}: {name}")


def _three_steps(logit: str, feature: str) -> dict[str, Tensor]:
    """Gradients of a tiny student and of the loss after three steps, and what the loss remembers."""
    config = make_config(CompressConfig, {"logit_loss": logit, "feature_loss": feature})
    torch.manual_seed(0)
    views = config.views
    maps = nn.Conv2d(3, 8, 3, padding=1)
    head = nn.Linear(8, 4)
    images, labels, indices = torch.randn(3, 8, 3, 4, 4), torch.arange(8) % 4, torch.arange(8)
    answers = [torch.randn(8 * views, 8, 4, 4) for _ in range(3)], torch.randn(4, 8)

    def output(state: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> Output:
        features = state.mean((2, 3))
        return Output(features @ weight.T + bias, [state.relu(), state], features)

    example = output(maps(images[0, :2]), head.weight)
    frozen = output(answers[0][0][:2], answers[1])
    pair = Pair(example, frozen, Observed(nn.Linear(1, 1), ()), images[0, :2], TrainingImages(labels, 8))
    loss = make_distillation(config, pair, 0)
    parameters = {**dict(maps.named_parameters()), **{f"head.{n}": p for n, p in head.named_parameters()}}
    parameters |= {f"loss.{n}": p for n, p in loss.named_parameters()}
    for phase in loss.phases:
        loss.begin(phase)
        mine = part_of_batch(8)
        for step in range(3):
            seen = torch.cat([images[step, mine].rot90(turns, dims=(2, 3)) for turns in range(views)])
            state = answers[0][step].unflatten(0, (views, 8))[:, mine].flatten(0, 1)
            student = output(maps(seen), head.weight, head.bias)
            target = Target(labels[mine], indices[mine], step / 3)
            loss(student, output(state, answers[1]), target)["loss"].backward()
    mean_gradients(parameters.values())
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    found |= {f"loss.{n}": b.float() for n, b in loss.named_buffers()}
    return found


def _images(data: Path, number: int) -> ImageSet:
    return resolve_data(make_config(CompressConfig, {"data": str(data)})).train.subset(range(number))


def check_images_are_measured_once(out: Path, teacher: Path, data: Path) -> None:
    """Also where there are fewer batches than processes, or the last one holds a single image."""
    model = load(teacher / "teacher")
    spec = read_card(teacher / "teacher").input
    for number, batch_size in ((20, 16), (7, 6), (5, 16)):
        config = make_config(CompressConfig, {"batch_size": batch_size})
        batches = EvalBatches(_images(data, number), spec, config, CPU)
        shares = joined([len(batches.share())])
        assert sum(shares) == len(batches)
        with alone():
            meter, answers = classification.evaluate(model, batches), classification.predict(model, batches)
            embeddings = embedding.evaluate(model, batches)
        assert vars(classification.evaluate(model, batches)).keys() == vars(meter).keys()
        ours = classification.evaluate(model, batches)
        assert (ours.num_images, ours.num_correct) == (number, meter.num_correct)
        assert ours.sum_log_likelihood == meter.sum_log_likelihood
        found = classification.predict(model, batches)
        assert torch.equal(found.probabilities, answers.probabilities)
        assert torch.equal(found.labels, answers.labels)
        found = embedding.evaluate(model, batches)
        assert torch.equal(found.probabilities, embeddings.probabilities)


def check_masks_are_measured_once(out: Path, teacher: Path, data: Path) -> None:
    """Each process runs its share; where there is one batch, the second has none."""
    folder = write_masks(out / f"masks-{rank()}", {"train": 2, "val": 2, "test": 7})
    config = make_config(CompressConfig, {"data": str(folder), "batch_size": 2, "workers": 0})
    images = resolve_data(config).test
    torch.manual_seed(0)
    model, asked = nn.Conv2d(3, 3, 3, padding=1), []
    model.register_forward_hook(lambda _module, inputs, _output: asked.append(len(inputs[0])))
    for number in (7, 2):
        batches = EvalBatches(images.subset(range(number)), MASK_SPEC, config, CPU)
        with alone():
            one = segmentation.evaluate(model, batches)
        asked.clear()
        ours = segmentation.predict(model, batches)
        assert sum(joined([sum(asked)])) == number
        assert torch.equal(ours.probabilities, one.counts)
        assert ours.meter.confusion is not None
        assert torch.equal(ours.meter.confusion, one.confusion)
        assert ours.meter.num_images == number
        assert ours.meter.log_likelihood == pytest.approx(one.log_likelihood)


def check_scores_are_those_of_one_process(out: Path, teacher: Path, data: Path) -> None:
    model = load(teacher / "teacher")
    groups = find_groups(model)
    spec, config = read_card(teacher / "teacher").input, make_config(CompressConfig, {"batch_size": 4})
    batches = EvalBatches(_images(data, 13), spec, config, CPU).undivided()
    for reduction in ("sample", "batch"):
        with alone():
            theirs = importance_by_gradient(model, groups, batches, reduction=reduction)
        ours = importance_by_gradient(model, groups, batches, reduction=reduction)
        assert ours.num_images == theirs.num_images == 13
        for name in theirs.raw:
            close(torch.tensor(ours.raw[name]), torch.tensor(theirs.raw[name]))


def check_statistics_are_those_of_one_process(out: Path, teacher: Path, data: Path) -> None:
    spec = read_card(teacher / "teacher").input
    for number, batch_size in ((13, 4), (7, 3), (3, 8)):
        batches = EvalBatches(
            _images(data, number), spec, make_config(CompressConfig, {"batch_size": batch_size}), CPU
        ).undivided()
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        )
        model.eval()
        with alone():
            recalibrate(model, model, batches)
        theirs = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        recalibrate(model, model, batches.share())
        for name, tensor in model.state_dict().items():
            close(tensor, theirs[name])


class Largest(Observer):
    """Notes how many images of a split this process has been shown at once."""

    def __init__(self) -> None:
        self.shown: dict[Split, int] = {}

    def on_batch(self, stage: str, split: Split, indices: Tensor) -> None:
        self.shown[split] = max(len(indices), self.shown.get(split, 0))


def check_kept_answers_are_read_by_all_or_sent(out: Path, teacher: Path, data: Path) -> None:
    """On a disk that both share, and where the first process has one of its own."""
    logits, images = torch.arange(24.0).view(8, 3), torch.zeros(4, 3, 8, 8)
    shared, own = out / "shared-answers", out / f"answers-of-{rank()}"
    if is_main():
        for folder in (shared, own):
            folder.mkdir()
            save_file(packed(logits, 0), folder / "view-000-00000.safetensors")
    indices = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])[part_of_batch(8)]
    for folder, are_seen in ((shared, True), (own, False)):
        answers = Answers(folder, 8, 3)
        assert answers._are_seen_by_all == are_seen
        assert torch.equal(answers.of(Batch(images, indices, indices)).logits, logits[indices])
        assert bool(answers.parts) == (are_seen or is_main())  # who has opened a file


def check_runs(out: Path, teacher: Path, data: Path) -> None:
    """No process computes more images at a time than its part of a batch, whatever it computes."""
    for name, words in RUNS.items():
        largest = Largest()
        words = ("--teacher", teacher, "--data", data, "--out", out / name, *words)
        watched(largest, *words)
        part = config_of(*words).batch_size // world()
        assert max(largest.shown.values()) == part, largest.shown
    stepwell("train", "--data", data, "--out", out / "mixed", *MIXED)


def check_compiled_models_learn_the_same(out: Path, teacher: Path, data: Path) -> None:
    words = ("--teacher", teacher, "--data", data, "--out", out / "compiled", *RUNS["amd"], "--compile")
    graphs.BACKEND = "eager"  # not for its speed
    stepwell("compress", *words)
    for stage in ("joint", "distill"):
        ours, theirs = (
            load_file(out / run / f"stages/{stage}/tensors.safetensors") for run in ("compiled", "amd")
        )
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


def check_clocks_decide_once(out: Path, teacher: Path, data: Path) -> None:
    """Else one would train longer than the other, and wait for ever."""
    words = ("--data", data, "--minutes", 0.01, "--batch-size", 16)
    stepwell("train", "--model", TIMM, *MODEL, "--no-pretrained", *words, "--out", out / "minutes")
    given = ("--teacher", teacher, "--keep", 0.1, "--path", "single-step", "--out", out / "path-minutes")
    result = watched(Observer(), *words, *given).result
    first, second = joined([result.epochs])
    assert first == second


def check_a_model_with_batchnorm_stays_the_same_in_all(out: Path, teacher: Path, data: Path) -> None:
    """Its parts are normalised by themselves, but statistics and weights are one model's, from the start."""
    config = make_config(TrainConfig, {"batch_size": 8, "keep_best": 1.0})
    spec = read_card(teacher / "teacher").input
    batches = TrainBatches(_images(data, 24), spec, config, 0, CPU)
    torch.manual_seed(rank())
    model = create_timm("cifar_resnet8", {"num_classes": 3}, pretrained=False)
    judge = partial(performance_of, model, EvalBatches(_images(data, 10), spec, config, CPU), "top1")
    step = LabelStep(
        task_of("classification"), Observed(model, ()), 0.0, torch.autocast("cpu", enabled=False)
    )
    parameters = dict(model.named_parameters())
    trained = fit(
        Course("test", parameters, 2.0, 0.01, modules=[model], judge=judge), step, batches, config, config
    )
    first, second = joined([(model.state_dict(), trained.losses)])
    assert first[1] == second[1]
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])


def check_an_overflow_of_one_is_one_of_all(out: Path, teacher: Path, data: Path) -> None:
    """In fp16 a move is left out, or the training ended, by all or by none."""
    config = make_config(TrainConfig, {"batch_size": 8})
    batches = TrainBatches(_images(data, 24), read_card(teacher / "teacher").input, config, 0, CPU)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3), nn.BatchNorm1d(3))
    scaler, before = torch.amp.GradScaler("cpu"), []

    def step(batch: Batch, number: int, progress: float) -> dict[str, Tensor]:
        before.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        images = batch.images * (torch.inf if (number, rank()) == (1, 1) else 1)
        loss = nn.functional.cross_entropy(model(images), batch.labels)
        scaler.scale(loss).backward()
        return {"loss": loss.detach()}

    course = Course("test", dict(model.named_parameters()), 1.0, 0.01, modules=[model], scaler=scaler)
    trained = fit(course, step, batches, config)
    for name, tensor in before[1].items():
        assert torch.equal(tensor, before[2][name]), name
        assert tensor.isfinite().all()
    first, second = joined([(model.state_dict(), trained.losses)])
    assert first[1] == second[1]
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])


def check_an_optimizer_in_parts_moves_as_a_whole_one(out: Path, teacher: Path, data: Path) -> None:
    """To the bit: groups with rates of their own, parameters that rest, fp16; and a part is about a half."""
    for precision in ("fp32", "fp16"):
        (plain, all_moments), (ours, part) = (_five_moves(precision, shard=shard) for shard in (False, True))
        assert all(torch.equal(ours[name], tensor) for name, tensor in plain.items())
        assert sum(joined([part])) == all_moments
        assert 0.4 < part / all_moments < 0.6


def _five_moves(precision: str, *, shard: bool) -> tuple[dict[str, Tensor], int]:
    """The parameters, and how many of them have moments in this process."""
    options = make_config(TrainConfig, {"shard_optimizer": shard, "precision": precision})
    torch.manual_seed(0)
    model = create_timm(TIMM, {"depth": 2, "embed_dim": 24, "num_heads": 2}, pretrained=False)
    parameters = dict(model.named_parameters())
    scales = {name: 0.5 for name in parameters if "blocks.0" in name}
    optimizer = make_optimizer(parameters, 0.01, options, frozenset({"pos_embed"}), scales)
    scheduler, scaler = make_scheduler(optimizer, 5, options), scaler_of(options, CPU)
    for step in range(5):
        scheduler.step_update(step)
        for number, parameter in enumerate(parameters.values()):
            gradient = torch.randn_like(parameter)
            parameter.grad = None if (number + step) % 5 == 0 else scaler.scale(gradient)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    held = optimizer.optim if isinstance(optimizer, Sharded) else optimizer
    moments = sum(state["exp_avg"].numel() for state in held.state.values())
    return {name: p.detach().clone() for name, p in parameters.items()}, moments


def check_a_teacher_in_parts_answers_as_a_whole_one(out: Path, teacher: Path, data: Path) -> None:
    """Logits, hidden states and features, of other images in each process; and each holds about a half."""
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
    vit = create_timm(TIMM, sizes, pretrained=False)
    vit.register_parameter("number", nn.Parameter(torch.tensor(2.0)))  # which cannot be divided
    cnn = create_timm("cifar_resnet8", {}, pretrained=False).to(memory_format=torch.channels_last)
    for model, blocks in ((vit, ("blocks.0", "blocks.2")), (cnn, ("layer1", "layer3"))):
        model.eval().requires_grad_(False)
        copy_from_main(model.state_dict().values())
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        parts = in_parts(model, recomputed_blocks(model), CPU)
        size = 16 if model is vit else 32
        for autocast in (False, True):
            images = torch.randn(3 + rank(), 3, size, size, generator=torch.Generator().manual_seed(rank()))
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                ours, theirs = Observed(parts, blocks)(images), Observed(model, blocks)(images)
            assert len(ours.states) == 2
            near = 1e-2 if autocast else 1e-5  # FSDP makes weights contiguous, and a layout has its rounding
            for one, other in zip(_tensors(ours), _tensors(theirs), strict=True):
                torch.testing.assert_close(one, other, rtol=near, atol=near)
        assert 0.45 < num_held(parts) / num_params(model) < 0.55
        for name, tensor in model.state_dict().items():  # it is whole, and lies where it lay
            assert torch.equal(tensor, before[name])


def _tensors(output: Output) -> list[Tensor]:
    return [output.logits, output.features, *output.states]


def check_a_teacher_in_parts_waits_for_who_has_more_images(out: Path, teacher: Path, data: Path) -> None:
    model, spec = load(teacher / "teacher").requires_grad_(False), read_card(teacher / "teacher").input
    parts = in_parts(model, recomputed_blocks(model), CPU)
    guard(parts)
    for number, batch_size in ((20, 16), (5, 16)):  # three batches, and one
        config = make_config(CompressConfig, {"batch_size": batch_size})
        batches = EvalBatches(_images(data, number), spec, config, CPU)
        for task in (classification, embedding, multilabel):
            ours, theirs = (task.predict(each, batches).probabilities for each in (parts, model))
            assert torch.equal(ours, theirs)


def check_fewer_parameters_than_processes(out: Path, teacher: Path, data: Path) -> None:
    weight, options = nn.Parameter(torch.zeros(2, 2)), make_config(TrainConfig, {"shard_optimizer": True})
    optimizer = make_optimizer({"weight": weight}, 0.1, options, frozenset())
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert joined(weight.flatten().tolist()) == pytest.approx([-0.1] * 8)


def check_a_cnn_is_compressed(out: Path, teacher: Path, data: Path) -> None:
    words = ("--data", data, "--epochs", 1, "--batch-size", 16)
    stepwell("train", "--model", "cifar_resnet8", "--no-pretrained", *words, "--out", out / "cnn")
    more = ("--keep", 0.3, "--num-candidates", 3, "--feature-loss", "ab")
    stepwell("compress", "--teacher", out / "cnn", *words, *more, "--out", out / "small-cnn")


def check_resuming(out: Path, teacher: Path, data: Path) -> None:
    """One run is left by two processes; the other was begun by one, and ends here. Each of the two holds a
    part of the optimizer."""
    words = ("--teacher", teacher, "--data", data, *RUNS["amd"])
    try:
        watched(StopAt(*STOPPED_AT), *words, *SHARD, "--out", out / "left")
    except Stopped:
        pass
    else:
        raise AssertionError("it was not stopped")
    stepwell("compress", *words, *SHARD, "--out", out / "found")


def check_shards_are_looked_into_by_all(out: Path, teacher: Path, data: Path) -> None:
    """The first process alone keeps an index; images and splits are those of the folder, everywhere."""
    if is_main():
        write_shards(data, out / "shards")
    joined([0])  # until they are there
    found = resolve_data(make_config(CompressConfig, {"data": str(out / "shards")}))
    folder = resolve_data(make_config(CompressConfig, {"data": str(data)}))
    first, second = joined([[found.fingerprint, *(found.train.open(i).tobytes() for i in range(9))]])
    assert first == second
    assert found.fingerprint == folder.fingerprint
    joined([0])
    names = sorted(path.name for path in (out / "shards" / "train").iterdir())
    assert names == [".stepwell-shards.json", "000.tar", "001.tar"]


def check_where_each_has_other_images(out: Path, teacher: Path, data: Path) -> None:
    other = data if is_main() else out / "other-data"
    with pytest.raises(DataError, match="process 1 found another data than the first one"):
        watched(StopAt("score"), "--teacher", teacher, "--data", other, "--out", out / "none", *QUICK)


def run_checks(out: Path, teacher: Path, data: Path, only: list[str]) -> dict[str, str]:
    checks: list[Callable[[Path, Path, Path], None]] = [
        check for name, check in globals().items() if name.startswith("check_") and name in (only or [name])
    ]
    found = {}
    for check in checks:
        try:
            check(out, teacher, data)
            found[check.__name__] = ""
        except BaseException:
            found[check.__name__] = traceback.format_exc()
    return found


if __name__ == "__main__":
    out, teacher, data = map(Path, sys.argv[1:4])
    only = sys.argv[4:]
    torch.set_num_threads(1)
    checkpoint.SECONDS_BETWEEN, checkpoint.TIMES_AS_LONG, checkpoint.MOVES_BETWEEN = 0.0, 0, 1
    processes.PATIENCE = 0.5
    with pytest.MonkeyPatch.context() as monkeypatch:
        conftest.without_files(monkeypatch)
        found = run_checks(out, teacher, data, only)
    (out / f"{rank()}.json").write_text(json.dumps(found))
    if only:
        sys.exit()
    # Last: one fails by itself, and the other must not wait for it.
    print("--- one fails", file=sys.stderr, flush=True)
    given = data if is_main() else data / "nothing"
    sys.exit(main(["compress", "--teacher", str(teacher), "--data", str(given), "--out", str(out / "fails")]))
