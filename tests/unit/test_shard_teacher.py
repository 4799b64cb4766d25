"""What a teacher in parts cannot serve is refused in one line; in one process it is whole."""

from __future__ import annotations

import pytest
import torch

from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config
from stepwell.errors import ConfigError
from stepwell.models.card import Architecture
from stepwell.models.teacher import Teacher
from stepwell.run import sharded_model
from stepwell.setting import placed as room
from stepwell.setting.placed import placed
from tiny import SPEC, tiny_vit

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": True}, "gathers weights within a pass, and --compile cannot: leave one out"),
        ({"repair": True, "path": "single-step"}, "and --repair from layer to layer: leave one out"),
        ({"probe": True}, "--probe trains its classifier: train it first (stepwell train --probe)"),
        ({"path": "scalekd", "student": "resnet18"}, "goes back through its end: leave one out"),
    ],
)
def test_what_it_cannot_serve(options, message):
    with pytest.raises(ConfigError) as caught:
        make_config(CompressConfig, {"shard_teacher": True, **options})
    assert message in str(caught.value)
    make_config(CompressConfig, options)


def teacher() -> Teacher:
    model = tiny_vit()
    return Teacher(model, Architecture(source="factory", name="mine"), SPEC, None, {}, "mine", "")


def test_one_process_holds_all_of_it():
    found = placed(teacher(), CompressConfig(shard_teacher=True), CPU)
    assert found.sharded is None
    assert found.answering is found.model


def test_what_does_not_run_in_parts_is_refused(monkeypatch):
    def fails(*_: object) -> None:
        raise NotImplementedError("FSDP does not support this")

    monkeypatch.setattr(room, "world", lambda: 2)
    monkeypatch.setattr(room, "in_parts", fails)
    with pytest.raises(ConfigError, match=r"mine does not run in parts \(.*FSDP does not support this"):
        placed(teacher(), CompressConfig(shard_teacher=True), CPU)


def test_what_answers_otherwise_in_parts_is_refused(monkeypatch):
    monkeypatch.setattr(room, "world", lambda: 2)
    monkeypatch.setattr(room, "in_parts", lambda *_: tiny_vit(seed=5).eval())
    with pytest.raises(ConfigError, match="answers otherwise in parts than whole"):
        placed(teacher(), CompressConfig(shard_teacher=True), CPU)


def test_a_whole_model_does_not_wait_for_others(monkeypatch):
    monkeypatch.setattr(sharded_model, "world", lambda: 2)
    sharded_model.keep_up(pytest.fail, 1, 3, torch.zeros(1, 3, 4, 4))
