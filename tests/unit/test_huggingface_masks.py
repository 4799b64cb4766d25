"""Segformer and UperNet of transformers: taken from a folder, cut exactly, and built again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from stepwell.errors import ModelError
from stepwell.models.card import build
from stepwell.models.own_module import taken
from stepwell.models.teacher import load_teacher
from stepwell.pruning.coupled import concatenations
from stepwell.pruning.generic import propose
from stepwell.pruning.parts import take_apart
from stepwell.pruning.prove import difference, proven
from stepwell.tasks.outputs import as_logits

transformers = pytest.importorskip("transformers")
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
NAMES = {0: "ground", 1: "disc", 2: "bar"}


def segformer():
    torch.manual_seed(0)
    sizes = {"depths": [1] * 4, "hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 2, 2, 4]}
    config = transformers.SegformerConfig(decoder_hidden_size=16, id2label=NAMES, **sizes)
    return transformers.SegformerForSemanticSegmentation(config).eval()


def upernet():
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4, "layer_type": "basic"}
    backbone = transformers.ResNetConfig(out_features=[f"stage{i}" for i in range(1, 5)], **sizes)
    heads = {"hidden_size": 16, "auxiliary_channels": 8, "auxiliary_in_channels": 16}
    config = transformers.UperNetConfig(backbone_config=backbone, id2label=NAMES, **heads)
    return transformers.UperNetForSemanticSegmentation(config).eval()


@pytest.mark.parametrize("make", [segformer, upernet])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.brings(
    "model", "Segformer or UperNet of transformers, as a folder", "Taken without auxiliary head; cut"
)
def test_a_folder_becomes_a_teacher_and_is_cut_exactly(make, tmp_path):
    own = make()
    own.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), None, {}, 3)
    assert (teacher.task, teacher.classes) == ("segmentation", tuple(NAMES.values()))
    assert not any("auxiliary" in name for name in teacher.model.state_dict())
    # The processor's square is no reason to squash images; a student of ours was trained at its size.
    assert not teacher.has_own_size
    ours = replace(
        teacher, architecture=teacher.architecture.model_copy(update={"outputs": "maps"}), task="segmentation"
    )
    assert ours.has_own_size
    model = as_logits(teacher.model, "maps").eval()
    with torch.no_grad():
        raw = own(IMAGES).logits
        assert torch.allclose(
            model(IMAGES), torch.nn.functional.interpolate(raw, (64, 96), mode="bilinear"), atol=1e-6
        )
    parts = concatenations(model, IMAGES)
    assert parts
    take_apart(model, parts)
    groups = proven(model, propose(model, IMAGES).groups, IMAGES)
    assert len(groups) >= 8
    for share in (2, 4):
        widths = {group.name: max(1, group.num_units // share) for group in groups}
        assert difference(model, groups, widths, IMAGES) < 1e-4
    again = build(teacher.architecture.model_copy(update={"outputs": "maps", "parts": parts}), None, tmp_path)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(IMAGES), model(IMAGES))


def test_what_is_not_for_masks_or_names_a_file_is_refused(tmp_path):
    config = segformer().config
    with pytest.raises(ModelError, match="of this type SegformerForSemanticSegmentation is supported"):
        taken(transformers.SegformerForImageClassification(config), "a Segformer")
    values = json.loads(upernet().config.to_json_string(use_diff=False))
    args = {**values, "architectures": ["UperNetForSemanticSegmentation"]}
    args["backbone_config"]["_name_or_path"] = "http://somewhere"
    from stepwell.models.arguments import refused_configuration

    assert "_name_or_path is no part of an architecture" in str(refused_configuration(args))
