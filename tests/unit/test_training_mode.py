"""Modules whose forward pass does something else in training mode."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from stepwell.config.loss_facts import LossFacts, feature_facts
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError
from stepwell.pruning.families import find_groups
from stepwell.setting.prepare import proven_groups
from stepwell.setting.training_mode import check_training_mode, trainable_groups

SPEC = InputSpec((8, 8), 3, (0.5,) * 3, (0.5,) * 3)
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
STATES, FEATURES = feature_facts("states"), feature_facts("rkd")


class Net(nn.Module):
    """Tokens of 16 pixels through two FFNs; in training mode something besides, as `quirk` says."""

    def __init__(self, quirk: str = "") -> None:
        super().__init__()
        self.quirk = quirk
        self.auxiliary = nn.Linear(32, 3)
        self.stem, self.norm = nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16)
        self.first, self.second = Mlp(16, 32), Mlp(16, 32)
        self.head = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        quirk = self.quirk if self.training else ""
        if quirk == "noise":
            images = images + torch.randn_like(images)
        x = self.norm(self.stem(images)).flatten(2).transpose(1, 2)
        if quirk == "drop tokens":
            x = x[:, :2]
        x = x + self.first(x)
        x = x + self.second(x)
        logits = self.head(x.mean(1))
        if quirk == "auxiliary head":
            hidden = nn.functional.gelu(self.first.fc1(x)).mean(1)
            return logits + 0 * self.auxiliary(hidden)
        return (logits, logits) if quirk == "tuple" else logits


def checked(quirk: str, facts: LossFacts | None = STATES) -> str:
    torch.manual_seed(0)
    return check_training_mode(Net(quirk).eval(), ("first", "second"), SPEC, "Net", facts, cut=True)


def test_a_module_that_does_the_same():
    assert checked("") == ""


@pytest.mark.brings(
    "model", "randomness in forward in training mode (augmentation)", "students are trained with it; said"
)
def test_randomness_is_said_and_leaves_no_trace():
    torch.manual_seed(0)
    net = Net("noise").eval()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    before = torch.random.get_rng_state()
    note = check_training_mode(net, ("first",), SPEC, "Net", STATES, cut=True)
    assert note.startswith("Net answers the same images differently each time in training mode")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert not net.training


@pytest.mark.brings(
    "model",
    "tokens that are dropped in training mode",
    "refused where hidden states are compared; else trained like that",
)
def test_dropped_tokens():
    with pytest.raises(ConfigError) as error:
        checked("drop tokens")
    assert str(error.value) == (
        "Net has hidden states (4, 2, 16) in training mode and (4, 4, 16) in eval mode, as where tokens are "
        "dropped, so they cannot be compared: turn that off in the model, or pass --feature-weight 0"
    )
    assert checked("drop tokens", FEATURES) == ""
    assert checked("drop tokens", None) == ""


def test_a_tuple_that_nothing_has_taken_apart():
    with pytest.raises(
        ConfigError, match=r"Net returns logits \(4, 3\) in eval mode, but tuple in training mode"
    ):
        checked("tuple")


@pytest.mark.brings(
    "model", "an auxiliary head that runs in training mode only", "the layer that it reads stays whole; said"
)
def test_what_an_auxiliary_head_reads_stays_whole(capsys):
    torch.manual_seed(0)
    net = Net("auxiliary head").eval()
    groups = find_groups(net)
    assert [group.name for group in groups] == ["first", "second"]
    assert [group.name for group in trainable_groups(net, groups, IMAGES)] == ["second"]
    assert trainable_groups(Net().eval(), groups, IMAGES) == groups
    assert [group.name for group in proven_groups(net, SPEC, IMAGES)] == ["second"]
    assert "stays whole: first (in training mode something else reads it)" in capsys.readouterr().err
    assert not net.training


def test_another_student_that_drops_tokens():
    shape: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    student = timm.create_model("vit_tiny_patch16_224", patch_drop_rate=0.5, **shape).eval()
    spec = InputSpec((16, 16), 3, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ConfigError, match=r"has hidden states \(4, 9, 24\) in training mode and \(4, 17"):
        check_training_mode(student, ("blocks.0",), spec, "--student x", STATES, cut=False)
    # As a teacher its slices drop nothing.
    assert check_training_mode(student, ("blocks.0",), spec, "vit", STATES, cut=True) == ""
