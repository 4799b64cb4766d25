"""The recipe's part on weights: gradients accumulated, an average, the best ones, a rate for each layer."""

import itertools
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from test_checkpoint import Classify, Model, Stopped, feed, same
from test_joint import run_and_ladder
from torch import nn

from stepwell.config.options import TrainingOptions
from stepwell.config.recipe_options import RecipeOptions
from stepwell.data.batches import Batch
from stepwell.errors import ConfigError
from stepwell.run import checkpoint
from stepwell.setting.rungs import store_of
from stepwell.stages.joint import joint_step
from stepwell.tasks.classification import evaluate
from stepwell.training.handed_on import Average, performance_of
from stepwell.training.loop import Course, Trained, fit
from stepwell.training.optimizer import layer_scales, make_optimizer, make_scheduler, no_decay_of
from tiny import FixedEval, FixedTrain, random_batches, tiny_vit

OPTIONS = TrainingOptions(weight_decay=0.1, warmup=0.3)


# --- gradients accumulated


class Plain:
    """A step without statistics or chance, which notes what the weights were in each step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.linear = nn.Linear(3 * 16 * 16, 5).double()
        self.model = nn.Sequential(nn.Flatten(), self.linear)
        self.seen: list[torch.Tensor] = []
        self.biases: list[torch.Tensor] = []

    def __call__(self, batch, step, progress):
        self.seen.append(self.linear.weight.detach().clone())
        self.biases.append(self.linear.bias.detach().clone())
        loss = F.cross_entropy(self.model(batch.images), batch.labels)
        loss.backward()
        return {"loss": loss.detach()}


def trained(batches: list[Batch], epochs: float, options=OPTIONS, **recipe) -> tuple[Plain, Trained]:
    step = Plain()
    course = Course("test", dict(step.model.named_parameters()), epochs, lr=0.01, modules=[step.model])
    return step, fit(course, step, FixedTrain(batches), options, RecipeOptions(**recipe))


def joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*(batch[:3] for batch in batches), strict=True)))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_two_batches_are_as_good_as_one_twice_as_large(optimizer, clip_norm):
    options = OPTIONS.model_copy(update={"optimizer": optimizer, "clip_norm": clip_norm})
    small = random_batches(6, 4, torch.float64)
    large = [joined(small[i : i + 2]) for i in range(0, 6, 2)]
    ours, log = trained(small, 5.0, options, accumulate=2)
    theirs, _ = trained(large, 5.0, options)
    for i, weight in enumerate(theirs.seen):
        assert torch.equal(ours.seen[2 * i], ours.seen[2 * i + 1])
        torch.testing.assert_close(ours.seen[2 * i], weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.linear.weight, theirs.linear.weight, rtol=1e-9, atol=1e-12)
    assert (log.num_steps, log.epochs) == (30, 5.0)  # steps are batches


def test_a_training_of_a_few_moves_is_told(capsys):
    trained(random_batches(4, 2, torch.float64), 4.0, accumulate=8)
    assert "warning: test: --accumulate 8 leaves 2 moves in all\n" in capsys.readouterr().err
    trained(random_batches(4, 2, torch.float64), 4.0)
    assert capsys.readouterr().err == ""


def test_the_last_move_may_have_fewer_batches():
    small = random_batches(5, 4, torch.float64)
    ours, _ = trained(small, 1.0, OPTIONS.model_copy(update={"clip_norm": 0.0}), accumulate=2)
    assert [torch.equal(one, other) for one, other in itertools.pairwise(ours.seen)] == [
        True, False, True, False,
    ]  # fmt: skip
    # The last one has the gradient of one batch, not half of it.
    bias, found = ours.biases[4].requires_grad_(), ours.linear.weight.grad
    weight = ours.seen[4].clone().requires_grad_()
    loss = F.cross_entropy(F.linear(small[4].images.flatten(1), weight, bias), small[4].labels)
    (expected,) = torch.autograd.grad(loss, [weight])
    torch.testing.assert_close(found, expected)


def test_the_schedule_goes_by_moves():
    _, log = trained(random_batches(8, 2, torch.float64), 5.0, accumulate=4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = make_scheduler(optimizer, 10, OPTIONS)
    rates = []
    for move in range(10):
        scheduler.step_update(move)
        rates.append(optimizer.param_groups[0]["lr"])
    assert log.step == [10, 20, 30, 40]
    assert log.lr == [rates[(step - 1) // 4] for step in log.step]


@pytest.mark.parametrize("sampling", ["all", "sandwich"])
def test_the_gradients_of_candidates_add_up_over_batches(tmp_path, sampling):
    """A joint step adds to what is in the store, where other candidates may have been before."""
    s, ladder = run_and_ladder(tmp_path, sampling=sampling)
    step = joint_step(s, store_of(s, ladder))
    parameters, singles = step.shared.parameters, []

    def forget():
        for parameter in parameters.values():
            parameter.grad = None

    for number, batch in enumerate(s.batches[:3]):
        forget()
        step(batch, number)
        singles.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
    forget()
    for number, batch in enumerate(s.batches[:3]):
        step(batch, number)
    for name, parameter in parameters.items():
        parts = [single[name] for single in singles if name in single]
        assert (parameter.grad is None) == (not parts)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, torch.stack(parts).sum(dim=0))


# --- an average of the weights


def test_the_average_is_that_of_the_formula():
    ours, _ = trained(random_batches(4, 4, torch.float64), 6.0, ema=0.8)
    raw, _ = trained(random_batches(4, 4, torch.float64), 6.0)
    for mine, theirs in zip(ours.seen, raw.seen, strict=True):
        assert torch.equal(mine, theirs)  # the average does not come back into the training
    expected = raw.seen[0]
    for step, weight in enumerate([*raw.seen[1:], raw.linear.weight.detach()]):
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(ours.linear.weight.detach(), expected, rtol=1e-9, atol=1e-12)
    assert not torch.equal(ours.linear.weight, raw.linear.weight)


def test_what_is_handed_on_is_the_average_and_is_in_the_model():
    step, result = trained(random_batches(4, 4, torch.float64), 2.0, ema=0.9)
    assert torch.equal(result.tensors["1.weight"], step.linear.weight)


def test_statistics_of_batchnorms_are_averaged_with_the_weights():
    def run(**recipe):
        step = Classify(Model())
        course = Course("test", step.parameters(), 5.0, lr=0.05, modules=[step.model])
        fit(course, step, feed(), OPTIONS, RecipeOptions(**recipe))
        return step.model.state_dict()

    raw, ours = run(), run(ema=0.9)
    for name in ("body.2.running_mean", "body.2.running_var", "body.2.weight", "head.weight"):
        assert not torch.equal(ours[name], raw[name]), name
    for name in ("memory", "body.2.num_batches_tracked"):  # others stay as the last step left them
        assert torch.equal(ours[name], raw[name]), name


def test_exchanging_twice_changes_nothing():
    weight = torch.randn(5, generator=torch.Generator().manual_seed(0))
    before, average = weight.clone(), Average([weight], 0.9)
    weight.mul_(1.1)
    average.update(0)
    changed = weight.clone()
    with average.in_place():
        torch.testing.assert_close(weight, before + 0.9 * (changed - before))
    assert torch.equal(weight, changed)


def test_losses_with_parameters_are_not_averaged():
    """They are thrown away at the end; their memories can be as large as a data set."""
    step = Plain()
    loss = nn.Linear(3, 2)
    parameters = {**dict(step.model.named_parameters()), "losses.0.weight": loss.weight}
    course = Course("test", parameters, 1.0, lr=0.01, modules=[step.model], aids=[loss])
    assert list(course.handed_on) == ["1.weight", "1.bias"]


# --- the best weights


class Judged:
    """Marks for the weights, one after another; remembers what was judged."""

    def __init__(self, step: Plain, marks: list[float]) -> None:
        self.step, self.marks, self.seen = step, iter(marks), []

    def __call__(self) -> float:
        self.seen.append(self.step.linear.weight.detach().clone())
        return float(next(self.marks))


def judged(marks, epochs=4.0, file=None, step=None, **recipe) -> tuple[Plain, Judged]:
    step = step or Plain()
    judge = Judged(step, marks)
    course = Course(
        "test",
        dict(step.model.named_parameters()),
        epochs,
        lr=0.01,
        modules=[step.model],
        judge=judge,
        checkpoint=file,
    )
    batches = FixedTrain(random_batches(4, 4, torch.float64))
    fit(course, step, batches, OPTIONS, RecipeOptions(**{"keep_best": 1.0, **recipe}))
    return step, judge


@pytest.mark.parametrize(("marks", "best"), [([1, 3, 2, 0], 1), ([0, 1, 2, 3], 3), ([3, 1, 3, 2], 2)])
def test_the_best_of_the_evaluations_is_handed_on(marks, best, capsys):
    step, judge = judged(marks)
    assert len(judge.seen) == 4
    assert torch.equal(step.linear.weight, judge.seen[best])
    said = f"test: the weights after step {4 * (best + 1)} did best on the selection images"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("every", "epochs", "accumulate", "count"),
    [
        (1.0, 4.0, 1, 4),
        (0.5, 4.0, 1, 8),
        (1.5, 4.0, 1, 3),
        (9.0, 4.0, 1, 1),
        (1.0, 4.0, 3, 4),
        (0.25, 1.0, 4, 1),
    ],
)
def test_so_many_evaluations(every, epochs, accumulate, count):
    """Every so many epochs, after a move, and at the end."""
    _, judge = judged(itertools.count(), epochs, keep_best=every, accumulate=accumulate)
    assert len(judge.seen) == count


def test_the_average_is_what_is_evaluated():
    step, judge = judged([0, 2, 1, 1], ema=0.9)
    averages, _ = trained(random_batches(4, 4, torch.float64), 4.0, ema=0.9)
    for mine, raw in zip(step.seen, averages.seen, strict=True):
        assert torch.equal(mine, raw)
    assert not any(torch.equal(seen, raw) for seen in judge.seen for raw in step.seen)
    assert torch.equal(step.linear.weight, judge.seen[1])


def test_evaluating_changes_nothing_else():
    with_, _ = judged([0, 1, 2, 3])
    without, _ = trained(random_batches(4, 4, torch.float64), 4.0)
    assert torch.equal(with_.linear.weight, without.linear.weight)


def test_a_model_is_judged_as_it_would_be_used_and_trains_on():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(3 * 16 * 16, 5)).train()
    images = FixedEval(random_batches(3, 4))
    before = torch.get_rng_state()
    value = performance_of(model, images, "likelihood")
    assert model.training
    assert all(module.training for module in model)
    assert torch.equal(torch.get_rng_state(), before)
    assert value == evaluate(model.eval(), images).performance("likelihood")


def test_a_model_that_has_just_diverged_is_judged_too():
    """The loop looks at the losses of every tenth step alone; an evaluation may come before."""
    linear = nn.Linear(3 * 16 * 16, 5)
    nn.init.constant_(linear.weight, math.nan)
    model = nn.Sequential(nn.Flatten(), linear)
    assert performance_of(model, FixedEval(random_batches(3, 4)), "likelihood") == pytest.approx(0.2)


# --- resumed


@pytest.mark.parametrize("stop_at", [1, 5, 13, 24])
@pytest.mark.parametrize(
    "recipe",
    [{"ema": 0.9}, {"accumulate": 3}, {"keep_best": 0.8}, {"ema": 0.9, "accumulate": 2, "keep_best": 0.6}],
)
def test_it_resumes_to_the_very_same_end(tmp_path, monkeypatch, stop_at, recipe):
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(checkpoint, "TIMES_AS_LONG", 0)

    def run(file, stop_at=None):
        step = Classify(Model(), stop_at)

        def judge() -> float:  # best in the middle
            return -abs(float(step.model.head.weight.detach().abs().sum()) - 6.0)

        course = Course(
            "test", step.parameters(), 5.0, lr=0.05, modules=[step.model], judge=judge, checkpoint=file
        )
        return step, fit(course, step, feed(), OPTIONS, RecipeOptions(**recipe))

    undisturbed, expected = run(None)
    file = tmp_path / "stage" / "main.safetensors"
    with pytest.raises(Stopped):
        run(file, stop_at)
    second, found = run(file)
    same(second.model, undisturbed.model)
    assert (found.step, found.losses, found.lr) == (expected.step, expected.losses, expected.lr)


# --- a learning rate for each layer


def test_each_layer_has_a_share_of_the_rate_of_the_next():
    model = tiny_vit()
    scales = layer_scales(model, 0.5)
    assert scales.keys() == dict(model.named_parameters()).keys()
    assert scales["head.weight"] == 1
    assert [scales[f"blocks.{i}.mlp.fc1.weight"] for i in range(3)] == [
        scales["blocks.2.attn.qkv.weight"] / 4,
        scales["blocks.2.attn.qkv.weight"] / 2,
        scales["blocks.2.attn.qkv.weight"],
    ]
    assert scales["patch_embed.proj.weight"] == scales["blocks.0.norm1.weight"] / 2
    assert layer_scales(model, 1.0) == {}


def test_the_optimizer_uses_these_rates():
    """With a gradient that never changes, each step of AdamW moves a parameter by the learning rate."""
    model = tiny_vit(torch.float64)
    scales, before = layer_scales(model, 0.5), {n: p.detach().clone() for n, p in model.named_parameters()}

    def pull(batch, number, progress):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return {"loss": torch.tensor(1.0)}

    options = TrainingOptions(weight_decay=0.0, warmup=0.0, clip_norm=0.0, schedule="linear")
    course = Course("test", dict(model.named_parameters()), 1.0, 0.01, lr_scales=scales)
    log = fit(course, pull, FixedTrain(random_batches(4, 2)), options)
    assert log.lr == [pytest.approx(0.01 / 4)]  # that of the last layer
    for name, parameter in model.named_parameters():
        expected = before[name] - 0.01 * (1 + 0.75 + 0.5 + 0.25) * scales[name]
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


def test_what_decays_is_decided_as_ever():
    model = tiny_vit()
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def decayed(scales):
        optimizer = make_optimizer(dict(model.named_parameters()), 0.1, OPTIONS, no_decay_of(model), scales)
        groups = [group for group in optimizer.param_groups if group["weight_decay"]]
        return {names[id(parameter)] for group in groups for parameter in group["params"]}

    assert decayed(layer_scales(model, 0.7)) == decayed(None)
    assert "blocks.0.attn.qkv.weight" in decayed(None)


def test_a_model_that_does_not_say_its_layers_is_refused():
    with pytest.raises(ConfigError) as error:
        layer_scales(nn.Sequential(nn.Linear(2, 2)), 0.7)
    assert str(error.value) == (
        "--layer-decay 0.7: this Sequential does not say in which order its layers follow each other (timm's "
        "group_matcher); leave it out"
    )


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_models_of_timm_say_it(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    scales = layer_scales(model, 0.9)
    assert scales.keys() == dict(model.named_parameters()).keys()
    assert max(scales.values()) == 1
    assert min(scales.values()) < 0.9
    assert math.isclose(sorted(set(scales.values()))[-2], 0.9)
