"""Arguments that say where weights come from are refused, in a card as on the command line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import stepwell
from stepwell.errors import ConfigError, ModelError
from stepwell.models.arguments import refused, refused_configuration
from stepwell.models.card import Architecture, Card, save_model
from stepwell.models.timm_models import create_timm
from tiny import ARGS, SPEC, tiny_vit

BAD: list[dict[str, Any]] = [
    {"checkpoint_path": "weights.pth"},
    {"pretrained": True},
    {"pretrained": False},
    {"pretrained_cfg": {"file": "weights.pth"}},
    {"pretrained_cfg_overlay": {"url": "somewhere"}},
    {"cache_dir": "here"},
    {"pretrained_something_new": 1},
    {"act_layer": "folder/file"},
    {"weight_init": "https:example"},
    {"norm_layer": object()},
    {"stem_args": {"inner": ["relu", "/etc/passwd"]}},
    {"features_only": True},
]


@pytest.mark.parametrize("args", BAD, ids=lambda args: next(iter(args)))
def test_refused(args: dict[str, Any]) -> None:
    (name,) = args
    assert name in (refused({**ARGS, **args}) or "")
    with pytest.raises(ConfigError, match=f"--model-args: {name} "):
        create_timm("vit_tiny_patch16_224", {**ARGS, **args}, pretrained=False)


@pytest.mark.parametrize(
    "args",
    [
        ARGS,
        {"act_layer": "gelu"},
        {"layers": (2, 1, 1, 1)},
        {"global_pool": ""},
        {"drop_rate": 0.1, "x": None},
    ],
)
def test_taken(args: dict[str, Any]) -> None:
    assert refused(args) is None


def test_a_configuration_with_an_empty_name_is_no_special_case() -> None:
    assert refused_configuration({"": True, "_private": True}) is None
    assert refused_configuration({"_private": "x"}) == "_private is no part of an architecture; leave it out"


class Harmful:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_card_from_a_stranger_opens_no_file(tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "mark"
    folder.mkdir()
    weights = tmp_path / "weights.pth"
    weights.write_bytes(pickle.dumps(Harmful(mark)))
    card = Card(
        architecture=Architecture(source="timm", name="vit_tiny_patch16_224", args=dict(ARGS)),
        classes=list("abcde"),
        input=SPEC,
    )
    save_model(folder, tiny_vit(), card)
    assert stepwell.load(folder) is not None
    file = folder / "stepwell.json"
    content = json.loads(file.read_text())
    content["architecture"]["args"]["checkpoint_path"] = str(weights)
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"stepwell\.json: checkpoint_path is no part of an architecture"):
        stepwell.load(folder)
    assert not mark.exists()
