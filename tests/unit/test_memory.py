"""What `doctor` says of memory, beside what training steps took on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
from torch import nn

from stepwell.config.commands import CompressConfig
from stepwell.data.spec import InputSpec
from stepwell.measure.estimate import Losses, activation_bytes, footprint
from stepwell.measure.size import num_params
from stepwell.pruning.blocks import compared_blocks
from stepwell.setting.prepare import known_groups
from tiny import SPEC, tiny_vit

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "throughput.json"
MEASURED_LATER = MEASURED.with_stem("throughput-h200")  # ResNet-50 in bf16


@pytest.mark.parametrize(
    ("name", "precision", "file"),
    [
        ("vit_small_patch16_224", "fp32", MEASURED),
        ("vit_small_patch16_224", "bf16", MEASURED),
        ("resnet50", "fp32", MEASURED),
        ("resnet50", "bf16", MEASURED_LATER),
        pytest.param("swin_tiny_patch4_window7_224", "fp32", MEASURED, marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", "bf16", MEASURED, marks=pytest.mark.slow),
    ],
)
def test_memory_as_a_gpu_had_it(name, precision, file):
    """A teacher teaches a model of its own size by the default losses, 128 images of 224 x 224 in a step."""
    (run,) = (
        run
        for run in json.loads(file.read_text(encoding="utf-8"))["runs"]
        if (run["model"], run["precision"], run["step"]) == (name, precision, "full")
    )
    model = timm.create_model(name)
    config = CompressConfig(precision=precision, batch_size=run["batch"])
    losses = Losses().of(model, config.observed(compared_blocks(known_groups(model))))
    spec = InputSpec((224, 224), 3, (0.5,) * 3, (0.5,) * 3)
    counted = footprint(config, num_params(model), model, spec, run["batch"], 1000, losses).memory
    assert counted / 2**20 == pytest.approx(run["peak_mib"], rel=0.2)


def test_states_are_kept_in_fp32_of_both_models():
    model = tiny_vit()
    state = 4 * 2 * (model.patch_embed.num_patches + 1) * model.embed_dim
    with_states = activation_bytes(model, SPEC, 2, "fp32", states=("blocks.0",))
    # The next block keeps the student's anyway; what is added is the teacher's.
    assert with_states - activation_bytes(model, SPEC, 2, "fp32") == state
    assert activation_bytes(model, SPEC, 2, "fp32", states=("blocks.9",)) == activation_bytes(
        model, SPEC, 2, "fp32"
    ), "a block that was dropped has no state"


class _Asks(nn.Module):
    """A model whose forward pass wants a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * SPEC.size[0] * SPEC.size[1], 4)

    def forward(self, images):
        return self.layer(images.flatten(1)) * (2 if images.sum() > 0 else 1)


def test_a_model_that_asks_for_numbers_is_counted_on_two_images():
    # The images, which the layer keeps, are all that there is; in bf16 they are kept as bf16.
    image = 3 * SPEC.size[0] * SPEC.size[1]
    for precision, size in (("fp32", 4), ("bf16", 2)):
        counted = activation_bytes(_Asks(), SPEC, 8, precision)
        assert counted == pytest.approx(8 * image * size, rel=0.01)
