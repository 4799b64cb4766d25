"""How images are fed: decoded, kept in memory where they fit, batched, augmented.

    small sets    decoded once into one uint8 tensor; augmentation is batched tensor arithmetic on the device
    large sets    decoded in every epoch by DataLoader workers; `resized-crop` is timm's ImageNet recipe

Both keep one promise: what an image looks like in an epoch depends on (seed, training, epoch, image) and on
nothing else - not on the batch size, the order, the number of workers or of machines - so a run that is
resumed sees what the unbroken run would have seen, and no training of a run sees what another one saw.

With `--mixup` or `--cutmix` it is then mixed with another image of its batch, which depends on (seed,
training, epoch, step) and on the batch: not the same with another batch size, but the same again in a run
that is resumed.

Of several processes each gets a part of every training batch, all of one size; and what is done once, for a
sum over images, a stretch of the other batches (`EvalBatches.share`). No batch of either kind is larger than
a process's part of `--batch-size`, but for those that are `undivided`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float32, Int64, Shaped
from torch import Tensor

from stepwell.config.options import Augment, DataOptions
from stepwell.config.recipe_options import PLAIN, RecipeOptions
from stepwell.data.feed import Feed, num_workers, whole_masks
from stepwell.data.images import ImageSet
from stepwell.data.labels import Label, as_tensor
from stepwell.data.mask_transforms import MaskTrainTransform, check_mask_recipe
from stepwell.data.mixing import erase, mix
from stepwell.data.randomness import generator
from stepwell.data.spec import InputSpec
from stepwell.data.transforms import NUM_RANDOM, TrainTransform, augment_batch, normalise, resolve_augment
from stepwell.errors import ConfigError
from stepwell.run.processes import num_launched, rank, world

OnBatch = Callable[[Tensor], None]
"""Is told the indices of the images of every batch before it is used."""


class Batch(NamedTuple):
    """Images ready for the model, on its device; `indices` point into the `ImageSet`, and stay on the CPU, so
    that what is looked up by them need not wait for the device.

    `labels` are a class for each image, (batch,); or floats (batch, classes): of mixed images a probability
    for each class, or 0 and 1 where an image has several; or a class for each pixel, (batch, height, width),
    with `mask_classes.IGNORED` where none is known. `view` is the number of the view where images have some
    that come back, and else 0.
    """

    images: Float32[Tensor, "batch channels height width"]
    labels: Shaped[Tensor, "batch ..."]
    indices: Int64[Tensor, " batch"]
    view: int = 0


class TrainBatches:
    """Shuffled, augmented batches; the last incomplete one is dropped unless there is no other.

    Args:
        images: The training split.
        spec: What the model wants.
        options: Augmentation, batch size, workers.
        seed: With the training's name, the epoch and the image, all that randomness depends on.
        device: Where batches go.
        on_batch: Whoever looks on.
        recipe: What else is done to images.
        num_classes: Classes of the labels of mixed images.

    Raises:
        ConfigError: There is no RandAugment in this kind of augmentation.
    """

    def __init__(
        self,
        images: ImageSet,
        spec: InputSpec,
        options: DataOptions,
        seed: int,
        device: torch.device,
        on_batch: OnBatch | None = None,
        recipe: RecipeOptions = PLAIN,
        num_classes: int = 0,
    ) -> None:
        self.spec, self.seed, self.device, self._on_batch = spec, seed, device, on_batch
        self.recipe, self.num_classes = recipe, num_classes
        self.augment: Augment = resolve_augment(options.augment, spec, images.masks is not None)
        self.batch_size = min(options.batch_size, len(images))
        self.steps_per_epoch = len(images) // self.batch_size
        self.images_per_process = images_per_process(options, len(images), recipe.mixes)
        self._mine = part_of_batch(self.batch_size, recipe.mixes)
        self.labels = as_tensor(images.labels)
        self.has_masks = images.masks is not None
        if self.has_masks:
            check_mask_recipe(self.augment, recipe)
        if recipe.rand_augment and self.augment != "resized-crop":
            raise ConfigError(
                f"--rand-augment works on images as they are decoded, and --augment {self.augment} decodes "
                f"them once: give --augment resized-crop, too"
            )
        transform = None
        if self.augment == "resized-crop":
            transform = (
                MaskTrainTransform(spec) if self.has_masks else TrainTransform(spec, recipe.rand_augment)
            )
        self._feed = Feed(images, spec, options, device, transform)
        self.num_views = 0

    def of_views(self, number: int) -> TrainBatches:
        """The same where each image has so many views, which all trainings show in turn, one an epoch; with 0
        each epoch of each training draws its own."""
        other = copy.copy(self)
        other.num_views = number
        return other

    def blank(self, like: torch.nn.Module) -> Tensor:
        """Two images of nothing, in the number format of `like`: enough to see the shapes of its outputs."""
        dtype = next(like.parameters()).dtype
        return torch.zeros(2, self.spec.channels, *self.spec.size, dtype=dtype, device=self.device)

    def epoch(self, epoch: int, first_step: int = 0, training: str = "") -> Iterator[Batch]:
        """The batches of one epoch of a training, from `first_step` on; equal arguments give equal batches.

        Args:
            epoch: From 0.
            first_step: Within the epoch.
            training: The name of the training; another one shuffles and augments otherwise.
        """
        seed = f"{self.seed}:{training}"
        order = torch.randperm(len(self.labels), generator=generator("shuffle", seed, epoch))
        steps = order.split(self.batch_size)[first_step : self.steps_per_epoch]
        chunks = [chunk[self._mine] for chunk in steps]
        if self.num_views:
            batches = self._of_view(epoch % self.num_views, chunks)
        else:
            batches = self._drawn(chunks, seed, epoch)
        for step, batch in enumerate(batches, start=first_step):
            if self.recipe.mixes:
                moment = (seed, epoch, step)
                soft = mix(batch.images, batch.labels, self.recipe, self.num_classes, moment)
                batch = batch._replace(labels=soft)
            yield batch

    def of_view(self, view: int, images: range) -> Iterator[Batch]:
        """One of the views of some images, in their order; of no images none, as processes may have."""
        # An empty tensor is split into one empty chunk.
        chunks = torch.arange(images.start, images.stop).split(self.images_per_process) if images else ()
        return self._of_view(view, chunks)

    def _of_view(self, view: int, chunks: Sequence[Tensor]) -> Iterator[Batch]:
        # A seed without a training's name: all of them see the same views.
        for batch in self._drawn(chunks, f"{self.seed}: views", view):
            yield batch._replace(view=view)

    def _drawn(self, chunks: Sequence[Tensor], seed: str, epoch: int) -> Iterator[Batch]:
        """Augmented images; equal seeds and epochs draw the same for an image, whatever chunk it is in."""
        # Row i belongs to image i, so no batch, order or machine changes what happens to an image.
        table = torch.rand(len(self.labels), NUM_RANDOM, generator=generator("augment", seed, epoch))
        for pixels, indices in self._feed.batches(chunks, seed, epoch):
            if self._on_batch is not None:
                self._on_batch(indices)
            augmented = augment_batch(pixels, table[indices].to(self.device), self.augment)
            batch = _batch(augmented, self.labels, indices, self.spec, self.has_masks)
            if self.recipe.random_erasing:
                erase(batch.images, indices, self.recipe.random_erasing, seed, epoch)
            yield batch


def images_per_process(options: DataOptions, num_images: int, mixes: bool = False) -> int:
    """How many images of a step each process computes; `--batch-size` is that of all together.

    Args:
        options: The batch size.
        num_images: Training images, of which a batch has no more.
        mixes: Whether the images of a batch are mixed with each other, in pairs.

    Raises:
        ConfigError: It is not the same number for all, or a pair would lie in two processes.
    """
    batch_size = min(options.batch_size, num_images)
    divisor = world() * (2 if mixes and world() > 1 else 1)
    if batch_size % divisor:
        parts = "equal parts of pairs of images, which are mixed" if mixes else "equal parts"
        only = f" (a batch has at most the {num_images} training images)" if batch_size == num_images else ""
        raise ConfigError(
            f"--batch-size {options.batch_size} is that of all {world()} processes together, which get "
            f"{parts}: give a multiple of {divisor}{only}"
        )
    return batch_size // world()


def part_of_batch(batch_size: int, mixes: bool = False) -> Int64[Tensor, " part"]:
    """Which places of a batch are this process's: a stretch of them; or, where images are mixed, each with
    its partner, the first with the last and so on, so that the part is mixed as the whole would be."""
    places = torch.arange(batch_size)
    if not mixes or world() == 1:
        return places.chunk(world())[rank()]
    first = places[: batch_size // 2].chunk(world())[rank()]
    return torch.cat([first, batch_size - 1 - first.flip(0)])


class EvalBatches:
    """Every image exactly once, in order, without augmentation.

    A batch holds as many images as a process has of a training batch, since a device may not hold more; also
    where a process is `alone` for a while.

    Args:
        images: Any split.
        spec: What the model wants.
        options: Batch size, workers.
        device: Where batches go.
        labels: Instead of the labels of `images`.
        on_batch: Whoever looks on.
    """

    def __init__(
        self,
        images: ImageSet,
        spec: InputSpec,
        options: DataOptions,
        device: torch.device,
        labels: Sequence[Label] | Tensor | None = None,
        on_batch: OnBatch | None = None,
    ) -> None:
        self.spec, self.device, self._on_batch = spec, device, on_batch
        self._of_all, self.batch_size = options.batch_size, max(1, options.batch_size // num_launched())
        labels = images.labels if labels is None else labels
        assert len(labels) == len(images)
        self.labels = labels if isinstance(labels, Tensor) else as_tensor(labels)
        self._has_masks = images.masks is not None and labels is images.labels
        self._images, self._num_workers = images, num_workers(options)
        self._feed = Feed(images, spec, options, device, None)
        self._steps = self._all_steps

    @property
    def _all_steps(self) -> range:
        return range(math.ceil(len(self.labels) / self.batch_size))

    def undivided(self) -> EvalBatches:
        """The same in batches of `--batch-size`, however many processes there are: for what depends on which
        images are in a batch together."""
        other = copy.copy(self)
        other.batch_size = self._of_all
        other._steps = other._all_steps
        return other

    def share(self) -> EvalBatches:
        """This process's stretch of the batches, which are what they were: all together have all, in the
        order of the ranks. Where there are few, it may be empty."""
        part, number = copy.copy(self), len(self._steps)
        part._steps = self._steps[number * rank() // world() : number * (rank() + 1) // world()]
        return part

    def to(self, device: torch.device) -> EvalBatches:
        """The same batches, elsewhere."""
        moved = copy.copy(self)
        moved.device = device
        return moved

    def first(self, number: int) -> EvalBatches:
        """The first so many of the batches, as they are fed when all are."""
        part = copy.copy(self)
        part._steps = self._steps[:number]
        return part

    def truths(self, batch: Batch) -> list[Tensor]:
        """The masks of a batch at their own sizes; `batch.labels` are scaled to the model's."""
        return whole_masks(self._images, batch.indices.tolist(), self._num_workers)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        chunks = torch.arange(len(self.labels)).split(self.batch_size)[self._steps.start : self._steps.stop]
        for pixels, indices in self._feed.batches(chunks, seed="", epoch=0):
            if self._on_batch is not None:
                self._on_batch(indices)
            yield _batch(pixels.to(self.device), self.labels, indices, self.spec, self._has_masks)


def _batch(pixels: Tensor, labels: Tensor, indices: Tensor, spec: InputSpec, has_masks: bool) -> Batch:
    device = pixels.device
    # Convolutions keep this layout, and are faster in it (benchmarks/layout.py).
    images = normalise(pixels[:, : spec.channels], spec).contiguous(memory_format=torch.channels_last)
    known = pixels[:, spec.channels].long() if has_masks else labels[indices].to(device)
    return Batch(images, known, indices)
