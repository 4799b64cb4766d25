"""Modules as users have them: made plain, with the outputs of the user's own, or refused."""

from __future__ import annotations

import copy
import types
import warnings
from collections import namedtuple

import pytest
import torch
from timm.utils.model_ema import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel

from stepwell.data.spec import InputSpec
from stepwell.errors import ModelError
from stepwell.models import own_module
from stepwell.models.card import Architecture, Card, load, save_model
from stepwell.models.export import export_onnx
from stepwell.models.input import check_runs
from stepwell.models.teacher import teacher_from_module

SPEC = InputSpec((16, 16), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
Answer = namedtuple("Answer", ["scores", "aux"])


class Net(nn.Module):
    """A small CNN; `answer` makes of its logits what a user's forward returns."""

    def __init__(self, answer=lambda logits: logits) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        self.answer = answer

    def logits(self, images):
        return self.head(self.norm(self.stem(images)).relu().mean((2, 3)))

    def forward(self, images):
        return self.answer(self.logits(images))


class Args(Net):
    def forward(self, *args):
        return super().forward(*args)


class ArgsAndOptions(Net):
    def forward(self, *args, **options):
        assert not options
        return super().forward(*args)


class Targets(Net):
    def forward(self, images, targets=None):
        logits = self.logits(images)
        return {"logits": logits} if targets is None else nn.functional.cross_entropy(logits, targets)


class Autocast(Net):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, images):
        return self.logits(images)


class Convolutional(Net):
    def forward(self, images):
        return self.logits(images)[:, :, None, None]


def taken(module: nn.Module) -> nn.Module:
    return teacher_from_module(module, None).model


def own_logits(module: Net) -> torch.Tensor:
    with torch.no_grad():
        return module.eval().logits(IMAGES)


def said(capsys: pytest.CaptureFixture) -> str:
    return " ".join(capsys.readouterr().err.split())


OUTPUTS = {
    "a dict with logits": Net(lambda logits: {"loss": None, "logits": logits}),
    "a dict of one tensor": Net(lambda logits: {"out": logits}),
    "an object with .logits": Net(lambda logits: types.SimpleNamespace(logits=logits)),
    "a tuple with logits first": Net(lambda logits: (logits, logits.mean())),
    "a list with logits first": Net(lambda logits: [logits, None]),
    "a named tuple": Net(lambda logits: Answer(logits, None)),
    "logits of shape (batch, classes, 1, 1)": Convolutional(),
    "logits from forward(*args)": Args(),
    "logits from forward(*args, **kwargs)": ArgsAndOptions(lambda logits: (logits,)),
    "a dict from forward(images, targets=None)": Targets(),
}


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(
            what, marks=pytest.mark.brings("model", f"A module that returns {what}", "the logits are used")
        )
        for what in OUTPUTS
    ],
)
def test_logits_are_found_in_what_a_module_returns(what):
    module = OUTPUTS[what]
    model = taken(module)
    assert check_runs(model, SPEC, "mine", "--image-size") == 5
    with torch.no_grad():
        assert torch.equal(model(IMAGES), own_logits(module))
        in_training = model.train()(IMAGES)
        assert torch.equal(in_training, copy.deepcopy(module).train().logits(IMAGES))


def test_what_is_returned_is_the_same_after_loading(tmp_path):
    module = Net(lambda logits: {"logits": logits})
    model = taken(module)
    card = Card(architecture=Architecture(source="factory", name="Net"), classes=list("abcde"), input=SPEC)
    save_model(tmp_path, model, card)
    again = load(tmp_path, factory=lambda: nn.DataParallel(Net(lambda logits: {"logits": logits})))
    assert isinstance(again, Net)
    with torch.no_grad():
        assert torch.equal(again(IMAGES), own_logits(module))


def test_a_forward_of_any_arguments_is_exported(tmp_path):
    assert export_onnx(taken(Args()), SPEC, tmp_path / "model.onnx", IMAGES) < 1e-6


@pytest.mark.brings(
    "model", "A module with autocast as a decorator of its forward", "the autocast is taken off"
)
def test_autocast_on_forward(tmp_path, capsys):
    module = Autocast()
    model = taken(module)
    assert "autocast is taken off its forward" in said(capsys)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), own_logits(module))
        assert module(IMAGES).dtype == torch.bfloat16  # the caller's is as it was
    assert export_onnx(model, SPEC, tmp_path / "model.onnx", IMAGES) < 1e-6
    assert copy.deepcopy(model).forward.__self__ is not model


@pytest.mark.brings("model", "A module with autocast inside of its forward", "its logits become float32")
def test_autocast_inside():
    module = Net(lambda logits: logits.bfloat16())
    with torch.no_grad():
        assert torch.equal(taken(module)(IMAGES), own_logits(module).bfloat16().float())


# --- what is wrapped around a module for training


class Inner(nn.Module):
    """Holds a compiled part."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(Net())

    def forward(self, images):
        return self.net(images)


class PeftModel(nn.Module):
    """As peft builds it: `base_model` holds the user's model as `model`."""

    __module__ = "peft.peft_model"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model


class LoraLinear(nn.Module):
    __module__ = "peft.tuners.lora.layer"

    def __init__(self, layer: nn.Linear, merged: bool) -> None:
        super().__init__()
        self.base_layer, self.merged = layer, merged
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})

    def forward(self, x):
        return self.base_layer(x)


def averaged(kind):
    """An average that has seen another version of the model, so that it is not equal to it."""
    model = Net()
    average = kind(model, decay=0.5) if kind is not AveragedModel else kind(model)
    if kind is AveragedModel:
        average.update_parameters(model)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    if kind is AveragedModel:
        average.update_parameters(model)
    else:
        average.update(model)
    return average


WRAPPED = {
    "DataParallel": lambda: nn.DataParallel(Net()),
    "OptimizedModule": lambda: torch.compile(Net()),
    "ModelEmaV3": lambda: averaged(ModelEmaV3),
    "ModelEmaV2": lambda: averaged(ModelEmaV2),
    "AveragedModel": lambda: averaged(AveragedModel),
    "PeftModel": lambda: PeftModel(Net()),
}
NAMES = {
    "DataParallel": "DataParallel",
    "OptimizedModule": "torch.compile",
    "ModelEmaV3": "timm's ModelEmaV3",
    "ModelEmaV2": "timm's ModelEmaV2",
    "AveragedModel": "torch's AveragedModel",
    "PeftModel": "peft's PeftModel, merged",
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind, marks=pytest.mark.brings("model", f"A module inside of {NAMES[kind]}", "taken out of it")
        )
        for kind in WRAPPED
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside of torch.compile
def test_a_module_is_taken_out_of_what_is_around_it(kind, capsys):
    module = WRAPPED[kind]()
    inner = own_module.unwrapped(module)
    model = taken(module)
    assert type(model) is Net
    assert f"taken out of its {kind}" in said(capsys)
    assert model.state_dict().keys() == Net().state_dict().keys()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), own_logits(inner))
    assert model.head.weight.data_ptr() != inner.head.weight.data_ptr()


@pytest.mark.brings("model", "A module inside of DistributedDataParallel", "taken out of it")
def test_distributed_data_parallel(tmp_path):
    group = {"backend": "gloo", "rank": 0, "world_size": 1}
    torch.distributed.init_process_group(init_method=f"file://{tmp_path / 'meeting'}", **group)
    try:
        module = Net()
        model = taken(nn.parallel.DistributedDataParallel(module))
    finally:
        torch.distributed.destroy_process_group()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), own_logits(module))


@pytest.mark.brings("model", "A module with a compiled part", "the part is taken out of torch.compile")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside of torch.compile
def test_a_wrapper_inside_a_module():
    module = Inner()
    model = taken(module)
    assert {key.split(".")[1] for key in model.state_dict()} == {"stem", "norm", "head"}
    with torch.no_grad():
        assert torch.equal(model(IMAGES), own_logits(module.net._orig_mod))
    assert hasattr(module.net, "_orig_mod")  # the caller's is as it was


@pytest.mark.brings("model", "A LoRA of peft merged in place", "the merged layers are taken out")
def test_a_merged_lora():
    net = Net()
    expected = own_logits(net)
    net.head = LoraLinear(net.head, merged=True)
    model = taken(PeftModel(net))
    assert type(model.head) is nn.Linear
    with torch.no_grad():
        assert torch.equal(model(IMAGES), expected)


@pytest.mark.brings("model", "A LoRA of peft that is not merged", "refused: call merge_and_unload() first")
def test_a_lora_that_is_not_merged():
    net = Net()
    net.head = LoraLinear(net.head, merged=False)
    for module in (net, PeftModel(net)):
        with pytest.raises(ModelError, match=r"LoRA that is not merged: pass model\.merge_and_unload\(\)"):
            taken(module)


# --- number formats, and weights that are computed in each pass


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        pytest.param(
            getattr(torch, name),
            rounding,
            marks=pytest.mark.brings("model", f"A module in {name}", "its weights are taken in float32"),
        )
        for name, rounding in (("float16", 5e-3), ("bfloat16", 5e-2), ("float64", 1e-6))
    ],
)
def test_weights_in_other_number_formats(dtype, rounding, capsys):
    module = Net()
    expected = own_logits(module)
    model = taken(module.to(dtype))
    assert f"{dtype}".removeprefix("torch.") + " weights are taken in float32" in said(capsys)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert module.head.weight.dtype == dtype
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), expected, rtol=rounding, atol=rounding)


def normed() -> Net:
    """With the weight_norm of older versions of torch, which newer ones warn of."""
    net = Net()
    with warnings.catch_warnings(action="ignore"):
        WeightNorm.apply(net.stem, "weight", 0)
    with torch.no_grad():
        net.stem.weight_g.mul_(2.0)
    return net


def changed(change) -> Net:
    net = Net()
    net.stem = change(net.stem)
    return net


COMPUTED = {
    "WeightNorm": (normed, "the old weight_norm"),
    "WeightNorm.parametrized": (lambda: changed(parametrizations.weight_norm), "weight_norm"),
    "SpectralNorm": (lambda: changed(spectral_norm), "the old spectral_norm"),
    "SpectralNorm.parametrized": (lambda: changed(parametrizations.spectral_norm), "spectral_norm"),
    "L1Unstructured": (
        lambda: changed(lambda conv: prune.l1_unstructured(conv, "weight", 0.5)),
        "masks of prune",
    ),
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind, marks=pytest.mark.brings("model", f"Weights under {what}", "folded into the weights")
        )
        for kind, (_, what) in COMPUTED.items()
    ],
)
def test_weights_that_are_computed_in_each_pass_are_folded(kind, capsys):
    module = COMPUTED[kind][0]().eval()
    model = taken(module)
    assert f"folded into the weights: {kind.split('.')[0]}" in said(capsys)
    assert model.state_dict().keys() == Net().state_dict().keys()
    assert isinstance(model.stem.weight, nn.Parameter)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), own_logits(module))
    assert module.state_dict().keys() != model.state_dict().keys()  # the caller's is as it was


class Remembers(Net):
    """Keeps what it has computed, as code that draws attention maps does."""

    def forward(self, images):
        self.last = self.logits(images)
        self.all = [*getattr(self, "all", []), {"logits": self.last}]
        return self.last


@pytest.mark.brings("model", "A module that keeps activations of its last pass", "copied without their graph")
def test_a_module_that_remembers():
    module = Remembers()
    module(IMAGES)
    assert module.last.grad_fn is not None
    model = taken(module)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), own_logits(module))
    model.train()(IMAGES).sum().backward()  # what is returned still knows how it was computed
    assert model.head.weight.grad is not None
    again = copy.deepcopy(model)  # and what is kept does not
    assert torch.equal(again.all[-1]["logits"], again.last)


@pytest.mark.brings("model", "A module with hooks of the user's own", "the hooks run in the copy too")
def test_hooks_stay():
    module = Net()
    module.head.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    with torch.no_grad():
        assert torch.equal(taken(module)(IMAGES), own_logits(module))


@pytest.mark.brings("model", "A module whose parameters are all frozen", "taken like any other")
def test_a_frozen_module():
    module = Net().requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(taken(module)(IMAGES), own_logits(module))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside of torch.compile
def test_a_module_compiled_in_place():
    module = Net()
    module.compile()
    model = taken(module)
    assert model._compiled_call_impl is None
    with torch.no_grad():
        assert torch.equal(model(IMAGES), own_logits(module))


# --- what is refused


class Locked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.frames = (i for i in range(3))  # generators cannot be copied


def replaced() -> nn.Module:
    module = Net()
    inner = module.forward
    module.forward = lambda images: inner(images)
    return module


REFUSED = {
    "a ScriptModule": (
        lambda: torch.jit.trace(Net().eval(), IMAGES),
        "is a ScriptModule, which cannot be cut: pass the module it was made of",
    ),
    "a dynamically quantised module": (
        lambda: torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear}),
        r"is quantised \(Linear\).*quantise the student afterwards",
    ),
    "a module on the meta device": (
        lambda: Net().to("meta"),
        "has no weights: stem.weight is on the meta device",
    ),
    "a lazy module that has not run": (
        lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5)),
        "is not built yet: 1.weight has no shape before its first run; run it once",
    ),
    "a module without parameters": (nn.Flatten, "a Flatten has no parameters"),
    "a module that cannot be copied": (
        Locked,
        r"a Locked cannot be copied \(.*generator.*\): pass FILE.py:FACTORY, a function that",
    ),
    "a module whose forward was replaced on the object": (
        replaced,
        "forward of a Net was replaced on the object",
    ),
}


@pytest.mark.filterwarnings("ignore")  # torch says that both ways are deprecated
@pytest.mark.parametrize(
    "what",
    [
        pytest.param(
            what, marks=pytest.mark.brings("model", what[0].upper() + what[1:], "refused in one line")
        )
        for what in REFUSED
    ],
)
def test_kinds_that_are_refused(what):
    make, message = REFUSED[what]
    module = make()
    with pytest.raises(ModelError, match=message) as caught:
        taken(module)
    assert "\n" not in str(caught.value)


def test_a_factory_whose_module_cannot_be_copied():
    with pytest.raises(
        ModelError, match=r"mine.py:build cannot be copied \(.*\): keep what cannot be copied out"
    ):
        own_module.plain(Locked(), "mine.py:build")


def test_an_output_that_is_none_of_these_is_refused_where_the_module_is_run():
    model = taken(Net(lambda logits: {"a": logits, "b": logits}))
    with pytest.raises(Exception, match="mine must return logits"):
        check_runs(model, SPEC, "mine", "--image-size")


class Tutorial(nn.Module):
    """The convolutional net of PyTorch's own tutorial, in small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5)
        self.head = nn.Linear(6 * 6 * 6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.conv(x).relu(), 2)
        return self.head(x.view(-1, 6 * 6 * 6))


@pytest.mark.brings("model", "a `view` behind a convolution", "images lie in memory as it needs them")
def test_a_view_behind_a_convolution():
    model, images = Tutorial(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model.eval()(images)
        found = taken(model)(images.contiguous(memory_format=torch.channels_last))
    assert torch.equal(found, expected)


class InPlace(Net):
    def forward(self, images):
        return self.logits(images.sub_(0.5).mul_(2))


@pytest.mark.brings("model", "a forward pass that changes the images in place", "it changes a copy")
def test_images_are_not_changed_in_place():
    images = torch.rand(2, 3, 16, 16)
    before, model = images.clone(), taken(InPlace())
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
    assert torch.equal(images, before)
    model(images.requires_grad_())  # a leaf that wants a gradient cannot be changed at all
