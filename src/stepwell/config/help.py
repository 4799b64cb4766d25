"""The first screen of help: the options that matter, in groups; `--help-all` lists every one."""

from __future__ import annotations

from collections.abc import Mapping

Groups = Mapping[str, tuple[tuple[str, str], ...]]
"""By heading: flags with what they take, and one line on each."""

_IMAGES = ("--data DIR", "train/CLASS/* with val/ or test/, or a folder of classes")
_LENGTH = (
    ("--epochs N", "passes over the images (30)"),
    ("--minutes M", "or: all training within this time"),
)
_BUDGET = (
    ("--budget-epochs N", "cost of it all, in epochs of plain distillation (60)"),
    ("--minutes M", "or: all training within this time"),
    ("--epochs N", "or: so many epochs for every training"),
)
_MACHINE = (
    ("--device NAME", "cpu, cuda, mps, ...; by default the GPU if there is one"),
    ("--config FILE", "YAML with any of these options"),
)
_TEACHER = ("--teacher MODEL", "a timm name, a run or model folder, or FILE.py:FACTORY")
_COMPRESS: Groups = {
    "what": (_TEACHER, _IMAGES, ("--out RUN", "for the results; the same command again resumes")),
    "how small (one of these)": (
        ("--keep SHARE", "of the heads, FFN neurons and filters (0.1)"),
        ("--macs 1.8G", "operations per image, or 10% of the teacher's"),
        ("--params 9M", "parameters, or 10% of the teacher's"),
        ("--latency-ms T", "milliseconds per image, measured before training"),
        ("--ladder S S ...", "or: several sizes from one run"),
    ),
    "how": (
        ("--control NAME", "equal_compute: also by the teacher alone; the better is kept"),
        ("--student MODEL", "a student of another architecture"),
        ("--baseline MODEL", "also a stock network, to compare the student with"),
        ("--path NAME", "way down: with an assistant where one pays (auto)"),
        ("--tune", "try three learning rates first, and take the best"),
        *_BUDGET,
    ),
    "on what": _MACHINE,
}

MAIN_OPTIONS: Mapping[str, Groups] = {
    "compress": _COMPRESS,
    "doctor": {
        **{name: _COMPRESS[name] for name in ("what", "how small (one of these)", "how")},
        "how long": (
            ("--plan", "time some steps here: what will every stage take?"),
            ("--num-images N", "with --plan: for so many images, without --data"),
            ("--devices N", "with --plan: also on several devices (1)"),
        ),
    },
    "train": {
        "what": (
            ("--model NAME", "a timm model, such as vit_tiny_patch16_224"),
            ("--model-args K=V ...", "such as img_size=32 patch_size=4"),
            _IMAGES,
            ("--out RUN", "for the teacher; the same command again resumes"),
            ("--weights FILE", "start from these; or --no-pretrained for random ones"),
        ),
        "how": (
            *_LENGTH,
            ("--lr RATE", "peak learning rate (0.001)"),
            ("--batch-size N", "images per step (64)"),
        ),
        "on what": _MACHINE,
    },
    "compare": {
        "what": (
            _TEACHER,
            _IMAGES,
            ("--out DIR", "for cells and tables; again, it adds what is missing"),
            ("--suite NAME", "or: a published table, with teacher and data"),
        ),
        "which runs": (
            ("--paths NAME ...", "ways down (single-step amd)"),
            ("--logit-losses NAME ...", "losses on the logits, each with every path"),
            ("--feature-losses NAME ...", "losses on states or features, likewise"),
            ("--seeds N ...", "every row runs once with each (0 1 2)"),
            ("--lrs RATE ...", "rates that every row tries, with one seed"),
            ("--keep SHARE", "of the units that students keep (0.1)"),
            ("--budget-epochs N", "cost of each, in epochs of plain distillation (60)"),
            ("--jobs N", "runs side by side (1)"),
        ),
        "on what": _MACHINE,
    },
}


def first_screen(command: str, summary: str) -> str:
    """The help of a command with many options."""
    groups = MAIN_OPTIONS[command]
    width = max(len(flag) for rows in groups.values() for flag, _ in rows)
    lines = [f"stepwell {command}", f"  {summary}"]
    for heading, rows in groups.items():
        lines += ["", f"{heading}:", *(f"  {flag:<{width}}  {text}" for flag, text in rows)]
    return "\n".join([*lines, "", f"stepwell {command} --help-all lists every option."])
