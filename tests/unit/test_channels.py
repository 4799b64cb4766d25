"""Channels of the residual stream: every family, cut from the first layer to the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.layers import RmsNorm
from timm.layers.norm import LayerNorm2d, RmsNorm2d
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet, RegNetCfg
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models.resnet import Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from blocks import check_sliced_equals_masked, masked, shaken
from stepwell.data.batches import Batch
from stepwell.data.spec import InputSpec
from stepwell.errors import ModelError, UnsupportedModelError
from stepwell.models.card import Architecture, Card, narrow_and_load, save_model
from stepwell.models.export import export_onnx
from stepwell.models.huggingface import wrapped
from stepwell.pruning.channels import channel_groups, is_stream
from stepwell.pruning.families import find_groups
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units
from stepwell.pruning.uniform import unequal
from stepwell.pruning.units import Group, tensors_of
from stepwell.setting.channels import with_channels
from stepwell.stages.score import importance_by_gradient
from stepwell.zoo.cifar_nets import CifarResNet, CifarWideResNet
from tiny import FixedEval

RATIOS = (0.2, 0.6)
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 5}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 1),
        "num_heads": (2, 4), "num_classes": 5}  # fmt: skip


def vit(name: str = "vit_tiny_patch16_224", **args: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **{**VIT, **args})


def swin(name: str, **args: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **{**SWIN, **args})


def convnext(name: str = "convnext_tiny", **args: object) -> Callable[[], nn.Module]:
    sizes = {"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 16), "num_classes": 5}
    return lambda: timm.create_model(name, **{**sizes, **args})


def cnn(name: str, **args: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **args)


def torchvision_resnet() -> nn.Module:
    return TorchvisionResNet(Bottleneck, [1, 2, 1, 1], num_classes=5, width_per_group=8)


def of_transformers(kind: str, more: str = "", **args: object) -> Callable[[], nn.Module]:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    config = {"image_size": 32, "patch_size": 8, "num_labels": 5, **sizes, **args}
    made = (
        getattr(transformers, f"{kind}Config"),
        getattr(transformers, f"{kind}ForImageClassification{more}"),
    )
    return lambda: wrapped(made[1](made[0](**config)))


def regnet() -> nn.Module:
    cfg = RegNetCfg(depth=6, w0=8, wa=8.0, wm=1.8, group_size=4, se_ratio=0.25, stem_width=8)
    return RegNet(cfg, num_classes=5)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": vit(),
    "vit, mean of tokens, LayerScale": vit(class_token=False, global_pool="avg", init_values=0.1),
    "vit, registers, norm first": vit(reg_tokens=2, pre_norm=True, qk_norm=True),
    "vit, post-norm": vit("vit_base_patch16_rpn_224"),
    "vit, parallel branches": vit("vit_small_patch16_18x2_224"),
    "vit, RMS norms": vit("beit3_base_patch16_224", norm_layer=RmsNorm),
    "deit, distilled": vit("deit_tiny_distilled_patch16_224"),
    "deit 3": vit("deit3_small_patch16_224", init_values=0.1),
    "eva02": vit("eva02_tiny_patch14_224", embed_dim=32),
    "eva, post-norm, plain FFN": vit(
        "eva02_tiny_patch14_224", embed_dim=32, use_post_norm=True, swiglu_mlp=False
    ),
    "dinov3": vit("vit_small_patch16_dinov3", embed_dim=32),
    "beit": vit("beit_base_patch16_224"),
    "beit v2": vit("beitv2_base_patch16_224", use_abs_pos_emb=True, use_rel_pos_bias=False),
    "cait": vit("cait_xxs24_224", depth_token_only=2),
    "vit of transformers": of_transformers("ViT", qkv_bias=False, head_dim=8),
    "deit of transformers": of_transformers("DeiT", "WithTeacher"),
    "swin": swin("swin_tiny_patch4_window7_224"),
    "swin v2": swin("swinv2_tiny_window8_256"),
    "convnext": convnext(),
    "convnext of convolutions": convnext(conv_mlp=True),
    "convnext v2": convnext("convnextv2_atto"),
    "resnet, basic blocks": cnn("resnet18", layers=(2, 1, 1, 1), channels=(8, 12, 16, 16)),
    "resnet, bottlenecks, SE, deep stem": cnn(
        "seresnet50",
        layers=(1, 2, 1, 1),
        channels=(8, 8, 8, 8),
        stem_type="deep",
        stem_width=4,
        avg_down=True,
    ),
    "resnext": cnn(
        "resnext50_32x4d", layers=(1, 2, 1, 1), channels=(8, 8, 8, 8), cardinality=2, base_width=64
    ),
    "torchvision's resnet": torchvision_resnet,
    "cifar resnet": lambda: CifarResNet(14, "B", num_classes=5),
    "cifar resnet, zeros": lambda: CifarResNet(14, "A", num_classes=5),
    "cifar wide resnet": lambda: CifarWideResNet(16, 1, num_classes=5),
    "regnet": regnet,
    "efficientnet": lambda: EfficientNet(
        decode_arch_def([["ds_r1_k3_s1_e1_c8"], ["ir_r2_k3_s2_e3_c12"], ["er_r2_k3_s1_e2_c16"]]),
        num_classes=5,
        num_features=20,
        stem_size=12,
    ),
    "efficientnet with SE, no head": lambda: EfficientNet(
        decode_arch_def([["ds_r2_k3_s1_e1_c8_se0.25"], ["ir_r2_k3_s2_e3_c12_se0.25"]]),
        num_classes=5,
        num_features=0,
        stem_size=8,
        se_layer=SqueezeExcite,
    ),
    "mobilenet v3": lambda: MobileNetV3(
        decode_arch_def([["ir_r2_k3_s2_e3_c12"], ["cn_r1_k1_s1_c20"]]),
        num_classes=5,
        num_features=24,
        stem_size=8,
    ),
}


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def all_groups(model: nn.Module) -> list[Group]:
    others = find_groups(model)
    return [*others, *channel_groups(model, others)]


QUICK = ("vit", "deit, distilled", "vit of transformers", "deit of transformers", "eva02", "beit", "cait",
         "swin", "convnext v2", "resnext", "cifar resnet, zeros", "regnet", "efficientnet",
         "mobilenet v3")  # fmt: skip
"""The others differ from these by a layer or two, and are slow tests."""
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize("name", EVERY)
def test_slices_equal_masks(name: str) -> None:
    model = shaken(MODELS[name])
    groups = all_groups(model)
    assert groups[-1].kind == "channel"
    check_sliced_equals_masked(model, noise(2, 3, 32, 32), RATIOS, masked=masked_channels, groups=groups)


def test_heads_that_have_no_equal_share_of_the_channels_are_said() -> None:
    groups = all_groups(of_transformers("ViT", hidden_size=26)())
    assert unequal(groups) == "its 26 channels cannot be shared out among 4 heads"


def mixed_widths(groups: Sequence[Group]) -> dict[str, int]:
    """Two thirds of each, but that the first attention, the first FFN and the last filters are gone."""
    gone = {g.kind: g.name for g in reversed(groups) if g.kind in ("head", "neuron")}
    # Of a stage's first block nothing but its convolutions leads on, where it has no shortcut.
    gone |= {g.kind: g.name for g in groups if g.kind == "filter"}
    return {g.name: 0 if g.name in gone.values() else (2 * g.num_units + 2) // 3 for g in groups}


def student_of(model: nn.Module, groups: Sequence[Group], widths: Mapping[str, int]) -> nn.Module:
    skeleton = build_skeleton(model, groups, widths)
    return fill(skeleton, leading_units(tensors_of(model), skeleton, groups, widths)).eval()


def with_plain_keys(model: nn.Module) -> nn.Module:
    for key, buffer in model.named_buffers():
        if key.endswith("k_bias"):
            buffer.zero_()  # a constant of timm's, which no file holds
    return model


@pytest.mark.parametrize("name", EVERY)
def test_a_student_is_saved_loaded_and_cut_again(name: str, tmp_path: Path) -> None:
    model = with_plain_keys(shaken(MODELS[name]).float())
    groups = all_groups(model)
    widths = mixed_widths(groups)
    student, images = student_of(model, groups, widths), noise(3, 3, 32, 32).float()
    card = Card(
        architecture=Architecture(source="factory", name=name),
        widths=widths,
        classes=list("abcde"),
        input=InputSpec((32, 32), 3, (0.5,) * 3, (0.5,) * 3),
    )
    save_model(tmp_path, student, card)
    loaded = narrow_and_load(MODELS[name](), widths, tmp_path / "model.safetensors")
    assert torch.equal(loaded(images), student(images))

    again = {g.name: g for g in all_groups(student)}
    assert {n: g.num_units for n, g in again.items()} == {n: widths[n] for n in again}
    assert {n for n in again if is_stream(n)} == {n for n in widths if is_stream(n)}
    one_less = {n: g.num_units - 1 for n, g in again.items()}
    labels = torch.zeros(3, dtype=torch.int64)
    scored = importance_by_gradient(
        student, list(again.values()), FixedEval([Batch(images, labels, torch.arange(3))])
    )
    assert scored.raw.keys() == again.keys()
    twice = student_of(student, list(again.values()), one_less)
    once = student_of(model, groups, {**widths, **one_less})
    torch.testing.assert_close(twice(images), once(images))


@pytest.mark.parametrize(
    "name",
    [
        *("vit", "vit of transformers", "beit", "cait", "eva02", "swin", "convnext v2"),
        *("cifar resnet, zeros", "regnet", "mobilenet v3"),
    ],
)
@pytest.mark.slow
def test_a_student_is_exported(name: str, tmp_path: Path) -> None:
    model = shaken(MODELS[name]).float()
    groups = all_groups(model)
    student, images = student_of(model, groups, mixed_widths(groups)), noise(3, 3, 32, 32).float()
    spec = InputSpec((32, 32), 3, (0.5,) * 3, (0.5,) * 3)
    assert export_onnx(student, spec, tmp_path / "model.onnx", images) <= 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "vit",
        "deit of transformers",
        "eva, post-norm, plain FFN",
        "cait",
        "swin",
        "convnext",
        "resnext",
        "cifar resnet, zeros",
        "efficientnet",
    ],
)
def test_importance_is_the_gradient_of_one_gate_wherever_the_stream_is_read(name: str) -> None:
    """Against differences of the loss: a channel's gates moved together, a little up and down."""
    model = shaken(MODELS[name])
    groups = [g for g in all_groups(model) if g.kind == "channel"]
    images, labels = noise(1, 3, 32, 32), torch.tensor([2])
    importance = importance_by_gradient(model, groups, FixedEval([Batch(images, labels, torch.arange(1))]))
    for group in (groups[0], groups[-1]):
        for unit in (0, group.num_units - 1):
            high, low = (
                gated_loss(model, group, unit, gate, images, labels) for gate in (1 + 1e-5, 1 - 1e-5)
            )
            expected = abs(high - low) / 2e-5
            assert importance.raw[group.name][unit] == pytest.approx(expected, rel=1e-4, abs=1e-8)


def gated_loss(
    model: nn.Module, group: Group, unit: int, value: float, images: Tensor, labels: Tensor
) -> float:
    gate = torch.ones(group.num_units, dtype=images.dtype)
    gate[unit] = value

    def multiply(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ((inputs[0].movedim(group.gate_dim, -1) * gate).movedim(-1, group.gate_dim), *inputs[1:])

    with ExitStack() as stack, torch.no_grad():
        for name in dict.fromkeys(group.gates):
            stack.callback(model.get_submodule(name).register_forward_pre_hook(multiply).remove)
        return cross_entropy(model(images), labels).item()


def test_a_group_of_channels_has_a_slice_of_every_tensor_that_is_as_wide() -> None:
    """No 24 but the width in this model, and no tensor without it but those inside of heads and neurons."""
    model = MODELS["vit"]()
    (group,) = channel_groups(model, find_groups(model))
    cut = {(s.tensor, s.dim) for s in group.slices}
    wide = {
        (name, dim)
        for name, tensor in model.named_parameters()
        for dim, size in enumerate(tensor.shape)
        if size == 24
        # The heads' outputs are 24 as well: these are no channels.
        and (name.rpartition("blocks")[2][3:], dim) != ("attn.proj.weight", 1)
    }
    assert cut == wide


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (vit(class_token=False, global_pool="map"), "attention pooling has a stream of its own"),
        (vit(num_classes=0), "without a classifier the channels are the model's outputs"),
        (vit(attn_layer="diff"), "no family knows blocks.0.attn"),
        (cnn("resnetblur50"), "maxpool.1 does something else to the channels"),
        (lambda: type("Other", (CifarResNet,), {})(8), "that of timm's ViT and DeiT, .* can"),
    ],
    ids=["attention pooling", "no classifier", "unknown attention", "blur", "another class"],
)
def test_streams_that_cannot_be_cut_stay_whole(build: Callable[[], nn.Module], reason: str) -> None:
    model = build()
    groups = find_groups(model)
    assert channel_groups(model, groups) == []
    refused = f"--cut all: the residual stream of this {type(model).__name__} cannot be cut: {reason}; --cut"
    with pytest.raises(UnsupportedModelError, match=refused):
        with_channels(model, groups, torch.zeros(2, 3, 32, 32))


def test_a_missing_part_is_named() -> None:
    model = vit()()
    groups = find_groups(model)
    model.patch_embed.proj = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"cut: patch_embed\.proj has no weight; --cut"):
        with_channels(model, groups, torch.zeros(2, 3, 32, 32))


def test_a_card_without_channels_is_damaged(tmp_path: Path) -> None:
    model = MODELS["vit"]()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for width, said in ((0, "cannot lose all of its channels"), (25, "channels has 24 units there, here 25")):
        with pytest.raises(ModelError, match=said):
            narrow_and_load(MODELS["vit"](), {"channels": width}, tmp_path / "model.safetensors")


def test_something_that_reads_the_stream_from_outside_is_noticed() -> None:
    model = shaken(MODELS["vit"]).float()
    images = noise(2, 3, 32, 32).float()
    assert len(with_channels(model, find_groups(model), images)) == 5
    model.norm.register_forward_hook(lambda _module, _inputs, output: output * torch.arange(24))
    with pytest.raises(UnsupportedModelError, match="something else in it reads its channels"):
        with_channels(model, find_groups(model), images)


@contextmanager
def masked_channels(model: nn.Module, groups: Sequence[Group], widths: Mapping[str, int]) -> Iterator[None]:
    """As `masked`, but that norms see the channels alone that are left, and say 0 for all others."""
    with ExitStack() as stack:
        stack.enter_context(masked(model, groups, widths))
        for group in groups:
            for name in group.norms:
                norm = model.get_submodule(name)
                hook = over_kept(group, widths[group.name])
                stack.callback(norm.register_forward_hook(hook).remove)
        yield


def over_kept(group: Group, width: int) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    def hook(norm: nn.Module, inputs: tuple[Tensor], _output: Tensor) -> Tensor:
        is_map = isinstance(norm, LayerNorm2d | RmsNorm2d) or (group.kind == "neuron" and group.gate_dim == 1)
        dim = 1 if is_map else -1
        x = inputs[0].movedim(dim, -1)
        if group.kind == "channel":  # where there are several parts, a channel has the same place in each
            kept = (torch.arange(x.shape[-1]) % group.num_units) < width
        else:
            kept = torch.arange(x.shape[-1]) < x.shape[-1] // group.num_units * width
        out = torch.zeros_like(x)
        out[..., kept] = normed(norm, x[..., kept], kept)
        return out.movedim(-1, dim)

    return hook


def normed(norm: nn.Module, x: Tensor, kept: Tensor) -> Tensor:
    """The norms, written out."""
    if x.shape[-1] == 0:
        return x
    if type(norm).__name__ == "GlobalResponseNorm":
        length = x.square().sum(dim=(1, 2), keepdim=True).sqrt()
        share = length / (length.mean(dim=-1, keepdim=True) + norm.eps)
        return x + norm.bias[kept] + norm.weight[kept] * x * share
    if isinstance(norm, RmsNorm | RmsNorm2d):
        return x / (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight[kept]
    centred = x - x.mean(dim=-1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    return scaled * norm.weight[kept] + norm.bias[kept]
