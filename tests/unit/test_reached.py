"""A user's own model with a second head: losses read the first one's map, and no student has the second."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from masks import write_masks
from stepwell.config.options import DataOptions, LossOptions
from stepwell.data.spec import InputSpec
from stepwell.data.splits import resolve_data
from stepwell.errors import ConfigError, ModelError
from stepwell.losses.choose import feature_loss
from stepwell.losses.observe import Observed
from stepwell.measure.estimate import Losses
from stepwell.models import own_module
from stepwell.models.card import Architecture, Card, load, save_model
from stepwell.models.reached import LeftOut, leave_out, with_logits_alone
from stepwell.models.teacher import Teacher
from stepwell.setting.masks import settle_masks
from stepwell.tasks.outputs import AsLogits
from tiny import pair

SPEC = InputSpec((16, 24), 3, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "squash")


class TwoHeads(nn.Module):
    """The second one runs last; it has dropout and batch normalisation, as such heads have."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.neck = nn.Conv2d(8, 6, 3, 1, 1)
        self.head = nn.Conv2d(6, 3, 1)
        self.deep = nn.Sequential(
            nn.Conv2d(8, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 3, 1)
        )
        self.never = nn.Linear(5, 5)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        shared = self.body(images)
        return {"out": self.head(self.neck(shared)), "aux": self.deep(shared)}


class ReadsWeights(TwoHeads):
    """No gradient says that it needs the layer `never`."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = super().forward(images)
        return {"out": found["out"] + self.never.weight.detach().mean(), "aux": found["aux"]}


def taken(model: nn.Module) -> AsLogits:
    torch.manual_seed(0)
    return AsLogits(own_module.plain(model, "mine", quiet=True).eval().requires_grad_(False), "maps")


def test_losses_read_the_map_of_the_first_head():
    model = taken(TwoHeads())
    images = torch.randn(2, 3, 16, 24)
    expected = model.model.neck(model.model.body(images))
    assert with_logits_alone(model, SPEC) == ["model.deep", "model.never"]
    assert model.last_layer == "model.head"
    assert torch.equal(Observed(model, ())(images).features, expected)


def test_the_first_heads_map_is_read_where_the_second_stays():
    model = taken(TwoHeads())
    model.last_layer = "model.head"
    assert Observed(model, ())(torch.randn(2, 3, 16, 24)).features.shape == (2, 6, 16, 24)


def test_what_no_gradient_tells_stays():
    model = taken(ReadsWeights())
    images = torch.randn(2, 3, 16, 24)
    before = model(images)
    assert with_logits_alone(model, SPEC) == ["model.deep"]
    assert torch.equal(model(images), before)
    assert isinstance(model.model.deep, LeftOut)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_teacher_is_taken_without_its_second_head_and_its_card_says_so(tmp_path):
    torch.manual_seed(0)
    data = resolve_data(
        DataOptions(data=str(write_masks(tmp_path / "data", {"train": 3, "val": 2, "test": 2})), workers=0)
    )
    model = own_module.plain(TwoHeads(), "mine", quiet=True).eval()
    teacher = Teacher(model, Architecture(source="factory", name="mine"), SPEC, None, {}, "mine", "")
    options = DataOptions(data=data.source, workers=0, batch_size=2)
    teacher, _ = settle_masks(teacher, data, options, torch.device("cpu"))
    assert teacher.architecture.unused == ["model.deep", "model.never"]
    assert any("left out, since the logits do not depend on it: deep, never" in n for n in teacher.notes)
    card = Card(
        architecture=teacher.architecture, classes=list(data.classes), input=SPEC, task="segmentation"
    )
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", teacher.model, card)
    again = load(tmp_path / "model", TwoHeads)
    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(again(images), teacher.model(images))
    assert not any("deep" in name for name in again.state_dict())
    with pytest.raises(ModelError, match=r"does not fit the AsLogits .* no model\.deep there"):
        load(tmp_path / "model", lambda: TwoHeads().neck)


class OfOneSize(TwoHeads):
    """It takes no small images, on which others are looked at."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        assert images.shape[2:] == (160, 32)
        return super().forward(images)


def test_a_model_of_one_size_is_looked_at_in_that_size():
    model = taken(OfOneSize())
    assert with_logits_alone(model, replace(SPEC, size=(160, 32))) == ["model.deep", "model.never"]
    assert model.last_layer == "model.head"


class OnTokens(nn.Module):
    """Of patches; the way from tokens to logits is given."""

    def __init__(self, head: nn.Module, *behind: nn.Module) -> None:
        super().__init__()
        self.embed, self.mix = nn.Conv2d(3, 8, 4, 4), nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.head, self.behind = head, nn.Sequential(*behind)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images)
        tokens = self.mix(patches.flatten(2).mT)
        if isinstance(self.head, nn.Linear):
            tokens = self.head(tokens)
        found = tokens.mT.unflatten(2, patches.shape[2:])
        return self.behind(found if isinstance(self.head, nn.Linear) else self.head(found))


def features_of(model: AsLogits) -> Tensor:
    return Observed(model, ())(torch.randn(2, 3, 16, 24)).features


@pytest.mark.parametrize("behind", [(), (nn.ConvTranspose2d(3, 3, 4, 4),)])
def test_what_a_linear_layer_reads_is_no_map_and_not_the_images(behind):
    model = taken(OnTokens(nn.Linear(8, 3), *behind))
    assert with_logits_alone(model, SPEC) == []
    assert model.last_layer == "model.head"
    assert features_of(model).shape == (2, 4 * 6, 8)


@pytest.mark.parametrize("head", [nn.Conv2d(8, 3, 1), nn.ConvTranspose2d(8, 3, 4, 4)])
def test_the_map_that_a_convolution_of_either_kind_reads(head):
    model = taken(OnTokens(head))
    with_logits_alone(model, SPEC)
    assert model.last_layer == "model.head"
    assert features_of(model).shape == (2, 8, 4, 6)
    assert Losses().of(model, ()).last_map == (3, 8)


def test_a_convolution_that_only_scales_logits_is_not_the_last_layer():
    model = taken(OnTokens(nn.Conv2d(8, 3, 1), nn.ConvTranspose2d(3, 3, 4, 4, groups=3)))
    with_logits_alone(model, SPEC)
    assert model.last_layer == "model.head"


class NoLayer(nn.Module):
    """It has none that anybody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.weight * images


@pytest.mark.parametrize("model", [NoLayer(), OnTokens(nn.Linear(8, 3))])
@pytest.mark.parametrize("name", ["cwd", "skd", "ifvd", "cirkd"])
def test_losses_on_maps_are_refused_where_there_is_none(model, name):
    model, images = taken(model), torch.randn(2, 3, 16, 24)
    with_logits_alone(model, SPEC)
    answer = Observed(model, ())(images)
    with_map = answer._replace(features=torch.randn(2, 8, 4, 6))
    for who, student, teacher in (("teacher", with_map, answer), ("student", answer, with_map)):
        with pytest.raises(ConfigError, match=f"{name} compares the maps .* the {who}'s logits come from no"):
            feature_loss(LossOptions(feature_loss=name), pair(student, teacher, task="segmentation"))


def test_what_is_not_there_cannot_be_left_out():
    with pytest.raises(KeyError):
        leave_out(TwoHeads(), ["heads"])
