"""How `doctor` gets at the shapes of a timm model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from stepwell.commands import doctor
from stepwell.config import CompressConfig
from stepwell.errors import ConfigError


def devices_of(config: CompressConfig, data: object = None) -> set[str]:
    model, _, _ = doctor._model(config, data)
    return {parameter.device.type for parameter in model.parameters()}


def test_weights_take_memory_only_where_time_is_measured():
    assert devices_of(CompressConfig(teacher="resnet18")) == {"meta"}
    assert devices_of(CompressConfig(teacher="resnet18", latency_ms=5.0)) == {"cpu"}


@pytest.mark.parametrize("own_classes", [False, True])
def test_a_model_whose_constructor_computes_with_tensors_is_built_for_real(monkeypatch, own_classes):
    """As timm's RegNet did; with arguments, `create_timm` reports the failure as one of them."""

    def create(name: str, pretrained: bool = False, num_classes: int = 10) -> nn.Module:
        return nn.Conv2d(3, num_classes, len(torch.tensor([1, 1]).unique()))

    def on_meta_without_unique(self: torch.Tensor) -> torch.Tensor:
        if self.is_meta:
            raise NotImplementedError("aten::_unique2")
        return unique(self)

    unique = torch.Tensor.unique
    monkeypatch.setattr(torch.Tensor, "unique", on_meta_without_unique)
    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(doctor, "input_spec", lambda model: None)
    data = SimpleNamespace(classes=["a", "b"]) if own_classes else None
    config = CompressConfig(teacher="resnet18", teacher_weights="weights.pt" if own_classes else None)
    assert devices_of(config, data) == {"cpu"}


def test_arguments_that_do_not_suit_are_still_told():
    with pytest.raises(ConfigError, match="do not suit resnet18"):
        devices_of(CompressConfig(teacher="resnet18", model_args={"no_such": "1"}))
