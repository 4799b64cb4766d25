"""Models of transformers and timm that are brought as they are published: from a folder to a student."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import save_file
from sklearn.metrics import average_precision_score
from small_world import QUICK, all_test_images, data_of, result_of, stepwell, write_images
from test_multi_label_runs import CLASSES, write_data

import stepwell as package
from conftest import made_once
from stepwell.data.labels import as_tensor
from stepwell.models.card import read_card

transformers = pytest.importorskip("transformers")

PLAIN = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "intermediate_size": 48}
PLAIN |= {"num_hidden_layers": 2, "num_attention_heads": 4}


def embeddings_agree(run: Path, teacher: torch.nn.Module, student: torch.nn.Module) -> None:
    images = all_test_images(run)
    with torch.no_grad():
        ours, theirs = student(images), teacher(images)
    cosine = torch.nn.functional.cosine_similarity(ours, theirs).mean().item()
    assert result_of(run).student.quality == pytest.approx(100 * cosine, abs=1e-3)


@pytest.mark.brings(
    "model",
    "DINOv2 of transformers as its folder is published, with class folders",
    "Its embedding is distilled; the student loads, and is exported, without any code of yours.",
)
def test_a_folder_without_a_classifier_from_compress_to_export(data, tmp_path, quick, capsys):
    torch.manual_seed(0)
    if hasattr(transformers.models.dinov2.modeling_dinov2, "Dinov2SelfAttention"):
        pytest.skip("DINOv2 as this version of transformers has it is not cut")
    config = transformers.Dinov2Config(**{**PLAIN, "image_size": 24, "mlp_ratio": 2})
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    processor = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "dino" / "preprocessor_config.json").write_text(json.dumps(processor))
    run = tmp_path / "run"
    stepwell("compress", "--teacher", tmp_path / "dino", "--data", data, "--out", run, *QUICK)
    result = result_of(run)
    assert (result.measure, result.teacher.quality) == ("cosine", pytest.approx(100))
    assert set(result.group_kinds.values()) == {"head", "neuron"}
    card = read_card(run / "student")
    assert (card.task, card.classes, card.architecture.name) == ("features", [], "Dinov2Model")
    teacher = package.load(run / "student")
    assert teacher(torch.zeros(1, 3, 16, 16)).shape == (1, 24)
    dino = transformers.Dinov2Model.from_pretrained(tmp_path / "dino").eval()
    embeddings_agree(run, lambda images: dino(pixel_values=images).pooler_output, teacher)
    assert 0 <= result.student.neighbours_right <= 100
    assert len(set(as_tensor(data_of(run).test.labels).tolist())) == 3
    rung = tmp_path / "rungs"
    stepwell("export", run, "--keep", 0.1, "--format", "safetensors", "--out", rung)
    assert package.load(rung / "keep-0.1")(torch.zeros(2, 3, 16, 16)).shape == (2, 24)


@pytest.mark.brings(
    "model",
    "a CLIP tower of timm (num_classes=0), with images without labels",
    "Its embedding is distilled; cosine is reported.",
)
def test_a_clip_tower_of_timm(tmp_path, quick):
    write_images(tmp_path / "flat", 60, seed=0, classes=())
    name, args = "vit_base_patch16_clip_224", {"img_size": 16, "patch_size": 8, "embed_dim": 24}
    args |= {"depth": 2, "num_heads": 4, "num_classes": 0}
    torch.manual_seed(0)
    clip = timm.create_model(name, **args).eval()
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    words = ("--teacher", name, "--teacher-weights", tmp_path / "clip.safetensors", "--model-args")
    words += tuple(f"{key}={value}" for key, value in args.items())
    run = tmp_path / "run"
    stepwell("compress", *words, "--data", tmp_path / "flat", "--out", run, *QUICK, "--path", "single-step")
    assert result_of(run).measure == "cosine"
    assert read_card(run / "student").architecture.args["num_classes"] == 0
    embeddings_agree(run, clip, package.load(run))


@pytest.mark.brings(
    "model",
    "a transformers model of problem_type multi_label_classification, from compress to export",
    "Binary cross-entropy and mAP; its labels follow id2label.",
)
def test_a_multi_label_model_of_transformers(tmp_path_factory, tmp_path, quick):
    colours = made_once(tmp_path_factory, "colours", write_data)
    names = dict(enumerate(reversed(CLASSES)))
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        **PLAIN, problem_type="multi_label_classification", id2label=names,
        label2id={name: i for i, name in names.items()},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    run = tmp_path / "run"
    stepwell("compress", "--teacher", tmp_path / "vit", "--data", colours, "--out", run, *QUICK)
    result = result_of(run)
    assert (result.measure, result.data.classes) == ("mAP", list(reversed(CLASSES)))
    assert {"task", "logit", "feature", "loss"} == set(result.histories["distill"].losses)
    card = read_card(run / "student")
    assert (card.task, card.classes) == ("multi-label", list(reversed(CLASSES)))
    assert card.architecture.args["problem_type"] == "multi_label_classification"
    with torch.no_grad():
        probabilities = package.load(run)(all_test_images(run)).double().sigmoid()
    # Images and tables number the classes by the alphabet, the model the other way round.
    labels = as_tensor(data_of(run).test.labels).flip(1)
    expected = average_precision_score(labels.numpy(), probabilities.numpy(), average="macro")
    assert result.student.quality == pytest.approx(100 * expected)


@pytest.mark.slow
def test_a_rung_of_several_classes_is_an_onnx_file(tmp_path_factory, tmp_path, quick):
    """Of a teacher of timm: its file returns the logits of every class, for one image and for many."""
    colours = made_once(tmp_path_factory, "colours", write_data)
    model = ("img_size=16", "patch_size=8", "embed_dim=24", "depth=2", "num_heads=4")
    words = ("--model", "vit_tiny_patch16_224", "--model-args", *model, "--no-pretrained", "--data", colours)
    stepwell("train", *words, "--out", tmp_path / "teacher", "--epochs", 1, "--batch-size", 16)
    run = tmp_path / "run"
    stepwell("compress", "--teacher", tmp_path / "teacher", "--data", colours, "--out", run, *QUICK)
    stepwell("export", run, "--keep", 0.4, "--out", tmp_path / "out")
    stepwell("export", run, "--keep", 0.4, "--format", "safetensors", "--out", tmp_path / "out")
    rung, images = package.load(tmp_path / "out" / "keep-0.4"), all_test_images(run)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "keep-0.4.onnx")
    with torch.no_grad():
        for batch in (images, images[:1]):
            (logits,) = session.run(None, {"images": batch.numpy()})
            torch.testing.assert_close(torch.from_numpy(logits), rung(batch), atol=1e-4, rtol=1e-4)
