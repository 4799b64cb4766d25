"""A model that is looked at: states are its blocks', and the rest behind a block is the model itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from blocks import shaken
from stepwell.config.options import LossOptions
from stepwell.losses.distillation import Distillation, loss_parameters
from stepwell.losses.observe import Observed
from stepwell.losses.output import Output, Target
from stepwell.models import huggingface
from stepwell.pruning.families import find_groups
from stepwell.run.checkpoint import changed_by_training
from stepwell.zoo.cifar_nets import CifarResNet
from tiny import NUM_CLASSES, VARIANTS, random_images, tiny_vit

SIZE = 32


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=SIZE, patch_size=4, embed_dim=24, depths=(2, 2),
        num_heads=(3, 6), window_size=4, mlp_ratio=2.0, num_classes=NUM_CLASSES,
    )  # fmt: skip


def resnet() -> nn.Module:
    return timm.create_model("resnet18", layers=(2, 1, 1, 1), channels=(8, 8, 8, 16), num_classes=NUM_CLASSES)


def huggingface_vit() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=SIZE, patch_size=8, num_labels=NUM_CLASSES, hidden_size=24, intermediate_size=20,
        num_hidden_layers=3, num_attention_heads=4,
    )  # fmt: skip
    return huggingface.wrapped(transformers.ViTForImageClassification(config))


class Returning(nn.Module):
    """Returns its state beside something else, as blocks of some libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.linear(x).relu()
        return x, x.mean()


class Pairs(nn.Module):
    """Blocks that return pairs, and a sum of positions outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 8, 8)
        self.position = nn.Parameter(torch.randn(1, 16, 12))
        self.blocks = nn.ModuleList([Returning() for _ in range(3)])
        self.head = nn.Linear(12, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x, _ = block(x)
            x = 2 * x
        return self.head(x.mean(1))


class Reused(nn.Module):
    """Layers that run before the blocks run again behind each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(3)])
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(images)))
        for block in self.blocks:
            x = self.act(self.norm(block(x)))
        return self.head(x.mean((2, 3)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"vit, {name}": lambda args=args: tiny_vit(torch.float64, img_size=SIZE, **args)
        for name, args in VARIANTS.items()
        if name in ("plain", "registers", "no-class-token")
    },
    "swin": lambda: shaken(swin),
    "resnet": lambda: shaken(resnet),
    "cifar resnet": lambda: shaken(lambda: CifarResNet(14, num_classes=NUM_CLASSES)),
    "huggingface vit": lambda: shaken(huggingface_vit),
    "blocks that return pairs": lambda: shaken(Pairs),
    "layers that are used again": lambda: shaken(Reused),
}


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    return MODELS[request.param]()


def images(num: int = 3) -> Tensor:
    return random_images(num, torch.float64, size=SIZE)


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    if isinstance(model, Pairs | Reused):
        return tuple(f"blocks.{i}" for i in range(3))
    return tuple(dict.fromkeys(group.block for group in find_groups(model)))


def by_hooks(model: nn.Module, blocks: tuple[str, ...], batch: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Logits, what each block returned, and what went into the classifier."""
    states, read, handles = {}, [], []

    def keep(name: str):
        return lambda _module, _inputs, out: states.__setitem__(name, out if torch.is_tensor(out) else out[0])

    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in blocks]
    handles.append(classifier.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0])))
    try:
        logits = model(batch)
    finally:
        for handle in handles:
            handle.remove()
    assert read[0].ndim == 2
    return logits, [states[name] for name in blocks], read[0]


def assert_equal(found: Output, logits: Tensor, states: list[Tensor], features: Tensor) -> None:
    assert torch.equal(found.logits, logits)
    assert torch.equal(found.features, features)
    assert len(found.states) == len(states)
    assert all(torch.equal(a, b) for a, b in zip(found.states, states, strict=True))


def test_what_is_observed_is_what_hooks_placed_by_hand_see(model):
    blocks = blocks_of(model)
    assert len(blocks) >= 3
    assert_equal(Observed(model, blocks)(images()), *by_hooks(model, blocks, images()))
    some = blocks[1::2]
    assert_equal(Observed(model, some)(images()), *by_hooks(model, some, images()))
    logits, _, features = by_hooks(model, (), images())
    assert_equal(Observed(model, ())(images()), logits, [], features)


def test_the_features_of_a_model_without_a_linear_layer_are_the_mean_of_its_last_state():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten()).double()
    found = Observed(model, ("0", "1"))(images())
    assert torch.equal(found.features, found.states[1].mean((2, 3)))
    assert torch.equal(Observed(model, ())(images()).features, model(images()))


class HeadFirst(nn.Module):
    """Whose classifier is named before a layer that runs before it."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.neck = nn.Linear(6, 4), nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(x.mean((2, 3))))


def test_the_features_are_what_the_last_layer_to_run_reads_whatever_the_order_of_the_names():
    model = HeadFirst().double()
    observed = Observed(model, ())
    for _ in range(2):  # the second pass knows which layer that is
        assert torch.equal(observed(images()).features, model.neck(images().mean((2, 3))))


class OtherHeadInTraining(HeadFirst):
    """Whose neck feeds another classifier while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        return self.neck(x.mean((2, 3))) if self.training else super().forward(x)


def test_the_classifier_may_be_another_layer_in_training():
    observed = Observed(OtherHeadInTraining().double(), ())
    for _ in range(2):
        assert observed.train()(images()).features.shape[1] == 3
        assert observed.eval()(images()).features.shape[1] == 6


# --- the rest behind a block


def test_the_rest_behind_a_block_is_the_models_to_the_bit(model):
    blocks = blocks_of(model)
    logits, states, features = by_hooks(model, blocks, images())
    for i, block in enumerate(blocks):
        rest = Observed(model, blocks).after(block, images())
        assert_equal(rest(states[i]), logits, states[i + 1 :], features)
        # The same function for another number of images, and again.
        assert torch.allclose(rest(states[i][:1]).logits, logits[:1], rtol=1e-12, atol=1e-12)
        assert_equal(rest(states[i]), logits, states[i + 1 :], features)


def test_the_states_are_those_of_the_observed_blocks_behind_it(model):
    blocks = blocks_of(model)
    observed = Observed(model, (blocks[0], blocks[-1]))
    logits, states, features = by_hooks(model, observed.blocks, images())
    first = observed.after(blocks[0], images())
    assert_equal(first(states[0]), logits, states[1:], features)
    assert observed.after(blocks[-1], images())(states[1]).states == []


def test_another_state_gives_what_the_model_makes_of_it(model):
    """The block's output replaced by a hook, against the rest as a function."""
    block = blocks_of(model)[1]
    state = by_hooks(model, (block,), images())[1][0].detach()
    other = state + torch.randn_like(state)

    def replace(_module, _inputs, output):
        return other if torch.is_tensor(output) else (other, *output[1:])

    handle = model.get_submodule(block).register_forward_hook(replace)
    expected = model(images())
    handle.remove()
    assert not torch.allclose(expected, model(images()), rtol=0.01)
    assert torch.equal(Observed(model, (block,)).after(block, images())(other).logits, expected)


def test_gradients_are_those_of_the_whole_model(model):
    """Of the state; and of the parameters, with what flows on through the state to those before it."""
    blocks = blocks_of(model)
    parameters = dict(model.named_parameters())

    def gradients(of: Tensor, *inputs: Tensor, outputs: Tensor | None = None) -> tuple[Tensor | None, ...]:
        tensors = [*inputs, *parameters.values()]
        return torch.autograd.grad(of, tensors, outputs, allow_unused=True, retain_graph=True)

    logits, (state,), _ = by_hooks(model, blocks[1:2], images())
    weights = torch.linspace(1, 2, logits.numel(), dtype=torch.float64).view_as(logits)
    expected = gradients((logits.sin() * weights).sum(), state)
    given = state.detach().requires_grad_()
    found = Observed(model, blocks[1:2]).after(blocks[1], images())(given).logits
    of_state, *behind = gradients((found.sin() * weights).sum(), given)
    assert of_state.abs().sum() > 0
    torch.testing.assert_close(of_state, expected[0], rtol=1e-12, atol=1e-14)
    before = gradients(state, outputs=of_state)
    for (name, parameter), *parts, whole in zip(
        parameters.items(), behind, before, expected[1:], strict=True
    ):
        if name.startswith(tuple(f"{block}." for block in blocks[:2])):
            assert parts[0] is None, f"{name} lies before what follows {blocks[1]}"
        elif name.startswith(f"{blocks[2]}."):
            assert parts[0] is not None
        if whole is not None:
            total = sum((part for part in parts if part is not None), start=torch.zeros_like(parameter))
            torch.testing.assert_close(
                total, whole, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_what_lies_before_the_block_is_not_run(model):
    blocks = blocks_of(model)
    leaves = {name: module for name, module in model.named_modules() if not list(module.children())}
    calls = dict.fromkeys(leaves, 0)
    for name, module in leaves.items():
        forward = module.forward
        module.forward = lambda *a, n=name, f=forward, **k: calls.__setitem__(n, calls[n] + 1) or f(*a, **k)
    _, states, _ = by_hooks(model, blocks, images())
    once = dict(calls)
    for i, block in enumerate(blocks):
        rest = Observed(model, blocks).after(block, images())
        calls.update(dict.fromkeys(calls, 0))
        rest(states[i])
        for other in blocks[: i + 1]:
            assert not any(n for name, n in calls.items() if name.startswith(f"{other}.")), other
        for other in blocks[i + 1 :]:
            inner = [name for name in leaves if name.startswith(f"{other}.")]
            assert inner
            assert {name: calls[name] for name in inner} == {name: once[name] for name in inner}
    # Nor is what stands before all blocks.
    first = min((n for n in leaves if isinstance(leaves[n], nn.Conv2d)), key=list(leaves).index)
    assert once[first] == 1
    assert calls[first] == 0


def traces(model: nn.Module) -> dict[str, object]:
    """All that could be left changed: attributes, hooks, modes."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        found[f"{name} attributes"] = sorted(vars(module))
        found[f"{name} forward"] = getattr(vars(module).get("forward"), "__name__", None)
        found[f"{name} hooks"] = [len(module._forward_hooks), len(module._forward_pre_hooks)]
        found[f"{name} training"] = module.training
    return found


def test_nothing_is_left_changed(model):
    blocks = blocks_of(model)
    before, state_before = traces(model), {k: v.clone() for k, v in model.state_dict().items()}
    (state,) = by_hooks(model, blocks[1:2], images())[1]
    rest = Observed(model, blocks).after(blocks[1], images())
    assert traces(model) == before
    rest(state.detach().requires_grad_()).logits.sum().backward()
    assert traces(model) == before
    with pytest.raises(Exception):  # noqa: B017, PT011  (whatever a block says of a state of another width)
        rest(torch.zeros(3, *[n + 1 for n in state.shape[1:]], dtype=torch.float64))
    assert traces(model) == before
    after = model.state_dict()
    assert after.keys() == state_before.keys()
    assert all(torch.equal(after[name], state_before[name]) for name in after)


def test_a_forward_of_the_users_own_stays(model):
    """One that was put on a module, not on its class."""
    blocks = blocks_of(model)
    module = model.get_submodule(blocks[1])
    forward = module.forward
    module.forward = replaced = lambda *words, **options: forward(*words, **options)
    (state,) = by_hooks(model, blocks[1:2], images())[1]
    Observed(model, blocks).after(blocks[1], images())(state)
    assert module.forward is replaced


def test_a_block_that_is_not_observed_is_refused(model):
    blocks = blocks_of(model)
    with pytest.raises(ValueError, match=rf"^{blocks[0]} is not observed; observed are {blocks[1]}$"):
        Observed(model, blocks[1:2]).after(blocks[0], images())
    with pytest.raises(ValueError, match="observed are none"):
        Observed(model, ()).after(blocks[0], images())


class Around(nn.Module):
    """What follows the block also reads what stands before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        return self.head((self.block(x).relu() + x).mean((2, 3)))


class Twice(nn.Module):
    """A block that runs two times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(self.block(self.stem(images)).relu()).mean((2, 3)))


@pytest.mark.parametrize("build", [Around, Twice])
def test_a_block_whose_output_is_not_all_that_follows_reads_is_refused(build):
    model = shaken(build)
    with pytest.raises(ValueError, match="what follows block reads more than what it returns"):
        Observed(model, ("block",)).after("block", images())


def test_class_attention_reads_the_tokens_beside_its_state():
    model = shaken(
        lambda: timm.create_model("cait_xxs24_224", img_size=SIZE, patch_size=8, embed_dim=24, depth=2,
                                  num_heads=4, num_classes=NUM_CLASSES)
    )  # fmt: skip
    blocks = ("blocks.1", "blocks_token_only.0")
    with pytest.raises(ValueError, match=r"what follows blocks_token_only\.0 reads more"):
        Observed(model, blocks).after("blocks_token_only.0", images())
    logits, (state, _), _ = by_hooks(model, blocks, images())
    assert torch.equal(Observed(model, blocks).after("blocks.1", images())(state).logits, logits)


# --- a loss that borrows


class Continued(nn.Module):
    """A loss on what the teacher makes of the student's state; learns a projection of its own."""

    def __init__(self, teacher: Observed, block: str, dim: int) -> None:
        super().__init__()
        self.rest = teacher.after(block, images())
        self.projection = nn.Linear(dim, dim, dtype=torch.float64)

    def forward(self, student: Output, teacher: Output, target: Target) -> Tensor:
        return (self.rest(self.projection(student.states[0])).logits - teacher.logits).square().mean()


def test_a_loss_that_borrows_the_rest_of_the_teacher_neither_saves_nor_trains_it():
    teacher, student = tiny_vit(torch.float64, img_size=SIZE), tiny_vit(torch.float64, seed=1, img_size=SIZE)
    observed = Observed(teacher.requires_grad_(False), ("blocks.1",))
    rest = observed.after("blocks.1", images())
    assert callable(rest)
    assert not isinstance(rest, nn.Module)
    loss = Distillation(LossOptions(feature_loss="mine.py:loss"), None, Continued(observed, "blocks.1", 24))
    names = ["feature.projection.weight", "feature.projection.bias"]
    assert [name for name, _ in loss.named_parameters()] == list(loss.state_dict()) == names
    assert list(loss_parameters([loss])) == [f"losses.0.{name}" for name in names]
    saved = changed_by_training(loss_parameters([loss]), [student, loss])
    assert not {id(tensor) for tensor in saved.values()} & {id(p) for p in teacher.parameters()}

    labels = torch.arange(3)
    with torch.no_grad():
        answer = observed(images())
    loss(Observed(student, ("blocks.1",))(images()), answer, Target(labels, labels, 0.0))["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert loss.feature.projection.weight.grad.abs().sum() > 0
    assert student.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    loss.train()  # reaches its own parts alone
    assert not teacher.training
