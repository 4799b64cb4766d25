"""Which models can be cut, at which ratios, and what still works then: docs/supported.md.

    make support-table                       # resumes where it stopped; --jobs 2 takes two processes
    python benchmarks/support.py --only swin

Every model has random weights and a random ranking. For each keep ratio:

    exact      the slice computes what the model computes with its other units masked (largest logit, 1e-4)
    backward   every parameter that is left gets a finite gradient
    reload     saved, loaded by stepwell, equal to the bit
    onnx       exported with a dynamic batch, run by onnxruntime, agrees to 1e-5
    export     torch.export with a dynamic batch, agrees to 1e-5
    compile    torch.compile(fullgraph=True, backend="aot_eager"), one graph, agrees to 1e-5

Writes benchmarks/results/support.json and docs/supported.md. What channels of the residual stream add to
both is support_channels.py's, the section on masks support_masks.py's.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from record import RESULTS, commit
from stepwell.config.options import DataOptions
from stepwell.config.path_options import GridOptions
from stepwell.measure.size import count_macs, num_params
from stepwell.models.card import Card, load, save_model
from stepwell.models.export import export_onnx, export_program
from stepwell.models.input import with_image_size
from stepwell.models.teacher import Teacher, teacher_from_module
from stepwell.pruning.prove import difference
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units, sort_units
from stepwell.pruning.units import Group, tensors_of
from stepwell.run.atomic import write_atomically
from stepwell.setting.prepare import groups_of
from stepwell.stages.grid import make_grid
from stepwell.tasks.outputs import is_dense

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
CHECKS = ("exact", "backward", "reload", "onnx", "export", "compile")
CHANNEL_RATIOS = (0.1, 0.3, 0.7)
COLUMNS = (*CHECKS, "--cut all", "params at 0.1", "MACs at 0.1", "MACs at 0.1, --cut all")
PAGE = Path(__file__).parent.parent / "docs" / "supported.md"
FILE = RESULTS / "support.json"
NUM_CLASSES = 10
MASKS = "## Masks"
"""From this line on the page is support_masks.py's."""

# Small inputs: what can be cut does not depend on them.
SMALL = {"img_size": 64}
TIMM: dict[str, dict[str, dict[str, Any]]] = {
    "ViT": {
        "vit_tiny_patch16_224": SMALL,
        "vit_small_patch16_224": SMALL,
        "vit_base_patch16_224": SMALL,
        "vit_base_patch16_gap_224": SMALL,
        "vit_small_patch14_reg4_dinov2": {"img_size": 56},
        "vit_base_patch16_siglip_gap_224": SMALL,
        "vit_little_patch16_reg4_gap_256": SMALL,
        "vit_wee_patch16_reg1_gap_256": SMALL,
    },
    "DeiT": {
        "deit_tiny_patch16_224": SMALL,
        "deit_small_distilled_patch16_224": SMALL,
        "deit3_small_patch16_224": SMALL,
    },
    "BEiT, EVA": {
        "beit_base_patch16_224": SMALL,
        "beitv2_base_patch16_224": SMALL,
        "eva02_tiny_patch14_224": {"img_size": 56},
        "eva02_base_patch14_224": {"img_size": 56},
        "vit_base_patch16_rope_reg1_gap_256": SMALL,
    },
    "CaiT, XCiT": {"cait_xxs24_224": SMALL, "xcit_nano_12_p16_224": {}},
    "Swin": {
        "swin_tiny_patch4_window7_224": SMALL,
        "swin_small_patch4_window7_224": SMALL,
        "swin_s3_tiny_224": SMALL,
        "swinv2_tiny_window8_256": SMALL,
        "swinv2_cr_tiny_224": SMALL,
    },
    "ConvNeXt": {"convnext_tiny": {}, "convnext_nano": {}, "convnextv2_nano": {}, "convnext_atto": {}},
    "ResNet": {
        "resnet18": {},
        "resnet50": {},
        "resnet50d": {},
        "seresnet50": {},
        "ecaresnet26t": {},
        "resnext50_32x4d": {},
        "wide_resnet50_2": {},
    },
    "RegNet": {"regnetx_002": {}, "regnety_004": {}, "regnety_016": {}},
    "EfficientNet, MobileNet": {
        "mobilenetv2_100": {},
        "mobilenetv3_large_100": {},
        "mobilenetv4_conv_small": {},
        "efficientnet_b0": {},
        "tf_efficientnetv2_b0": {},
        "mnasnet_100": {},
    },
    "CIFAR": {
        "cifar_resnet20": {},
        "cifar_resnet56": {},
        "cifar_wrn_16_2": {},
        "cifar_wrn_40_2": {},
        "cifar_vgg8": {},
        "cifar_vgg13": {},
    },
    "Others, by the dependency graph": {
        "resnetv2_50": {},
        "densenet121": {},
        "inception_v3": {},
        "repvit_m1": {},
        "fastvit_t8": {},
        "levit_128s": SMALL,
        "pvt_v2_b0": {},
        "tiny_vit_5m_224": {},
    },
}
TORCHVISION = (
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "regnet_y_400mf",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "vit_b_16",
    "swin_t",
    "swin_v2_t",
)
TRANSFORMERS = ("ViT", "DeiT", "Swin", "Swinv2", "Beit", "Dinov2", "ConvNext", "ConvNextV2", "ResNet")

CONVOLUTIONAL = ("timm", "torchvision/r", "torchvision/m")
"""Where these start without patches, they take a smaller image as they are."""


def main() -> None:
    """Check all models that are not checked yet, then write the page."""
    options = options_of(__doc__)
    done = recorded()
    todo = [n for n in models() if re.search(options.only, n) and (options.again or n not in done)]
    for name, found in checked(check, todo, options.jobs):
        done[name] = {"family": models()[name], "commit": commit(), **found}
        write(done)
        print(f"{name}: {summary(done[name])}", flush=True)
    write(done)


def options_of(description: str | None) -> argparse.Namespace:
    """Of the command line, for the table's own script and that of channels."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="a regular expression of names")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="also those that are checked")
    return parser.parse_args()


def recorded() -> dict[str, Any]:
    """What is checked already, by name."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def checked(check: Callable[[str], Any], names: Collection[str], jobs: int) -> Iterator[tuple[str, Any]]:
    """Names and what `check` says of them, each in a process of its own, as they are done."""
    with ProcessPoolExecutor(jobs, max_tasks_per_child=1) as pool:
        waiting = {pool.submit(check, name): name for name in names}
        for number, future in enumerate(as_completed(waiting), 1):
            print(f"{number}/{len(names)} ", end="")
            yield waiting[future], future.result()


def write(done: Mapping[str, Any]) -> None:
    """The file, and the page down to its section on masks."""
    write_atomically(FILE, json.dumps(dict(sorted(done.items())), indent=1) + "\n")
    _, masks, its = PAGE.read_text().partition(MASKS)
    write_atomically(PAGE, page(done) + ("\n" + masks + its if masks else ""))


def models() -> dict[str, str]:
    """Family by name."""
    return {
        **{f"timm/{name}": family for family, members in TIMM.items() for name in members},
        **{f"torchvision/{name}": "torchvision" for name in TORCHVISION},
        **{f"transformers/{name}": "transformers" for name in TRANSFORMERS},
    }


def build(name: str) -> nn.Module:
    """The model with random weights and 10 classes; none of its numbers is 0 or 1 any more."""
    torch.manual_seed(0)
    library, _, plain = name.partition("/")
    match library:
        case "timm":
            args = next(members[plain] for members in TIMM.values() if plain in members)
            model = timm.create_model(plain, num_classes=10, **args)
        case "torchvision":
            model = torchvision.models.get_model(plain, weights=None, num_classes=10)
        case _:
            model = from_transformers(plain)
    return awake(model)


def awake(model: nn.Module) -> nn.Module:
    """In eval mode; none of its scales and shifts is 0 or 1 any more."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def from_transformers(kind: str) -> nn.Module:
    """A small model of Hugging Face's transformers."""
    import transformers

    common = {"image_size": 64, "num_labels": 10}
    match kind:
        case "Swin" | "Swinv2":
            # The smallest stage is as large as a window: it does not run where it is smaller.
            sizes = {**common, "image_size": 128, "window_size": 4}
            special = {"embed_dim": 48, "depths": [2, 2, 4, 2], **sizes}
        case "ConvNext" | "ConvNextV2":
            special = {"hidden_sizes": [40, 80, 160, 320], "depths": [2, 2, 6, 2], **common}
        case "ResNet":
            special = {"num_labels": 10}
        case _:
            special = {"hidden_size": 192, "num_attention_heads": 6, "num_hidden_layers": 6, **common}
    config = getattr(transformers, f"{kind}Config")(**special)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


def check(name: str) -> dict[str, Any]:
    """All checks of one model at all ratios; what fails says why."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        return {"ratios": {}, **Checked.of_classes(name).record()}
    except Exception as error:
        return {"error": one_line(error), "ratios": {}}


class Checked:
    """One model with a random ranking of its units."""

    def __init__(
        self, teacher: Teacher, original: nn.Module, groups: list[Any], ratios: Sequence[float] = RATIOS
    ) -> None:
        self.original, self.groups = original, groups
        self.model, self.spec, self.architecture = teacher.model, teacher.spec, teacher.architecture
        rng = random.Random(0)
        order = {g.name: rng.sample(range(g.num_units), g.num_units) for g in groups}
        scores = {g.name: [rng.random() for _ in range(g.num_units)] for g in groups}
        self.candidates = make_grid(groups, scores, ratios, GridOptions())
        self.weights = sort_units(tensors_of(self.model), groups, order)
        whole = build_skeleton(self.model, groups, {g.name: g.num_units for g in groups})
        self.sorted_model = fill(whole, self.weights).eval()
        self.images = torch.randn(4, self.spec.channels, *self.spec.size)

    @classmethod
    def of_classes(cls, name: str) -> Checked:
        """A classifier by its name in the table."""
        return cls(*classifier(name))

    def record(self) -> dict[str, Any]:
        """Sizes, and the checks of every candidate."""
        return {
            "num_params": num_params(self.model),
            "macs": count_macs(self.model, self.spec),
            "input": list(self.spec.size),
            "ratios": {f"{c.keep_ratio:g}": self.candidate(c.widths) for c in self.candidates},
        }

    def candidate(self, widths: Mapping[str, int]) -> dict[str, Any]:
        """Sizes of one slice, and what works with it."""
        skeleton = build_skeleton(self.model, self.groups, widths)
        small = fill(skeleton, leading_units(self.weights, skeleton, self.groups, widths)).eval()
        card = Card(
            architecture=self.architecture,
            widths=dict(widths),
            classes=[str(i) for i in range(NUM_CLASSES)],
            input=self.spec,
            task="segmentation" if is_dense(small) else "classification",
        )
        with tempfile.TemporaryDirectory() as temporary:
            checks = self.checks(small, card, Path(temporary))
            results = {check_name: passed(run) for check_name, run in checks.items()}
        return {"num_params": num_params(small), "macs": count_macs(small, self.spec), **results}

    def checks(self, small: nn.Module, card: Card, folder: Path) -> dict[str, Callable[[], object]]:
        """What is tried with a slice; each raises what is wrong."""
        spec, images = self.spec, self.images
        return {
            "exact": lambda: exact(self.sorted_model, self.groups, card.widths, images),
            "backward": lambda: backward(small, images),
            "reload": lambda: reload(small, card, folder, images, self.original),
            "onnx": lambda: export_onnx(small, spec, folder / "model.onnx", images, tolerance=1e-5),
            "export": lambda: export_program(small, spec, folder / "model.pt2", images),
            "compile": lambda: compiled(small, images),
        }


def classifier(name: str) -> tuple[Teacher, nn.Module, list[Group]]:
    """A model by its name in the table, as it was built too, and what may be cut inside of its blocks."""
    original = build(name)
    teacher = teacher_from_module(original, None)
    if not hasattr(teacher.model, "patch_embed") and name.startswith(CONVOLUTIONAL):
        small = with_image_size(teacher.spec, teacher.model, min(64, teacher.spec.size[0]))
        teacher = replace(teacher, spec=small)
    return teacher, original, groups_of(teacher.model, teacher.spec, False, None, DataOptions())


def passed(run: Callable[[], object]) -> str:
    """`ok`, or what went wrong."""
    try:
        run()
    except Exception as error:
        return one_line(error)
    return "ok"


def one_line(error: Exception) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # some come in colours
    return f"{type(error).__name__}: {' '.join(plain.split())[:160]}"


def exact(model: nn.Module, groups: list[Any], widths: Mapping[str, int], images: torch.Tensor) -> None:
    """Where a norm lies over the units, a mask is not a cut: those groups stay whole for this check."""
    maskable = [group for group in groups if not group.norms]
    off = difference(model, maskable, {g.name: widths[g.name] for g in maskable}, images)
    assert off <= 1e-4, f"logits differ by {off:.1e} of the largest"


def backward(model: nn.Module, images: torch.Tensor) -> None:
    model.train()
    model(images).square().sum().backward()
    model.eval()
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    assert not bad, f"{bad[0]} has no finite gradient"
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.zero_grad()


def reload(model: nn.Module, card: Card, folder: Path, images: torch.Tensor, original: nn.Module) -> None:
    save_model(folder, model, card)
    factory = (lambda: original) if card.architecture.source == "factory" else None
    with torch.no_grad():
        assert torch.equal(load(folder, factory=factory)(images), model(images)), (
            "another result after loading"
        )


def compiled(model: nn.Module, images: torch.Tensor) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
        off = (found - model(images)).abs().max() / found.abs().max()
    assert off <= 1e-5, f"logits differ by {off:.1e} of the largest"


def summary(record: dict[str, Any]) -> str:
    """One line for the log."""
    if "error" in record:
        return record["error"]
    bad = {c: r[c] for r in record["ratios"].values() for c in CHECKS if r[c] != "ok"}
    return "all ok" if not bad else "; ".join(f"{check}: {text}" for check, text in bad.items())


def page(done: Mapping[str, Any]) -> str:
    """docs/supported.md."""
    lines = [
        "# What can be compressed",
        "",
        "Written by `make support-table` (`benchmarks/support.py`); do not edit. Random weights, a random",
        f"ranking, keep ratios {', '.join(f'{r:g}' for r in RATIOS)}; a check that does not pass at all of",
        "them says at how many.",
        "",
        "`exact`: the slice equals the masked model. `onnx`: onnxruntime agrees to 1e-5. `compile`: one",
        "graph, `torch.compile(fullgraph=True)`. *At 0.1*: what is left of parameters and of MACs when a",
        "tenth of the units is kept; what is never cut (stem, classifier, residual width) is part of it.",
        "",
        "`--cut all`: channels of the residual stream are cut too, and `exact`, `backward`, `reload` and",
        f"`onnx` pass at {', '.join(f'{r:g}' for r in CHANNEL_RATIOS)}; `–`: they stay whole",
        "([which families have them](guide/width.md)); empty: not tried yet.",
        "",
        f"| model | {' | '.join(COLUMNS)} |",
        "|---|" + "---|" * (len(CHECKS) + 1) + "---:|---:|---:|",
    ]
    notes: list[str] = []
    for family in dict.fromkeys(models().values()):
        members = [name for name, its in models().items() if its == family and name in done]
        if members:
            lines.append(f"| **{family}** |" + " |" * len(COLUMNS))
        for name in members:
            row, told = row_of(name, done[name])
            lines.append(row)
            notes += told
    if notes:
        lines += ["", "What does not pass:", "", *notes]
    return "\n".join(lines) + "\n"


def row_of(name: str, record: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The row of a model, and what does not pass."""
    if "error" in record:
        return f"| {name} | refused |" + " |" * (len(COLUMNS) - 1), [f"- {name}: {record['error']}"]
    ratios = record["ratios"].values()
    cells = [count([r[one] == "ok" for r in ratios]) for one in CHECKS]
    notes = [f"- {name}, {one}: {reason}" for one in CHECKS for reason in sorted({r[one] for r in ratios})]
    least = record["ratios"]["0.1"]
    shares = [f"{100 * least[k] / record[k]:.1f} %" for k in ("num_params", "macs")]
    cell, share, told = channel_cells(name, record)
    row = f"| {name} | {' | '.join([*cells, cell, *shares, share])} |"
    return row, [note for note in notes + told if not note.endswith(": ok")]


def channel_cells(name: str, record: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    """Whether `--cut all` works with a model, what it leaves of the MACs, and what does not pass."""
    channels = record.get("channels", {})
    if not channels:
        return "" if channels is not None else "–", "", []
    if "error" in channels:
        return "refused", "", [f"- {name}, --cut all: {channels['error']}"]
    ratios = channels["ratios"]
    tried = [checks_of(candidate) for candidate in ratios.values()]
    told = sorted({pair for checks in tried for pair in checks.items()})
    return (
        count([set(checks.values()) == {"ok"} for checks in tried]),
        f"{100 * ratios['0.1']['macs'] / record['macs']:.1f} %",
        [f"- {name}, --cut all, {one}: {reason}" for one, reason in told],
    )


def checks_of(candidate: Mapping[str, Any]) -> dict[str, str]:
    """What was tried with one candidate, without its sizes."""
    return {name: found for name, found in candidate.items() if isinstance(found, str)}


def count(passed: Collection[bool]) -> str:
    """A check mark, or how many of them passed."""
    return "✓" if all(passed) else f"{sum(passed)} of {len(passed)}"


if __name__ == "__main__":
    main()
