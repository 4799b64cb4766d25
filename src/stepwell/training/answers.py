"""What a frozen model answers on views of the training images, computed once and read ever after.

    logits   fp16, of every class; or
    top      the largest k of them, with their classes, and the rest of the probability spread evenly:
             every other class gets the logit log(sum of exp(z) over the others / their number)

Spreading is TinyViT's (Wu et al., ECCV 2022), fixed views of each image are FKD's (Shen & Xing, ECCV 2022).
Files hold `PART` images of one view each and are written whole, so a run that was killed goes on after the
last. They lie in a folder named by the weights of the model, so another one never reads them. The first
process alone writes; each reads the rows of its own images, if all see the same files, and else the first one
reads for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from stepwell.data.batches import Batch, TrainBatches
from stepwell.errors import ModelError, RunDirError
from stepwell.losses.output import Output
from stepwell.run.atomic import plain_tensors, write_atomically, writing
from stepwell.run.distributed import copy_from_main, from_main, joined, whole
from stepwell.run.processes import is_main, rank, world
from stepwell.run.progress import progress
from stepwell.run.sharded_model import keep_up

PART = 2**14
"""Images in a file."""
KEPT_AS = torch.float16


@dataclass(frozen=True)
class Answers:
    """The answers of one model.

    Attributes:
        folder: Where they are kept.
        num_images: Training images.
        num_classes: Logits of each.
        top: How many of them are kept; 0 for all.
        passes: What they have cost and no training is charged with, in forward passes of the teacher.
        parts: Files that are open; their tensors are read from disk as they are used.
    """

    folder: Path
    num_images: int
    num_classes: int
    top: int = 0
    passes: float = 0.0
    parts: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def num_bytes(self) -> int:
        """Of one view."""
        return self.num_images * bytes_of(self.num_classes, self.top)

    def of(self, batch: Batch) -> Output:
        """The answer to a batch, without states."""
        if world() == 1 or self._are_seen_by_all:
            logits = self._rows(batch.view, batch.indices)
        else:
            indices = whole(batch.indices)
            rows = torch.empty(len(indices), self.num_classes)
            if is_main():
                rows = self._rows(batch.view, indices)
            copy_from_main([rows])
            logits = rows.chunk(world())[rank()]
        device = batch.images.device
        if device.type == "cuda":  # what is not pinned is copied when the device has time for it
            logits = logits.pin_memory()
        logits = logits.to(device, non_blocking=True)
        return Output(logits, [], logits)

    @cached_property
    def _are_seen_by_all(self) -> bool:
        """Whether the files of the first process lie on a disk that all of them share; asked once."""
        theirs = from_main(self._files)  # which by then has written all
        return all(joined([self._files() == theirs]))

    def _files(self) -> list[tuple[str, int, int]]:
        found = [(file.name, file.stat()) for file in sorted(self.folder.glob("*.safetensors"))]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]

    def _rows(self, view: int, indices: Int[Tensor, " batch"]) -> Float[Tensor, "batch classes"]:
        rows = torch.empty(len(indices), self.num_classes)
        for part in (indices // PART).unique().tolist():
            here = (indices // PART) == part
            kept = {name: tensor[indices[here] % PART] for name, tensor in self._part(view, part).items()}
            rows[here] = unpacked(kept, self.num_classes)
        return rows

    def _part(self, view: int, part: int) -> dict[str, Tensor]:
        if (view, part) not in self.parts:
            file = self.file(view, part)
            try:
                self.parts[view, part] = load_file(file)
            except (OSError, SafetensorError):
                raise RunDirError(
                    f"{file} is gone or damaged: remove it and {self.folder.parents[1] / 'stages'}/answers*, "
                    f"and the same command computes it again"
                ) from None
        return self.parts[view, part]

    def file(self, view: int, part: int) -> Path:
        """Where the answers to one view of some images are kept."""
        return self.folder / f"view-{view:03d}-{part:05d}.safetensors"

    @torch.no_grad()
    def compute(self, model: nn.Module, batches: TrainBatches, autocast: torch.autocast, title: str) -> None:
        """Let the model, frozen and in eval mode, answer all views; what is there already stays.

        Raises:
            ModelError: An answer is larger than fp16 holds.
            RunDirError: There is no space.
        """
        jobs = [(v, p) for v in range(batches.num_views) for p in range(-(-self.num_images // PART))]
        is_done = from_main(lambda: [self.file(*job).is_file() for job in jobs])
        if is_main():
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
        with progress(title, len(jobs)) as advance:
            for (view, part), done in zip(jobs, is_done, strict=True):
                if not done:
                    images = range(part * PART, min((part + 1) * PART, self.num_images))
                    kept = self._computed(model, batches, autocast, view, images)
                    if is_main():
                        write_atomically(self.file(view, part), save(plain_tensors(kept)))
                advance("")

    def _computed(
        self, model: nn.Module, batches: TrainBatches, autocast: torch.autocast, view: int, images: range
    ) -> dict[str, Tensor]:
        """Each process computes a stretch; all of it is joined."""
        number = len(images)
        mine = images[number * rank() // world() : number * (rank() + 1) // world()]
        size, stretch = batches.images_per_process, []
        for batch in batches.of_view(view, mine):
            with autocast:
                logits = model(batch.images)
            stretch.append(packed(logits.float().cpu(), self.top))
        blank, largest = batches.blank(model)[:1], math.ceil(number / world())
        keep_up(model, len(stretch), math.ceil(largest / size), blank)
        whole_part = joined(stretch)
        return {name: torch.cat([each[name] for each in whole_part]) for name in whole_part[0]}


def bytes_of(num_classes: int, top: int) -> int:
    """Of one answer."""
    return 6 * top + 2 if 0 < top < num_classes else 2 * num_classes


def packed(logits: Float[Tensor, "batch classes"], top: int) -> dict[str, Tensor]:
    """Logits as they are kept.

    Raises:
        ModelError: They are larger than fp16 holds.
    """
    if not logits.to(KEPT_AS).isfinite().all():
        raise ModelError(
            "--cache-teacher keeps logits as fp16, and the teacher's go beyond 65,504: leave it out"
        )
    if not 0 < top < logits.shape[1]:
        return {"logits": logits.to(KEPT_AS)}
    values, classes = logits.topk(top)
    others = logits.scatter(1, classes, -torch.inf)
    rest = others.logsumexp(1) - torch.log(torch.tensor(float(logits.shape[1] - top)))
    return {"top": values.to(KEPT_AS), "classes": classes.int(), "rest": rest.to(KEPT_AS)}


def unpacked(kept: Mapping[str, Tensor], num_classes: int) -> Float[Tensor, "batch classes"]:
    """The logits again, in fp32."""
    if "logits" in kept:
        return kept["logits"].float()
    rows = kept["rest"].float()[:, None].repeat(1, num_classes)
    return rows.scatter_(1, kept["classes"].long(), kept["top"].float())
