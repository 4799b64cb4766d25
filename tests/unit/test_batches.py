"""What a batch holds: the right pixels, the right labels, and the same again for the same seed."""

import math
import multiprocessing
import os
import random
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from stepwell.config.options import DataOptions
from stepwell.data import feed
from stepwell.data.batches import EvalBatches, TrainBatches
from stepwell.data.images import FolderReader, ImageSet
from stepwell.data.spec import InputSpec
from stepwell.data.transforms import affine, augment_batch, eval_transform, normalise
from stepwell.errors import DataError
from stepwell.run.processes import alone

CPU = torch.device("cpu")
GREY = InputSpec((8, 8), 1, (0.5,), (0.25,))
COLOUR = InputSpec((32, 32), 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth waves with some noise: about what a photo is to a resampling filter."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(3, 9) + c) + np.cos(y / rng.uniform(3, 9) - c) for c in range(3)]
    pixels = 127 + 50 * np.stack(waves, axis=-1) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def image_set(folder: Path, num_images: int = 10, width: int = 32, height: int = 32) -> ImageSet:
    folder.mkdir(exist_ok=True)
    keys = tuple(f"{i:03d}.png" for i in range(num_images))
    for i, key in enumerate(keys):
        photo(width, height, seed=i).save(folder / key)
    return ImageSet(keys, tuple(i % 3 for i in range(num_images)), FolderReader(folder))


def options(**values) -> DataOptions:
    return DataOptions(**{"workers": 0, "batch_size": 4, **values})


def by_image(epoch) -> dict[int, torch.Tensor]:
    """The pixels of each image, by its index."""
    return {
        int(index): pixels
        for batch in epoch
        for index, pixels in zip(batch.indices, batch.images, strict=True)
    }


# --- evaluation


@pytest.mark.parametrize("num_images", [8, 10])
def test_eval_gives_every_image_once_and_in_order(tmp_path, num_images):
    images = image_set(tmp_path, num_images)
    loader = EvalBatches(images, COLOUR, options(), CPU)
    found = list(loader)
    assert len(found) == len(loader) == math.ceil(num_images / 4)
    assert torch.cat([batch.indices for batch in found]).tolist() == list(range(num_images))
    assert torch.cat([batch.labels for batch in found]).tolist() == list(images.labels)
    assert found[0].images.shape == (4, 3, 32, 32)
    assert found[0].images.dtype == torch.float32
    expected = (np.asarray(photo(32, 32, seed=5)) / 255 - COLOUR.mean) / COLOUR.std
    torch.testing.assert_close(found[1].images[1].numpy(), expected.transpose(2, 0, 1).astype(np.float32))


@pytest.mark.parametrize(
    ("image_size", "size", "crop_pct", "interpolation"),
    [
        ((100, 80), (64, 64), 0.875, "bicubic"),
        ((100, 80), (64, 64), 1.0, "bilinear"),
        ((100, 80), (48, 64), 0.9, "bicubic"),
        ((20, 30), (96, 96), 0.95, "bicubic"),
    ],
)
def test_eval_transform_is_that_of_timm(image_size, size, crop_pct, interpolation):
    spec = InputSpec(size, 3, (0.0,) * 3, (1.0,) * 3, interpolation, crop_pct)
    theirs = create_transform(
        (3, *size),
        is_training=False,
        interpolation=interpolation,
        crop_pct=crop_pct,
        mean=spec.mean,
        std=spec.std,
    )
    image = photo(*image_size)
    ours = eval_transform(spec)(image)
    assert ours.dtype == torch.uint8
    assert ours.shape == (3, *size)
    assert (ours - theirs(image) * 255).abs().max() <= 1


def test_small_images_of_the_right_size_are_not_cropped():
    image = photo(32, 32)
    assert torch.equal(eval_transform(COLOUR)(image), torch.from_numpy(np.array(image)).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("spec", [COLOUR, InputSpec((32, 32), 1, (0.5,), (0.5,))])
def test_every_kind_of_file_loads(tmp_path, mode, spec):
    image = photo(32, 32)
    grey = np.array(image.convert("L"))
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "0.png")
    elif mode == "PA":  # which no format writes
        image.convert("P").save(tmp_path / "0.png", transparency=bytes(range(256)))
    else:
        image.convert(mode).save(tmp_path / ("0.tif" if mode == "CMYK" else "0.png"))
    key = next(tmp_path.iterdir()).name
    pixels = eval_transform(spec)(ImageSet((key,), (0,), FolderReader(tmp_path), 65535).open(0))
    assert pixels.shape == (spec.channels, 32, 32)
    if mode != "1":
        # A palette of 256 colours is the coarsest of these.
        assert (pixels.float().mean(0) - torch.from_numpy(grey)).abs().mean() < 30
    if mode == "I;16":
        assert np.array_equal(pixels[0], grey)


def test_palette_with_transparency_loads(tmp_path):
    photo(32, 32).convert("P").save(tmp_path / "0.png", transparency=bytes(range(256)))
    image = ImageSet(("0.png",), (0,), FolderReader(tmp_path)).open(0)
    assert image.mode == "P"
    assert eval_transform(COLOUR)(image).shape == (3, 32, 32)


def test_normalise():
    pixels = torch.tensor([[[0, 255]], [[51, 102]], [[153, 204]]], dtype=torch.uint8)
    before = pixels.clone()
    expected = torch.tensor([[[-2.0, 3.0]], [[-1.2, -0.4]], [[0.0, 2 / 3]]])
    torch.testing.assert_close(normalise(pixels, COLOUR), expected)
    torch.testing.assert_close(normalise(pixels.float()[None], COLOUR)[0], expected)
    assert torch.equal(pixels, before)


def test_channels_that_images_do_not_have():
    with pytest.raises(DataError, match="1 or 3 channels, but the model takes 4"):
        InputSpec((8, 8), 4, (0.0,) * 4, (1.0,) * 4)


# --- training


def test_train_batches_cover_the_epoch_and_drop_the_rest(tmp_path):
    images = image_set(tmp_path, 10)
    train = TrainBatches(images, COLOUR, options(), 0, CPU)
    assert train.steps_per_epoch == 2
    found = list(train.epoch(0))
    assert [len(batch.labels) for batch in found] == [4, 4]
    indices = torch.cat([batch.indices for batch in found])
    assert len(set(indices.tolist())) == 8
    assert torch.cat([batch.labels for batch in found]).tolist() == [images.labels[i] for i in indices]
    assert indices.tolist() != torch.cat([batch.indices for batch in train.epoch(1)]).tolist()


def test_a_set_smaller_than_one_batch_is_one_batch(tmp_path):
    train = TrainBatches(image_set(tmp_path, 3), COLOUR, options(batch_size=64), 0, CPU)
    assert train.steps_per_epoch == 1
    (batch,) = train.epoch(0)
    assert sorted(batch.indices.tolist()) == [0, 1, 2]


def test_labels_can_be_given(tmp_path):
    images = image_set(tmp_path, 4)
    (batch,) = EvalBatches(images, COLOUR, options(), CPU, labels=[7, 5, 3, 1])
    assert batch.labels.tolist() == [7, 5, 3, 1]


def test_of_several_processes_no_batch_is_larger_than_a_part_of_a_batch(tmp_path, monkeypatch):
    images, of_all, of_views, undivided = image_set(tmp_path, 11), [], [], []
    for rank in range(2):
        for name, value in (("WORLD_SIZE", 2), ("RANK", rank), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        batches = EvalBatches(images, COLOUR, options(), CPU)
        of_all += [batch.indices.tolist() for batch in batches.share()]
        undivided += [batch.indices.tolist() for batch in batches.undivided().share()]
        with alone():
            assert {len(batch.indices) for batch in EvalBatches(images, COLOUR, options(), CPU)} == {2, 1}
        train = TrainBatches(images, COLOUR, options(), 0, CPU).of_views(1)
        of_views.append([batch.indices.tolist() for batch in train.of_view(0, range(5))])
    assert of_all == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    assert undivided == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert of_views == [[[0, 1], [2, 3], [4]]] * 2


def test_who_looks_on_is_told_every_batch_before_it_is_used(tmp_path):
    images, seen = image_set(tmp_path, 10), []
    train = TrainBatches(images, COLOUR, options(), 0, CPU, lambda indices: seen.append(indices.tolist()))
    for batches in (train.epoch(0), train.epoch(1, first_step=1)):
        for batch in batches:
            assert seen.pop() == batch.indices.tolist()
            assert not seen
    evaluation = EvalBatches(images, COLOUR, options(), CPU, on_batch=lambda i: seen.append(i.tolist()))
    assert [batch.indices.tolist() for batch in evaluation] == seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("augment", ["affine", "crop", "resized-crop"])
def test_augmentation_depends_on_seed_training_epoch_and_image_alone(tmp_path, augment):
    images = image_set(tmp_path, 12)

    def epoch(batch_size, seed=3, epoch=5, training="joint"):
        train = TrainBatches(images, COLOUR, options(augment=augment, batch_size=batch_size), seed, CPU)
        return by_image(train.epoch(epoch, training=training))

    first = epoch(4)
    for same in (epoch(4), epoch(3), epoch(12)):
        assert all(torch.equal(first[i], same[i]) for i in range(12))
    for other in (epoch(4, seed=4), epoch(4, epoch=6), epoch(4, training="distill")):
        # With `crop` an image may draw the same of 9 * 9 * 2 cases twice; not many do.
        assert sum(torch.equal(first[i], other[i]) for i in range(12)) <= 2


def test_an_epoch_can_be_entered_in_the_middle(tmp_path):
    train = TrainBatches(image_set(tmp_path, 12), COLOUR, options(augment="affine"), 0, CPU)
    whole, rest = list(train.epoch(2)), list(train.epoch(2, first_step=1))
    assert len(rest) == 2
    for expected, found in zip(whole[1:], rest, strict=True):
        assert torch.equal(expected.images, found.images)
        assert torch.equal(expected.indices, found.indices)
    assert list(train.epoch(2, first_step=3)) == []


def test_auto_is_crop_for_small_and_resized_crop_for_large_images(tmp_path):
    images = image_set(tmp_path, 2)
    assert TrainBatches(images, COLOUR, options(), 0, CPU).augment == "crop"
    large = InputSpec((96, 96), 3, COLOUR.mean, COLOUR.std)
    assert TrainBatches(images, large, options(), 0, CPU).augment == "resized-crop"


def test_no_augmentation_is_the_eval_image(tmp_path):
    images = image_set(tmp_path, 4)
    train = by_image(TrainBatches(images, COLOUR, options(augment="none"), 0, CPU).epoch(0))
    evaluated = by_image(EvalBatches(images, COLOUR, options(), CPU))
    assert all(torch.equal(train[i], evaluated[i]) for i in range(4))


def test_training_leaves_the_global_generators_alone(tmp_path):
    train = TrainBatches(image_set(tmp_path, 4), COLOUR, options(augment="resized-crop"), 0, CPU)

    def draws_after_an_epoch(seed):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        assert len(list(train.epoch(0))) == 1
        return float(torch.rand(1)), float(np.random.rand()), random.random()

    # Python's own generator cannot be pinned here: beartype, where it is on, draws from it.
    first, second = draws_after_an_epoch(1), draws_after_an_epoch(2)
    torch.manual_seed(1)
    np.random.seed(1)
    assert first[:2] == (float(torch.rand(1)), float(np.random.rand()))
    assert first[2] != second[2]


# --- augmentation, by hand


def random_pixels(batch: int = 5, channels: int = 3, height: int = 16, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("width", [16, 24])
def test_affine_by_nothing_is_the_identity(width):
    pixels = random_pixels(width=width)
    zero = torch.zeros(5)
    assert (affine(pixels, zero, zero + 1, torch.zeros(5, 2)) - pixels).abs().max() < 0.01
    assert (augment_batch(pixels, torch.full((5, 4), 0.5), "affine") - pixels).abs().max() < 0.01


def test_affine_shift_by_whole_pixels_repeats_the_border():
    pixels = random_pixels(batch=1)
    shifted = affine(pixels, torch.zeros(1), torch.ones(1), torch.tensor([[2 / 16, 1 / 16]]))
    torch.testing.assert_close(shifted[..., 1:, 2:], pixels[..., :-1, :-2].float(), atol=0.01, rtol=0)
    # Left of the old border: the border's own value, in rows that moved down by one.
    torch.testing.assert_close(shifted[..., 1:, 0], pixels[..., :-1, 0].float(), atol=0.01, rtol=0)


def test_affine_turn_by_a_right_angle():
    pixels = random_pixels(batch=1)
    turned = affine(pixels, torch.tensor([math.pi / 2]), torch.ones(1), torch.zeros(1, 2))
    matches = [(turned - pixels.rot90(k, (2, 3))).abs().max() < 0.05 for k in (1, 3)]
    assert sum(matches) == 1


def test_affine_keeps_a_disc_round_in_a_wide_image():
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(64) - 31.5, indexing="ij")
    disc = (200 * torch.sigmoid(10 - (x**2 + y**2).sqrt())).to(torch.uint8)[None, None]
    turned = affine(disc, torch.tensor([0.7]), torch.ones(1), torch.zeros(1, 2))
    assert (turned - disc).abs().max() < 25  # 90 and more if the aspect ratio is left out
    larger = affine(disc, torch.zeros(1), torch.tensor([1.2]), torch.zeros(1, 2))
    assert larger.sum() / disc.sum() == pytest.approx(1.44, abs=0.03)


def test_affine_stays_within_its_limits():
    corner = torch.zeros(1, 1, 40, 40, dtype=torch.uint8)
    corner[..., 20:22, 20:22] = 255
    for u in ([0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 1, 0]):
        moved = augment_batch(corner, torch.tensor([u], dtype=torch.float32), "affine")[0, 0]
        y, x = (moved > 30).nonzero(as_tuple=True)
        # A tenth of 40 pixels, magnified by 1.1, plus the turn of a point one pixel off the centre.
        assert abs(x.float().mean() - 20.5) < 6.5
        assert abs(y.float().mean() - 20.5) < 6.5
        assert abs(x.float().mean() - 20.5) > 2.5


def crop_by_hand(pixels: np.ndarray, u: list[float]) -> np.ndarray:
    _, height, width = pixels.shape
    most = height // 8
    down, right = int(u[0] * (2 * most + 1)) - most, int(u[1] * (2 * most + 1)) - most
    result = np.zeros_like(pixels)
    for row in range(height):
        for column in range(width):
            if 0 <= row + down < height and 0 <= column + right < width:
                result[:, row, column] = pixels[:, row + down, column + right]
    return result[:, :, ::-1] if u[2] < 0.5 else result


def test_crop_is_the_loop_written_by_hand():
    pixels = random_pixels(batch=40)
    uniform = torch.rand(40, 4, generator=torch.Generator().manual_seed(1))
    uniform[0], uniform[1] = 0.0, 1 - 2**-24
    ours = augment_batch(pixels, uniform, "crop")
    assert ours.dtype == torch.uint8
    for i in range(40):
        assert np.array_equal(ours[i], crop_by_hand(pixels[i].numpy(), uniform[i].tolist()))
    assert (ours[0] == 0).sum() >= 3 * (2 * 16 + 2 * 14)


# --- memory and workers


def test_images_are_decoded_once(tmp_path, monkeypatch):
    images = image_set(tmp_path, 6)
    opened = []
    read = FolderReader.open
    monkeypatch.setattr(FolderReader, "open", lambda self, key: opened.append(key) or read(self, key))
    for seed in range(2):
        train = TrainBatches(images, COLOUR, options(augment="affine"), seed, CPU)
        assert len(list(train.epoch(0))) == 1
        assert len(list(EvalBatches(images, COLOUR, options(workers=2), CPU))) == 2
    assert sorted(opened) == list(images.keys)
    list(EvalBatches(images, InputSpec((16, 16), 3, COLOUR.mean, COLOUR.std), options(), CPU))
    assert len(opened) == 12


@pytest.mark.parametrize("augment", ["affine", "crop", "none"])
def test_lazy_images_equal_those_in_memory(tmp_path, monkeypatch, augment):
    images = image_set(tmp_path, 8, width=50, height=40)
    chosen = options(augment=augment)
    train = by_image(TrainBatches(images, COLOUR, chosen, 1, CPU).epoch(2))
    evaluated = by_image(EvalBatches(images, COLOUR, chosen, CPU))
    monkeypatch.setattr(feed, "MEMORY_LIMIT", 0)
    images = images.subset(range(8))
    lazy = by_image(TrainBatches(images, COLOUR, chosen, 1, CPU).epoch(2))
    lazy_evaluated = by_image(EvalBatches(images, COLOUR, chosen, CPU))
    assert images.cache == {}
    assert all(torch.equal(train[i], lazy[i]) for i in range(8))
    assert all(torch.equal(evaluated[i], lazy_evaluated[i]) for i in range(8))


@pytest.mark.brings(
    "machine",
    "small shared memory (a container's 64 MB)",
    "Workers send images through pipes, so training runs as it does elsewhere.",
)
def test_workers_need_no_shared_memory(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(feed, "MEMORY_LIMIT", 0)
    for name in ("_share_fd_cpu_", "_share_filename_cpu_"):
        monkeypatch.setattr(torch.UntypedStorage, name, refuse)  # forked workers have it too
    images = image_set(tmp_path)
    batches = list(EvalBatches(images, COLOUR, options(workers=1), CPU))
    expected = [int(np.asarray(images.open(i), dtype=np.int64).sum()) for i in range(10)]
    mean, std = (np.array(each)[:, None, None] for each in (COLOUR.mean, COLOUR.std))
    found = [int(np.rint((pixels.numpy() * std + mean) * 255).sum()) for b in batches for pixels in b.images]
    assert found == expected


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")
def test_a_process_that_was_started_afresh_forks_its_workers(tmp_path, monkeypatch):
    """As the cells of a comparison are: a worker that imports all again takes seconds, in every pass."""
    monkeypatch.setattr(feed, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", get_context("spawn"))
    monkeypatch.setattr(FolderReader, "open", lambda *_: photo(32, 32))  # only a fork knows of it
    batches = list(EvalBatches(image_set(tmp_path, 2), COLOUR, options(workers=1), CPU))
    assert torch.equal(batches[0].images[0], batches[0].images[1])


def test_a_worker_that_dies_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(feed, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(FolderReader, "open", lambda self, key: os._exit(1))
    with pytest.raises(DataError) as caught:
        list(EvalBatches(image_set(tmp_path), COLOUR, options(workers=1), CPU))
    line = str(caught.value)
    assert line.startswith("the processes that decode images failed (DataLoader worker (pid")
    assert line.endswith("fewer --workers need less memory, and with --workers 0 the run itself decodes")


def test_workers_change_nothing(tmp_path):
    images = image_set(tmp_path, 8, width=50, height=40)
    alone = by_image(TrainBatches(images, COLOUR, options(augment="resized-crop"), 1, CPU).epoch(2))
    chosen = options(augment="resized-crop", workers=1)
    helped = by_image(TrainBatches(images, COLOUR, chosen, 1, CPU).epoch(2))
    assert len(alone) == 8
    assert all(torch.equal(alone[i], helped[i]) for i in range(8))
    assert len({float(pixels.sum()) for pixels in alone.values()}) == 8


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("augment", ["crop", "resized-crop"])
def test_a_corrupt_image_is_named(tmp_path, workers, augment):
    images = image_set(tmp_path, 8)
    (tmp_path / "005.png").write_bytes((tmp_path / "005.png").read_bytes()[:200])
    with pytest.raises(DataError) as caught:
        list(TrainBatches(images, COLOUR, options(augment=augment, workers=workers), 0, CPU).epoch(0))
    assert str(caught.value).startswith(f"cannot decode image {tmp_path / '005.png'} (")
    assert str(caught.value).endswith("pass --skip-bad-images to leave such images out")
    assert "\n" not in str(caught.value)


def test_grey_models_see_grey_images(tmp_path):
    images = image_set(tmp_path, 4, width=8, height=8)
    (batch,) = EvalBatches(images, GREY, options(), CPU)
    assert batch.images.shape == (4, 1, 8, 8)
    expected = np.array(photo(8, 8, seed=2).convert("L"), dtype=np.float32) / 255
    torch.testing.assert_close(batch.images[2, 0].numpy(), (expected - 0.5) / 0.25)
