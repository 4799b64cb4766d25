"""The first screen of help: the options that matter, in groups; `--help-all` lists every one."""

from __future__ import annotations

from collections.abc import Mapping

Groups = Mapping[str, tuple[tuple[str, str], ...]]
"""By heading: flags with what they take, and one line on each."""

_IMAGES = ("--data DIR", "train/CLASS/* with val/ or test/, one folder of classes, or a data set of timm")
_MACHINE = (
    ("--device NAME", "cpu, cuda, mps, ...; by default the GPU if there is one"),
    ("--precision fp32|bf16", "number format of forward passes in training"),
    ("--seed N", "seed of everything random (0)"),
    ("--config FILE", "YAML with any of these options"),
)
_TRAINING = (
    ("--epochs N", "passes over the images, of each training (30)"),
    ("--minutes M", "or: all training within this time, by timing a few steps first"),
    ("--lr RATE", "peak learning rate (0.001)"),
    ("--batch-size N", "images per step (64)"),
    ("--augment NAME", "none, affine, crop or resized-crop; by default by the size of the images"),
)
_COMPRESS: Groups = {
    "what": (
        ("--teacher MODEL", "a timm name, the folder of a run or a model, or FILE.py:FACTORY"),
        _IMAGES,
        ("--out RUN", "where results go; the same command again resumes"),
    ),
    "how small (one of these)": (
        ("--keep SHARE", "of the heads, FFN neurons and filters (0.1)"),
        ("--macs 1.8G", "operations per image, or a share of the teacher's: 10%"),
        ("--params 9M", "parameters, or a share of the teacher's: 10%"),
        ("--latency-ms T", "milliseconds per image, measured before anything is trained"),
    ),
    "how": (
        (
            "--control NAME",
            "equal_compute: also train the student without the assistant, and keep the better",
        ),
        ("--student MODEL", "a student of another architecture"),
        ("--path NAME", "another way down than amd: single-step, takd, dgkd, mmd, ..."),
        *_TRAINING,
    ),
    "on what": _MACHINE,
}

MAIN_OPTIONS: Mapping[str, Groups] = {
    "compress": _COMPRESS,
    "doctor": {name: _COMPRESS[name] for name in ("what", "how small (one of these)", "how")},
    "train": {
        "what": (
            ("--model NAME", "a timm model, such as vit_tiny_patch16_224"),
            ("--model-args K=V ...", "its arguments, such as img_size=32 patch_size=4"),
            _IMAGES,
            ("--out RUN", "where the teacher goes; the same command again resumes"),
            ("--weights FILE", "start from these; or --no-pretrained for random ones"),
        ),
        "how": _TRAINING,
        "on what": _MACHINE,
    },
    "compare": {
        "what": (
            ("--teacher MODEL", "a timm name, the folder of a run or a model, or FILE.py:FACTORY"),
            _IMAGES,
            ("--out DIR", "where cells and tables go; the same command again adds what is missing"),
            ("--suite NAME", "or: a published table, with teacher and data"),
        ),
        "which runs": (
            ("--paths NAME ...", "ways down (single-step amd)"),
            ("--logit-losses NAME ...", "losses on the logits, each with every path"),
            ("--feature-losses NAME ...", "losses on hidden states or features, likewise"),
            ("--seeds N ...", "every row runs once with each (0 1 2)"),
            ("--lrs RATE ...", "learning rates that every row tries with the first seed"),
            ("--keep SHARE", "of the units that students keep (0.1)"),
            ("--epochs N", "passes over the images, of each training (30)"),
            ("--jobs N", "runs side by side (1)"),
        ),
        "on what": _MACHINE,
    },
}


def first_screen(command: str, summary: str) -> str:
    """The help of a command with many options."""
    groups = MAIN_OPTIONS[command]
    width = max(len(flag) for rows in groups.values() for flag, _ in rows)
    lines = [f"stepwell {command} - {summary}"]
    for heading, rows in groups.items():
        lines += ["", f"{heading}:", *(f"  {flag:<{width}}  {text}" for flag, text in rows)]
    return "\n".join([*lines, "", f"stepwell {command} --help-all lists every option."])
