"""Which parameters of real models have no weight decay."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from stepwell.training.optimizer import no_decay_of


def matrices_without_decay(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.ndim > 1} & no_decay_of(model)


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("vit_tiny_patch16_224", {"depth": 1}, {"cls_token", "pos_embed"}),
        (
            "swin_tiny_patch4_window7_224",
            {"depths": (1,), "num_heads": (2,)},
            {"relative_position_bias_table"},
        ),
        ("samvit_base_patch16_224", {"depth": 1}, {"rel_pos_h", "rel_pos_w"}),
        ("edgenext_xx_small", {}, {"temperature", "token_projection.weight"}),
        ("resnet18", {}, set()),
    ],
)
def test_models_of_timm(name, args, expected):
    with torch.device("meta"):
        found = matrices_without_decay(timm.create_model(name, **args))
    assert {end for end in expected if any(n.endswith(end) for n in found)} == expected
    assert all(any(n.endswith(end) for end in expected) for n in found)


def test_what_a_part_of_a_module_excepts():
    with torch.device("meta"):
        model = nn.Sequential(timm.create_model("vit_tiny_patch16_224", depth=1), nn.ReLU())
    assert matrices_without_decay(model) == {"0.cls_token", "0.pos_embed"}


def test_torchvisions_vit():
    with torch.device("meta"):
        model = torchvision.models.vision_transformer._vision_transformer(16, 1, 2, 8, 8, None, False)
    assert matrices_without_decay(model) == {"class_token", "encoder.pos_embedding"}


@pytest.mark.parametrize(
    ("family", "args", "expected"),
    [
        ("DeiT", {"num_hidden_layers": 1}, {"cls_token", "distillation_token", "position_embeddings"}),
        ("Dinov2", {"num_hidden_layers": 1}, {"cls_token", "mask_token", "position_embeddings"}),
    ],
)
def test_models_of_transformers(family, args, expected):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**args)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForImageClassification")(config)
    assert {name.rpartition(".")[2] for name in matrices_without_decay(model)} == expected


def test_weights_of_layers_decay_whatever_their_shape():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(1, 4), nn.LayerNorm(4))
    assert no_decay_of(model) == {"0.bias", "1.bias", "2.weight", "2.bias"}
