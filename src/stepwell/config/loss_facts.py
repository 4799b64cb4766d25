"""What is known of every loss before a tensor is at hand: one record each, and nothing here imports torch.

A loss is told in two places: its record here, and its `case` in `losses/choose.py`, which builds it.
Options, checks, costs and the call itself follow from the record. Where a default comes from is said in the
loss's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Reads = Literal["logits", "features", "states", "student_states", "maps", "middle_map", "last_map", "outputs"]
"""What a loss is called with, the student's first, then the teacher's:
    logits          (B, classes)
    features        (B, dim), what the classifier reads
    states          outputs of the compared blocks, from shallow to deep, in whatever layout they have
    student_states  the student's alone
    maps            states as maps (B, C, H, W), as many as both models have, paired from the deepest
    middle_map      the middle one of them
    last_map        the deepest one of them
    outputs         the whole `Output`
"""
Given = Literal["labels", "indices", "progress", "target"]
"""What a loss is told besides: the labels of the images, their places among the training images, the share of
the training that is over, or the whole `Target`."""


@dataclass(frozen=True)
class LossFacts:
    """What a loss reads, needs and costs.

    Attributes:
        reads: What it is called with, of both models.
        given: What follows after that.
        pretraining: A training before the student's: of the `student` by this loss alone, which is silent
            afterwards; or of the `loss` itself, whose `pretraining_loss` gets the teacher's piece of the
            first of `reads`, and for which only the teacher runs.
        pretraining_share: Epochs of that training as a share of those of the student's.
        rotations: Whether it makes four images of each, by turns of 90 degrees, which both models see.
        implied: Options that its authors use, where the user gives none.
        implied_of_masks: Of these, those that are others for masks.
        masks: Whether it is for one class an image alone (`never`), for one class a pixel as well (`too`), or
            for that alone (`only`).
        exclusive: Whether it is defined only where each image has one class: it has a softmax, or asks which.
        between_slices: Where it is for students of another architecture alone: the options of the steps
            between slices of one model, which such a run has besides. Its states are then those behind the
            last two stages of either model.
        relates_images: Whether the images of a batch do not stand for themselves: it compares them with each
            other, or remembers what it has seen. Several processes then compute it of the whole batch.
    """

    reads: tuple[Reads, ...]
    given: tuple[Given, ...] = ()
    pretraining: Literal["student", "loss"] | None = None
    pretraining_share: float = 1 / 8
    rotations: bool = False
    implied: Mapping[str, Any] = field(default_factory=dict)
    implied_of_masks: Mapping[str, Any] = field(default_factory=dict)
    exclusive: bool = False
    masks: Literal["never", "too", "only"] = "never"
    between_slices: Mapping[str, Any] = field(default_factory=dict)
    relates_images: bool = False

    @property
    def views(self) -> int:
        """Images that both models see of each."""
        return 4 if self.rotations else 1

    @property
    def needs_labels(self) -> bool:
        """Whether it is not defined without labels."""
        return "labels" in self.given

    @property
    def needs_unmixed(self) -> bool:
        """Whether it must know which class, or which training image, an image is: a mixed one is two."""
        return not {"labels", "indices"}.isdisjoint(self.given)

    @property
    def needs_states(self) -> bool:
        """Whether it compares hidden states; the features before the classifier are there in every model."""
        return self.needs_maps or not {"states", "student_states"}.isdisjoint(self.reads)

    @property
    def needs_maps(self) -> bool:
        """Whether it compares them as maps."""
        return not {"maps", "middle_map", "last_map"}.isdisjoint(self.reads)

    @property
    def needs_teacher_states(self) -> bool:
        """Whether the teacher's hidden states are among them."""
        return self.needs_states and "student_states" not in self.reads

    @property
    def reads_stages(self) -> bool:
        """Whether its states are those behind the last two stages of two architectures."""
        return bool(self.between_slices)

    @property
    def is_silent_after_pretraining(self) -> bool:
        """Whether it is no part of the student's training itself."""
        return self.pretraining == "student"


OWN_CODE = LossFacts(reads=("outputs",), given=("target",), masks="too", relates_images=True)
"""A loss of the user's own, FILE.py:FUNCTION, which may relate images."""

LOGIT_LOSSES: Mapping[str, LossFacts] = {
    "kd": LossFacts(reads=("logits",), masks="too"),
    "dkd": LossFacts(
        reads=("logits",),
        given=("labels",),
        implied={"temperature": 4.0, "loss_warmup": 1 / 12},
        exclusive=True,
    ),
    "dist": LossFacts(
        reads=("logits",),
        implied={"logit_weight": 2.0},
        implied_of_masks={"logit_weight": 1.0},
        exclusive=True,
        masks="too",
        relates_images=True,
    ),
    # The labels are in it.
    "pld": LossFacts(reads=("logits",), given=("labels",), implied={"task_weight": 0.0}, exclusive=True),
    # Its share of the teacher follows the loss of whole batches.
    "taid": LossFacts(reads=("logits",), given=("progress",), exclusive=True, relates_images=True),
    "cwd-logits": LossFacts(reads=("logits",), implied={"logit_weight": 3.0}, masks="only"),
}

FEATURE_LOSSES: Mapping[str, LossFacts] = {
    "states": LossFacts(reads=("states",), masks="too"),
    "fitnet": LossFacts(reads=("middle_map",), implied={"feature_weight": 100.0}, masks="too"),
    "at": LossFacts(reads=("maps",), implied={"feature_weight": 1000.0}, masks="too"),
    "fsp": LossFacts(reads=("maps",), pretraining="student", implied={"feature_weight": 50.0}),
    "nst": LossFacts(reads=("maps",), implied={"feature_weight": 50.0}),
    "ab": LossFacts(reads=("maps",), pretraining="student"),
    "ft": LossFacts(reads=("last_map",), pretraining="loss", implied={"feature_weight": 200.0}),
    "vid": LossFacts(reads=("maps",), masks="too"),
    "review": LossFacts(reads=("maps",), implied={"loss_warmup": 1 / 12}, masks="too"),
    "sp": LossFacts(reads=("last_map",), implied={"feature_weight": 3000.0}, relates_images=True),
    "cc": LossFacts(reads=("features",), implied={"feature_weight": 0.02}, relates_images=True),
    "rkd": LossFacts(reads=("features",), relates_images=True),
    "pkt": LossFacts(reads=("features",), implied={"feature_weight": 30000.0}, relates_images=True),
    # Its negatives are images of other classes.
    "crd": LossFacts(
        reads=("features",),
        given=("indices",),
        implied={"feature_weight": 0.8},
        exclusive=True,
        relates_images=True,
    ),
    "sskd": LossFacts(
        reads=("features", "logits"),
        given=("labels",),
        pretraining="loss",
        pretraining_share=1 / 4,
        rotations=True,
        exclusive=True,
        relates_images=True,
    ),
    "ofa": LossFacts(reads=("student_states", "logits"), given=("labels",), exclusive=True),
    # Of masks: on the maps that the classifiers read.
    "cwd": LossFacts(reads=("features",), implied={"feature_weight": 50.0}, masks="only"),
    # Its weights are within it.
    "skd": LossFacts(reads=("features", "logits"), masks="only", relates_images=True),
    "ifvd": LossFacts(
        reads=("features",),
        given=("labels",),
        implied={"feature_weight": 20.0},
        masks="only",
        relates_images=True,
    ),
    "cirkd": LossFacts(reads=("features",), given=("labels",), masks="only", relates_images=True),
    # Slices have AMD's loss: half of it, as the other two terms are halved.
    "scalekd": LossFacts(
        reads=("states",),
        implied={"task_weight": 0.5, "logit_weight": 0.5},
        between_slices={"feature_loss": "states", "feature_weight": 0.5, "feature_args": {}},
    ),
}


def logit_facts(name: str) -> LossFacts:
    """The record of a loss on the logits, or of the user's own code."""
    return LOGIT_LOSSES.get(name, OWN_CODE)


def feature_facts(name: str) -> LossFacts:
    """The record of a loss on hidden states or features, or of the user's own code."""
    return FEATURE_LOSSES.get(name, OWN_CODE)
