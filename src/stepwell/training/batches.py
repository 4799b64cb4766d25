"""How images are fed: decoded, kept in memory where they fit, batched, augmented.

    small sets    decoded once into one uint8 tensor; augmentation is batched tensor arithmetic on the device
    large sets    decoded in every epoch by DataLoader workers; `resized-crop` is timm's ImageNet recipe

Both keep one promise: what an image looks like in an epoch depends on (seed, epoch, image) and on nothing
else - not on the batch size, the order, the number of workers or of machines - so a run that is resumed
sees what the unbroken run would have seen.
"""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stepwell.errors import DataError
from stepwell.options import Augment, DataOptions
from stepwell.training.images import ImageSet, in_threads, num_cpus
from stepwell.training.transforms import (
    NUM_RANDOM,
    InputSpec,
    TrainTransform,
    Transform,
    augment_batch,
    eval_transform,
    normalise,
    resolve_augment,
)

__all__ = ["Batch", "EvalBatches", "InputSpec", "TrainBatches", "eval_transform", "normalise"]

MEMORY_LIMIT = 2**30
"""Bytes; sets whose decoded pixels take no more are kept in memory."""


class Batch(NamedTuple):
    """Images ready for the model, on its device; `indices` point into the `ImageSet`."""

    images: Float32[Tensor, "batch channels height width"]
    labels: Int64[Tensor, " batch"]
    indices: Int64[Tensor, " batch"]


class TrainBatches:
    """Shuffled, augmented batches; the last incomplete one is dropped unless there is no other.

    Args:
        images: The training split.
        spec: What the model wants.
        options: Augmentation, batch size, workers.
        seed: With the epoch and the image, all that randomness depends on.
        device: Where batches go.
        labels: Instead of the labels of `images`, for instance in the order of the teacher's classes.
    """

    def __init__(
        self,
        images: ImageSet,
        spec: InputSpec,
        options: DataOptions,
        seed: int,
        device: torch.device,
        labels: Sequence[int] | None = None,
    ) -> None:
        self.spec, self.seed, self.device = spec, seed, device
        self.augment: Augment = resolve_augment(options.augment, spec)
        self.batch_size = min(options.batch_size, len(images))
        self.steps_per_epoch = len(images) // self.batch_size
        self.labels = _label_tensor(images, labels)
        transform = TrainTransform(spec) if self.augment == "resized-crop" else None
        self._feed = _Feed(images, spec, options, device, transform)

    def blank(self, like: torch.nn.Module) -> Tensor:
        """Two images of nothing, in the number format of `like`: enough to see the shapes of its outputs."""
        parameter = next(like.parameters())
        return parameter.new_zeros(2, self.spec.channels, *self.spec.size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from `first_step` on; equal arguments give equal batches."""
        num_images = len(self.labels)
        # Row i belongs to image i, so no batch, order or machine changes what happens to an image.
        table = torch.rand(num_images, NUM_RANDOM, generator=_generator("augment", self.seed, epoch))
        order = torch.randperm(num_images, generator=_generator("shuffle", self.seed, epoch))
        chunks = order.split(self.batch_size)[first_step : self.steps_per_epoch]
        for pixels, indices in self._feed.batches(chunks, self.seed, epoch):
            augmented = augment_batch(pixels, table[indices].to(self.device), self.augment)
            yield _batch(augmented, self.labels, indices, self.spec)


class EvalBatches:
    """Every image exactly once, in order, without augmentation.

    Args:
        images: Any split.
        spec: What the model wants.
        options: Batch size, workers.
        device: Where batches go.
        labels: Instead of the labels of `images`.
    """

    def __init__(
        self,
        images: ImageSet,
        spec: InputSpec,
        options: DataOptions,
        device: torch.device,
        labels: Sequence[int] | None = None,
    ) -> None:
        self.spec, self.batch_size = spec, options.batch_size
        self._labels = _label_tensor(images, labels)
        self._feed = _Feed(images, spec, options, device, None)

    def __len__(self) -> int:
        return math.ceil(len(self._labels) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        chunks = torch.arange(len(self._labels)).split(self.batch_size)
        for pixels, indices in self._feed.batches(chunks, seed=0, epoch=0):
            yield _batch(pixels, self._labels, indices, self.spec)


# --- feeding


class _Feed:
    """uint8 batches on the device, out of memory where the set fits, else from DataLoader workers."""

    def __init__(
        self,
        images: ImageSet,
        spec: InputSpec,
        options: DataOptions,
        device: torch.device,
        transform: Transform | None,
    ) -> None:
        assert len(images) > 0
        self._device = device
        self._num_workers = min(options.workers, num_cpus())  # torch warns above
        num_bytes = len(images) * spec.channels * spec.size[0] * spec.size[1]
        in_memory = transform is None and num_bytes <= MEMORY_LIMIT
        self._pixels = _decode(images, spec, self._num_workers) if in_memory else None
        # A copy without decoded pixels: it is sent to the workers.
        self._images = replace(images, cache={})
        self._transform = transform or eval_transform(spec)

    def batches(self, chunks: Sequence[Tensor], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels on the device, and indices on the CPU, of each chunk of indices."""
        known = self._pixels
        loaded = self._load(chunks, seed, epoch) if known is None else (known[chunk] for chunk in chunks)
        for pixels, chunk in zip(loaded, chunks, strict=True):
            yield pixels.to(self._device, non_blocking=True), chunk

    def _load(self, chunks: Sequence[Tensor], seed: int, epoch: int) -> Iterator[Tensor]:
        loader = DataLoader(
            _Items(self._images, self._transform, seed, epoch),
            batch_sampler=[chunk.tolist() for chunk in chunks],
            num_workers=self._num_workers,
            collate_fn=_stack,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_use_real_stderr,
            generator=torch.Generator(),  # otherwise every epoch would draw from the global generator
        )
        with warnings.catch_warnings():
            # Python 3.12 warns of every fork beside threads; workers only decode and take no lock of theirs.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            batches = iter(loader)
        try:
            for pixels in batches:
                if isinstance(pixels, str):
                    raise DataError(pixels)
                yield pixels
        finally:
            del batches  # ends the workers now, even if a traceback keeps this frame


def _use_real_stderr(_: int) -> None:
    """A live progress bar catches stderr behind a lock, which a fork may have copied while it was held."""
    sys.stderr = sys.__stderr__


@dataclass(frozen=True)
class _Items(Dataset[Tensor | str]):
    """What a worker does for one index; a message instead of pixels where the image is bad."""

    images: ImageSet
    transform: Transform
    seed: int
    epoch: int

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            image = self.images.open(index)
        except DataError as error:  # torch would wrap an exception in the worker's traceback
            return str(error)
        with _seeded("image", self.seed, self.epoch, index):
            return self.transform(image)


def _stack(items: list[Tensor | str]) -> Tensor | str:
    pixels = [item for item in items if isinstance(item, Tensor)]
    if len(pixels) == len(items):
        return torch.stack(pixels)
    return next(item for item in items if isinstance(item, str))


def _decode(images: ImageSet, spec: InputSpec, num_threads: int) -> Tensor:
    """All pixels of a set; decoded once per run, and so all bad images are found before any training."""
    key = (spec.size, spec.channels, spec.interpolation, spec.crop_pct)
    if key not in images.cache:
        transform = eval_transform(spec)
        pixels = torch.empty((len(images), spec.channels, *spec.size), dtype=torch.uint8)

        def read(index: int) -> None:
            pixels[index] = transform(images.open(index))

        for _ in in_threads(read, len(images), "reading images", num_threads):
            pass
        images.cache[key] = pixels
    return images.cache[key]


def _batch(pixels: Tensor, labels: Tensor, indices: Tensor, spec: InputSpec) -> Batch:
    device = pixels.device
    return Batch(normalise(pixels, spec), labels[indices].to(device), indices.to(device))


def _label_tensor(images: ImageSet, labels: Sequence[int] | None) -> Tensor:
    labels = images.labels if labels is None else labels
    assert len(labels) == len(images)
    return torch.tensor(labels, dtype=torch.int64)


# --- randomness


def _mix(*parts: int | str) -> int:
    """One seed from several; hashed, so that seed 1 of epoch 2 has nothing to do with seed 2 of epoch 1."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def _generator(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(_mix(*parts))


@contextmanager
def _seeded(*parts: int | str) -> Iterator[None]:
    """Seed the three generators that transforms draw from, and put them back afterwards."""
    seed = _mix(*parts)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the GPU's generator too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
