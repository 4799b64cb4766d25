"""How `doctor` gets at the shapes of a timm model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from stepwell.commands import doctor
from stepwell.config.commands import CompressConfig
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError
from stepwell.losses.crd import CRD


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


def test_memory_knows_the_banks_of_crd():
    crd = CRD(8, 8, None, num_images=500)
    banks = crd.student_bank.nbytes + crd.teacher_bank.nbytes
    config = CompressConfig(feature_loss="crd", batch_size=32)
    scores = 2 * 32 * 500 * 4
    assert doctor.bank_bytes(config, 500, num_rungs=9) == (9 * banks, banks + scores)
    alone = config.model_copy(update={"path": "single-step"})
    assert doctor.bank_bytes(alone, 500, num_rungs=9) == (banks, banks + scores)
    chain = config.model_copy(update={"path": "dgkd", "assistants": (0.6, 0.3)})
    assert doctor.bank_bytes(chain, 500, num_rungs=3) == (3 * banks, 2 * (banks + scores))
    assert doctor.bank_bytes(CompressConfig(), 500, num_rungs=9) == (0, 0)


@pytest.mark.parametrize(("num_images", "num_negatives"), [(500, 400), (5000, 32)])
def test_what_a_step_of_crd_reads_is_counted(num_images, num_negatives):
    """Few negatives of many images are copied out of the banks; else a product is taken with all of them."""
    crd = CRD(8, 8, None, num_images=num_images, num_negatives=num_negatives)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        crd(torch.rand(32, 8, requires_grad=True), torch.rand(32, 8), torch.arange(32))
    args = {"num_negatives": float(num_negatives)}
    config = CompressConfig(feature_loss="crd", batch_size=32, path="single-step", feature_args=args)
    _, read = doctor.bank_bytes(config, num_images, 1)
    assert 0.7 * read < sum(kept) < 2 * read


def test_memory_knows_the_rotations_of_sskd(tmp_path):
    spec = InputSpec((32, 32), 3, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "center")
    model = timm.create_model("resnet18", num_classes=10)

    def said(**options: object) -> float:
        config = CompressConfig(teacher="resnet18", batch_size=512, device="cpu", **options)
        (line,) = doctor._estimate(config, None, model, [model, model], None, spec)
        return float(line.split(" GiB of memory")[0].split()[-1])

    weights = 20 * sum(p.numel() for p in model.parameters()) / 2**30  # teacher, store, gradients, AdamW
    assert said(feature_loss="sskd") - weights == pytest.approx(4 * (said() - weights), rel=0.15)
