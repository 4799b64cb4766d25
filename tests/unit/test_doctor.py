"""How `doctor` gets at the shapes of a timm model."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from stepwell.commands import doctor
from stepwell.commands.images_in_words import images_in_words
from stepwell.config.commands import CompressConfig
from stepwell.config.doctor_options import DoctorConfig
from stepwell.data.spec import InputSpec
from stepwell.data.splits import resolve_data
from stepwell.errors import ConfigError
from stepwell.losses.choose import memory_bytes
from stepwell.losses.cirkd import CIRKD
from stepwell.losses.crd import CRD
from stepwell.measure.estimate import Losses, footprint, memory_and_disk, num_answering
from stepwell.measure.size import num_params
from stepwell.paths import path_of
from stepwell.setting import looked_at
from stepwell.setting.looked_at import teacher_to_look_at
from stepwell.tasks.outputs import AsLogits
from tiny import SPEC, tiny_vit


def devices_of(config: CompressConfig) -> set[str]:
    model = teacher_to_look_at(config, None).model
    return {parameter.device.type for parameter in model.parameters()}


def test_weights_take_memory_only_where_time_is_measured():
    assert devices_of(CompressConfig(teacher="resnet18")) == {"meta"}
    assert devices_of(CompressConfig(teacher="resnet18", latency_ms=5.0)) == {"cpu"}


@pytest.mark.parametrize("args", [{}, {"num_classes": "2"}])
def test_a_model_whose_constructor_computes_with_tensors_is_built_for_real(monkeypatch, args):
    """As timm's RegNet did; with arguments, `create_timm` reports the failure as one of them."""

    def create(name: str, pretrained: bool = False, num_classes: int = 10) -> nn.Module:
        return nn.Conv2d(3, num_classes, len(torch.tensor([1, 1]).unique()))

    def on_meta_without_unique(self: torch.Tensor) -> torch.Tensor:
        if self.is_meta:
            raise NotImplementedError("aten::_unique2")
        return unique(self)

    unique = torch.Tensor.unique
    monkeypatch.setattr(torch.Tensor, "unique", on_meta_without_unique)
    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(looked_at, "input_spec", lambda model, args: None)
    assert devices_of(CompressConfig(teacher="resnet18", model_args=args)) == {"cpu"}


def test_arguments_that_do_not_suit_are_still_told():
    with pytest.raises(ConfigError, match="do not suit resnet18"):
        devices_of(CompressConfig(teacher="resnet18", model_args={"no_such": "1"}))


def test_memory_knows_the_queues_of_cirkd():
    loss = CIRKD(4, 6, 3, num_pixels=50)
    queues = loss.pixels.rows.nbytes + loss.regions.rows.nbytes
    config = CompressConfig(feature_loss="cirkd", feature_args={"num_pixels": 50})
    assert memory_bytes(config, 500, 8, (3, 6))[0] == queues
    teacher = AsLogits(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 3, 1)), "maps")
    spec = InputSpec((16, 16), 3, (0.5,) * 3, (0.5,) * 3)
    before = memory_and_disk(config, teacher, [teacher], spec, 500, Losses(kept=9).of(teacher, ()))
    teacher.last_layer = "model.1"
    after = memory_and_disk(config, teacher, [teacher], spec, 500, Losses(kept=9).of(teacher, ()))
    assert [a - b for a, b in zip(after, before, strict=True)] == [9 * queues, 2 * 9 * queues]


def test_memory_knows_the_banks_of_crd():
    crd = CRD(8, 8, None, num_images=500)
    banks = crd.student_bank.nbytes + crd.teacher_bank.nbytes
    config = CompressConfig(feature_loss="crd", batch_size=32)
    scores = 2 * 32 * 500 * 4
    assert memory_bytes(config, 500, 32) == (banks, banks + scores)
    assert memory_bytes(CompressConfig(), 500, 32) == (0, 0)
    spec = InputSpec((32, 32), 3, (0.5,) * 3, (0.5,) * 3)
    model = timm.create_model("resnet18", num_classes=10)

    def more(**options: object) -> tuple[float, float]:
        """Memory and disk that go beyond those of a loss without banks."""
        found = []
        for name in ("crd", "rkd"):
            options = {**options, "feature_loss": name, "batch_size": 32}
            losses = path_of(options["path"]).losses(9, CompressConfig(**options))
            found.append(memory_and_disk(CompressConfig(**options), model, [model], spec, 500, losses))
        (memory, disk), (memory_without, disk_without) = found
        return memory - memory_without, disk - disk_without

    # A bank for each rung of the ladder, a step reads those of one; and two checkpoints.
    assert more(path="amd") == (9 * banks + banks + scores, 2 * 9 * banks)
    assert more(path="single-step") == (banks + banks + scores, 2 * banks)
    # One for each teacher of the last step, of which one is left out.
    chain = more(path="dgkd", assistants=(0.6, 0.3))
    assert chain == (3 * banks + 2 * (banks + scores), 2 * 3 * banks)


def test_an_average_is_one_more_copy_of_the_store():
    model, spec = tiny_vit(), SPEC
    ours, theirs = (
        memory_and_disk(CompressConfig(ema=ema), model, [model], spec, 500, Losses()) for ema in (0.999, 0.0)
    )
    store = 4 * num_params(model)
    assert (ours[0] - theirs[0], ours[1] - theirs[1]) == (store, 2 * store)  # in two checkpoints


def test_devices_share_the_moments_where_that_is_asked_for():
    model, config = tiny_vit(), CompressConfig()
    sharded = config.model_copy(update={"shard_optimizer": True})

    def memory(config: CompressConfig, devices: int) -> float:
        return footprint(config, 0, model, SPEC, 8, 500, Losses(), devices).memory

    alone = memory(config, 1)
    assert memory(sharded, 1) == memory(config, 4) == alone
    assert memory(sharded, 4) == alone - 8 * num_params(model) * 3 / 4


def test_devices_share_the_teacher_where_that_is_asked_for():
    model, config = tiny_vit(), CompressConfig()
    sharded = config.model_copy(update={"shard_teacher": True})
    whole = num_params(model)
    assert num_answering(sharded, model, 1) == num_answering(config, model, 4) == whole
    blocks = [num_params(block) for block in model.blocks]
    beside = whole - sum(blocks) - num_params(model.patch_embed)
    assert num_answering(sharded, model, 4) == whole / 4 + beside + 2 * max(blocks)


@pytest.mark.parametrize(
    ("options", "kept", "in_a_step"),
    [
        ({"path": "amd"}, 9, 1),
        ({"path": "amd-manual"}, 9, 1),
        ({"path": "auto"}, 9, 1),
        ({"path": "single-step"}, 1, 1),
        ({"path": "takd", "assistants": (0.6, 0.3)}, 1, 1),
        ({"path": "dgkd", "assistants": (0.6, 0.3)}, 3, 2),
        ({"path": "dgkd", "assistants": (0.6, 0.3), "drop": 0}, 3, 3),
        ({"path": "dgkd", "assistants": (0.6, 0.3), "drop": 7}, 3, 1),
        ({"path": "mmd"}, 1, 1),
        ({"path": "mmd-os"}, 1, 1),
    ],
)
def test_losses_that_a_path_keeps_and_computes_at_once(options, kept, in_a_step):
    assert path_of(options["path"]).losses(9, CompressConfig(**options)) == Losses(kept, in_a_step)


@pytest.mark.parametrize(("num_images", "num_negatives"), [(500, 400), (5000, 32)])
def test_what_a_step_of_crd_reads_is_counted(num_images, num_negatives):
    """Few negatives of many images are copied out of the banks; else a product is taken with all of them."""
    crd = CRD(8, 8, None, num_images=num_images, num_negatives=num_negatives)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        crd(torch.rand(32, 8, requires_grad=True), torch.rand(32, 8), torch.arange(32))
    args = {"num_negatives": float(num_negatives)}
    config = CompressConfig(feature_loss="crd", batch_size=32, feature_args=args)
    _, read = memory_bytes(config, num_images, config.batch_size)
    assert 0.7 * read < sum(kept) < 2 * read


def test_each_device_computes_crd_of_the_whole_batch():
    model, config = tiny_vit(), CompressConfig(feature_loss="crd")

    def memory(devices: int) -> float:
        return footprint(config, 0, model, SPEC, 8, 500, Losses(), devices).memory

    reads = [memory_bytes(config, 500, batch_size)[1] for batch_size in (8, 32)]
    assert memory(4) - memory(1) == reads[1] - reads[0] > 0


def test_memory_knows_the_rotations_of_sskd():
    spec = InputSpec((32, 32), 3, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "center")
    model = timm.create_model("resnet18", num_classes=10)

    def memory(**options: object) -> float:
        config = CompressConfig(batch_size=512, **options)
        return memory_and_disk(config, model, [model, model], spec, 1000, Losses())[0]

    weights = 20 * sum(p.numel() for p in model.parameters())  # teacher, store, gradients, AdamW
    assert memory(feature_loss="sskd") - weights == pytest.approx(4 * (memory() - weights), rel=0.15)


def test_doctor_says_where_images_come_from(tmp_path):
    for split, num_images in (("train", 5), ("val", 2), ("test", 3)):
        for name, more in (("ant", 0), ("bee", 1)):
            for i in range(num_images + more):
                file = tmp_path / split / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 200).save(file)
    assert images_in_words(resolve_data(CompressConfig(data=str(tmp_path)))) == [
        f"images: {tmp_path}",
        "  11 to train on",
        "  5 to choose the assistant on (val/)",
        "  7 to test on (test/)",
        "  2 classes with 5 to 6 training images each",
    ]


@pytest.mark.slow
def test_doctor_says_that_four_views_take_the_memory_of_four_times_as_many_images():
    def said(**options: object) -> float:
        config = DoctorConfig(teacher="resnet18", image_size=32, path="single-step", device="cpu", **options)
        (line,) = [line for line in doctor.run(config).splitlines() if "GiB of memory" in line]
        return float(line.split(" GiB of memory")[0].split()[-1])

    plain = {"feature_loss": "rkd"}  # it looks at the same
    four_times = said(batch_size=2048, **plain)
    assert said(feature_loss="sskd", batch_size=512) == four_times > 2 * said(batch_size=512, **plain)


@pytest.mark.slow
def test_doctor_says_what_the_operations_decide():
    """A stem and a classifier that stay whole leave more than an eighth."""
    words = {"teacher": "resnet18", "keep_ratio": 0.1, "budget_epochs": 20.0}
    auto, amd = (doctor.run(DoctorConfig(**words, path=path)) for path in ("auto", "amd"))
    assert "--path auto: a single step, for the student has 18 % of the teacher's operations" in auto
    assert ": 20 epochs of 1,000 training images" in auto
    assert "a single step" not in amd
    assert re.search(r": [\d.]+ \+ [\d.]+ epochs of 1,000 training images", amd)


@pytest.mark.slow
def test_doctor_says_what_a_narrower_stream_would_leave():
    words = {"teacher": "vit_tiny_patch16_224", "keep_ratio": 0.5}
    plain, narrow = (doctor.run(DoctorConfig(**words, cut=cut)) for cut in ("heads,neurons", "all"))
    (line,) = (line for line in plain.splitlines() if line.startswith("with --cut all, keep 0.5 of all "))
    assert line.endswith("units, the channels too: 26.8 % of the parameters, 29.1 % of the MACs")
    assert "with --cut all" not in narrow
    assert "channels of the residual stream" in narrow
    row = next(line for line in narrow.splitlines() if line.split()[:1] == ["0.5"])
    assert "26.8 %" in row
    assert "29.1 %" in row
