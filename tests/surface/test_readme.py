"""The README's commands, run as they stand, on a small folder of images."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stepwell.cli import main

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """Every `stepwell ...` line under "Use", comments removed, continued lines joined."""
    text = next(block for block in blocks("sh") if "stepwell train" in block)
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("stepwell ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """path/to/images with stripes of three directions, which a small model tells apart."""
    folder = tmp_path_factory.mktemp("readme")
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    waves = {"cat": x, "dog": y, "frog": x + y}
    for split, count in (("train", 60), ("test", 20)):
        for name, wave in waves.items():
            place = folder / "path/to/images" / split / name
            place.mkdir(parents=True)
            for i in range(1, count + 1):
                grey = 128 + 90 * np.sin(wave * 0.8 + draw.uniform(0, 6)) + draw.normal(0, 8, (32, 32))
                pixels = np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
                Image.fromarray(pixels).save(place / f"{i:04d}.jpg")
    return folder


def test_the_readme_names_every_step_of_a_first_hour() -> None:
    assert [words[0] for words in commands()] == [
        "train",
        "doctor",
        "compress",
        "predict",
        "inspect",
        "export",
    ]


@pytest.mark.slow
def test_commands_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for words in commands():
        # Seconds instead of half an hour; all else as it stands in the README.
        argv = [
            "0.1" if before == "--minutes" else word
            for before, word in zip(["", *words], words, strict=False)
        ]
        assert main(argv) == 0, f"stepwell {' '.join(words)}: {capsys.readouterr().err}"
        assert capsys.readouterr().out.strip()
    for file in (
        "report.html",
        "result.json",
        "student/model.onnx",
        "student/model.safetensors",
        "student/stepwell.json",
    ):
        assert (folder / "runs/small" / file).stat().st_size > 100
    assert (folder / "runs/small/exports/student.pt2").is_file()


@pytest.mark.slow
def test_python_runs(folder: Path) -> None:
    """After the commands: the example finds their finished run, for which it must name the same options."""
    (code,) = blocks("python")
    code = code.replace('out_dir="runs/small")', 'out_dir="runs/python", epochs=0.2, num_candidates=3)')
    code = code.replace("runs/small/student", "runs/python/student")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for role in ("teacher", "student"):
        assert role in done.stdout


@pytest.mark.parametrize(
    "page", ["README.md", "docs/results.md", "docs/guide/compare.md", "docs/selection.md"]
)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = [re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, target


def test_the_length_of_the_main_path_is_what_the_readme_says() -> None:
    (said,) = re.findall(r"one file of (\d+) lines", README)
    lines = len((ROOT / "src/stepwell/paths/amd.py").read_text(encoding="utf-8").splitlines())
    assert abs(lines - int(said)) <= 10
