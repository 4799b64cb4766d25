"""What images a model takes, and what is said where it does not."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from stepwell.config.options import DataOptions
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError, DataError, ModelError
from stepwell.models.card import digest
from stepwell.models.input import as_asked, check_runs, check_trains, input_spec, with_image_size
from stepwell.models.teacher import teacher_from_module
from stepwell.pruning.skeleton import build_skeleton, fill
from stepwell.tasks.outputs import check_output

SPEC = InputSpec((16, 16), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Own(nn.Module):
    """Called `patch_embed` as timm's, but takes any size."""

    def __init__(self, as_dict: bool = False) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.head = nn.Linear(8, 5)
        self.as_dict = as_dict

    def forward(self, images):
        logits = self.head(self.patch_embed(images).mean((2, 3)))
        return {"logits": logits} if self.as_dict else logits


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def test_any_size_where_the_model_takes_any():
    assert with_image_size(input_spec(Own()), Own(), 32).size == (32, 32)


def test_one_size_where_the_model_has_one():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with pytest.raises(ConfigError, match="--image-size 64: this VisionTransformer was built for 32 x 32"):
        with_image_size(input_spec(model), model, 64)


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [
        ("twins_svt_small", {"img_size": 64, "depths": (1, 1, 1, 1)}, (64, 64)),
        ("sequencer2d_s", {"img_size": 64, "layers": (1, 1, 1, 1)}, (64, 64)),
        ("naflexvit_base_patch16_gap", {"img_size": 64, "depth": 1}, (64, 64)),
        ("gmlp_s16_224", {"img_size": 64}, (64, 64)),
        ("hiera_tiny_224", {"img_size": 64, "stages": (1, 1, 1, 1)}, (64, 64)),
        ("vit_tiny_patch16_224", {"img_size": (32, 64), "depth": 1}, (32, 64)),
        ("efficientvit_m0", {"img_size": 64}, (64, 64)),
        ("vit_tiny_patch16_224", {"depth": 1}, (224, 224)),
        ("resnet18", {"in_chans": 1}, (224, 224)),
    ],
)
@pytest.mark.brings(
    "model", "A timm model built with img_size=", "takes images of that size, whatever its class"
)
def test_the_size_that_a_model_was_built_with(name, args, size):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3, **args)
    spec = input_spec(model, args)
    assert (spec.size, spec.channels) == (size, args.get("in_chans", 3))
    assert check_runs(model, spec, name, "--image-size") == 3


@pytest.mark.brings("model", "A timm model with dynamic_img_size at another --image-size", "allowed")
def test_another_size_where_the_model_resamples_its_positions():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, dynamic_img_size=True)
    assert with_image_size(input_spec(model), model, 64).size == (64, 64)


class Dino(nn.Module):
    """As DINO's own code: `img_size` is a number, and positions are resampled for other sizes."""

    def __init__(self, img_size: int = 32, patch: int = 8, dim: int = 16) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.img_size, self.patch_embed.patch_size = img_size, patch
        self.patch_embed.proj = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (img_size // patch) ** 2, dim))
        self.block = nn.TransformerEncoderLayer(dim, 4, 32, batch_first=True)
        self.head = nn.Linear(dim, 5)

    def interpolate_pos_encoding(self, num_patches: int) -> torch.Tensor:
        side, new = round((self.pos_embed.shape[1] - 1) ** 0.5), round(num_patches**0.5)
        if side == new:
            return self.pos_embed
        table = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        table = nn.functional.interpolate(table, (new, new), mode="bicubic").flatten(2).mT
        return torch.cat([self.pos_embed[:, :1], table], 1)

    def prepare_tokens(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed.proj(images).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1)
        return tokens + self.interpolate_pos_encoding(patches.shape[1])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.prepare_tokens(images))[:, 0])


@pytest.mark.brings("model", "A ViT of DINO's or DeiT's own code, with img_size as a number", "read and used")
def test_img_size_as_a_number():
    model = Dino().eval()
    teacher = teacher_from_module(model, None)
    assert teacher.spec.size == (32, 32)
    assert with_image_size(teacher.spec, teacher.model, 64).size == (64, 64)
    with torch.no_grad():
        images = torch.randn(2, 3, 64, 64)
        assert torch.equal(teacher.model(images), model(images))


class StemLast(nn.Module):
    """Its stem is registered after its body."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(16, 16, 3)
        self.stem = nn.Conv2d(channels, 16, 3)
        self.head = nn.Linear(16, 5)

    def forward(self, images):
        return self.head(self.body(self.stem(images)).mean((2, 3)))


class Rearranged(nn.Sequential):
    """Pixels become channels before the first convolution."""

    def __init__(self, channels: int) -> None:
        pool = nn.AdaptiveAvgPool2d(1)
        super().__init__(
            nn.PixelUnshuffle(4), nn.Conv2d(16 * channels, 8, 1), pool, nn.Flatten(), nn.Linear(8, 5)
        )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [StemLast, Rearranged])
@pytest.mark.brings(
    "model",
    "A module whose first convolution is registered last, or reads rearranged pixels",
    "its channels are found by running it",
)
def test_the_convolution_that_runs_first_says_the_channels(kind, channels):
    spec = input_spec(kind(channels))
    assert spec.channels == len(spec.mean) == channels
    assert check_runs(kind(channels), spec, "mine", "--image-size") == 5


@pytest.mark.brings("model", "A module for six channels", "refused: images have 1 or 3")
def test_six_channels():
    with pytest.raises(DataError, match="images are read with 1 or 3 channels, but the model takes 6"):
        input_spec(StemLast(6))


def test_looking_leaves_no_hook_and_the_mode_as_it_was():
    model = StemLast(3).train()
    input_spec(model)
    assert model.training
    assert not model.stem._forward_pre_hooks


class Pooled(nn.Sequential):
    def __init__(self) -> None:
        conv, norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        super().__init__(nn.AdaptiveAvgPool2d(1), conv, norm, nn.Flatten(), nn.Linear(8, 5))


class OnlyEval(Own):
    def forward(self, images):
        if self.training:
            raise RuntimeError("needs targets")
        return super().forward(images)


@pytest.mark.brings(
    "model", "--batch-size 1 with BatchNorm on 1 x 1 maps", "refused before anything is trained"
)
def test_one_image_at_a_time():
    model = Pooled().eval()
    check_trains(model, SPEC, "mine", 2)
    check_trains(Own(), SPEC, "mine", 1)
    with pytest.raises(ConfigError, match="--batch-size 1: mine cannot be trained on one image at a time"):
        check_trains(model, SPEC, "mine", 1)
    assert not model.training
    assert model[2].num_batches_tracked == 0


class Silent(Own):
    @torch.no_grad()
    def forward(self, images):
        return super().forward(images)


@pytest.mark.brings(
    "model", "A module with torch.no_grad on its forward", "refused before anything is trained"
)
def test_a_forward_pass_without_gradients():
    check_trains(Own().requires_grad_(False), SPEC, "mine", 8)
    with pytest.raises(ModelError, match="mine cannot be trained: its forward pass hands on no gradients"):
        check_trains(Silent(), SPEC, "mine", 8)


@pytest.mark.brings("model", "A module that fails in training mode", "refused before anything is trained")
def test_a_forward_pass_that_fails_in_training_mode():
    with pytest.raises(
        ModelError, match=r"not in training mode \(needs targets \(test_input.py, line \d+\)\)"
    ):
        check_trains(OnlyEval().eval(), SPEC, "mine", 8)


def test_a_model_runs_or_says_why_not():
    assert check_runs(Own(), SPEC, "own", "--image-size") == 5
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    reason = "if its size is the reason, give another --image-size"
    with pytest.raises(ConfigError, match=rf"vit cannot run on images of 16 x 16 x 3 .*; {reason}"):
        check_runs(vit, SPEC, "vit", "--image-size")
    with pytest.raises(ConfigError, match=r"own must return logits \(batch, classes\), not a dict"):
        check_runs(Own(as_dict=True), SPEC, "own", "--image-size")


def test_the_keys_of_a_dictionary_without_logits_are_named():
    with pytest.raises(
        ConfigError, match=r"own must return logits .*, not a dict with the keys features, 3 "
    ):
        check_output({"features": torch.zeros(1), 3: torch.zeros(1)}, "own")


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 64}),
        ("resnet18", {}),
        (
            "vit_tiny_patch16_224",
            {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3},
        ),
    ],
)
def test_a_module_of_timm_is_recognised(name, args):
    teacher = teacher_from_module(timm.create_model(name, num_classes=5, **args), None)
    assert (teacher.architecture.source, teacher.architecture.name) == ("timm", name)


def test_a_module_that_cannot_be_built_again_needs_its_factory():
    model = timm.create_model("vit_small_patch16_18x2_224", img_size=32, depth=1, num_classes=5)
    assert teacher_from_module(model, None).architecture.source == "factory"


def test_layers_that_share_a_weight_still_do():
    model = Tied().eval()
    assert len(digest(model)) == 32
    again = fill(build_skeleton(model, [], {}), dict(model.named_parameters()))
    assert again.second.weight is again.first.weight
    x = torch.randn(2, 8)
    assert torch.equal(again(x), model(x))


@pytest.mark.brings("image", "a normalisation that the model does not say", "--mean and --std say it")
@pytest.mark.parametrize(
    ("mean", "std", "found"),
    [
        ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))),
        ((0.5,), (), ((0.5, 0.5, 0.5), (0.229, 0.224, 0.225))),
        ((), (), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    ],
)
def test_the_normalisation_that_was_asked_for(mean, std, found):
    spec = as_asked(input_spec(Own()), Own(), DataOptions(mean=mean, std=std), None)
    assert (spec.mean, spec.std) == found


def test_a_normalisation_for_other_channels_is_refused():
    with pytest.raises(ConfigError, match="--std has 2 numbers, and the model reads 3 channels: give one"):
        as_asked(input_spec(Own()), Own(), DataOptions(std=(0.5, 0.5)), None)
