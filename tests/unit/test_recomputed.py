"""`--gradient-checkpointing`: the same gradients and statistics, from less memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stepwell.zoo
from stepwell.cli import main
from stepwell.config.options import LossOptions, TrainingOptions
from stepwell.errors import ConfigError
from stepwell.losses.observe import Observed
from stepwell.measure.estimate import activation_bytes
from stepwell.models.ladder import Ladder
from stepwell.pruning.blocks import compared_blocks
from stepwell.pruning.families import find_groups
from stepwell.pruning.units import Candidate
from stepwell.setting.rungs import store_of
from stepwell.stages.distill import DistillStep
from stepwell.stages.joint import JointStep, joint_step
from stepwell.tasks.outputs import as_logits
from stepwell.tasks.task import task_of
from stepwell.training.from_labels import label_step
from stepwell.training.recomputed import Recomputed, recomputed_blocks
from tiny import NUM_CLASSES, SPEC, lesson, random_batches, random_images, setting, tiny_vit

assert stepwell.zoo  # timm knows its models by now


def cnn(depth: int = 8) -> nn.Module:
    """With BatchNorm."""
    torch.manual_seed(0)
    return timm.create_model(f"cifar_resnet{depth}", num_classes=NUM_CLASSES).eval()


def joint_of(folder: Path, teacher: nn.Module, **options) -> JointStep:
    s = setting(folder, teacher, random_batches(3, 4), num_candidates=3, sampling="all", **options)
    scales = [0.3, 0.6, 0.9]
    candidates = [
        Candidate(scale, {g.name: max(1, round(g.num_units * scale)) for g in s.groups}) for scale in scales
    ]
    order = {group.name: list(range(group.num_units)) for group in s.groups}
    ladder = Ladder(teacher=s.card({}), candidates=candidates, scales=scales, order=order)
    return joint_step(s, store_of(s, ladder), order)


@pytest.mark.parametrize("make", [tiny_vit, cnn])
@pytest.mark.parametrize("feature", ["states", "crd"])
def test_joint_training_comes_to_the_same(tmp_path, make, feature):
    """Gradients in the store, statistics of every candidate, losses."""
    plain = joint_of(tmp_path / "plain", make(), feature_loss=feature)
    ours = joint_of(tmp_path / "ours", make(), feature_loss=feature, gradient_checkpointing=True)
    assert all(isinstance(student, Recomputed) for student in ours.students)
    for number, batch in enumerate(random_batches(3, 4)):
        assert_close(ours(batch, number, 0.5), plain(batch, number, 0.5))
    assert_close(
        {key: p.grad for key, p in ours.shared.parameters.items()},
        {key: p.grad for key, p in plain.shared.parameters.items()},
    )
    for mine, other in zip(ours.shared.skeletons, plain.shared.skeletons, strict=True):
        assert_close(dict(mine.named_buffers()), dict(other.named_buffers()))
        # Whoever copies, exports or evaluates a candidate meets it as it was.
        assert not any("forward" in vars(module) for module in mine.modules())


def trained(model: nn.Module, *, recomputed: bool, blocks=None, precision: str = "fp32") -> nn.Module:
    """A student after three steps of distillation without an optimizer."""
    torch.manual_seed(7)
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    blocks = compared_blocks(find_groups(model)) if blocks is None else blocks
    student = Observed(model.train(), blocks)
    taught = replace(
        lesson(Observed(teacher, blocks), LossOptions()),
        autocast=torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    )
    step = DistillStep(taught, Recomputed(student, "it") if recomputed else student)
    for number, batch in enumerate(random_batches(3, 4)):
        step(batch, number)
    return model


def assert_same(make: Callable[[], nn.Module], **options) -> None:
    plain, ours = (trained(make(), recomputed=recomputed, **options) for recomputed in (False, True))
    assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()))
    assert_close(
        {name: p.grad for name, p in ours.named_parameters()},
        {name: p.grad for name, p in plain.named_parameters()},
    )
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in ours.parameters())
    copy.deepcopy(ours)  # nothing of a graph has stayed in it


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropout_and_stochastic_depth_are_the_same_in_both_passes(precision):
    assert_same(lambda: tiny_vit(proj_drop_rate=0.3, drop_path_rate=0.3), precision=precision)


@pytest.mark.parametrize("name", ["swin", "resnet", "mobilenet", "regnet"])
def test_every_family_learns_the_same(name):
    torch.manual_seed(0)
    make = {
        "swin": lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=16, patch_size=2, window_size=2, embed_dim=8,
            depths=(2, 2), num_heads=(1, 2), num_classes=NUM_CLASSES,
        ),
        "resnet": lambda: timm.create_model("test_resnet", num_classes=NUM_CLASSES),
        "mobilenet": lambda: torchvision.models.mobilenet_v3_small(num_classes=NUM_CLASSES),
        "regnet": lambda: timm.create_model("regnety_002", num_classes=NUM_CLASSES),
    }[name]  # fmt: skip
    model = make()
    assert_same(lambda: copy.deepcopy(model))


@pytest.mark.parametrize("name", ["swin", "dense"])
def test_what_is_read_inside_of_a_block_is_the_first_passs(name):
    """A classifier in a head that is computed again; of masks the map that the last convolution reads."""
    torch.manual_seed(0)
    if name == "swin":
        model = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=16, patch_size=2, window_size=2, embed_dim=8,
            depths=(2, 2), num_heads=(1, 2), num_classes=NUM_CLASSES,
        )  # fmt: skip
    else:
        model = as_logits(
            torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None), "maps"
        )
    found = []
    for again in (False, True):
        observed = Observed(copy.deepcopy(model).train(), ())
        assert observed.is_dense == (name == "dense")
        observed = Recomputed(observed, "it") if again else observed
        out = observed(random_images(2, size=16 if name == "swin" else 64))
        (out.features.square().mean() + out.logits.mean()).backward()
        found.append({n: p.grad for n, p in observed.model.named_parameters()})
        found[-1] |= dict(observed.model.named_buffers())
    assert_close(found[1], found[0])


class Block(nn.Module):
    """Reads a buffer, then puts another in its place, counts its calls, and keeps what it has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = spectral_norm(nn.Linear(8, 8)), nn.LayerNorm(8)
        self.register_buffer("seen", torch.ones(8))
        self.calls, self.kept = 0, None

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        self.calls += 1
        out = self.fc(torch.sin(self.norm(x) * self.seen * scale)) * self.calls
        self.seen = 0.5 * self.seen + out.detach().mean(0)
        self.kept = out.detach()
        return x + out.tanh()


class Net(nn.Module):
    """Such blocks one after another; the second of them runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3 * 16 * 16, 8), nn.Linear(8, NUM_CLASSES)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.flatten(1))
        for number in (0, 1, 1):
            x = self.blocks[number](x, scale=images.mean())
        return self.head(x)


def test_a_block_that_changes_itself():
    """What it reads in the second pass is what it has read in the first."""
    torch.manual_seed(0)
    net = Net()
    assert_same(lambda: copy.deepcopy(net), blocks=("blocks.0",))
    ours = trained(net, recomputed=True, blocks=("blocks.0",))
    assert [block.calls for block in ours.blocks] == [3, 6]


class Adds(nn.Module):
    """Sums up all that came before it."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.fc = nn.GELU(), nn.Linear(8, 8)

    def forward(self, before: list[Tensor]) -> Tensor:
        return self.fc(self.act(torch.stack(before).sum(0)))


class Grows(nn.Module):
    """Its blocks are given a list that the model goes on to fill."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3 * 16 * 16, 8)
        self.blocks = nn.ModuleList(Adds() for _ in range(3))
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        found = [self.stem(images.flatten(1))]
        for block in self.blocks:
            found.append(block(found))
        return self.fc(found[-1])


def test_a_list_that_grows_is_what_it_was_then():
    torch.manual_seed(0)
    net = Grows()
    assert_same(lambda: copy.deepcopy(net), blocks=("blocks.0",))


def test_a_densenet():
    torch.manual_seed(0)
    net = torchvision.models.DenseNet(4, (2, 2), 8, num_classes=NUM_CLASSES)
    assert recomputed_blocks(net)
    assert_same(lambda: copy.deepcopy(net), blocks=("features.denseblock1",))


class ListInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.fc = nn.ReLU(inplace=True), nn.Linear(8, 8)

    def forward(self, parts: list[Tensor]) -> Tensor:
        return self.fc(self.act(parts[0]))


def test_what_is_changed_in_a_list_is_seen_too():
    class Net(Grows):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([ListInPlace(), ListInPlace()])

    with pytest.raises(ConfigError, match="changes its input in place"):
        Recomputed(Observed(Net(), ()), "it")(random_images(2))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.fc = nn.ReLU(inplace=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(x))


def test_a_block_that_changes_its_input_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), InPlace(), nn.Linear(8, 5))
    with pytest.raises(ConfigError) as caught:
        Recomputed(Observed(model, ()), "it")(random_images(2))
    assert str(caught.value) == (
        "--gradient-checkpointing: 2 changes its input in place, so it cannot be computed again; leave it out"
    )
    with torch.no_grad():  # nothing is computed again
        Recomputed(Observed(model, ()), "it")(random_images(2))


def test_a_model_without_blocks_is_told(capsys):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.ReLU(), nn.Linear(8, 5))
    Recomputed(Observed(model, ()), "candidate 1")
    assert "warning: --gradient-checkpointing: candidate 1 has no blocks" in capsys.readouterr().err


def test_what_is_computed_as_one():
    names = list(recomputed_blocks(tiny_vit()))
    assert [name for name in names if "blocks" in name] == ["blocks.0", "blocks.1", "blocks.2"]
    with torch.device("meta"):
        models = torchvision.models.mobilenet_v3_small(), torchvision.models.swin_t()
    mobilenet, swin = ({type(b).__name__ for b in recomputed_blocks(model).values()} for model in models)
    assert "InvertedResidual" in mobilenet
    assert "SqueezeExcitation" not in mobilenet  # it lies inside of a block
    assert "SwinTransformerBlock" in swin


class Live(TorchDispatchMode):
    """Bytes of all tensors that have come to be since it was entered and are still there, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.now -= size


def peak(model: nn.Module, *, recomputed: bool) -> int:
    """Bytes at most, of one step from labels, gradients among them."""
    options = TrainingOptions(gradient_checkpointing=recomputed)
    step = label_step(task_of("classification"), model.train(), options, 0.0)
    (batch,) = random_batches(1, 32)
    with Live() as live:
        step(batch, 0)
    return live.peak


@pytest.mark.parametrize("make", [lambda: tiny_vit(depth=8, patch_size=4), lambda: cnn(20)])
def test_it_takes_less_memory_and_doctor_knows_how_much(make):
    gradients = sum(p.nbytes for p in make().parameters())
    plain, ours = (peak(make(), recomputed=recomputed) - gradients for recomputed in (False, True))
    assert ours < 0.65 * plain
    for measured, recomputed in ((plain, False), (ours, True)):
        counted = activation_bytes(make(), SPEC, 32, "fp32", recomputed=recomputed)
        assert 0.6 < measured / counted < 1.4, (measured, counted, recomputed)


def test_not_beside_compile(tmp_path, capsys):
    words = ["--model", "vit_tiny_patch16_224", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["train", *words, "--compile", "--gradient-checkpointing"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "--compile decides by itself what is computed again: leave out --gradient-checkpointing"
    )
