"""Tiny models and images for the tests, and gates that are put in from outside.

Nothing here uses the package's own idea of a unit: heads and neurons are named as timm names them, so that
a test which compares with these helpers does not compare the code with itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stepwell.config.commands import CompressConfig
from stepwell.config.options import LossOptions
from stepwell.data.batches import Batch, EvalBatches, TrainBatches
from stepwell.data.images import FolderReader, ImageSet
from stepwell.data.spec import InputSpec
from stepwell.data.splits import Data
from stepwell.losses.choose import Pair
from stepwell.losses.distillation import Distillation, make_distillation
from stepwell.losses.observe import Observed
from stepwell.losses.output import Output, Target, TrainingImages
from stepwell.models.card import Architecture
from stepwell.models.student import OtherStudent
from stepwell.models.teacher import Teacher
from stepwell.pruning.families import find_groups
from stepwell.pruning.units import Group
from stepwell.run.run_dir import RunDir
from stepwell.setting.setting import Setting
from stepwell.training.lesson import Lesson

CPU = torch.device("cpu")
NUM_CLASSES = 5
SPEC = InputSpec((16, 16), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ARGS = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "num_classes": NUM_CLASSES,
}
VARIANTS: dict[str, dict] = {
    "plain": {},
    "layer-scale": {"init_values": 0.1},
    "small-layer-scale": {"init_values": 1e-5},
    "qk-norm": {"qk_norm": True},
    "no-class-token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 2},
    "no-qkv-bias": {"qkv_bias": False},
    "no-output-bias": {"proj_bias": False},
}
"""Arguments of timm's VisionTransformer that change which parameters there are."""


def tiny_vit(dtype: torch.dtype = torch.float32, seed: int = 0, **args) -> VisionTransformer:
    """A vision transformer whose every parameter matters: none is 0 or 1 as timm would leave it."""
    model = timm.create_model("vit_tiny_patch16_224", **{**ARGS, **args}).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
            if name.endswith("gamma"):
                parameter.mul_(1 + 0.3 * noise)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model


def random_images(num: int = 3, dtype: torch.dtype = torch.float32, seed: int = 1, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)


def random_batches(
    num_batches: int, batch_size: int, dtype: torch.dtype = torch.float32, seed: int = 2
) -> list[Batch]:
    """Random images and labels, all batches different."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(
            random_images(batch_size, dtype, seed=1000 * seed + i),
            torch.randint(NUM_CLASSES, (batch_size,), generator=generator),
            torch.arange(batch_size) + i * batch_size,
        )
        for i in range(num_batches)
    ]


def distillation(options: LossOptions) -> Distillation:
    """A loss whose parts look at no shapes when it is made, as AMD's."""
    example = Output(torch.zeros(2, 2), [torch.zeros(2, 1, 1)], torch.zeros(2, 1))
    return make_distillation(options, pair(example, example), seed=0)


def pair(student: Output, teacher: Output, **facts) -> Pair:
    """Two models of which only outputs are known."""
    values = {
        "observed_teacher": Observed(nn.Identity(), ()),
        "blank": torch.zeros(2, 3, 16, 16),
        "training_images": TrainingImages(None, 1),
    }
    return Pair(student, teacher, **{**values, **facts})


def lesson(teacher: Observed, options: LossOptions, num_losses: int = 1) -> Lesson:
    """What AMD's loss teaches one student, or several of one teacher."""
    return Lesson([teacher], [distillation(options) for _ in range(num_losses)], no_autocast())


def output(logits: Tensor, states: Sequence[Tensor]) -> Output:
    """Of a model whose classifier reads nothing of interest."""
    return Output(logits, states, logits)


def amd_loss(student: Output, teacher: Output, labels: Tensor, options: LossOptions) -> dict[str, Tensor]:
    """The loss of one batch."""
    return distillation(options)(student, teacher, Target(labels, torch.arange(len(labels)), 0.0))


class FixedEval(EvalBatches):
    """Hands out the batches it was given, in order."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._fixed = list(batches)
        self._steps = range(len(self._fixed))

    def __iter__(self) -> Iterator[Batch]:
        return (self._fixed[step] for step in self._steps)

    def truths(self, batch: Batch) -> list[Tensor]:
        return list(batch.labels)


class FixedTrain(TrainBatches):
    """Hands out the batches it was given, in order, in every epoch."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._fixed = list(batches)
        self.labels = torch.cat([batch.labels for batch in batches])
        self.spec = replace(SPEC, size=tuple(batches[0].images.shape[2:]))
        self.batch_size = len(self._fixed[0].labels)
        self.steps_per_epoch = len(self._fixed)
        self.epochs_begun: list[int] = []
        self.trainings: set[str] = set()
        self.seed, self.device = 0, batches[0].images.device

    def epoch(self, epoch: int, first_step: int = 0, training: str = "") -> Iterator[Batch]:
        self.epochs_begun.append(epoch)
        self.trainings.add(training)
        yield from self._fixed[first_step:]


@dataclass(frozen=True)
class FixedSetting(Setting):
    """A setting whose images are the given batches, for all that they are used for."""

    batches: Sequence[Batch] = ()

    @cached_property
    def train(self) -> TrainBatches:
        return FixedTrain(self.batches)

    @cached_property
    def scored(self) -> EvalBatches:
        return FixedEval(self.batches)

    @cached_property
    def selection(self) -> EvalBatches:
        return FixedEval(self.batches)


def setting(
    folder: Path,
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    groups: list[Group] | None = None,
    other_student: OtherStudent | None = None,
    **options,
) -> FixedSetting:
    """What a stage needs to run on random batches; the teacher is left as it is."""
    config = CompressConfig(**options)
    labels = tuple(torch.cat([batch.labels for batch in batches]).tolist())
    images = ImageSet(tuple(map(str, range(len(labels)))), labels, FolderReader(Path("no-images")))
    classes = tuple(map(str, range(NUM_CLASSES)))
    spec = replace(SPEC, size=tuple(batches[0].images.shape[2:]))
    architecture = Architecture(source="timm", name="vit_tiny_patch16_224", args=ARGS)
    return FixedSetting(
        config=config,
        run=RunDir.open(folder, config),
        teacher=Teacher(model, architecture, spec, classes, {}, "tiny", "digest"),
        groups=find_groups(model) if groups is None else groups,
        other_student=other_student,
        data=Data(classes, images, images, images, "random images", "", "", 0, "fingerprint"),
        classes=classes,
        device=CPU,
        batches=batches,
    )


def no_autocast() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


# --- units, as timm names them


def group_sizes(model: VisionTransformer) -> dict[str, int]:
    """How many heads and neurons each layer has."""
    sizes = {}
    for i, block in enumerate(model.blocks):
        sizes[f"blocks.{i}.attn"] = block.attn.num_heads
        sizes[f"blocks.{i}.mlp"] = block.mlp.fc1.out_features
    return sizes


def gate_name(group: str) -> str:
    return f"{group}.proj" if group.endswith("attn") else f"{group}.fc2"


@contextmanager
def gates(model: VisionTransformer, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the output of every head and neuron by its gate: one number per unit, by group."""

    def multiply(gate: Tensor):
        def hook(_module, inputs):
            by_unit = inputs[0].unflatten(-1, (len(gate), -1))
            return ((by_unit * gate[:, None]).flatten(-2), *inputs[1:])

        return hook

    with ExitStack() as stack:
        for group, gate in values.items():
            handle = model.get_submodule(gate_name(group)).register_forward_pre_hook(multiply(gate))
            stack.callback(handle.remove)
        yield


def keep_leading(
    sizes: Mapping[str, int], widths: Mapping[str, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Gates of 1 for the first units of each group and of 0 for the others."""
    return {name: (torch.arange(sizes[name]) < widths[name]).to(dtype) for name in sizes}


def units_first(name: str, tensor: Tensor, head_dim: int) -> Tensor | None:
    """A parameter with its units in front, or None if it is not cut.

    Heads: `qkv` holds the queries of all heads, then the keys, then the values; a head takes `head_dim`
    columns of `proj`. Neurons: a row of `fc1`, a column of `fc2`.
    """
    match name.split(".")[2:]:
        case ["attn", "qkv", "weight"]:
            return tensor.reshape(3, -1, head_dim, tensor.shape[-1]).permute(1, 0, 2, 3)
        case ["attn", "qkv", "bias"]:
            return tensor.reshape(3, -1, head_dim).permute(1, 0, 2)
        case ["attn", "proj", "weight"]:
            return tensor.reshape(tensor.shape[0], -1, head_dim).permute(1, 0, 2)
        case ["mlp", "fc1", _]:
            return tensor
        case ["mlp", "fc2", "weight"]:
            return tensor.T
        case _:
            return None


def group_of(name: str) -> str:
    """`blocks.0.attn.qkv.weight` -> `blocks.0.attn`."""
    return ".".join(name.split(".")[:3])
