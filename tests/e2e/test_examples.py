"""The loss of docs/guide/new-loss.md, against a loop and in a run; and what the guides say of the code."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from small_world import QUICK, stepwell, student_weights

from stepwell.cli import main
from stepwell.config.commands import CompressConfig
from stepwell.config.files import make_config, read_yaml
from stepwell.config.loss_facts import FEATURE_LOSSES, LOGIT_LOSSES
from stepwell.config.own_code import load_function
from stepwell.losses.output import Output, Target
from stepwell.paths import checked_path
from stepwell.report.result import Result

ROOT = Path(__file__).parents[2]
COSINE = f"{ROOT / 'examples' / 'cosine_loss.py'}:CosineLoss"
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "examples/cluster/README.md",
    *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("docs/**/*.md"))),
]
NUM_IMAGES = 6
TARGET = Target(torch.zeros(NUM_IMAGES, dtype=torch.int64), torch.arange(NUM_IMAGES), progress=0.0)


def output(seed: int, dim: int) -> Output:
    features = torch.randn(NUM_IMAGES, dim, generator=torch.Generator().manual_seed(seed))
    return Output(torch.zeros(NUM_IMAGES, 3), [], features)


def make(student: Output, teacher: Output, **arguments) -> torch.nn.Module:
    torch.manual_seed(0)
    return load_function(COSINE, "--feature-loss")(student, teacher, **arguments)


def by_loop(embed: torch.nn.Linear, student: Output, teacher: Output, power: float) -> float:
    weight, bias = embed.weight.detach().numpy(), embed.bias.detach().numpy()
    total = 0.0
    for s, t in zip(student.features.numpy(), teacher.features.numpy(), strict=True):
        e = weight @ s + bias
        total += (1 - (e @ t) / math.sqrt((e @ e) * (t @ t))) ** power
    return total / NUM_IMAGES


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_cosine_loss_equals_a_loop(power):
    student, teacher = output(1, 5), output(2, 7)
    loss = make(student, teacher, power=power)
    expected = by_loop(loss.embed, student, teacher, power)
    assert loss(student, teacher, TARGET).item() == pytest.approx(expected, rel=1e-5)


def test_the_cosine_loss_is_least_where_the_student_is_the_teacher():
    teacher = output(1, 5)
    student = teacher._replace(features=(3 * teacher.features).requires_grad_())
    loss = make(student, teacher, power=1.5)
    with torch.no_grad():
        loss.embed.weight.copy_(torch.eye(5))
        loss.embed.bias.zero_()
    value = loss(student, teacher, TARGET)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert np.isfinite(student.features.grad.numpy()).all()


def compress(teacher, data, out, *words) -> list[str]:
    command = ("compress", "--teacher", teacher, "--data", data, "--out", out, *QUICK, *words)
    return [str(word) for word in command]


def test_the_cosine_loss_in_a_run(data, teacher, tmp_path, quick):
    words = ("--feature-loss", COSINE, "--feature-args", "power=2", "--feature-weight", 3)
    stepwell(*compress(teacher, data, tmp_path / "run", *words))
    result = Result.load(tmp_path / "run" / "result.json")
    for stage in ("joint", "distill"):
        assert all(0 < value < 4 for value in result.histories[stage].losses["feature"])
    assert not any("embed.weight" in name for name in student_weights(tmp_path / "run"))


def test_an_argument_that_the_cosine_loss_does_not_take(data, teacher, tmp_path, capsys):
    words = ("--feature-loss", COSINE, "--feature-args", "pover=2")
    assert main(compress(teacher, data, tmp_path / "run", *words)) == 2
    assert "--feature-args pover" in (error := capsys.readouterr().err)
    assert error.rstrip().endswith("takes power")


@pytest.mark.parametrize("value", ["[states, {}]", "!!set {{'{}'}}"])
def test_a_config_file_cannot_name_code_in_a_list_either(data, teacher, tmp_path, capsys, value):
    (tmp_path / "config.yaml").write_text(f"feature_losses: {value.format(COSINE)}\n")
    words = compress(teacher, data, tmp_path / "run", "--config", tmp_path / "config.yaml")
    assert main(["compare", *words[1:]]) == 2
    assert "would run code, which a config file cannot ask for" in capsys.readouterr().err


def test_the_guide_shows_the_lines_of_the_example():
    example = (ROOT / "examples" / "cosine_loss.py").read_text().splitlines()
    guide = (ROOT / "docs" / "guide" / "new-loss.md").read_text()
    shown = re.search(r"```python\n(import.*?)```", guide, flags=re.DOTALL)
    assert set(shown[1].splitlines()) <= set(example)


def test_the_guide_lists_every_loss_with_its_weight():
    guide = (ROOT / "docs" / "guide" / "compare.md").read_text()
    row = r"^\| `([\w-]+)`.* \| ([\d.]+)(?:, of masks ([\d.]+))? \| (.*)\|$"
    rows = re.findall(row, guide, flags=re.MULTILINE)
    listed = {
        name: (float(weight), needs.startswith("labels"), "a pretraining" in needs)
        for name, weight, _, needs in rows
    }
    expected = {}
    for kind, names in (("logit", LOGIT_LOSSES), ("feature", FEATURE_LOSSES)):
        for name, facts in names.items():
            config = make_config(CompressConfig, {f"{kind}_loss": name})
            weight, first = getattr(config, f"{kind}_weight"), config.pretraining_epochs(1) > 0
            expected[name] = (weight, facts.needs_labels, first)
    assert listed == expected
    for name, _, of_masks, _ in rows:
        if of_masks:
            masks = make_config(CompressConfig, {"logit_loss": name, "task": "segmentation"})
            assert masks.logit_weight == float(of_masks)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / page).parent / link).exists(), link


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "scalekd").glob("*.yaml")), ids=lambda f: f.stem)
def test_a_published_strategy_is_a_config(file: Path):
    """Every name in the file is an option, and every value one that it takes."""
    config = make_config(CompressConfig, {**read_yaml(file), "teacher": "swin_large_patch4_window7_224"})
    assert config.path == "scalekd"
    assert config.feature_loss == "scalekd"  # which comes with the path
    assert checked_path(config.model_copy(update={"student": "resnet50", "data": "images"}))
