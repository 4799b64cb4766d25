"""What a teacher's outputs mean: logits, probabilities, one number, a sigmoid per class, an embedding."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from grey import ReadsGrey, grey_images, settled
from stepwell.errors import ConfigError, DataError, ModelError
from stepwell.models.card import Architecture, build
from stepwell.models.teacher import teacher_from_module
from stepwell.tasks.outputs import AsLogits, check_output, last_operation, logits_of, meaning_of
from stepwell.training.optimizer import no_decay_of

NAMES = ("a", "b", "c")


class Ends(ReadsGrey):
    """Reads the class off the pixels, and ends in `end`."""

    def __init__(self, num_classes: int, end) -> None:
        super().__init__(num_classes)
        self.end = end

    def forward(self, images: Tensor) -> Tensor:
        return self.end(super().forward(images))


def difference(z: Tensor) -> Tensor:
    """One logit: how much more the second class."""
    return z[:, 1:] - z[:, :1]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    return grey_images(tmp_path / "three", NAMES)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return grey_images(tmp_path / "two", NAMES[:2])


def answers(module: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return module(images)


@pytest.mark.brings("model", "a softmax at the end of forward", "its logarithm is taken for the logits; said")
def test_a_softmax_at_the_end(three):
    module = Ends(3, lambda z: (z / 10).softmax(1))
    teacher, _ = settled(three, module)
    assert isinstance(teacher.model, AsLogits)
    assert teacher.architecture.outputs == "probabilities"
    assert teacher.notes == (
        "Ends returns probabilities (a softmax at its end): their logarithms are taken for logits, and the "
        "student returns those",
    )
    images = torch.rand(5, 3, 4, 4)
    assert torch.allclose(answers(teacher.model, images).softmax(1), answers(module, images))
    assert [name for name, _ in teacher.model.named_parameters()] == ["model.greys"]


def test_a_softmax_that_rounds_to_0_stays_a_number():
    logits = logits_of(torch.tensor([[1.0, 0.0]], requires_grad=True), "probabilities")
    logits.sum().backward()
    assert logits.isfinite().all()
    assert logits.softmax(1)[0, 1] < 1e-37


@pytest.mark.brings("model", "a log_softmax at the end of forward", "logits, up to a constant: nothing to do")
def test_a_log_softmax_at_the_end(three):
    teacher, _ = settled(three, Ends(3, lambda z: z.log_softmax(1)))
    assert isinstance(teacher.model, Ends)
    assert teacher.notes == ()


@pytest.mark.brings(
    "model",
    "a sigmoid per class, and images of one class each",
    "one line: --task multi-label, or return the logits before it",
)
@pytest.mark.parametrize("end", [torch.sigmoid, nn.Sigmoid(), lambda z: z.sigmoid().view(-1, 3)])
def test_a_sigmoid_per_class(three, end):
    with pytest.raises(ConfigError) as error:
        settled(three, Ends(3, end))
    assert str(error.value) == (
        f"Ends ends in a sigmoid for each class, as where one image has several classes, and each image of "
        f"{three} has one: pass --task multi-label to read them so; or, if each image has one class, return "
        f"the logits of classes that exclude each other"
    )


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(
            difference,
            marks=pytest.mark.brings(
                "model",
                "one logit, (batch, 1) or (batch,), and two classes",
                "read as 0 and that logit; said",
            ),
        ),
        lambda z: difference(z).squeeze(1),
    ],
)
def test_one_logit_and_two_classes(two, end):
    module = Ends(2, end)
    teacher, data = settled(two, module)
    assert data.classes == ("a", "b")
    assert teacher.notes == (
        "Ends returns one number: it is read as the logit of the second class, and the student returns two "
        "logits, 0 and that number",
    )
    images = torch.rand(5, 3, 4, 4)
    logits = answers(teacher.model, images)
    assert logits.shape == (5, 2)
    assert torch.equal(logits[:, 1], answers(module, images).flatten())
    assert not logits[:, 0].any()


@pytest.mark.brings("model", "one sigmoid, and two classes", "read as the probability of the second; said")
def test_one_probability_and_two_classes(two):
    module = Ends(2, lambda z: (difference(z) / 10).sigmoid())
    teacher, _ = settled(two, module)
    assert teacher.architecture.outputs == "one probability"
    images = torch.rand(5, 3, 4, 4)
    probabilities = answers(teacher.model, images).softmax(1)
    assert torch.allclose(probabilities[:, 1:], answers(module, images))


def test_one_logit_and_three_classes(three):
    with pytest.raises(DataError, match=r"Ends has one output, for two classes, .*three has 3: fine-tune it"):
        settled(three, Ends(2, difference))


@pytest.mark.brings(
    "model", "one logit, and images without labels", "two classes: agreement can be measured, and is taught"
)
def test_one_logit_without_labels(tmp_path):
    folder = tmp_path / "flat"
    grey_images(tmp_path / "sorted", NAMES[:2])
    folder.mkdir()
    for file in (tmp_path / "sorted").rglob("*.png"):
        file.rename(folder / f"{file.parent.name}{file.name}")
    teacher, data = settled(folder, Ends(2, difference))
    assert not data.labelled
    assert answers(teacher.model, torch.rand(5, 3, 4, 4)).shape == (5, 2)
    assert teacher.classes is None
    assert len(teacher.notes) == 1
    always, _ = settled(folder, Ends(2, lambda z: difference(z).exp()))  # a number, but no logit
    assert always.notes[1].startswith("WARNING: Ends names the same class for all of ")
    (tmp_path / "names.txt").write_text("bad\ngood\n")
    named, _ = settled(folder, Ends(2, difference), class_order=tmp_path / "names.txt")
    assert named.classes == ("bad", "good")
    with pytest.raises(DataError, match="--class-order names 2 classes, and ReadsGrey has 3"):
        settled(folder, ReadsGrey(3), class_order=tmp_path / "names.txt")


@pytest.mark.brings(
    "model",
    "an embedding (unit vectors, or num_classes=0 of timm) with `--task classification`",
    "one line: --task features, or a classifier first",
)
def test_an_embedding_where_classes_are_wanted(three):
    way_out = "classification is measured by classes: pass --task features to distil its embedding, or fine-"
    with pytest.raises(
        ModelError, match=f"Ends returns vectors of length 1, and a run for the task {way_out}"
    ):
        settled(three, Ends(3, nn.functional.normalize), task="classification")
    bare = teacher_from_module(timm.create_model("test_resnet", num_classes=0), None)
    with pytest.raises(ModelError, match=rf"has no classifier \(num_classes=0\), and a run .* {way_out}"):
        settled(three, bare, task="classification")


@pytest.mark.brings(
    "model",
    "an embedding: unit vectors, or num_classes=0 of timm",
    "the student learns the embedding; cosine is measured, and nearest neighbours where there are labels",
)
def test_an_embedding(three):
    teacher, data = settled(three, Ends(3, nn.functional.normalize))
    assert (data.task, data.classes) == ("features", NAMES)
    assert teacher.notes == (
        "Ends returns an embedding of 3 numbers and no classes: the student learns that, and is measured by "
        "its cosine with it",
    )
    bare = teacher_from_module(timm.create_model("test_resnet", num_classes=0), None)
    assert settled(three, bare)[1].task == "features"
    # Whatever a model returns may be taken for an embedding.
    assert settled(three, Ends(3, nn.Identity()), task="features")[1].task == "features"
    with pytest.raises(ModelError, match="returns the same for all of 26 training images"):
        settled(three, Ends(3, lambda z: nn.functional.normalize(z * 0 + 1)))


@pytest.mark.brings("model", "outputs that are NaN on real images", "refused, with the first image")
def test_nan_on_real_images(three):
    def nan_if_bright(z: Tensor) -> Tensor:
        return torch.where((z.argmax(1) == 2)[:, None], torch.nan, z)

    with pytest.raises(ModelError) as error:
        settled(three, Ends(3, nan_if_bright))
    assert str(error.value).startswith("Ends returns NaN or infinite numbers for ")
    assert "training images, the first is c/" in str(error.value)


@pytest.mark.brings("model", "outputs that are the same for all images", "refused")
def test_the_same_for_all_images(three):
    with pytest.raises(
        ModelError, match="Ends returns the same for all of 26 training images: it cannot teach"
    ):
        settled(three, Ends(3, lambda z: z * 0 + torch.tensor([1.0, 2.0, 3.0])))


def test_the_card_says_how_to_get_logits_again():
    module = Ends(2, difference)
    architecture = Architecture(source="factory", name="Ends", outputs="one logit")
    again = build(architecture, lambda: module, Path("student"))
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(answers(again, images), logits_of(answers(module, images), "one logit"))
    assert build(Architecture(source="factory", name="Ends"), lambda: module, Path("student")) is module


def test_what_the_wrapper_passes_on():
    vit = timm.create_model("test_vit", num_classes=1)
    wrapped = AsLogits(vit, "one logit")
    assert wrapped.pretrained_cfg is vit.pretrained_cfg
    assert {"model.pos_embed", "model.cls_token"} <= no_decay_of(wrapped)


def test_the_last_operation():
    x = torch.rand(2, 3, requires_grad=True)
    assert last_operation(x.sigmoid().view(3, 2).unsqueeze(0)) == "Sigmoid"
    assert last_operation(x.softmax(1)) == "Softmax"
    assert last_operation(x.detach()) == ""
    assert last_operation(x.sigmoid() * 2) == "Mul"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ((torch.zeros(1, 2), torch.zeros(1, 2)), "a tuple"),
        (torch.zeros(3), r"a tensor \(3,\)"),
        (torch.zeros(()), r"a tensor \(\)"),
        (torch.zeros(1, 2, 4, 4), r"a tensor \(1, 2, 4, 4\)"),
    ],
)
def test_outputs_that_are_no_logits(output, said):
    with pytest.raises(
        ConfigError, match=rf"own must return logits \(batch, classes\), not {said} for one image"
    ):
        check_output(output, "own")


KEYS = [str(i) for i in range(50)]


def test_numbers_between_0_and_1_that_spread_widely_are_no_logits():
    """Whatever the last operation was, such as one that keeps them off 0 and 1."""
    wide = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    assert meaning_of(wide, "Div", "It", KEYS) == "class probabilities"
    assert meaning_of(wide[:, :1], "Div", "It", KEYS) == "one probability"
    assert meaning_of(0.1 * wide, "Addmm", "It", KEYS) == "logits"
    assert meaning_of(wide - 0.5, "Addmm", "It", KEYS) == "logits"


def test_so_many_times_probabilities_are_probabilities():
    shares = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    assert meaning_of(100 * shares, "Mul", "It", KEYS) == "probabilities"
    logits = logits_of(100 * shares, "probabilities")
    torch.testing.assert_close(logits.softmax(dim=1), shares)


def test_a_clamp_behind_a_sigmoid_hides_nothing():
    x = torch.rand(2, 3, requires_grad=True)
    assert last_operation(x.sigmoid().clamp(1e-6, 1 - 1e-6)) == "Sigmoid"


class Mixes(ReadsGrey):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).mean(dim=0, keepdim=True)


@pytest.mark.brings("model", "a forward pass that mixes up the images of a batch", "refused")
def test_images_of_a_batch_are_kept_apart(tmp_path):
    folder = grey_images(tmp_path / "images", ("a", "b", "c"))
    with pytest.raises(ModelError, match=r"returns 1 rows for \d+ images: its forward pass must keep"):
        settled(folder, Mixes(3))


def test_a_sigmoid_that_is_unsure_is_no_softmax():
    """All near 0.5: the sums are as equal as those of probabilities."""
    unsure = 0.5 + 1e-5 * torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    assert meaning_of(unsure, "Sigmoid", "It", KEYS) == "class probabilities"
    assert meaning_of(unsure, "Div", "It", KEYS) == "probabilities"
