"""Which teachers can teach which students by ScaleKD: docs/pairs.md.

    make pairs-table                         # some minutes on one core
    python benchmarks/pairs.py --new         # those alone that the file of results lacks
    python benchmarks/pairs.py --only swin   # pairs with this in a name; prints, writes nothing

Tiny variants of timm's models with random weights, each with each on square images and some on images that
are not square. For each pair, of which nothing is set by hand:

    forward    the loss is finite, and every part of it is there
    backward   the student's first layer and every projector get a finite gradient; the teacher's parameters
               and buffers stay as they are, to the bit
    file       the delivered file loads strictly into timm.create_model(...), and computes the same
    bill       operations of the loss by itself (projectors and tail), of the teacher's forward pass

Writes benchmarks/results/pairs.json and docs/pairs.md, which also has the published pairs: what their authors
set by hand, and what is read from the models.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from record import RESULTS, commit
from stepwell.compare.pairs import PAIRS, PublishedPair
from stepwell.config.options import LossOptions
from stepwell.losses.choose import Pair
from stepwell.losses.distillation import Distillation, loss_macs, make_distillation
from stepwell.losses.observe import Observed
from stepwell.losses.output import Target, TrainingImages
from stepwell.losses.scalekd.stages import Stages, find_stages
from stepwell.measure.size import count_macs
from stepwell.models.card import WEIGHTS, Architecture, Card, save_model
from stepwell.models.input import input_spec
from stepwell.run.atomic import write_atomically

PAGE = Path(__file__).parent.parent / "docs" / "pairs.md"
FILE = RESULTS / "pairs.json"
NOT_TAKEN = (
    "## Not taken",
    "",
    "Of one model of each of timm's 98 families, built without memory, stages are read, but of these:",
    "",
    "- HRNet and CrossViT, whose stages return several maps, or rows of tokens, at once;",
    "- CoaT, whose stages are lists that are never called, and whose last one returns several, too;",
    "- Gemma's vision tower, whose blocks are not there by the names that timm gives, and are not known;",
    "- `cifar_vgg*`, the plain VGGs of the CIFAR literature, which have neither stages nor blocks.",
    "",
    "`compress` refuses them as teacher or student, and says which stages are missing; `doctor` says it",
    "beforehand. MViTv2 and Twins do not have the stages that timm names: theirs are read by their blocks.",
)
"""Tried with timm 1.0.31."""
CHECKS = ("forward", "backward", "file")
NUM_CLASSES = 10
SIZE = 64

_VIT = {"img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4}
_SWIN = {
    "img_size": SIZE,
    "embed_dim": 24,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 4, 8),
    "window_size": 4,
}
Model = tuple[str, Mapping[str, Any]]
Models = Mapping[str, Model]

TEACHERS: Models = {
    "Swin": ("swin_tiny_patch4_window7_224", _SWIN),
    "Swin V2": ("swinv2_tiny_window8_256", _SWIN),
    "ViT": ("vit_tiny_patch16_224", _VIT),
    "ViT, 4 registers": ("vit_small_patch14_reg4_dinov2", {**_VIT, "num_classes": NUM_CLASSES}),
    "ViT, no class token": ("vit_base_patch16_gap_224", _VIT),
    "ViT, 12 blocks": ("vit_tiny_patch16_224", {**_VIT, "depth": 12}),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", _VIT),
    "DeiT III": ("deit3_small_patch16_224", _VIT),
    "BEiT": ("beit_base_patch16_224", _VIT),
    "BEiT v2": ("beitv2_base_patch16_224", _VIT),
    "EVA": ("eva_large_patch14_196", _VIT),
    "EVA-02": ("eva02_tiny_patch14_224", _VIT),
    "ConvNeXt": ("convnext_tiny", {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)}),
    "ConvNeXt V2": ("convnextv2_tiny", {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)}),
}
STUDENTS: Models = {
    "ResNet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}),
    "ResNet, bottleneck": ("resnet50", {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}),
    "MobileNet V1": ("mobilenetv1_100", {}),
    "MobileNet V3": ("mobilenetv3_small_050", {}),
    "EfficientNet": ("test_efficientnet", {}),
    "ConvNeXt": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "Mixer": ("mixer_s32_224", {"img_size": SIZE}),
    "ResMLP": ("resmlp_12_224", {"img_size": SIZE}),
    "ViT": ("vit_tiny_patch16_224", {**_VIT, "embed_dim": 24, "depth": 3}),
    "ViT, 12 blocks": ("vit_tiny_patch16_224", {**_VIT, "embed_dim": 24, "depth": 12}),
    "DeiT": ("deit_tiny_patch16_224", {**_VIT, "embed_dim": 24, "class_token": False, "global_pool": "avg"}),
    "Swin": ("swin_tiny_patch4_window7_224", {**_SWIN, "embed_dim": 12}),
    "RegNet": ("regnetx_002", {}),
}
WIDE = (SIZE, 3 * SIZE // 2)
ON_WIDE_IMAGES = [(teacher, student) for teacher in ("Swin", "ViT") for student in ("ResNet", "Swin", "ViT")]


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--only", default="", help="pairs with this in a name, without writing")
    words.add_argument("--new", action="store_true", help="pairs without a result alone")
    asked = words.parse_args()
    only = asked.only.lower()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known = json.loads(FILE.read_text())["pairs"] if asked.new else {}
    done = {}
    for name, (teacher, student, size) in all_pairs().items():
        if only in name.lower():
            done[name] = known.get(name) or checked(teacher, student, size)
            print(f"{name}: {summary(done[name])}", flush=True)
    if not only:
        record = {"benchmark": "pairs", "commit": commit(), "timm": timm.__version__, "pairs": done}
        write_atomically(FILE, json.dumps(record, indent=1) + "\n")
        write_atomically(PAGE, page(done))


def all_pairs() -> dict[str, tuple[Model, Model, tuple[int, int]]]:
    """Teacher, student and size of the images of each pair, by its name."""
    square = [(teacher, student) for teacher in TEACHERS for student in STUDENTS]
    return {
        f"{teacher} -> {student}{where}": (TEACHERS[teacher], STUDENTS[student], size)
        for pairs, where, size in ((square, "", (SIZE, SIZE)), (ON_WIDE_IMAGES, on_wide(), WIDE))
        for teacher, student in pairs
    }


def on_wide() -> str:
    return f", {WIDE[0]} x {WIDE[1]}"


def built(model: Model, size: tuple[int, int]) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(model[0], **arguments(model, size)).eval()


def arguments(model: Model, size: tuple[int, int]) -> dict[str, Any]:
    """Of `timm.create_model`, for images of this size."""
    args = {"num_classes": NUM_CLASSES, **model[1]}
    return {**args, "img_size": size} if "img_size" in args else args


def checked(teacher: Model, student: Model, size: tuple[int, int]) -> dict[str, Any]:
    """All checks of a pair; each says `ok`, or what went wrong."""
    begin, torch_rng = time.perf_counter(), torch.Generator().manual_seed(0)
    above, below = built(teacher, size).requires_grad_(False), built(student, size)
    images = torch.randn(2, 3, *size, generator=torch_rng)
    ours, theirs = find_stages(below, images), find_stages(above, images)
    assert ours is not None
    assert theirs is not None
    observed, learner = Observed(above, theirs.blocks), Observed(below, ours.blocks)
    with torch.no_grad():
        outputs = learner(images), observed(images)
    pair = Pair(*outputs, observed, images, TrainingImages(None, 2), True, stages=(ours, theirs))
    options = LossOptions(feature_loss="scalekd", task_weight=0.5, logit_weight=0.5)
    loss = make_distillation(options, pair, seed=0)
    found = {
        "teacher_stages": described(theirs),
        "student_stages": described(ours),
        "notes": list(loss.feature.notes),
        "forward": passed(lambda: forward(loss, learner, pair, images)),
        "backward": passed(lambda: backward(loss, learner, pair, images)),
        "file": passed(lambda: file(below, student, size)),
    }
    macs = loss_macs(make_distillation(options, pair, seed=0), pair, 2)["main"]
    bill = macs / count_macs(above, input_spec(above, {"img_size": size}))
    return {**found, "bill": round(bill, 1), "seconds": round(time.perf_counter() - begin, 1)}


def forward(loss: Distillation, learner: Observed, pair: Pair, images: torch.Tensor) -> None:
    labels = torch.arange(len(images))
    parts = loss(learner(images), pair.teacher, Target(labels, labels, 0.0))
    assert set(parts) == {"loss", "task", "logit", "feature"}, f"only {', '.join(parts)}"
    assert all(value.isfinite() for value in parts.values()), "the loss is not finite"
    assert loss.feature.tail is not None, loss.feature.notes[0]


def backward(loss: Distillation, learner: Observed, pair: Pair, images: torch.Tensor) -> None:
    teacher = pair.observed_teacher.model
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    labels = torch.arange(len(images))
    learner.model.train()
    loss(learner(images), pair.teacher, Target(labels, labels, 0.0))["feature"].backward()
    learner.model.eval()
    first = next(p for p in learner.model.parameters() if p.requires_grad)
    for what, parameter in (("the student's first layer", first), *loss.named_parameters()):
        assert parameter.grad is not None, f"no gradient reaches {what}"
        assert parameter.grad.isfinite().all(), f"the gradient of {what} is not finite"
    assert first.grad is not None
    assert first.grad.abs().sum() > 0, "the gradient of the student's first layer is 0"
    after = teacher.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()), "the teacher has changed"


def file(model: nn.Module, built_by: Model, size: tuple[int, int]) -> None:
    name, args = built_by[0], arguments(built_by, size)
    spec = input_spec(model, {"img_size": size})
    card = Card(
        architecture=Architecture(source="timm", name=name, args=dict(args)),
        widths={},
        classes=[str(i) for i in range(NUM_CLASSES)],
        input=spec,
    )
    images = torch.randn(2, 3, *size)
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        save_model(Path(temporary), model, card)
        plain = timm.create_model(name, **args).eval()
        plain.load_state_dict(load_file(Path(temporary) / WEIGHTS), strict=True)
        assert torch.equal(plain(images), model(images)), "it computes something else"


def passed(run: Callable[[], None]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return "ok"


def described(stages: Stages) -> list[str]:
    return [
        f"{stage.block}: {stage.layout.channels} x {stage.layout.height} x {stage.layout.width}"
        for stage in (stages.third, stages.fourth)
    ]


def summary(record: Mapping[str, Any]) -> str:
    bad = [f"{check}: {record[check]}" for check in CHECKS if record[check] != "ok"]
    return "; ".join(bad) or f"ok, {record['seconds']:.1f} s"


def page(done: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/pairs.md."""
    good = sum(all(record[check] == "ok" for check in CHECKS) for record in done.values())
    lines = [
        "# Teachers and students that go together",
        "",
        "Written by `make pairs-table` (`benchmarks/pairs.py`); do not edit.",
        "",
        "## Tested pairs",
        "",
        f"{good} of {len(done)} pairs pass. Tiny variants of timm's models with random weights on images of",
        f"{SIZE} x {SIZE}, and some of {WIDE[0]} x {WIDE[1]}; no stage, width, grid or head is set by hand.",
        "✓: the loss is finite, gradients reach the student's first layer and every projector through the",
        "teacher's frozen tail, the teacher's bytes stay as they are, and the delivered file loads strictly",
        "into `timm.create_model` and computes the same.",
        "",
        "| student \\ teacher | " + " | ".join(TEACHERS) + " |",
        "|---|" + ":-:|" * len(TEACHERS),
    ]
    problems = {name: [f"{name}, {c}: {r[c]}" for c in CHECKS if r[c] != "ok"] for name, r in done.items()}
    marks = {name: "✗" if bad else "✓" for name, bad in problems.items()}
    for student in STUDENTS:
        cells = [marks[f"{teacher} -> {student}"] for teacher in TEACHERS]
        lines.append(f"| {student} | {' | '.join(cells)} |")
    wide = [f"{teacher} -> {student}" for teacher, student in ON_WIDE_IMAGES]
    lines += ["", f"On images of {WIDE[0]} x {WIDE[1]}:"]
    lines[-1] += f" {', '.join(f'{name} {marks[name + on_wide()]}' for name in wide)}."
    bad = [problem for problems_of in problems.values() for problem in problems_of]
    lines += ["", *(f"- {problem}" for problem in bad)] if bad else []
    lines += ["", "What is compared, as it was read from each model:", ""]
    lines += ["| | timm | stage 3 | stage 4 |", "|---|---|---|---|"]
    for kind, models, key in (
        ("teacher", TEACHERS, "teacher_stages"),
        ("student", STUDENTS, "student_stages"),
    ):
        for label, (name, _) in models.items():
            record = next(r for pair, r in done.items() if label == pair.split(" -> ")[kind == "student"])
            lines.append(f"| {kind} {label} | `{name}` | {' | '.join(record[key])} |")
    return "\n".join([*lines, "", *NOT_TAKEN, "", *published()]) + "\n"


def published() -> list[str]:
    """The 17 configurations of the authors beside what is read from the models, built without memory."""
    lines = [
        "## The published pairs",
        "",
        "What the authors set by hand in each of their 17 configurations (channels of the student's",
        "maps and the teacher's states, grid of the queries, grid of the student's maps, heads; of stage",
        "3 / stage 4), and what is read from timm's models here. Heads are the teacher's own here; the",
        "attention's scale is 5, the weights are .08 and .06 times 49 / positions of stage 4, and the norm",
        "of the student's maps in the projectors is a BatchNorm.",
        "",
        "| pair | | student | teacher | queries | maps | heads | scale | weights | norm |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for pair in PAIRS:
        teacher = stages_of(pair.teacher, pair.teacher_args, pair)
        student = stages_of(pair.student, pair.student_args, pair)
        ours = [stage.layout for stage in (student.third, student.fourth)]
        theirs = [stage.layout for stage in (teacher.third, teacher.fourth)]
        heads = (teacher.third.num_heads, teacher.fourth.num_heads)
        share = 49 / theirs[1].num_positions
        by_hand = [
            *map(
                slashed,
                (pair.student_channels, pair.teacher_channels, pair.grids, pair.positions, pair.num_heads),
            ),
            f"{pair.softmax_scale:g}",
            slashed(pair.weights) + (", stage 4 .08 / 0" if pair.is_pilot else ""),
            "LayerNorm" if pair.layer_norm else "BatchNorm",
        ]
        read = [
            slashed([layout.channels for layout in ours]),
            slashed([layout.channels for layout in theirs]),
            slashed([layout.height for layout in theirs]),
            slashed([layout.height for layout in ours]),
            slashed(heads),
            "5",
            slashed([round(0.08 * share, 4), round(0.06 * share, 4)]),
            "BatchNorm",
        ]
        lines.append(f"| {pair.name} | theirs | {' | '.join(by_hand)} |")
        lines.append(f"| | read | {' | '.join(read)} |")
    return [
        *lines,
        "",
        "Stages, channels and grids are the same in all 17. What differs is a choice: heads, the scale",
        "where it is not 5, the weights where the teacher has more than 7 x 7 positions, the norm of one",
        "pair, and the pilots of Swin-S, which have no divergence of logits, and one view at stage 4.",
        "(Their files also ask for queries of its own there, which the code makes and does not read: it is",
        "always given the tail's outputs.) Published scales are 1 where the student has the teacher's grids",
        "and is no CNN with BatchNorm, else 5, in all pairs but BEiT-L with ResNet-50; ours is 5.",
        "",
        "As options of `compress --path scalekd`, where weights are those of 7 x 7 positions:",
        "",
        *(f"- {pair.name}: `{as_flags(pair)}`" for pair in PAIRS),
        "",
        "Wrong in the published files:",
        "",
        *(f"- {pair.name}: {pair.trouble}." for pair in PAIRS if pair.trouble),
    ]


def as_flags(pair: PublishedPair) -> str:
    """The published configuration as words of a command."""
    words = []
    for name, value in pair.options().items():
        assert isinstance(value, Mapping | float)
        values = [f"{k}={v:.4g}" for k, v in value.items()] if isinstance(value, Mapping) else [f"{value:g}"]
        words += [f"--{name.replace('_', '-')}", *values]
    return " ".join(words)


def stages_of(name: str, args: Mapping[str, Any], pair: PublishedPair) -> Stages:
    with torch.device("meta"):
        # The authors' Mixer-B/14 has no name in timm.
        model = (
            timm.create_model(name, **args) if name else MlpMixer(patch_size=14, num_blocks=12, embed_dim=768)
        )
        found = find_stages(model.eval(), torch.empty(1, 3, pair.image_size, pair.image_size))
    assert found is not None
    return found


def slashed(numbers: Sequence[float]) -> str:
    return " / ".join(f"{number:g}" for number in numbers)


if __name__ == "__main__":
    main()
