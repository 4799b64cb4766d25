"""Checkpoints as others leave them: what is read, which of their weights are taken, and what is said."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn

from stepwell.commands import doctor
from stepwell.config.commands import TrainConfig
from stepwell.config.doctor_options import DoctorConfig
from stepwell.config.files import make_config
from stepwell.errors import ConfigError, ModelError
from stepwell.models.fitting import find_fit, load_start, load_whole
from stepwell.models.teacher import load_teacher
from stepwell.models.weights import read_weights
from stepwell.paths.from_labels import _start
from tiny import ARGS, tiny_vit

Weights = Mapping[str, Tensor]


def fresh(**args: object) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{**ARGS, **args})


def weights(seed: int = 0) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tiny_vit(seed=seed).state_dict().items()}


def is_filled_with(model: nn.Module, expected: Weights) -> bool:
    return all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def under(prefix: str, tensors: Weights) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    return lambda: capsys.readouterr().err


def brings(what: str, happens: str) -> Any:
    return pytest.mark.brings("checkpoint", what, happens)


RAW, AVERAGED = weights(1), weights(2)


# --- what may lie beside the tensors


class Harmful:
    """Unpickled, it would run a command of the shell."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.proof}",)


@brings("a pickle with code in it (os.system)", "refused, the function is named, and it does not run")
@pytest.mark.parametrize("as_zip", [True, False])
def test_code_is_refused_and_does_not_run(tmp_path: Path, as_zip: bool) -> None:
    proof, file = tmp_path / "ran", tmp_path / "weights.pth"
    content = {"state_dict": weights(), "args": Harmful(proof)}
    torch.save(content, file, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(
        ModelError, match=r"more than tensors and settings: posix\.system, which could run code"
    ):
        read_weights(file)
    assert not proof.exists()
    torch.load(file, weights_only=False)
    assert proof.exists()  # it really would have


@brings("a whole model saved with torch.save(model)", "refused; the class is named, and state_dict() advised")
def test_a_pickled_module_is_named(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "weights.pth")
    with pytest.raises(
        ModelError, match=r"torch\.nn\.modules\.linear\.Linear.*save its state_dict\(\) alone"
    ):
        read_weights(tmp_path / "weights.pth")


@brings("argparse settings, NumPy scalars and paths beside the tensors", "loads: they are data")
def test_settings_beside_the_tensors(tmp_path: Path) -> None:
    numbers = [np.float64(1.5), np.float32(0.5), np.float16(1), np.int64(3), np.uint8(3), np.bool_(True)]
    settings = argparse.Namespace(lr=np.float32(0.1), out=Path("runs"), more=argparse.Namespace(words=["a"]))
    paths = [pathlib.PurePosixPath("/etc"), pathlib.PureWindowsPath("C:/x"), Path("x")]
    content = {"model": RAW, "args": settings, "best": numbers, "name": np.str_("x"), "paths": paths}
    torch.save(content, tmp_path / "weights.pth")
    before = torch.serialization.get_safe_globals()
    load_whole(model := fresh(), tmp_path / "weights.pth")
    assert is_filled_with(model, RAW)
    assert set(torch.serialization.get_safe_globals()) == set(before)  # for this file alone


@pytest.mark.parametrize("value", [np.zeros(3), np.array([None]), SimpleNamespace(x=1)])
def test_other_classes_are_not_data(tmp_path: Path, value: object) -> None:
    torch.save({"model": RAW, "x": value}, tmp_path / "weights.pth")
    with pytest.raises(
        ModelError, match=r"more than tensors and settings: [a-z_.]*(_reconstruct|SimpleNamespace)"
    ):
        read_weights(tmp_path / "weights.pth")


def test_a_pickle_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": RAW}
    content["self"] = [content]
    torch.save(content, tmp_path / "weights.pth")
    load_whole(model := fresh(), tmp_path / "weights.pth")
    assert is_filled_with(model, RAW)


# --- what training scripts write


@brings(
    "the .pth.tar of timm's train.py", "loads; its averaged weights are taken, as timm does, and it says so"
)
def test_what_timms_training_script_saves(tmp_path: Path, said: Callable[[], str]) -> None:
    model = fresh()
    model.load_state_dict(RAW)
    average = ModelEmaV3(model)
    average.module.load_state_dict(AVERAGED)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, 16, 16)).sum().backward()
    optimizer.step()
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    args = argparse.Namespace(model="vit_tiny_patch16_224", lr=0.1, output=Path("x"), clip_grad=None)
    saver = CheckpointSaver(
        model, optimizer, args, average, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(0, metric=np.float64(71.5))
    file = tmp_path / "last.pth.tar"
    found = load_teacher("vit_tiny_patch16_224", file, {k: str(v) for k, v in ARGS.items()}, 5)
    assert is_filled_with(found.model, AVERAGED)
    line = said()
    assert "taken is state_dict_ema; these are averaged (--weights-key state_dict takes the others)" in line
    assert line.count("\n") == 1
    load_whole(other := fresh(), file, "state_dict")
    assert is_filled_with(other, raw)
    assert "taken is state_dict\n" in said()


@brings("a Lightning .ckpt", "loads: the prefix of the model in it is found, and said")
def test_a_lightning_checkpoint(tmp_path: Path, said: Callable[[], str]) -> None:
    content = {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**under("model.", RAW), "criterion.weight": torch.ones(5), "acc.tp": torch.tensor(3)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best_model_score": torch.tensor(0.7)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [{"last_lr": [0.1]}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "name": "vit"},
    }
    torch.save(content, tmp_path / "last.ckpt")
    load_whole(model := fresh(), tmp_path / "last.ckpt")
    assert is_filled_with(model, RAW)
    assert "taken is state_dict.model\n" in said()


PAIRS = {
    "state_dict_ema": "state_dict",
    "model_ema": "model",
    "ema": "model",
    "ema_state_dict": "model_state_dict",
    "model_ema_state_dict": "net",
    "swa_model": "model",
    "teacher": "student",
}


@brings("raw and averaged weights in one file", "the averaged ones; --weights-key takes the others")
@pytest.mark.parametrize("averaged", PAIRS)
@pytest.mark.parametrize("inner", ["", "module."])
def test_raw_and_averaged(tmp_path: Path, said: Callable[[], str], averaged: str, inner: str) -> None:
    raw, file = PAIRS[averaged], tmp_path / "weights.pth"
    torch.save({raw: under(inner, RAW), averaged: under(inner, AVERAGED), "epoch": 3}, file)
    load_whole(model := fresh(), file)
    assert is_filled_with(model, AVERAGED)
    dotted = f".{inner}".rstrip(".")
    text = f"taken is {averaged}{dotted}; these are averaged (--weights-key {raw}{dotted} takes the others)"
    assert text in said()
    load_whole(model, file, raw)
    assert is_filled_with(model, RAW)


@brings(
    "averaged weights that cannot be matched by name (lists, other names)", "the raw ones, and it says so"
)
@pytest.mark.parametrize(
    "other",
    [
        {"ema": {"shadow_params": list(AVERAGED.values())}},
        {"state_dict_ema": {name.replace(".", ""): tensor for name, tensor in AVERAGED.items()}},
    ],
)
def test_averages_that_cannot_be_used(tmp_path: Path, said: Callable[[], str], other: dict[str, Any]) -> None:
    torch.save({"model": RAW, **other}, tmp_path / "weights.pth")
    load_whole(model := fresh(), tmp_path / "weights.pth")
    assert is_filled_with(model, RAW)
    name = next(iter(other))
    assert f"taken is model; {name}, which may be averaged, does not fit and is left out" in said()


def test_averages_in_one_dictionary_with_the_others(tmp_path: Path) -> None:
    """As in a Lightning module that holds both."""
    save_file({**under("model.", RAW), **under("ema_model.", AVERAGED)}, tmp_path / "weights.safetensors")
    load_whole(model := fresh(), tmp_path / "weights.safetensors")
    assert is_filled_with(model, AVERAGED)
    load_whole(model, tmp_path / "weights.safetensors", "model")
    assert is_filled_with(model, RAW)


@brings("several weights of which none is said to be better", "one line names them; --weights-key chooses")
def test_several_that_fit(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"base": RAW, "momentum": AVERAGED, "again": RAW}, file)
    with pytest.raises(
        ModelError, match=r"several weights that fit \(base, momentum\): choose with --weights-key"
    ):
        load_whole(fresh(), file)
    load_whole(model := fresh(), file, "momentum")
    assert is_filled_with(model, AVERAGED)
    with pytest.raises(ModelError, match=r"--weights-key best: no such .* there are: base, momentum, again"):
        load_whole(fresh(), file, "best")


def test_a_teacher_is_an_average_only_of_a_student(tmp_path: Path) -> None:
    torch.save({"teacher": RAW, "other": AVERAGED}, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=r"several weights that fit \(teacher, other\)"):
        load_whole(fresh(), tmp_path / "weights.pth")


def test_one_of_many(tmp_path: Path) -> None:
    torch.save({f"fold{i}": weights(i) for i in range(8)}, tmp_path / "weights.pth")
    load_whole(model := fresh(), tmp_path / "weights.pth", "fold6")
    assert is_filled_with(model, weights(6))
    save_file(under("a.", RAW) | under("b.c.", AVERAGED), tmp_path / "weights.safetensors")
    load_whole(model, tmp_path / "weights.safetensors", "c")
    assert is_filled_with(model, AVERAGED)


def test_a_key_needs_a_file() -> None:
    with pytest.raises(ConfigError, match="name it with --teacher-weights"):
        load_teacher("resnet18", None, {}, 5, "model_ema")
    with pytest.raises(ConfigError, match="name the file with --weights"):
        make_config(TrainConfig, {"weights_key": "model_ema"})


@brings("prefixes of DataParallel, torch.compile, FSDP and of one's own classes", "left out, and said")
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.",
        "backbone.",
        "encoder.",
        "student.model.",
        "_fsdp_wrapped_module.anything.of_mine.",
    ],
)
def test_prefixes(tmp_path: Path, said: Callable[[], str], prefix: str, ending: str) -> None:
    file = tmp_path / f"weights.{ending}"
    (save_file if ending == "safetensors" else torch.save)(under(prefix, RAW), file)
    load_whole(model := fresh(), file)
    assert is_filled_with(model, RAW)
    assert f"taken is {prefix.rstrip('.')}\n" in said()


def test_wrappers_inside_of_names(tmp_path: Path) -> None:
    """Blocks that were compiled, or wrapped for checkpointing, one by one."""
    file = tmp_path / "weights.pth"
    torch.save({n.replace("blocks.1.", "blocks.1._orig_mod."): t for n, t in RAW.items()}, file)
    load_whole(model := fresh(), file)
    assert is_filled_with(model, RAW)


def test_a_module_around_the_model(tmp_path: Path) -> None:
    """Its names have a prefix that the file lacks."""
    outer = nn.Module()
    outer.net = fresh()
    torch.save({"model": under("module.", RAW)}, tmp_path / "weights.pth")
    load_whole(outer, tmp_path / "weights.pth")
    assert is_filled_with(outer.net, RAW)


def test_counters_are_no_weights(tmp_path: Path, said: Callable[[], str]) -> None:
    """Of BatchNorm in old checkpoints, and of thop."""
    model = timm.create_model("resnet10t", num_classes=3)
    tensors = {n: t + 1 for n, t in model.state_dict().items() if "num_batches" not in n}
    counts = {"total_ops": torch.zeros(1), "layer1.0.total_params": torch.zeros(1)}
    torch.save({**tensors, **counts}, tmp_path / "weights.pth")
    load_whole(model, tmp_path / "weights.pth")
    assert torch.equal(model.state_dict()["fc.weight"], tensors["fc.weight"])
    assert said() == ""


@brings("half, bfloat16 or double weights", "read as float32, and it says so")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_number_formats(tmp_path: Path, said: Callable[[], str], dtype: torch.dtype) -> None:
    save_file({n: t.to(dtype) for n, t in RAW.items()}, tmp_path / "weights.safetensors")
    load_whole(model := fresh(), tmp_path / "weights.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert is_filled_with(model, {n: t.to(dtype).float() for n, t in RAW.items()})
    assert f"{str(dtype)[6:]} is read as float32" in said()


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    tensors = {**RAW, "head.weight": RAW["head.weight"].to(torch.int8)}
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match=r"head\.weight holds int8 \(quantised\?\), not float32"):
        load_whole(fresh(), tmp_path / "weights.safetensors")


# --- what does not fit


@brings("weights of another model", "one line with what is missing, or with the names that were found")
def test_weights_of_another_model(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"net": {"a.weight": torch.zeros(1), "a.bias": torch.zeros(1), "b": torch.zeros(1)}}, file)
    with pytest.raises(
        ModelError, match=r"holds no weights of a VisionTransformer; there are: net: a\.weight, a"
    ):
        load_whole(fresh(), file)
    torch.save({"net": under("module.", {**RAW, "blocks.0.ls1.gamma": torch.ones(24)})}, file)
    with pytest.raises(ModelError, match=r"1 not in the model: blocks\.0\.ls1\.gamma"):
        load_whole(fresh(), file)


@brings("a LoRA that is not merged", "one line: merge_and_unload(), and save that model")
def test_a_lora(tmp_path: Path) -> None:
    tensors = {n.replace(".qkv.", ".qkv.base_layer."): t for n, t in under("base_model.model.", RAW).items()}
    tensors["base_model.model.blocks.0.attn.qkv.lora_A.default.weight"] = torch.zeros(2, 24)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"LoRA that is not merged .* model\.merge_and_unload\(\)"):
        load_whole(fresh(), tmp_path / "adapter_model.safetensors")


@brings(
    "weights without a classifier", "train: a new one, and it says so; compress: one line says to train first"
)
def test_without_a_classifier(tmp_path: Path, said: Callable[[], str]) -> None:
    """As DINO saves them, beside a projection head of its own."""
    body = {n: t for n, t in RAW.items() if not n.startswith("head")}
    student = {**under("module.backbone.", body), "module.head.mlp.0.weight": torch.zeros(8, 24)}
    teacher = {n.replace("module.", ""): t + 1 for n, t in student.items()}
    file = tmp_path / "checkpoint.pth"
    torch.save({"student": student, "teacher": teacher, "epoch": 3, "args": argparse.Namespace(x=1)}, file)
    load_start(model := fresh(num_classes=7), file)
    assert torch.equal(model.state_dict()["cls_token"], RAW["cls_token"] + 1)
    line = said()
    assert (
        "taken is teacher.backbone; these are averaged (--weights-key student.module.backbone takes" in line
    )
    assert "there is no classifier, so it starts fresh (head.weight, head.bias)" in line
    with pytest.raises(
        ModelError, match=r"no classifier \(head\.weight, head\.bias\).*stepwell train --weights"
    ):
        load_teacher("vit_tiny_patch16_224", file, {k: str(v) for k, v in ARGS.items()}, 5)


@brings(
    "weights for another number of classes", "train: a new classifier, and it says so; compress counts them"
)
def test_another_number_of_classes(tmp_path: Path, said: Callable[[], str]) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"model": RAW}, file)
    model = fresh(num_classes=7)
    before = model.state_dict()["head.weight"].clone()
    load_start(model, file)
    assert torch.equal(model.state_dict()["head.weight"], before)
    assert torch.equal(model.state_dict()["cls_token"], RAW["cls_token"])
    assert (
        "the classifier is for another number of classes, so it starts fresh (head.weight, head.bias)"
        in said()
    )
    with pytest.raises(ModelError, match=r"head\.bias \(5,\) for \(7,\)"):
        load_whole(fresh(num_classes=7), file)
    args = {k: str(v) for k, v in ARGS.items() if k != "num_classes"}
    assert load_teacher("vit_tiny_patch16_224", file, args, 7).model.num_classes == 5


@brings(
    "a position table for another image size", "train: resampled as timm does it; compress names the img_size"
)
def test_another_image_size(tmp_path: Path, said: Callable[[], str]) -> None:
    large = tiny_vit(img_size=32).state_dict()
    file = tmp_path / "weights.pth"
    torch.save({"model": large}, file)
    load_start(model := fresh(), file)
    expected = timm.models.vision_transformer.checkpoint_filter_fn(dict(large), tiny_vit())
    assert is_filled_with(model, expected)
    assert "resampled to this image size as timm does it: pos_embed\n" in said()
    args = {k: str(v) for k, v in ARGS.items()}
    with pytest.raises(
        ModelError, match=r"images of another size \(pos_embed differs\): give --model-args img_size=32$"
    ):
        load_teacher("vit_tiny_patch16_224", file, args, 5)
    assert load_teacher("vit_tiny_patch16_224", file, {**args, "img_size": "32"}, 5).spec.size == (32, 32)
    with pytest.raises(ModelError, match=r"pos_embed \(1, 17, 24\) for \(1, 5, 24\)"):
        load_whole(fresh(), file)


def test_names_of_the_authors(tmp_path: Path, said: Callable[[], str]) -> None:
    """ConvNeXt as its authors saved it: timm's own translation is used."""
    args = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "num_classes": 3}
    model = timm.create_model("convnext_tiny", **args)
    theirs = {}
    for name, tensor in model.state_dict().items():
        name = (
            name.replace("stem.", "downsample_layers.0.")
            .replace(".blocks.", ".")
            .replace("head.norm.", "norm.")
        )
        name = name.replace("head.fc.", "head.").replace("conv_dw", "dwconv").replace(".mlp.fc", ".pwconv")
        for stage in (1, 2, 3):
            name = name.replace(f"stages.{stage}.downsample.", f"downsample_layers.{stage}.")
        theirs[name] = tensor + 1
    torch.save({"model": theirs}, tmp_path / "weights.pth")
    load_whole(model, tmp_path / "weights.pth")
    assert torch.equal(model.state_dict()["head.fc.weight"], theirs["head.weight"])
    assert "taken is model; names translated as timm does it" in said()


# --- what is no checkpoint


@brings("a pointer of Git LFS, a web page, TorchScript, ONNX, arrays of JAX", "one line says what it is")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:abc",
            "Git LFS: fetch the",
        ),
        ("x.pth", b"\n<!DOCTYPE html><html>", "is a web page, probably of a download that failed"),
        ("x.npz", b"PK", "is arrays of NumPy or JAX, not a checkpoint of PyTorch"),
        ("x.onnx", b"\x08", "is an ONNX graph, not a checkpoint"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_weights(tmp_path / name)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"a TorchScript program: open it with torch\.jit\.load"):
        read_weights(tmp_path / "x.pt")


def test_safetensors_by_another_name(tmp_path: Path) -> None:
    save_file(RAW, tmp_path / "pytorch_model.bin")
    load_whole(model := fresh(), tmp_path)
    assert is_filled_with(model, RAW)


def test_no_safetensors_are_taken_for_a_web_page(tmp_path: Path) -> None:
    """A header of 0x3c20 bytes begins with a space and a `<`."""
    file = tmp_path / "x.safetensors"
    for length in range(15_200, 15_400):
        save_file({"a": torch.zeros(1)}, file, metadata={"note": "x" * length})
        if file.read_bytes()[:2] == b" <":
            break
    assert file.read_bytes()[:2] == b" <"
    assert read_weights(file).state_dicts[0].tensors.keys() == {"a"}


# --- shards


def test_an_index_as_weights(tmp_path: Path) -> None:
    where = {name: f"shard-{i % 2}.safetensors" for i, name in enumerate(RAW)}
    for shard in set(where.values()):
        save_file({n: t for n, t in RAW.items() if where[n] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        load_whole(model := fresh(), source)
        assert is_filled_with(model, RAW)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no weights: none of model\.safetensors"):
        read_weights(tmp_path)


def test_only_names_and_shapes_of_the_model_are_looked_at(tmp_path: Path) -> None:
    torch.save(RAW, tmp_path / "weights.pth")
    with torch.device("meta"):
        model = fresh()
    assert find_fit(read_weights(tmp_path / "weights.pth"), model).tensors.keys() == RAW.keys()


# --- where the command line leads


def test_training_starts_from_the_weights_that_are_asked_for(tmp_path: Path, said: Callable[[], str]) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"model": RAW, "model_ema": AVERAGED}, file)
    args = {name: str(value) for name, value in ARGS.items() if name != "num_classes"}
    for key, expected in ((None, AVERAGED), ("model", RAW)):
        config = TrainConfig(model="vit_tiny_patch16_224", model_args=args, weights=file, weights_key=key)
        model = _start(config, 5)[0]
        assert is_filled_with(model, expected)
        assert "taken is model" in said()


@brings("weights that do not fit, to doctor", "the same line as from compress")
def test_doctor_looks_at_weights(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    args = {name: str(value) for name, value in ARGS.items()}
    config = DoctorConfig(
        teacher="vit_tiny_patch16_224", teacher_weights=file, model_args=args, num_candidates=2
    )
    with pytest.raises(ModelError, match=r"no weights at .*weights\.pth"):
        doctor.run(config)
    torch.save({"model": {n: t for n, t in RAW.items() if n != "norm.bias"}}, file)
    with pytest.raises(ModelError, match=r"1 missing: norm\.bias"):
        doctor.run(config)
    torch.save({"model": RAW}, file)
    assert "vit_tiny_patch16_224: supported" in doctor.run(config)


@brings("sparse tensors in a checkpoint", "filled up, and loaded")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_tensors(tmp_path: Path, layout: torch.layout) -> None:
    file, model = tmp_path / "weights.pth", fresh()
    name = "head.weight"
    torch.save({**RAW, name: RAW[name].to_sparse(layout=layout)}, file)
    load_start(model, file)
    assert is_filled_with(model, RAW)


@brings("a checkpoint of shapes without numbers (the meta device)", "refused in one line")
def test_tensors_without_numbers(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"model": {**RAW, "head.bias": RAW["head.bias"].to("meta")}}, file)
    with pytest.raises(
        ModelError, match=rf"{file} holds shapes without numbers \(head.bias is on the meta device\)"
    ):
        load_start(fresh(), file)


@brings("weights to start from that hold NaN or infinite values", "refused; the tensor is named")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_training_starts_from_nan(tmp_path: Path, value: float) -> None:
    file, tensors = tmp_path / "weights.pth", weights(1)
    tensors["norm.bias"][0] = value
    torch.save(tensors, file)
    with pytest.raises(ModelError, match=rf"{file} cannot be used: norm.bias holds NaN or infinite values"):
        load_start(fresh(), file)


@brings("the state_dict() of torch's AveragedModel", "loads; its counter is no weight")
def test_the_counter_of_an_average_is_no_weight(tmp_path: Path, said: Callable[[], str]) -> None:
    file, model = tmp_path / "weights.pth", fresh()
    torch.save(torch.optim.swa_utils.AveragedModel(tiny_vit(seed=1)).state_dict(), file)
    load_start(model, file)
    assert is_filled_with(model, RAW)
    assert "n_averaged" not in said()
