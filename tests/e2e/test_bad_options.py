"""A wrong command, option or config file: one line on stderr, exit code 2, and nothing left behind."""

from __future__ import annotations

import pytest

import stepwell as package

# --- the command line


def test_no_such_command(fails):
    assert "did you mean compress?" in fails("compres")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("0", "greater than 0"),
        ("1", "less than 1"),
        ("-1", "greater than 0"),
        ("2", "less than 1"),
        ("nan", ""),
        ("inf", ""),
        ("-inf", ""),
        ("abc", "abc"),
        ("", ""),
    ],
)
def test_impossible_keep(compress_fails, value, said):
    line = compress_fails("--keep", value)
    assert "keep" in line
    assert said in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--kep", "0.1"), "did you mean --keep?"),
        (("--num-candidate", "3"), "did you mean --num-candidates?"),
        (("--num_candidats=3",), "did you mean --num-candidates?"),
        (("--epochs", "0"), "epochs"),
        (("--epochs", "many"), "epochs"),
        (("--epochs",), "epochs"),
        (("--lr", "-1"), "lr"),
        (("--lr", "nan"), "lr"),
        (("--minutes", "0"), "minutes"),
        (("--batch-size", "0"), "batch_size"),
        (("--batch-size", "1.5"), "batch-size"),
        (("--seed", "-1"), "seed"),
        (("--seed", "99999999999999999999"), "seed"),
        (("--warmup", "1"), "warmup"),
        (("--workers", "-1"), "workers"),
        (("--num-candidates", "1"), "num_candidates"),
        (("--num-candidates", "100"), "num_candidates"),
        (("--temperature", "0"), "temperature"),
        (("--rule", "nspd"), "npsd"),
        (("--control", "yes"), "equal_compute"),
        (("--precision", "fp8"), "bf16"),
        (("--preset", "papr"), "paper"),
        (("--assistant", "1.5"), "assistant"),
        (("--task-weight", "0", "--logit-weight", "0", "--feature-weight", "0"), "are all 0"),
        (("--feature-layers", "0", "7"), "7"),
        (("--feature-layers", "-1"), "-1"),
        (("--device", "quantum"), "--device cpu"),
        (("--device", "cuda:99"), "--device cpu"),
        (("--device", "meta"), "--device cpu"),
        (("stray",), "stray"),
        (("--model-args", "img_size"), "name=value"),
        (("--model-args", "img_size=16"), "--model-args"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_impossible_options(compress_fails, words, said):
    assert said in compress_fails(*words)


@pytest.mark.parametrize("missing", ["teacher", "data", "out"])
def test_compress_without_a_required_option(compress_fails, missing):
    assert f"--{missing}" in compress_fails(**{missing: None})


@pytest.mark.parametrize("missing", ["model", "data", "out"])
def test_train_without_a_required_option(train_fails, missing):
    assert f"--{missing}" in train_fails("--no-pretrained", **{missing: None})


@pytest.mark.parametrize("command", ["predict", "export", "inspect"])
def test_commands_without_arguments(fails, command):
    assert f"stepwell {command} --help" in fails(command)


def test_predict_without_images(fails, teacher):
    assert "stepwell predict --help" in fails("predict", teacher)


# --- config files


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"kep: 0.1\n", "kep"),
        (b"keep_ratios: 0.1\n", "did you mean keep_ratio?"),
        (b"keep: 0.1\n", "did you mean keep_ratio?"),
        (b"7: 0.1\n", "7"),
        (b"epochs: many\n", "epochs"),
        (b"lr: -3\n", "lr"),
        (b"preset: papr\n", "preset"),
        (b"model_args: img_size\n", "model_args"),
        (b"- keep_ratio\n- 0.1\n", "name: value"),
        (b"just words\n", "name: value"),
        (b"a: [1, 2\n", "YAML"),
        (b"a:\tb: c\n\t- d", "YAML"),
        (b"\x00\x01\x02", "YAML"),
        (b"\x89PNG\r\n\xff\xfe\xfa", "YAML"),
    ],
)
def test_bad_config_file(compress_fails, tmp_path, content, said):
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    line = compress_fails("--config", file)
    assert said in line
    assert "config.yaml" in line


def test_a_config_file_runs_no_code(compress_fails, tmp_path):
    proof = tmp_path / "ran"
    for tag in ("os.mkdir", "pathlib.Path.touch"):
        file = tmp_path / "config.yaml"
        file.write_text(f"teacher: !!python/object/apply:{tag} [{proof}]\n")
        assert "not valid YAML" in compress_fails("--config", file)
        assert not proof.exists()


def test_no_config_file(compress_fails, tmp_path):
    assert "nowhere.yaml" in compress_fails("--config", tmp_path / "nowhere.yaml")
    assert "Is a directory" in compress_fails("--config", tmp_path)
    assert "--config" in compress_fails("--config")


# --- Python


def test_unknown_names_in_python(teacher, data, tmp_path):
    with pytest.raises(package.StepwellError, match="did you mean keep_ratio"):
        package.compress(teacher, data=data, out_dir=tmp_path / "out", keepratio=0.1)
    with pytest.raises(package.StepwellError, match="epochs"):
        package.compress(teacher, data=data, out_dir=tmp_path / "out", epochs="many")
    assert not (tmp_path / "out").exists()
