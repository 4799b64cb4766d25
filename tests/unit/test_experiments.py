"""`benchmarks/experiments.py`: what is cut otherwise has the plain student's budget, and a row of its own."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import experiment_tables
import experiments
from experiments import CUTS, REPAIRED, SETTINGS, cell, suits


def config_of(setting: str, arm: str):
    options = Namespace(out=Path("out"), cells=Path("cells"), device="cpu")
    return cell(setting, arm, Path("data"), 1, {"teacher": "vit_tiny_patch16_224"}, options).config


@pytest.mark.parametrize("setting", ["resnet44-few", "clothing", "vit-cifar10", "vit-few", "digits"])
def test_cuts_differ_from_the_plain_student_in_what_is_cut_alone(setting):
    plain = config_of(setting, "single-step")
    cell_of_plain = json.loads((experiments.CELLS / setting / "single-step-1.json").read_text())
    told = {"cut", "shares", "drop_blocks", "whole_last", "uniform", "repair", "path"}  # AMD cuts one
    for arm in filter(lambda arm: suits(setting, arm), (REPAIRED, *CUTS)):
        config = config_of(setting, arm)
        changed = {name for name, value in config if value != getattr(plain, name)} - {"out_dir"}
        assert changed <= told | {"keep_ratio", "macs"} | set(SETTINGS[setting].get("finer", {}))
        is_control = "plain" in arm  # no channels, in the finer steps of the others
        assert config.repair or (config.cut == "all") != is_control
        if arm != REPAIRED:  # which has the plain student's widths
            assert config.keep_ratio is None
            share = 100 * cell_of_plain["macs"] / cell_of_plain["teacher_macs"]
            share *= SETTINGS[setting].get("plain_times", 1) if is_control else 1
            assert float(config.macs.removesuffix("%")) == pytest.approx(share, rel=0.03)


def test_no_other_setting_is_cut_otherwise():
    with_macs = {name for name in SETTINGS if any(suits(name, arm) for arm in CUTS)}
    assert with_macs == {"resnet44-few", "clothing", "vit-cifar10", "vit-few", "digits"}
    assert not suits("clothing", "cut-all-uniform")
    assert not suits("resnet44-few", "cut-all-last")


def written(folder: Path, arm: str, seed: int, top1: float, macs: int) -> None:
    figures = {"top1": top1, "selection_performance": 0.5, "num_params": 1500, "macs": macs}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"arm": arm, "seed": seed, "teacher_macs": 1000, **figures})
    (folder / f"{arm}-{seed}.json").write_text(text)


def test_the_table_compares_the_same_seeds(tmp_path):
    cells, clock = tmp_path / "experiments", tmp_path / "cut-students.json"
    for seed, top1 in enumerate((60.0, 62.0, 70.0)):
        written(cells / "digits", "single-step", seed, top1, 100)
    assert experiment_tables.cuts_table(cells, clock) == "Not run yet."
    for seed, top1 in enumerate((61.0, 64.0)):
        written(cells / "digits", "cut-all", seed, top1, 90)
    clock.write_text(
        json.dumps({"runs": [{"setting": "digits", "whole_ms": 1.0, "ms": {REPAIRED: 0.5, "cut-all": 0.25}}]})
    )
    *_, plain, narrow = experiment_tables.cuts_table(cells, clock).splitlines()
    assert plain == (
        "| `digits` | heads and neurons, or filters | 64.0 ± 5.3 |  | 0.500 | 1.5k | 10.0 % | 0.500 (2.0x) |"
    )
    assert narrow == (
        "| `digits` | `--cut all` | 62.5 ± 2.1 (2 seeds) | +1.5 ± 0.7 (2 seeds) | 0.500 | 1.5k | 9.0 % | "
        "0.250 (4.0x) |"
    )
