"""How should a budget be spent? Single step and AMD at equal cost, over settings, splits and assistants.

    python benchmarks/experiments.py --only digits --jobs 2
    python benchmarks/experiments.py --files FOLDER --jobs 2

Every arm of a setting costs as much as a single step of so many epochs (`--budget-epochs`). Cells are kept
in benchmarks/results/experiments/SETTING/ and not run again; `python benchmarks/tables.py` makes the tables
of docs/experiments.md of them, which has the questions, and what was expected before each was run.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from cifar10 import RECIPES, few_images, unpack
from record import RESULTS
from selection import SETTINGS as TEACHERS
from stepwell.commands import demo, train
from stepwell.compare.cells import Cell
from stepwell.compare.pool import run_all
from stepwell.config.commands import CompressConfig, TrainConfig
from stepwell.config.files import make_config
from stepwell.run.progress import say

CELLS = RESULTS / "experiments"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CIFAR: dict[str, Any] = {"augment": "crop", "threads": 1}
# Without a joint training: the teacher trains the first of these slices, that one the next, and so on.
CHAINS = {f"chain-{'-'.join(map(str, sizes))}": sizes for sizes in ((0.3,), (0.5,), (0.5, 0.2))}

FILES = {
    "cifar10": "cifar10.tar.xz",
    "cifar_resnet44": "resnet44-cifar10.safetensors",
    "clothing": "clothing160.tar",
    "tf_efficientnet_lite0": "tf_efficientnet_lite0-imagenet.safetensors",
}


def narrower(teacher: dict[str, Any], **args: str) -> dict[str, Any]:
    """A student like the teacher, made anew with other arguments."""
    return {"student": teacher["model"], "student_args": {**teacher["model_args"], **args}}


# What a practitioner has: a pretrained network, tuned on a folder of photographs.
CLOTHING: dict[str, Any] = {
    "one_teacher": True,
    "train": {
        "model": "tf_efficientnet_lite0",
        "image_size": 96,
        "epochs": 10,
        "lr": 1e-3,
        "batch_size": 64,
        "threads": 1,
    },
    "compress": {
        "image_size": 96,
        "threads": 1,
        "lr": 2e-3,
        "batch_size": 64,
        "keep_ratio": 0.3,
        "budget_epochs": 10,
    },
    "macs": "39%",
    "cannot": ("cut-all-uniform",),
    "stock": {"student": "mobilenetv2_050", "budget_epochs": 10.9},
}

DIGITS: dict[str, Any] = {
    "train": {**TEACHERS["digits"]["train"], "augment": "affine", "threads": 1},
    "compress": {
        "augment": "affine",
        "threads": 1,
        "lr": 4e-3,
        "batch_size": 64,
        "keep_ratio": 0.1,
        "budget_epochs": 60,
    },
    "macs": "10.9%",
    "stock": {
        **narrower(TEACHERS["digits"]["train"], embed_dim="16", num_heads="2"),
        "budget_epochs": 56.7,
    },
}

# The same ViT, but its teacher has seen ten times the images that the student is given.
VIT_FEW: dict[str, Any] = {
    "one_teacher": True,
    "teacher_saw_all": True,
    "train": {**TEACHERS["cifar10-vit"]["train"], **CIFAR, "batch_size": 128},
    "compress": {**CIFAR, "lr": 2e-3, "batch_size": 128, "keep_ratio": 0.1, "budget_epochs": 40},
    "macs": "12.8%",
    "stock": {**narrower(RECIPES["vit"], embed_dim="32", num_heads="2"), "budget_epochs": 38},
    "kept": 132.1,
    "alone": 145.3,
    "images_per_class": 500,
}

# `macs` is what the plain student has (the mean of the seeds' cells), for arms that are cut otherwise.
# `stock` is a network of about the student's operations, with the epochs that make its single step cost what
# the others cost. `kept` and `alone` are such epochs too: where the teacher answers each of 5 views once
# (which a run's own bill charges nobody with), and where no teacher is asked.
SETTINGS: dict[str, dict[str, Any]] = {
    # A strong teacher that others trained, few images, and a small student: the gap is real.
    "resnet44-few": {
        "teacher": "cifar_resnet44",
        "compress": {**CIFAR, **IMAGENET, "lr": 8e-3, "keep_ratio": 0.1, "budget_epochs": 20},
        "macs": "9.4%",
        "finer": {"round_to": 4},  # streams of 16, 32 and 64 channels in steps of 8 do not meet it
        "plain_times": 1.09,  # nor do blocks in steps of 4: the next larger size that there is
        "cannot": ("cut-all-last", "cut-all-uniform"),  # its last stage alone is a third; it is no ViT
        "stock": {"student": "cifar_resnet8", "budget_epochs": 17.9},
        "kept": 73.1,
        "alone": 90.9,
        "images_per_class": 200,
    },
    "resnet44-few-keep-0.2": {
        "teacher": "cifar_resnet44",
        "compress": {**CIFAR, **IMAGENET, "lr": 8e-3, "keep_ratio": 0.2, "budget_epochs": 20},
        "stock": {"student": "cifar_resnet14", "budget_epochs": 17.4},
        "images_per_class": 200,
    },
    # Half of the student: to see whether what the gap says holds where it was not looked for.
    "resnet44-few-keep-0.05": {
        "teacher": "cifar_resnet44",
        "compress": {**CIFAR, **IMAGENET, "lr": 8e-3, "keep_ratio": 0.05, "budget_epochs": 20},
        "images_per_class": 200,
        "methods": ("amd", "auto", "single-step", "single-step-dearer", *CHAINS),
    },
    "clothing": CLOTHING,
    "clothing-keep-0.1": {
        **CLOTHING,
        "teacher_of": "clothing",
        "compress": {**CLOTHING["compress"], "keep_ratio": 0.1},
        "methods": ("amd", "auto", "single-step", *CHAINS),
    },
    "vit-cifar10": {
        "one_teacher": True,
        "train": {**TEACHERS["cifar10-vit"]["train"], "batch_size": 128},
        "compress": {**CIFAR, "lr": 2e-3, "batch_size": 128, "keep_ratio": 0.1, "budget_epochs": 20},
        "macs": "12.7%",
        "stock": {**narrower(RECIPES["vit"], embed_dim="32", num_heads="2"), "budget_epochs": 19},
        "images_per_class": 1000,
    },
    "vit-few": VIT_FEW,
    "vit-few-keep-0.05": {
        **VIT_FEW,
        "teacher_of": "vit-few",
        "compress": {**VIT_FEW["compress"], "keep_ratio": 0.05},
        "methods": ("amd", "auto", "single-step", *CHAINS),
    },
    "digits": DIGITS,
    "digits-keep-0.05": {
        "train": DIGITS["train"],
        "teacher_of": "digits",
        "compress": {**DIGITS["compress"], "keep_ratio": 0.05},
        "methods": ("amd", "auto", "single-step", *CHAINS),
    },
    # 10.7 M parameters and all 50,000 images: a GPU in bf16.
    "vit-gpu": {
        "train": {
            "model": RECIPES["vit-gpu"]["model"],
            "model_args": RECIPES["vit-gpu"]["model_args"],
            "epochs": 30,
            "lr": 1e-3,
            "batch_size": 256,
            "precision": "bf16",
        },
        "compress": {
            "augment": "crop",
            "lr": 1e-3,
            "batch_size": 256,
            "precision": "bf16",
            "keep_ratio": 0.1,
            "budget_epochs": 20,
        },
        "stock": {**narrower(RECIPES["vit-gpu"], embed_dim="120", num_heads="4"), "budget_epochs": 19.8},
    },
}

SHARES, ASSISTANTS = (0.1, 0.25, 0.5, 0.7), (0.2, 0.3, 0.5, 0.9)
LADDER = (0.1, 0.2, 0.3, 0.5)
METHODS: dict[str, dict[str, Any]] = {
    "auto": {"path": "auto"},  # the default of `stepwell compress`
    "amd": {"path": "amd"},
    # With every candidate in every step, joint training is so much dearer than the last step that this
    # share gives both about the same epochs, as in Algorithm 1.
    "paper": {"preset": "paper", "path": "amd", "joint_share": 0.93},
    "single-step": {"path": "single-step"},
    # The student's weights are still the teacher's; nobody pays for the teacher's answers.
    "labels": {"path": "single-step", "logit_weight": 0, "feature_weight": 0},
    "stock": {"path": "single-step"},
}
RECIPES_TRIED: dict[str, dict[str, Any]] = {
    "mix": {"mixup": 0.2, "cutmix": 1.0},
    "ema": {"ema": 0.99},
    "smooth": {"label_smoothing": 0.1},
}
# How much what is compared between the blocks counts, beside the labels and the logits.
FEATURE_WEIGHTS = (3, 10, 30)
ASSISTANTS_TRIED: dict[str, dict[str, Any]] = {
    "trained-on": {"assistant_share": 0.15},
    "snapshots": {"snapshots": 2},
}

# From stepwell's own rate, which nobody has searched: is a search within the budget worth it, and how far
# apart should what it tries be?
SEARCHED: dict[str, dict[str, Any]] = {
    "single-step-unsearched": {},
    "single-step-tune": {"tune": True},
    "single-step-tune-wide": {"tune_lrs": (2e-4, 1e-3, 5e-3)},
}

VIEWS = 5
# With the budget that a setting has for them.
BUDGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "single-step-kept": ("kept", {"path": "single-step", "cache_teacher": VIEWS, "feature_weight": 0}),
    "amd-kept": ("kept", {"path": "amd", "cache_teacher": VIEWS, "feature_weight": 0}),
    "labels-long": ("alone", METHODS["labels"]),
}
# As --preset quick and long: with another budget than the others of a setting.
LENGTHS = {"quick": 0.25, "long": 4.0}
# Is the single step behind for want of operations, or of a better rate?
DEARER = 1.5
RATES = (0.5, 2.0, 4.0)
# A student of the plain one's size, repaired, or of the plain one's MACs, cut otherwise.
REPAIRED = "single-step-repair"
CUTS: dict[str, dict[str, Any]] = {
    "cut-all": {},
    "cut-all-search": {"shares": "search"},
    "cut-all-drop": {"shares": "search", "drop_blocks": True},
    "cut-all-last": {"whole_last": True},
    "cut-all-uniform": {"uniform": True},
    # What of this is the channels', and what the finer steps'?
    "plain-larger": {"cut": "heads,neurons"},
    "plain-drop": {"cut": "heads,neurons", "shares": "search", "drop_blocks": True},
    "cut-all-repair": {"repair": True},
    "amd-cut-all-drop": {"path": "amd", "shares": "search", "drop_blocks": True},
    "amd-plain-drop": {"cut": "heads,neurons", "path": "amd", "shares": "search", "drop_blocks": True},
}


def arms() -> dict[str, dict[str, Any]]:
    """What is compared: methods; the two main ones with another recipe, rate or budget; single steps that are
    cut otherwise; and AMD by length of the joint training and size of the assistant."""
    found = dict(METHODS)
    for method in ("amd", "single-step"):
        for name, recipe in RECIPES_TRIED.items():
            found[f"{method}-{name}"] = {**METHODS[method], **recipe}
        for weight in FEATURE_WEIGHTS:
            found[f"{method}-states-{weight}"] = {**METHODS[method], "feature_weight": weight}
    for name, options in SEARCHED.items():
        found[name] = {**METHODS["single-step"], "lr": 1e-3, **options}
    found["stock-states-0.1"] = {**METHODS["stock"], "feature_weight": 0.1}
    for name, options in ASSISTANTS_TRIED.items():
        found[f"amd-{name}"] = {**METHODS["amd"], **options}
    for name, factor in LENGTHS.items():
        found[f"amd-{name}"] = {**METHODS["amd"], "budgets": factor}
    found |= {name: {"path": "takd", "assistants": sizes} for name, sizes in CHAINS.items()}
    found["single-step-dearer"] = {**METHODS["single-step"], "budgets": DEARER}
    for method, factor in itertools.product(("amd", "single-step"), RATES):
        found[f"{method}-rate-{factor:g}"] = {**METHODS[method], "rates": factor}
    found |= {name: options for name, (_, options) in BUDGETS.items()}
    found[REPAIRED] = {**METHODS["single-step"], "repair": True}
    found |= {name: {**METHODS["single-step"], "cut": "all", **options} for name, options in CUTS.items()}
    for share in SHARES:
        for assistant in ASSISTANTS:
            options = {"path": "amd", "joint_share": share, "assistant": assistant}
            found[f"joint-{share:g}-assistant-{assistant:g}"] = options
    # Four single steps of a budget each cost 5.6 budgets of the smallest (4 + 3 x 1.1 passes of the teacher
    # over 1 + 3 x 0.1); the ladder has a third of it, as have the short single steps together.
    found["ladder"] = {"ladder": LADDER, "budgets": 5.6 / 3}
    found["ladder-amd"] = {**found["ladder"], "path": "amd"}
    for keep in LADDER:
        options = {"path": "single-step", "keep_ratio": keep}
        full = {} if keep == LADDER[0] else {f"single-step-{keep:g}": options}
        found |= {**full, f"third-{keep:g}": {**options, "budgets": 1 / 3}}
    return found


def suits(name: str, arm: str) -> bool:
    """Whether a setting has the arm: some have few, ladders begin with their smallest size, and some arms
    need a budget of the setting's own, or cannot meet it."""
    if arm not in SETTINGS[name].get("methods", arms()):
        return False
    if arm in BUDGETS:
        return BUDGETS[arm][0] in SETTINGS[name]
    if arm in CHAINS:
        return CHAINS[arm][-1] > SETTINGS[name]["compress"]["keep_ratio"]
    if arm == REPAIRED or arm in CUTS:
        return "macs" in SETTINGS[name] and arm not in SETTINGS[name].get("cannot", ())
    of_ladder = arm.startswith(("ladder", "single-step-0", "third-"))
    return SETTINGS[name]["compress"]["keep_ratio"] == LADDER[0] or not of_ladder


def main() -> None:
    """Train the teachers that are missing, then run the cells that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=Path, help=f"folder that holds {', '.join(FILES.values())}")
    parser.add_argument("--only", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", choices=arms(), default=list(arms()))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-experiments"))
    parser.add_argument("--cells", type=Path, default=CELLS, help="where cells are kept, below it by setting")
    options = parser.parse_args()
    for name in options.only:
        setting = SETTINGS[name]
        data = images(name, setting.get("images_per_class"), options.files, options.out)
        one, saw_all = (setting.get(key, False) for key in ("one_teacher", "teacher_saw_all"))
        seen = images(name, None, options.files, options.out) if saw_all else data
        teachers = {seed: teacher(name, seen, 0 if one else seed, options) for seed in options.seeds}
        # Seed by seed: what is there when the time ends is whole.
        cells = [
            cell(name, arm, data, seed, teachers[seed], options)
            for seed in options.seeds
            for arm in options.arms
            if suits(name, arm)
        ]
        for result in run_all(cells, options.jobs, name):
            say(f"{name} {result.arm} {result.seed}: {result.top1:.2f}")


def images(name: str, per_class: int | None, files: Path | None, out: Path) -> Path:
    """The digits; the photographs; or so many of the training images of each class of CIFAR-10, with all
    test images."""
    if name.startswith("digits"):
        demo.write_digits(out / "digits")
        return out / "digits"
    assert files is not None, "this setting needs --files"
    if name.startswith("clothing"):
        return unpack(files / FILES["clothing"], out / "clothing", "clothing160")
    if per_class is None:
        return unpack(files / FILES["cifar10"], out / "cifar10")
    return few_images(files / FILES["cifar10"], out, per_class)


def teacher(name: str, data: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The options that name the teacher, which is trained unless it comes with weights."""
    setting = SETTINGS[name]
    if "teacher" in setting:
        return {"teacher": setting["teacher"], "teacher_weights": options.files / FILES[setting["teacher"]]}
    given = {"pretrained": False, "data": str(data), "seed": seed, **setting["train"]}
    if given["model"] in FILES:
        given["weights"] = options.files / FILES[given["model"]]
    folder = options.out / f"{setting.get('teacher_of', name)}-teacher-{seed}"
    print(
        train.run(make_config(TrainConfig, {"device": options.device, "out_dir": folder, **given})),
        flush=True,
    )
    return {"teacher": str(folder)}


def cell(
    name: str, arm: str, data: Path, seed: int, teacher: dict[str, Any], options: argparse.Namespace
) -> Cell:
    """One run."""
    of = SETTINGS[name]
    options_of_arm = {**arms()[arm], **(of["stock"] if arm.startswith("stock") else {})}
    of_arm = of[BUDGETS[arm][0]] if arm in BUDGETS else of["compress"]["budget_epochs"]
    budget = options_of_arm.pop("budgets", 1) * of_arm
    share = float(of.get("macs", "100%").rstrip("%"))
    if options_of_arm.get("cut") == "heads,neurons":
        share *= of.get("plain_times", 1)
    macs = f"{share:.3g}%"
    values = {
        **of["compress"],
        **teacher,
        "budget_epochs": round(budget, 2),
        "lr": options_of_arm.pop("rates", 1) * of["compress"]["lr"],
        **({"keep_ratio": None, "macs": macs, **of.get("finer", {})} if arm in CUTS else {}),
        **options_of_arm,
        "data": str(data),
        "seed": seed,
        "device": options.device,
        "out_dir": options.out / "unfinished" / f"{name}-{arm}-{seed}",
    }
    return Cell(arm, make_config(CompressConfig, values), options.cells / name / f"{arm}-{seed}.json")


if __name__ == "__main__":
    main()
