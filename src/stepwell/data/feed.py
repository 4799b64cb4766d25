"""uint8 batches on the device: out of memory where the set fits, else decoded by DataLoader workers.

The mask of an image travels as one more channel.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stepwell.config.options import DataOptions
from stepwell.data.images import ImageSet, in_threads, num_cpus, one_line
from stepwell.data.mask_transforms import eval_mask_transform
from stepwell.data.randomness import seeded
from stepwell.data.spec import InputSpec
from stepwell.data.transforms import Transform, eval_transform
from stepwell.errors import DataError

MEMORY_LIMIT = 2**30
"""Bytes; sets whose decoded pixels take no more are kept in memory."""


class Feed:
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
        self._num_workers = num_workers(options)
        self._pixels = decoded(images, spec, options) if transform is None else None
        # A copy without decoded pixels: it is sent to the workers.
        self._images = replace(images, cache={})
        self._transform = transform or _plain(images, spec)

    def batches(self, chunks: Sequence[Tensor], seed: str, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels on the device, and indices on the CPU, of each chunk of indices."""
        known = self._pixels
        loaded = self._load(chunks, seed, epoch) if known is None else (known[chunk] for chunk in chunks)
        for pixels, chunk in zip(loaded, chunks, strict=True):
            yield pixels.to(self._device, non_blocking=True), chunk

    def _load(self, chunks: Sequence[Tensor], seed: str, epoch: int) -> Iterator[Tensor]:
        loader = DataLoader(
            _Items(self._images, self._transform, seed, epoch),
            batch_sampler=[chunk.tolist() for chunk in chunks],
            num_workers=self._num_workers,
            # A process that was itself spawned would spawn its workers, too: seconds for every pass.
            multiprocessing_context="fork" if sys.platform == "linux" and self._num_workers else None,
            collate_fn=_stack,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_use_real_stderr,
            generator=torch.Generator(),  # otherwise every epoch would draw from the global generator
        )
        batches: Iterator[_Sent | Tensor] | None = None
        try:
            with warnings.catch_warnings():
                # Python 3.12 warns of every fork beside threads; workers only decode and take no lock.
                warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
                batches = iter(loader)
            for sent in batches:
                yield sent if isinstance(sent, Tensor) else sent.unpacked()
        except (RuntimeError, OSError) as error:
            # A worker's own mistake arrives under its own name; a worker that is gone, under these.
            if not isinstance(error, OSError) and "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"the processes that decode images failed ({one_line(error)[:200]}): fewer --workers need "
                "less memory, and with --workers 0 the run itself decodes"
            ) from None
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
    seed: str
    epoch: int

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            opened = self.images.opened(index)
        except DataError as error:  # torch would wrap an exception in the worker's traceback
            return str(error)
        with seeded("image", self.seed, self.epoch, index):
            return self.transform(*opened)


@dataclass(frozen=True)
class _Sent:
    """What a worker sends: pixels, or what is wrong with an image.

    A plain array goes through a pipe. A tensor would go through shared memory, of which containers often have
    64 MB: where it ran out, workers died and the run waited for them for ever.
    """

    pixels: np.ndarray | None
    message: str = ""

    def unpacked(self) -> Tensor:
        """The pixels as a tensor.

        Raises:
            DataError: An image was bad.
        """
        if self.pixels is None:
            raise DataError(self.message)
        return torch.from_numpy(self.pixels)

    def pin_memory(self) -> _Sent | Tensor:
        """Called by torch, in a thread of its own, where batches go on to a GPU."""
        return self if self.pixels is None else self.unpacked().pin_memory()


def _stack(items: list[Tensor | str]) -> _Sent:
    pixels = [item for item in items if isinstance(item, Tensor)]
    if len(pixels) == len(items):
        return _Sent(torch.stack(pixels).numpy())
    return _Sent(None, next(item for item in items if isinstance(item, str)))


def _plain(images: ImageSet, spec: InputSpec) -> Transform:
    """What happens to an image that is not augmented; its mask goes with it."""
    return eval_transform(spec) if images.masks is None else eval_mask_transform(spec)


def whole_masks(images: ImageSet, indices: Sequence[int], num_threads: int) -> list[Tensor]:
    """The masks of some images at their own sizes, uint8; read once, as long as they fit in memory."""
    assert images.masks is not None
    masks, held = images.masks, images.cache.setdefault("masks", {})

    def read(index: int) -> Tensor:
        return torch.from_numpy(np.array(masks.open(images.keys[index])))

    missing = [index for index in indices if index not in held]
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        found = dict(zip(missing, pool.map(read, missing), strict=True))
    if sum(mask.numel() for mask in [*held.values(), *found.values()]) <= MEMORY_LIMIT:
        held |= found
    return [found[index] if index in found else held[index] for index in indices]


def num_workers(options: DataOptions) -> int:
    """Processes or threads that decode; torch warns where there are more than processors."""
    return min(options.workers, num_cpus())


def are_held(num_images: int, channels: int, spec: InputSpec) -> bool:
    """Whether so many decoded images are kept in memory."""
    return num_images * channels * spec.size[0] * spec.size[1] <= MEMORY_LIMIT


def decoded(images: ImageSet, spec: InputSpec, options: DataOptions) -> Tensor | None:
    """All pixels of a set, (images, channels, height, width) uint8; None where they do not fit in memory.

    Decoded once per run: a set called up before anything is written shows its bad images then.

    Raises:
        DataError: An image cannot be decoded.
    """
    channels = spec.channels + (images.masks is not None)
    if not are_held(len(images), channels, spec):
        return None
    key = (spec.size, spec.channels, spec.interpolation, spec.crop_pct, spec.crop_mode)
    if key not in images.cache:
        transform = _plain(images, spec)
        pixels = torch.empty((len(images), channels, *spec.size), dtype=torch.uint8)

        def read(index: int) -> None:
            pixels[index] = transform(*images.opened(index))

        for _ in in_threads(read, len(images), "reading images", num_workers(options)):
            pass
        images.cache[key] = pixels
    return images.cache[key]
