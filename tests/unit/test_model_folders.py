"""Folders that transformers and timm write: what is read of them, and that nothing outside of them is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf

from stepwell.commands import doctor
from stepwell.config.doctor_options import DoctorConfig
from stepwell.errors import ModelError, StepwellError
from stepwell.models import huggingface
from stepwell.models.teacher import Teacher, load_teacher
from tiny import ARGS, tiny_vit

transformers = pytest.importorskip("transformers")


def save(folder: Path) -> Path:
    """What `save_pretrained` writes of a small classifier."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, num_labels=5, hidden_size=24, intermediate_size=20,
        num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def load(folder: Path | str) -> Teacher:
    return load_teacher(str(folder), None, {}, 5)


def one_line_of(kind: type[StepwellError], folder: Path | str) -> str:
    with pytest.raises(kind) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("written", ["torch", "sharded", "sharded torch"])
@pytest.mark.brings(
    "model", "a transformers folder with pytorch_model.bin, or with shards and their index", "loads"
)
def test_weights_in_another_form(tmp_path, written):
    folder = save(tmp_path)
    found = load(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = "pytorch_model.bin" if "torch" in written else "model.safetensors"
    write = torch.save if "torch" in written else save_file
    if "sharded" in written:
        where = {key: f"{i % 2}-{name}" for i, key in enumerate(tensors)}
        for shard in set(where.values()):
            write({key: t for key, t in tensors.items() if where[key] == shard}, folder / shard)
        (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        write(tensors, folder / name)
    assert load(folder).digest == found.digest


def test_a_training_state_is_no_model(tmp_path):
    folder = save(tmp_path)
    torch.save({"model": load_file(folder / "model.safetensors")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "not as save_pretrained writes it: its tensors lie under model" in one_line_of(ModelError, folder)


@pytest.mark.brings("model", "an index of shards that names a file elsewhere", "refused; it is not opened")
def test_an_index_opens_nothing_outside_of_its_folder(tmp_path):
    folder = save(tmp_path / "inside")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"vit.layernorm.weight": "../outside.safetensors"}}))
    assert "names a file outside of its folder (../outside.safetensors)" in one_line_of(ModelError, folder)
    for name in ("", ".", ".."):
        index.write_text(json.dumps({"weight_map": {"vit.layernorm.weight": name}}))
        assert f"names a file outside of its folder ({name})" in one_line_of(ModelError, folder)
    index.write_text(json.dumps({"weight_map": {"vit.layernorm.weight": "gone.safetensors"}}))
    assert "names gone.safetensors, which is not there" in one_line_of(ModelError, folder)
    index.write_text("[]")
    assert "is no index of weights" in one_line_of(ModelError, folder)
    index.unlink()
    assert "holds no model.safetensors, pytorch_model.bin or index" in one_line_of(ModelError, folder)


@pytest.mark.brings(
    "model", "a transformers configuration that names code, a kernel or a file", "never followed"
)
def test_a_configuration_of_a_stranger_is_only_an_architecture(tmp_path):
    folder = save(tmp_path)
    found = load(folder)
    config = json.loads((folder / "config.json").read_text())
    harmless = {
        "_attn_implementation": "someone/kernel",
        "auto_map": {"AutoConfig": "x--y.Z"},
        "_name_or_path": "/",
    }
    (folder / "config.json").write_text(json.dumps({**config, **harmless}))
    assert load(folder).digest == found.digest
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "someone/kernel"}))
    assert "config.json: hidden_act names a file or an address" in one_line_of(ModelError, folder)
    args = found.architecture.args
    for name, value in {**harmless, "use_pretrained_backbone": True, "backbone": "resnet18"}.items():
        with pytest.raises(ModelError, match=f"{name} is no part of an architecture"):
            huggingface.build({**args, name: value})


@pytest.mark.brings(
    "model", "a LoRA that is not merged into its model", "one line: how to merge it with peft"
)
@pytest.mark.parametrize("with_model", [True, False])
def test_a_lora_is_not_a_model(tmp_path, with_model):
    folder = save(tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    if not with_model:
        (folder / "config.json").unlink()
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert "LoRA that is not merged" in one_line_of(ModelError, folder)
    assert "merge_and_unload()" in one_line_of(ModelError, folder)


# --- transformers' Trainer


@pytest.mark.brings("model", "the output folder of transformers' Trainer", "its final model is taken")
def test_a_final_model_beside_checkpoints(tmp_path: Path) -> None:
    save(tmp_path)
    save(tmp_path / "checkpoint-10")
    (tmp_path / "training_args.bin").write_bytes(b"a pickle that nobody opens")
    assert load(tmp_path).name == str(tmp_path)


@pytest.mark.brings(
    "model", "a Trainer's folder with several checkpoints and no final model", "one line names them"
)
def test_checkpoints_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (5, 10, 100):
        save(tmp_path / f"checkpoint-{step}")
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"not read")
        if step == 5:
            assert load(tmp_path).digest == load(tmp_path / "checkpoint-5").digest
            assert "taken is checkpoint-5, the only model in it" in capsys.readouterr().err
    line = one_line_of(ModelError, tmp_path)
    assert "(checkpoint-5, checkpoint-10, checkpoint-100) and no final model" in line
    assert line.endswith("--teacher " + str(tmp_path / "checkpoint-100"))


# --- timm


def hub_folder(folder: Path, **config: object) -> Path:
    save_for_hf(tiny_vit(), str(folder), model_args=dict(ARGS), safe_serialization=True)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


@pytest.mark.brings("model", "a timm model in the hub's format (config.json, model.safetensors)", "loads")
@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_timm_folder(tmp_path: Path, prefix: str) -> None:
    folder = hub_folder(tmp_path, label_names=list("abcde"))
    found = load(f"{prefix}{folder}")
    assert found.architecture.source == "timm"
    assert found.architecture.name == "vit_tiny_patch16_224"
    assert found.classes == tuple("abcde")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(found.model(images), tiny_vit()(images))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": tensors}, folder / "pytorch_model.bin")
    assert load(f"{prefix}{folder}").digest == found.digest


@pytest.mark.brings(
    "model", "a timm config.json that names files, addresses or loaders", "only its architecture counts"
)
def test_a_timm_configuration_of_a_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub_folder(tmp_path)
    found = load(folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"file": "/etc/x", "url": "http://x", "custom_load": True, "source": "file"}
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).digest == found.digest
    for args in ({"checkpoint_path": "x.pth"}, {"pretrained": True}, {"act_layer": "a/b"}):
        (folder / "config.json").write_text(json.dumps({**config, "model_args": args}))
        assert f"config.json: {next(iter(args))} " in one_line_of(ModelError, folder)
    (folder / "config.json").write_text(json.dumps({**config, "architecture": "vit_tiny_patch16_225"}))
    assert "no model 'vit_tiny_patch16_225' (did you mean vit_tiny_patch16_224?)" in one_line_of(
        ModelError, folder
    )
    (folder / "config.json").write_text(json.dumps({**config, "model_args": {"no_such": 1}}))
    assert "timm cannot build what" in one_line_of(ModelError, folder)


@pytest.mark.brings(
    "model", "--teacher local-dir:DIR with a DIR that is not there", "one line, in doctor too"
)
def test_a_timm_folder_that_is_not_there(tmp_path: Path) -> None:
    name = f"local-dir:{tmp_path / 'gone'}"
    assert "gone is no folder of a timm model" in one_line_of(ModelError, name)
    with pytest.raises(ModelError, match="gone is no folder of a timm model"):
        doctor.run(DoctorConfig(teacher=name))


@pytest.mark.brings(
    "model", "a folder with weights and nothing that says of which model", "one line says what to give"
)
def test_weights_alone(tmp_path: Path) -> None:
    save_file(tiny_vit().state_dict(), tmp_path / "model.safetensors")
    assert f"--teacher-weights {tmp_path / 'model.safetensors'}" in one_line_of(ModelError, tmp_path)
    assert "is a file; if it holds weights, pass it as --teacher-weights" in one_line_of(
        ModelError, tmp_path / "model.safetensors"
    )
