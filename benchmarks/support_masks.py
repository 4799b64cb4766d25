"""Which models for masks can be cut, and what still works then: a section of docs/supported.md.

    python benchmarks/support_masks.py       # resumes where it stopped
    python benchmarks/support_masks.py --only smp --again

As support.py does it for classifiers: random weights, a random ranking, and for each keep ratio `exact`,
`backward` and `reload`; then, in a second round and of the smallest slice alone, since it takes longest,
`onnx`: exported for images of any size, and run by onnxruntime on two that are multiples of 32. Writes
benchmarks/results/support-masks.json and its section of docs/supported.md; needs segmentation-models-pytorch.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from record import RESULTS, commit
from stepwell.config.options import DataOptions
from stepwell.measure.size import count_macs, num_params
from stepwell.models.card import Card
from stepwell.models.export import export_onnx, sizes_taken
from stepwell.models.onnx_graph import write_onnx
from stepwell.models.reached import with_logits_alone
from stepwell.models.teacher import Teacher, named_segmenter, teacher_from_module
from stepwell.pruning.skeleton import build_skeleton, fill, leading_units
from stepwell.run.atomic import write_atomically
from stepwell.setting.prepare import groups_of, with_parts
from stepwell.tasks.outputs import as_logits
from support import MASKS, NUM_CLASSES, PAGE, Checked, awake, backward, exact, one_line, passed, reload

RATIOS = (0.1, 0.3, 0.7)
CHECKS = ("exact", "backward", "reload", "onnx")
FILE = RESULTS / "support-masks.json"
SIZE = (64, 96)
RESNET = {"encoder_name": "resnet18"}
TORCHVISION = (
    "deeplabv3_resnet50",
    "deeplabv3_mobilenet_v3_large",
    "fcn_resnet50",
    "lraspp_mobilenet_v3_large",
)
SMP: dict[str, dict[str, Any]] = {
    "Unet/resnet18": RESNET,
    "Unet/tu-tf_efficientnet_lite0": {"encoder_name": "tu-tf_efficientnet_lite0"},
    "UnetPlusPlus/resnet18": RESNET,
    "DeepLabV3Plus/resnet18": RESNET,
    "FPN/resnet18": RESNET,
    "Linknet/resnet18": RESNET,
    "PSPNet/resnet18": RESNET,
    "PAN/resnet18": RESNET,
    "UPerNet/resnet18": RESNET,
    "Segformer/resnet18": RESNET,
}
TRANSFORMERS = ("Segformer", "UperNet")
LARGER = {"smp/PAN/resnet18": (128, 192)}
"""Of a smaller image its pyramid has nothing left."""


def main() -> None:
    """Check all models that are not checked yet, then write the section."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="a regular expression of names")
    parser.add_argument("--again", action="store_true", help="also those that are checked")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    done: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    names = [name for name in models() if re.search(options.only, name)]
    for name in names:
        if options.again or name not in done:
            kept(done, name, {"commit": commit(), **check(name)})
    for name in names:
        if not done[name].keys() & {"onnx", "error"}:
            kept(done, name, {**done[name], "onnx": passed(lambda name=name: any_size(name))})
    classes = PAGE.read_text().partition(MASKS)[0].rstrip("\n")
    write_atomically(PAGE, f"{classes}\n\n{section(done)}")


def kept(done: dict[str, Any], name: str, record: dict[str, Any]) -> None:
    """Write down what was found of a model."""
    done[name] = record
    write_atomically(FILE, json.dumps(dict(sorted(done.items())), indent=1) + "\n")
    found = [record[key] for key in ("error", "onnx") if key in record]
    found += [f"{one}: {r[one]}" for r in record["ratios"].values() for one in CHECKS[:3] if r[one] != "ok"]
    print(f"{name}: {'; '.join(found)}", flush=True)


def models() -> list[str]:
    """All names, as the table has them."""
    names = {"torchvision": TORCHVISION, "smp": SMP, "transformers": TRANSFORMERS}
    return [f"{library}/{name}" for library, of in names.items() for name in of]


def check(name: str) -> dict[str, Any]:
    """All checks of one model at all ratios; what fails says why."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            checked = CheckedMasks.of_masks(name)
        whole = [
            line.split("stays whole: ")[1] for line in said.getvalue().splitlines() if "stays whole" in line
        ]
        return {**checked.record(), "stays_whole": whole}
    except Exception as error:
        return {"error": one_line(error), "ratios": {}}


class CheckedMasks(Checked):
    """One model that tells the class of each pixel, with a random ranking of its units."""

    @classmethod
    def of_masks(cls, name: str) -> CheckedMasks:
        """A model by its name in the table."""
        torch.manual_seed(0)
        teacher = built(name)
        awake(teacher.model)
        spec = replace(teacher.spec, size=LARGER.get(name, SIZE))
        # As compress does: what never reaches the logits (stages behind PSPNet's) is no part of a student.
        unused = with_logits_alone(teacher.model, spec)
        architecture = teacher.architecture.model_copy(update={"unused": unused})
        teacher = with_parts(replace(teacher, spec=spec, architecture=architecture))
        groups = groups_of(teacher.model, spec, True, None, DataOptions())
        return cls(teacher, teacher.model, groups, RATIOS)

    def record(self) -> dict[str, Any]:
        """Sizes, and the checks of every candidate."""
        return {
            "num_params": num_params(self.model),
            "macs": count_macs(self.model, self.spec),
            "input": list(self.spec.size),
            "taken_apart": len(self.architecture.parts),
            "ratios": {f"{c.keep_ratio:g}": self.candidate(c.widths) for c in self.candidates},
        }

    def checks(self, small: nn.Module, card: Card, folder: Path) -> dict[str, Callable[[], object]]:
        """What is tried with a slice; each raises what is wrong."""
        return {
            "exact": lambda: exact(self.sorted_model, self.groups, card.widths, self.images),
            "backward": lambda: backward(small, self.images),
            "reload": lambda: reload(small, card, folder, self.images, self.original),
        }

    def smallest(self) -> nn.Module:
        """The smallest slice."""
        widths = min(self.candidates, key=lambda c: c.keep_ratio).widths
        skeleton = build_skeleton(self.model, self.groups, widths)
        return fill(skeleton, leading_units(self.weights, skeleton, self.groups, widths)).eval()


def any_size(name: str) -> None:
    """An ONNX file of the smallest slice, for any height and width or multiples of 32, run on two such."""
    with contextlib.redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        checked, file = CheckedMasks.of_masks(name), Path(folder) / "model.onnx"
        small, spec = checked.smallest(), checked.spec
        export_onnx(small, spec, file, checked.images, tolerance=1e-5)
        if not sizes_taken(file):
            write_onnx(small, spec, file, any_size=True)  # raises the reason, if the exporter knows it
            raise AssertionError(f"for {spec.size[0]} x {spec.size[1]} pixels alone")


def built(name: str) -> Teacher:
    """The model with random weights."""
    library, _, kind = name.partition("/")
    if library == "transformers":
        teacher = teacher_from_module(from_transformers(kind), None)
        model = as_logits(teacher.model, "maps").eval()
        architecture = teacher.architecture.model_copy(update={"outputs": "maps"})
        return replace(teacher, model=model, architecture=architecture)
    args = SMP[kind] if library == "smp" else {}
    return named_segmenter(f"{library}:{kind.partition('/')[0]}", {"num_classes": NUM_CLASSES, **args})


def from_transformers(kind: str) -> nn.Module:
    """A small model of Hugging Face's transformers."""
    import transformers

    if kind == "Segformer":
        sizes = {"depths": [1] * 4, "hidden_sizes": [16, 32, 64, 128], "num_attention_heads": [1, 2, 4, 8]}
        config = transformers.SegformerConfig(decoder_hidden_size=64, num_labels=NUM_CLASSES, **sizes)
        return transformers.SegformerForSemanticSegmentation(config)
    sizes = {
        "embedding_size": 32,
        "hidden_sizes": [32, 64, 96, 128],
        "depths": [1] * 4,
        "layer_type": "basic",
    }
    backbone = transformers.ResNetConfig(out_features=[f"stage{i}" for i in range(1, 5)], **sizes)
    heads = {"hidden_size": 64, "use_auxiliary_head": False}
    config = transformers.UperNetConfig(backbone_config=backbone, num_labels=NUM_CLASSES, **heads)
    return transformers.UperNetForSemanticSegmentation(config)


def section(done: Mapping[str, Any]) -> str:
    """What docs/supported.md says of masks."""
    ratios = ", ".join(f"{r:g}" for r in RATIOS)
    lines = [
        MASKS,
        "",
        "Written by `benchmarks/support_masks.py`; do not edit. Models for [masks](guide/segmentation.md),",
        f"encoder and decoder together, at keep ratios {ratios} and 64 x 96 pixels (PAN: 128 x 192).",
        "",
        f"`onnx`: at {RATIOS[0]:g}, exported for images of any height and width, and run by onnxruntime on",
        "two sizes that are multiples of 32; whether it takes odd ones too, each export finds out and says.",
        "*Apart*: convolutions of a concatenation that were taken apart, so that each part is cut by itself.",
        "Those of transformers are small ones, that of UperNet over a ResNet.",
        "",
        "| model | " + " | ".join(CHECKS) + " | apart | params at 0.1 | MACs at 0.1 |",
        "|---|" + "---|" * len(CHECKS) + "---:|---:|---:|",
    ]
    notes: list[str] = []
    whole: list[str] = []
    for name in [name for name in models() if name in done]:
        record = done[name]
        if "error" in record:
            lines.append(f"| {name} | refused |" + " |" * (len(CHECKS) + 2))
            notes.append(f"- {name}: {record['error']}")
            continue
        row, told = row_of(name, record)
        lines.append(row)
        notes += told
        whole += [f"- {name}: {layer}" for layer in record["stays_whole"]]
    if any("onnx" not in done[name] for name in done if "error" not in done[name]):
        lines += ["", "A `-` under `onnx`: not tried yet."]
    for title, those in (("What does not pass:", notes), ("What stays whole:", whole)):
        lines += ["", title, "", *those] if those else []
    return "\n".join(lines) + "\n"


def row_of(name: str, record: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The row of a model that can be cut, and what does not pass."""
    cells, notes = [], []
    for one in CHECKS[:3]:
        results = [r[one] for r in record["ratios"].values()]
        cells.append("✓" if set(results) == {"ok"} else f"{results.count('ok')} of {len(results)}")
        notes += [f"- {name}, {one}: {reason}" for reason in sorted(set(results) - {"ok"})]
    onnx = record.get("onnx", "-")
    cells.append({"ok": "✓", "-": "-"}.get(onnx, "no"))
    notes += [f"- {name}, onnx: {onnx}"] if cells[-1] == "no" else []
    cells.append(str(record["taken_apart"]))
    least = record["ratios"][f"{RATIOS[0]:g}"]
    cells += [f"{100 * least[k] / record[k]:.1f} %" for k in ("num_params", "macs")]
    return f"| {name} | {' | '.join(cells)} |", notes


if __name__ == "__main__":
    main()
