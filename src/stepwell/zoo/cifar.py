"""The models of `cifar_nets.py` under timm's names, so that they work wherever a timm model does.

There are no pretrained weights of ours; weights of others are loaded with `--teacher-weights FILE`. Images
are normalised with the mean and standard deviation of CIFAR-10. A checkpoint that was trained with other
numbers is given them by `--mean` and `--std`.
"""

from __future__ import annotations

from typing import Any, cast

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from stepwell.zoo.cifar_nets import CifarNet, CifarResNet, CifarVgg, CifarWideResNet


def _cfg(first_conv: str, classifier: str) -> dict[str, Any]:
    return {
        "input_size": (3, 32, 32),
        "num_classes": 10,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "first_conv": first_conv,
        "classifier": classifier,
    }


default_cfgs = generate_default_cfgs(
    {
        **{f"cifar_resnet{depth}": _cfg("conv1", "linear") for depth in (8, 14, 20, 32, 44, 56, 110)},
        **{f"cifar_wrn_{depth}_2": _cfg("conv1", "fc") for depth in (16, 40)},
        **{f"cifar_vgg{depth}": _cfg("block0.0", "classifier") for depth in (8, 13)},
    }
)


def _build(
    kind: type[CifarNet], name: str, pretrained: bool, args: dict[str, Any], **fixed: object
) -> CifarNet:
    return cast(CifarNet, build_model_with_cfg(kind, name, pretrained, **fixed, **args))


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> CifarNet:  # noqa: ANN401
    """ResNet-8 of He et al. 2015 for CIFAR."""
    return _build(CifarResNet, "cifar_resnet8", pretrained, kwargs, depth=8)


@register_model
def cifar_resnet14(pretrained: bool = False, **kwargs: Any) -> CifarNet:  # noqa: ANN401
    """ResNet-14 of He et al. 2015 for CIFAR."""
    return _build(CifarResNet, "cifar_resnet14", pretrained, kwargs, depth=14)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarNet:  # noqa: ANN401
    """ResNet-20 of He et al. 2015 for CIFAR."""
    return _build(CifarResNet, "cifar_resnet20", pretrained, kwargs, depth=20)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarNet:  # noqa: ANN401
    """ResNet-32 of He et al. 2015 for CIFAR."""
    return _build(CifarResNet, "cifar_resnet32", pretrained, kwargs, depth=32)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarNet:  # noqa: ANN401
    """ResNet-44 of He et al. 2015 for CIFAR."""
    return _build(CifarResNet, "cifar_resnet44", pretrained, kwargs, depth=44)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarNet:  # noqa: ANN401
    """ResNet-56 of He et al. 2015 for CIFAR."""
    return _build(CifarResNet, "cifar_resnet56", pretrained, kwargs, depth=56)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarNet:  # noqa: ANN401
    """ResNet-110 of He et al. 2015 for CIFAR."""
    return _build(CifarResNet, "cifar_resnet110", pretrained, kwargs, depth=110)


@register_model
def cifar_wrn_16_2(pretrained: bool = False, **kwargs: Any) -> CifarNet:  # noqa: ANN401
    """Wide ResNet of depth 16, twice as wide."""
    return _build(CifarWideResNet, "cifar_wrn_16_2", pretrained, kwargs, depth=16, widen=2)


@register_model
def cifar_wrn_40_2(pretrained: bool = False, **kwargs: Any) -> CifarNet:  # noqa: ANN401
    """Wide ResNet of depth 40, twice as wide."""
    return _build(CifarWideResNet, "cifar_wrn_40_2", pretrained, kwargs, depth=40, widen=2)


@register_model
def cifar_vgg8(pretrained: bool = False, **kwargs: Any) -> CifarNet:  # noqa: ANN401
    """VGG-8: one convolution in each of five stages."""
    stages = [[width] * 1 for width in (64, 128, 256, 512, 512)]
    return _build(CifarVgg, "cifar_vgg8", pretrained, kwargs, stages=stages)


@register_model
def cifar_vgg13(pretrained: bool = False, **kwargs: Any) -> CifarNet:  # noqa: ANN401
    """VGG-13: two convolutions in each of five stages."""
    stages = [[width] * 2 for width in (64, 128, 256, 512, 512)]
    return _build(CifarVgg, "cifar_vgg13", pretrained, kwargs, stages=stages)
