"""What the suites compare: the rows of published tables.

Published figures are those of AMD's supplementary (ViT-B or pairs of CNNs on CIFAR-100), for ImageNet those
of the losses' papers. At the scales `cpu` and `gpu` the data, the models and the epochs are others
(`scales.py`), so only the order of the rows can be compared with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stepwell.compare.arms import Arm
from stepwell.config.loss_facts import FEATURE_LOSSES, LOGIT_LOSSES, feature_facts
from stepwell.config.options import Suite


@dataclass(frozen=True)
class Pair:
    """Two CNNs of different depth that losses are compared on.

    Attributes:
        teacher: A model of timm.
        student: Another one; its shape is given, so it starts from random numbers.
        keep_ratio: Share of the teacher's filters at which it has about the student's parameters: where the
            candidates for an assistant end.
        dkd_beta: DKD's published weight of the other classes for this pair.
        published: The teacher's published top-1.
    """

    teacher: str
    student: str
    keep_ratio: float
    dkd_beta: float
    published: float


PAIRS: dict[Suite, Pair] = {
    "wrn-pair": Pair("cifar_wrn_40_2", "cifar_wrn_16_2", 0.3, 6.0, 76.46),
    "resnet-pair": Pair("cifar_resnet56", "cifar_resnet20", 0.3, 2.0, 73.44),
    # Without shortcuts both sides of a weight shrink, so the parameters fall with the square.
    "vgg-pair": Pair("cifar_vgg13", "cifar_vgg8", 0.65, 6.0, 75.38),
    "imagenet-pair": Pair("resnet34", "resnet18", 0.5, 0.5, 73.31),
}

_TABLE_7: dict[str, dict[Suite, float]] = {
    name: dict(zip(("wrn-pair", "resnet-pair", "vgg-pair"), figures, strict=True))
    for name, figures in {
        "student alone": (73.64, 69.63, 70.68),
        "kd": (74.92, 70.66, 72.98),
        "dkd": (76.23, 71.97, 74.68),
        "fitnet": (75.75, 71.60, 73.54),
        "at": (75.28, 71.78, 73.62),
        "sp": (75.34, 71.48, 73.44),
        "vid": (74.79, 71.71, 73.96),
        "rkd": (75.40, 71.48, 73.72),
        "pkt": (76.01, 71.44, 73.37),
        "ab": (68.89, 71.49, 74.27),
        "ft": (75.15, 71.52, 73.42),
        "crd": (76.04, 71.68, 74.06),
        "sskd": (76.04, 71.49, 75.33),
        "takd": (75.04, 70.77, 73.67),
        "dgkd": (76.24, 71.92, 74.40),
        "amd": (76.06, 71.95, 74.47),
    }.items()
}
"""Table 7; DKD's row is that of its authors' code (mdistiller), with other teachers."""
_UNPUBLISHED = tuple(
    name
    for name in (*LOGIT_LOSSES, *FEATURE_LOSSES)
    if name not in _TABLE_7 and name != "states" and not feature_facts(name).reads_stages
)
"""The losses that the table does not have; AMD's hidden states are a part of its row, and ScaleKD has a suite
of its own."""

_IMAGENET = {
    "student alone": 69.75,
    "kd": 71.03,
    "dkd": 71.70,
    "dist": 72.07,
    "at": 70.69,
    "crd": 71.17,
    "review": 71.61,
    "amd": None,
}
"""ResNet-34 (73.31) to ResNet-18, from the papers of DKD and DIST; AMD's figure is not known to us."""

_LOGITS_AT_4 = {"task_weight": 0.1, "logit_weight": 0.9, "temperature": 4.0}
_LOGITS_AT_1 = {"task_weight": 0.5, "logit_weight": 0.5, "temperature": 1.0}
_SINGLE_STEP = {"path": "single-step"}


def _arms_of_pair(suite: Suite, pair: Pair) -> tuple[Arm, ...]:
    """The rows of Table 7 and the other losses, or the rows of ImageNet's table."""
    rows: dict[str, float | None] = dict(_IMAGENET)
    if suite != "imagenet-pair":
        rows = {name: figures[suite] for name, figures in _TABLE_7.items()}
        rows |= dict.fromkeys(_UNPUBLISHED)
    if suite == "vgg-pair":  # all its layers change their width, so no hidden states are compared
        rows = {name: figure for name, figure in rows.items() if not feature_facts(name).needs_states}
    return tuple(Arm(name, _row_of_pair(name, suite, pair), published) for name, published in rows.items())


def _row_of_pair(name: str, suite: Suite, pair: Pair) -> dict[str, Any]:
    """What such a row runs: a path, or a loss in a single step."""
    soft = _LOGITS_AT_1 if suite == "imagenet-pair" else _LOGITS_AT_4
    # On ImageNet these rise over 1 epoch of 100, on CIFAR over 20 of 240, which is their default.
    rise = {"loss_warmup": 0.01} if suite == "imagenet-pair" and name in ("dkd", "review") else {}
    match name:
        case "student alone":
            return {**_SINGLE_STEP, "logit_weight": 0.0, "feature_weight": 0.0}
        case "kd":
            return {**_SINGLE_STEP, **soft, "feature_weight": 0.0}
        case "dkd":
            beta = {"beta": pair.dkd_beta}
            options = {**_SINGLE_STEP, "logit_loss": "dkd", "logit_args": beta, "feature_weight": 0.0}
            return {**options, "temperature": soft["temperature"], **rise}
        case "sskd":
            return {**_SINGLE_STEP, **soft, "feature_loss": "sskd"}
        case "takd" | "dgkd":  # the paths, with the loss of "kd"
            half_way = round((1 + pair.keep_ratio) / 2, 2)
            return {"path": name, "assistants": (half_way,), **soft, "feature_weight": 0.0}
        case "amd":  # and its hidden states
            return {"path": name, **soft}
        case "dist" | "pld":
            options = {**_SINGLE_STEP, "logit_loss": name, "feature_weight": 0.0}
            return {**options, "temperature": soft["temperature"]}
        case _ if name in LOGIT_LOSSES:
            return {**_SINGLE_STEP, "logit_loss": name, "feature_weight": 0.0}
        case _:  # a loss on the features beside cross-entropy alone
            return {**_SINGLE_STEP, "feature_loss": name, "logit_weight": 0.0, **rise}


_TABLE_3 = {
    ("adamw", 3e-2): 42.48,
    ("adamw", 3e-3): 80.19,
    ("adamw", 3e-4): 75.38,
}
"""With a cosine; SGD fails at every rate, AdamW at 0.3."""

OTHER_ARCHITECTURE: Suite = "scalekd"
SEVERAL_TEACHERS: Suite = "several-teachers"
"""A chain of slices of one teacher, and several teachers one after another."""
TEACHER_SIZE: Suite = "teacher-size"
TO_OTHERS: frozenset[Suite] = frozenset({OTHER_ARCHITECTURE, TEACHER_SIZE})
"""A transformer teaches a CNN, and nothing is cut."""
OF_MASKS: Suite = "segmentation"
_ALONE = {"path": "single-step", "feature_weight": 0.0}
_WHOLE = {"path": "scalekd"}
_WITH_LOGITS = {**_WHOLE, "task_weight": 0.5, "logit_weight": 0.5}
_LABELS_ALONE = {**_WHOLE, "feature_loss": "states", "logit_weight": 0.0, "feature_weight": 0.0}
_KD = {**_WITH_LOGITS, "feature_loss": "states", "feature_weight": 0.0}
TEACHER_SIZES = ("small", "middle", "large")

ARMS: dict[Suite, tuple[Arm, ...]] = {
    # Table 4.
    "losses": (
        Arm("all three terms", {}, 80.19),
        Arm("no labels", {"task_weight": 0.0}, 78.32),
        Arm("no logits", {"logit_weight": 0.0}, 78.01),
        Arm("no hidden states", {"feature_weight": 0.0}, 75.24),
        Arm("DKD on the logits", {"logit_loss": "dkd"}, 80.22),
    ),
    # Table 5.
    "candidates": tuple(
        Arm(f"{m} candidate{'s' * (m > 1)}", {"num_candidates": m, "grid": "between"}, published)
        for m, published in ((1, 78.39), (3, 79.46), (6, 79.84), (9, 80.19), (15, 80.22))
    ),
    "optimizer": tuple(
        Arm(
            f"{optimizer}, {lr:g}, {schedule}",
            {"optimizer": optimizer, "lr": lr, "schedule": schedule},
            _TABLE_3.get((optimizer, lr)) if schedule == "cosine" else None,
        )
        for optimizer in ("adamw", "sgd")
        for lr in (3e-1, 3e-2, 3e-3, 3e-4)
        for schedule in ("linear", "cosine", "cosine-restarts")
    ),
    # Around alpha = beta = 1.
    "weights": tuple(
        Arm(f"logits {logit:g}, states {feature:g}", {"logit_weight": logit, "feature_weight": feature})
        for logit in (0.3, 1.0, 3.0)
        for feature in (0.1, 1.0, 10.0)
    ),
    # Table 1: about the same operations by fewer units, or by fewer layers.
    "depth": (
        Arm("pruned, KD", {"path": "single-step", "feature_weight": 0.0}, 60.13),
        Arm("pruned, DKD", {"path": "single-step", "feature_weight": 0.0, "logit_loss": "dkd"}, 70.26),
        Arm("pruned, CRD", {"path": "single-step", "feature_loss": "crd"}, 78.40),
        Arm("pruned, TAKD", {"path": "takd", "feature_weight": 0.0}, 71.02),
        Arm("pruned, MMD", {"path": "mmd"}, 80.25),
        Arm("pruned, AMD", {"path": "amd"}, 80.23),
        Arm("fewer layers, KD", {"path": "single-step", "feature_weight": 0.0, "student": "depth"}, 59.85),
        Arm(
            "fewer layers, DKD",
            {"path": "single-step", "feature_weight": 0.0, "logit_loss": "dkd", "student": "depth"},
            69.10,
        ),
        Arm("fewer layers, CRD", {"path": "single-step", "feature_loss": "crd", "student": "depth"}, 74.15),
        Arm("fewer layers, TAKD", {"path": "takd", "feature_weight": 0.0, "student": "depth"}, 69.73),
    ),
    # Table 2.
    "steps": (
        Arm("single-step", {"path": "single-step"}),
        Arm("amd", {"path": "amd"}, 80.19),
        # By `performance` the second would be the next smaller one, which is hardly another teacher.
        Arm("amd, two assistants", {"path": "amd", "num_assistants": 2, "rule": "npsd"}),
        Arm("amd, best of all students", {"path": "amd-manual"}),
        Arm("takd", {"path": "takd"}),
        Arm("dgkd", {"path": "dgkd"}),
        Arm("mmd", {"path": "mmd"}, 80.11),
        Arm("mmd-os", {"path": "mmd-os", "rule": "npsd"}, 80.10),
    ),
    # The published ablations, and Swin-L to ResNet-50 of this recipe, the traditional one, are pictures.
    OTHER_ARCHITECTURE: (
        Arm("labels alone", _LABELS_ALONE),
        Arm("KD", _KD),
        Arm("FitNet", {**_WITH_LOGITS, "feature_loss": "fitnet"}),
        Arm("hidden states", {**_WITH_LOGITS, "feature_loss": "states"}),
        *(
            Arm(parts, {**_WITH_LOGITS, **({"feature_args": args} if args else {})}, instead="KD")
            for parts, args in (
                ("CAP", {"tpp": 0.0, "alternative": 0.0}),
                ("CAP, DFM", {"tpp": 0.0}),
                ("CAP, TPP", {"alternative": 0.0}),
                ("CAP, DFM, TPP", {}),
            )
        ),
    ),
    # Table 6: of ViT-S; which teachers were there besides is not known to us.
    SEVERAL_TEACHERS: (
        Arm("single-step", {"path": "single-step"}),
        Arm("amd", {"path": "amd"}, 79.17),
        Arm("curriculum", {"path": "curriculum"}, 78.91),
    ),
    # The size stands where the teacher's folder comes to stand (teacher_sizes.py).
    TEACHER_SIZE: (
        Arm("labels alone", _LABELS_ALONE),
        *(
            Arm(
                f"{name}, {size} teacher",
                {**options, "teacher": size},
                instead=instead and f"{instead}, {size} teacher",
            )
            for size in TEACHER_SIZES
            for name, options, instead in (("KD", _KD, None), ("ScaleKD", _WITH_LOGITS, "KD"))
        ),
    ),
    # Table 8.
    OF_MASKS: (
        Arm("labels alone", {**_ALONE, "logit_weight": 0.0}, 74.21),
        Arm("KD of each pixel", _ALONE),
        Arm("SKD", {"path": "single-step", "feature_loss": "skd"}, 75.42),
        Arm("IFVD", {"path": "single-step", "feature_loss": "ifvd"}, 75.59),
        Arm("CWD", {"path": "single-step", "feature_loss": "cwd"}, 75.55),
        Arm("CIRKD", {"path": "single-step", "feature_loss": "cirkd"}, 76.38),
        # For masks its authors' weight is 1, not 2.
        Arm("DIST", {**_ALONE, "logit_loss": "dist", "logit_weight": 1.0}, 77.10),
        Arm("single-step", {"path": "single-step"}),
        Arm("amd", {"path": "amd"}, 77.23),
    ),
    **{suite: _arms_of_pair(suite, pair) for suite, pair in PAIRS.items()},
}

NOTES: dict[Suite, tuple[str, ...]] = {
    OF_MASKS: (
        "Published: on Cityscapes, the students of all rows but the last are a DeepLabV3 on a ResNet-18, and "
        "AMD's is another one, on 15 % of a ResNet-101.",
        "IFVD and CWD are without the adversarial pair that they were published with (SKD has its own).",
        "labels alone asks no teacher: its epochs are those of the other rows, and cost less.",
    ),
}
"""What must be said of a suite's figures."""
