"""Models of transformers: what may be cut in them, and how they become teachers and students."""

from __future__ import annotations

import ast
import json
import sys
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import stepwell
from blocks import check_sliced_equals_masked, masked, shaken, whole
from grey import grey_images, settled
from stepwell.data.spec import InputSpec
from stepwell.errors import ConfigError, DataError, ModelError, StepwellError, UnsupportedModelError
from stepwell.measure.size import count_macs, num_params
from stepwell.models import huggingface
from stepwell.models.card import Architecture, Card, narrow_and_load, save_model
from stepwell.models.export import export_onnx
from stepwell.models.image_processor import read_spec
from stepwell.models.teacher import load_teacher, teacher_from_module
from stepwell.pruning.families import find_groups, names_by_family
from stepwell.pruning.shared import SharedWeights
from stepwell.pruning.skeleton import build_skeleton
from stepwell.pruning.units import Candidate, tensors_of

transformers = pytest.importorskip("transformers")

PLAIN = {"image_size": 16, "patch_size": 4, "num_labels": 5, "hidden_size": 24, "intermediate_size": 20}
PLAIN |= {"num_hidden_layers": 2, "num_attention_heads": 4}
PYRAMID = {"image_size": 16, "patch_size": 2, "num_labels": 5, "embed_dim": 12, "window_size": 4}
PYRAMID |= {"depths": [2, 2], "num_heads": [2, 4], "mlp_ratio": 1.5}

MODELS = {
    "vit": ("ViT", PLAIN),
    "vit, no q/k/v biases, dropout": (
        "ViT",
        {**PLAIN, "qkv_bias": False, "attention_probs_dropout_prob": 0.5},
    ),
    "deit": ("DeiT", PLAIN),
    "deit, two heads": ("DeiT, WithTeacher", PLAIN),
    "swin, shifted windows": ("Swin", PYRAMID),
    "swin, no biases, padded windows": ("Swin", {**PYRAMID, "qkv_bias": False, "window_size": 3}),
}
IMAGES = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SPEC = InputSpec((16, 16), 3, (0.5,) * 3, (0.5,) * 3)


def inner(name: str, **more: object) -> nn.Module:
    family, args = MODELS[name]
    family, _, suffix = family.partition(", ")
    config = getattr(transformers, f"{family}Config")(**{**args, **more})
    return getattr(transformers, f"{family}ForImageClassification{suffix}")(config)


def classifier(name: str, **more: object) -> nn.Module:
    return huggingface.wrapped(inner(name, **more))


@cache
def teacher(name: str) -> nn.Module:
    return shaken(lambda: classifier(name)).float()


def cut(name: str, widths: dict[str, int]) -> nn.Module:
    model = teacher(name)
    groups = find_groups(model)
    candidate = Candidate(0.5, {g.name: widths.get(g.kind, g.num_units) for g in groups})
    return SharedWeights(model, groups, tensors_of(model), [candidate]).extract(0).eval()


def save(folder, name: str, processor: dict | None = None, **more: object):
    torch.manual_seed(0)
    inner(name, **more).save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


# --- the family


@pytest.mark.parametrize("name", MODELS)
def test_sliced_equals_masked(name):
    check_sliced_equals_masked(shaken(lambda: classifier(name)), IMAGES, (0.1, 0.6))


@pytest.mark.parametrize("name", MODELS)
def test_everything_between_the_residual_sums_is_cut(name):
    groups = find_groups(teacher(name))
    layers = [n for n, m in teacher(name).named_modules() if type(m).__name__.endswith("Layer")]
    assert [g.kind for g in groups] == ["head", "neuron"] * 4 if "swin" in name else ["head", "neuron"] * 2
    assert list(dict.fromkeys(g.block for g in groups)) == layers
    assert len({g.section for g in groups}) == (2 if "swin" in name else 1)
    assert list(names_by_family(teacher(name))) == [
        "ViT, DeiT, BEiT, DINOv2, DINOv3, CLIP, SigLIP, Swin, ConvNeXt and ResNet of transformers"
    ]


@pytest.mark.parametrize("name", ["vit", "deit", "swin, shifted windows"])
def test_full_width_equals_the_model(name):
    model, groups = teacher(name), find_groups(teacher(name))
    copy = SharedWeights(model, groups, tensors_of(model), [whole(groups)]).extract(0).eval()
    with torch.no_grad():
        assert torch.equal(copy(IMAGES.float()), model(IMAGES.float()))
        assert torch.equal(model(IMAGES.float()), model.model(IMAGES.float()).logits)


@pytest.mark.parametrize("name", ["vit", "deit", "swin, shifted windows"])
@pytest.mark.parametrize("kind", ["head", "neuron"])
def test_emptied_layers_equal_masked_ones(name, kind):
    groups = find_groups(teacher(name))
    with masked(teacher(name), groups, {g.name: 0 for g in groups if g.kind == kind}), torch.no_grad():
        expected = teacher(name)(IMAGES.float())
    with torch.no_grad():
        torch.testing.assert_close(cut(name, {kind: 0})(IMAGES.float()), expected)


def test_candidates_train_without_dropout():
    student = (
        build_skeleton(classifier("vit, no q/k/v biases, dropout"), [], {}).to_empty(device="cpu").train()
    )
    for parameter in student.parameters():
        nn.init.normal_(parameter)
    assert torch.equal(student(IMAGES.float()), student(IMAGES.float()))


def test_candidates_train_without_checkpointing():
    module = inner("vit").train()
    module.gradient_checkpointing = True
    for layer in module.vit.layers:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, None  # calling it would fail
    student = huggingface.wrapped(module)
    student(IMAGES.float()).sum().backward()


def test_a_layer_that_an_adapter_has_replaced_stays_whole():
    model = classifier("vit")
    model.model.vit.layers[0].attention.q_proj = nn.Sequential(nn.Linear(24, 24))
    assert [g.name for g in find_groups(model)] == [
        "model.vit.layers.0.mlp",
        "model.vit.layers.1.attention",
        "model.vit.layers.1.mlp",
    ]


@pytest.mark.parametrize(
    ("family", "args", "params", "gmacs"),
    [
        # google/vit-base-patch16-224 and facebook/deit-tiny-patch16-224 (DeiT here: with distillation token)
        ("ViT", {}, 86_567_656, 17.6),
        # microsoft/swin-tiny-patch4-window7-224
        ("Swin", {}, 28_288_354, 4.5),
    ],
)
def test_published_sizes(family, args, params, gmacs):
    config = getattr(transformers, f"{family}Config")(num_labels=1000, **args)
    with torch.device("meta"):
        model = huggingface.wrapped(getattr(transformers, f"{family}ForImageClassification")(config))
    assert num_params(model) == params
    spec = InputSpec((224, 224), 3, (0.5,) * 3, (0.5,) * 3)
    assert count_macs(model, spec) / 1e9 == pytest.approx(gmacs, abs=0.06)


# --- as student


@pytest.mark.parametrize("name", ["vit", "deit, two heads", "swin, shifted windows"])
@pytest.mark.parametrize("widths", [{"head": 1, "neuron": 6}, {"head": 0, "neuron": 0}])
@pytest.mark.slow
def test_a_cut_model_is_saved_loaded_and_exported(tmp_path, name, widths):
    model = cut(name, widths)
    groups = find_groups(teacher(name))
    found = huggingface.recipe(teacher(name))
    assert found is not None
    card = Card(
        architecture=Architecture(source="transformers", name=found[0], args=found[1]),
        widths={g.name: widths[g.kind] for g in groups},
        classes=list("abcde"),
        input=SPEC,
    )
    save_model(tmp_path, model, card)
    loaded = stepwell.load(tmp_path)
    assert num_params(loaded) < num_params(teacher(name))
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES.float()), model(IMAGES.float()))
    again = narrow_and_load(classifier(name), card.widths, tmp_path / "model.safetensors")
    assert type(again.model) is type(teacher(name).model)
    if "deit" not in name:  # its layers are those of ViT, and an export takes seconds
        assert export_onnx(model, SPEC, tmp_path / "model.onnx", IMAGES) < 1e-5


# --- as teacher


def test_a_saved_folder_is_a_teacher(tmp_path):
    labels = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}
    processor = {"size": {"height": 16, "width": 16}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5] * 3}
    folder = save(tmp_path, "vit", {**processor, "resample": 3}, id2label=labels)
    found = load_teacher(str(folder), None, {}, 5)
    assert found.classes == ("ant", "bee", "cat", "dog", "eel")
    assert found.spec == InputSpec((16, 16), 3, (0.1, 0.2, 0.3), (0.5,) * 3, "bicubic", 1.0, "squash")
    assert found.architecture.source == "transformers"
    assert str(tmp_path) not in found.architecture.model_dump_json()
    theirs = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(found.model(IMAGES.float()), theirs(IMAGES.float()).logits)


def test_half_precision_and_nameless_classes(tmp_path, capsys):
    inner("swin, shifted windows").half().save_pretrained(tmp_path)
    found = load_teacher(str(tmp_path), None, {}, 5)
    assert found.classes is None
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}
    assert found.spec.mean == (0.5, 0.5, 0.5)
    assert not found.says_input
    assert "has no preprocessor_config.json" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4], "image_std": [0.2]}))
    assert load_teacher(str(tmp_path), None, {}, 5).says_input


def test_a_module_is_wrapped_and_left_alone():
    module = inner("deit, two heads").train()
    found = teacher_from_module(module, tuple("abcde"))
    assert found.architecture.name == "DeiTForImageClassificationWithTeacher"
    assert found.classes == tuple("abcde")
    assert module.training
    with torch.no_grad():
        assert torch.equal(found.model(IMAGES.float()), module.eval()(IMAGES.float()).logits)


def test_a_module_that_its_configuration_no_longer_describes_needs_a_factory():
    module = inner("vit")
    module.classifier = nn.Sequential(nn.Linear(24, 5))
    assert teacher_from_module(module, None).architecture.source == "factory"


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"size": 16}, ("bilinear", 1.0, "squash")),
        ({"size": {"shortest_edge": 20}, "crop_size": 16, "resample": 3}, ("bicubic", 0.8, "center")),
        (
            {"size": {"height": 20, "width": 20}, "crop_size": {"height": 16, "width": 16}},
            ("bilinear", 0.8, "squash"),
        ),
        ({"size": 16, "crop_size": 8, "do_center_crop": False, "resample": 0}, ("nearest", 1.0, "squash")),
        ({"do_resize": False, "size": 99}, ("bilinear", 1.0, "squash")),
    ],
)
def test_image_processors(tmp_path, processor, expected):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(processor))
    spec = read_spec(file, (16, 16), 3)
    assert (spec.interpolation, spec.crop_pct, spec.crop_mode) == expected


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        ({"image_mean": [0.4], "image_std": [0.2]}, 0.4, 0.2),
        ({"do_normalize": False}, 0.0, 1.0),
        ({"do_rescale": False, "image_mean": [51.0], "image_std": [127.5]}, 0.2, 0.5),
        ({"rescale_factor": 2 / 255, "image_mean": [1.0], "image_std": [1.0]}, 0.5, 0.5),
    ],
)
def test_statistics_are_those_of_pixels_between_0_and_1(tmp_path, processor, mean, std):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(processor))
    spec = read_spec(file, (16, 16), 1)
    assert (spec.mean, spec.std) == ((pytest.approx(mean),), (pytest.approx(std),))


# --- errors


def one_line_of(kind: type[StepwellError], folder) -> str:
    with pytest.raises(kind) as caught:
        load_teacher(str(folder), None, {}, 5)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_extra_is_missing(tmp_path, monkeypatch):
    folder = save(tmp_path, "vit")
    module = inner("vit")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'stepwell[transformers]'" in one_line_of(ModelError, folder)
    with pytest.raises(ModelError, match="not installed"):
        teacher_from_module(module, None)


def test_the_extra_is_too_old(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "version", lambda _: "4.57.6")
    assert "4.57.6 is too old, 5.10 will do" in one_line_of(ModelError, save(tmp_path, "vit"))


def test_damaged_folders(tmp_path):
    folder = save(tmp_path, "vit", {"size": 32})
    assert "makes images of 32 x 32" in one_line_of(ModelError, folder)
    (folder / "preprocessor_config.json").write_text('{"resample": 17}')
    assert "preprocessor_config.json is damaged" in one_line_of(ModelError, folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    assert "cannot read weights from" in one_line_of(ModelError, folder)
    save_file({"vit.layernorm.weight": torch.zeros(3)}, folder / "model.safetensors")
    assert "transformers cannot load" in one_line_of(ModelError, folder)
    (folder / "config.json").write_text("{")
    assert "cannot read" in one_line_of(ModelError, folder)


def test_a_model_without_classifier_is_no_random_teacher(tmp_path):
    inner("vit").vit.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "architectures": ["ViTForImageClassification"]})
    )
    assert "the first is classifier.bias" in one_line_of(ModelError, tmp_path)


def test_unsupported_classes(tmp_path):
    other = transformers.RegNetForImageClassification(
        transformers.RegNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], groups_width=4)
    )
    other.save_pretrained(tmp_path)
    assert "'regnet' model of transformers, which is not supported" in one_line_of(
        UnsupportedModelError, tmp_path
    )
    with pytest.raises(UnsupportedModelError, match=r"known are: beit, .*, swinv2, vit"):
        teacher_from_module(other, None)
    masked = transformers.ViTForMaskedImageModeling(inner("vit").config)
    with pytest.raises(ModelError, match=r"use the \.\.\.ForImageClassification or the ViTModel"):
        teacher_from_module(masked, None)


def test_options_that_do_not_go_with_a_folder(tmp_path):
    folder = save(tmp_path, "vit")
    with pytest.raises(ConfigError, match="--model-args"):
        load_teacher(str(folder), None, {"img_size": "32"}, 5)
    with pytest.raises(ConfigError, match="--teacher-weights"):
        load_teacher(str(folder), folder / "model.safetensors", {}, 5)


def test_starting_does_not_import_transformers(monkeypatch):
    """Nor does a model of timm: transformers takes seconds, and need not be there."""
    top = [
        (file.name, ast.unparse(statement))
        for file in Path(stepwell.__file__).parent.rglob("*.py")
        for statement in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(statement, ast.Import | ast.ImportFrom)
    ]
    assert ("huggingface.py", "import torch") in top
    assert not [where for where in top if "transformers" in where[1].split()[1].split(".")]
    monkeypatch.setitem(sys.modules, "transformers", None)  # to import it is an error
    with pytest.raises(ImportError):
        import transformers  # noqa: F401
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    assert len(find_groups(model)) == 2
    assert teacher_from_module(model, None).architecture.source == "timm"


# --- what its classes are


def named(names: tuple[str, ...]) -> dict:
    """Arguments that give the classes these names."""
    labels = dict(enumerate(names))
    return {"num_labels": len(names), "id2label": labels, "label2id": {v: k for k, v in labels.items()}}


@pytest.mark.brings(
    "model",
    "a transformers folder whose id2label is in another order than the class folders",
    "the labels follow id2label, by name; said",
)
def test_id2label_in_another_order(tmp_path):
    names = ("Dog", "cat", "ship", "tree_frog")
    folder = save(tmp_path / "model", "vit", **named(names))
    found = load_teacher(str(folder), None, {}, 4)
    images = grey_images(tmp_path / "images", ("cat", "dog", "ship", "tree frog"), size=16)
    found, data = settled(images, found)
    assert data.classes == ("dog", "cat", "ship", "tree frog")
    assert found.notes[0] == f"the classes are numbered as {folder} has them (matched by name)"
    others = grey_images(tmp_path / "others", ("cat", "dog", "ship", "toad"), size=16)
    with pytest.raises(DataError, match="has tree_frog; only the images have toad"):
        settled(others, found)


@pytest.mark.brings(
    "model",
    "a transformers model of problem_type multi_label_classification",
    "an image may have several classes; with images of one class each, one line",
)
def test_several_classes_in_one_image(tmp_path):
    folder = save(tmp_path / "model", "vit", problem_type="multi_label_classification")
    images = grey_images(tmp_path / "images", tuple("abcde"), num_each=3, size=16)
    found = load_teacher(str(folder), None, {}, 5)
    with pytest.raises(ConfigError, match="was trained for the task multi-label, as where one image has sev"):
        settled(images, found)
    _, data = settled(images, found, task="multi-label")
    assert data.train.labels[0] == (1, 0, 0, 0, 0)
    with pytest.raises(UnsupportedModelError, match="returns a number, no classes"):
        load_teacher(str(save(tmp_path / "number", "vit", num_labels=1)), None, {}, 5)
