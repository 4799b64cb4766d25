"""Images with masks: what is found, what is refused, and that image and mask are augmented alike."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from masks import CLASSES, VOID, write_masks
from stepwell.config.options import DataOptions
from stepwell.config.recipe_options import RecipeOptions
from stepwell.data import feed, mask_transforms
from stepwell.data.batches import EvalBatches, TrainBatches
from stepwell.data.mask_classes import IGNORED, numbered_classes, palette, ranges, read_classes
from stepwell.data.mask_transforms import MaskTrainTransform
from stepwell.data.spec import InputSpec
from stepwell.data.splits import in_order, resolve_data
from stepwell.errors import ConfigError, DataError

CPU = torch.device("cpu")
SPEC = InputSpec((32, 48), 3, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "squash")


def options(folder, **more) -> DataOptions:
    return DataOptions(data=str(folder), workers=0, **more)


def error_of(folder, **more) -> str:
    with pytest.raises(DataError) as error:
        resolve_data(options(folder, **more))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def folder(tmp_path):
    return write_masks(tmp_path / "data", {"train": 6, "val": 2, "test": 3})


def save_mask(file, pixels: np.ndarray, mode: str | None = None) -> None:
    Image.fromarray(pixels, mode).save(file)


# --- what is found


@pytest.mark.brings(
    "folder", "images/ and masks/ with train, val and test in each", "The class of each pixel"
)
def test_splits_as_given(folder):
    data = resolve_data(options(folder))
    assert data.task == "segmentation"
    assert data.classes == CLASSES
    assert [len(split) for split in (data.train, data.selection, data.test)] == [6, 2, 3]
    assert (data.test_from, data.selection_from) == ("images/test/", "images/val/")
    mask = np.array(data.train.opened(0)[1])
    raw = np.array(Image.open(folder / "masks/train/000.png"))
    assert (mask == np.where(raw == VOID, IGNORED, raw)).all()


def test_one_folder_each_is_split_by_hash(tmp_path):
    write_masks(tmp_path, {"": 30})
    data = resolve_data(options(tmp_path))
    assert len(data.train) + len(data.selection) + len(data.test) == 30
    assert data.test_from == "a tenth by hash of the file name"
    again = resolve_data(options(tmp_path))
    assert (again.test.keys, again.fingerprint) == (data.test.keys, data.fingerprint)


def test_classes_that_no_list_names(tmp_path, capsys):
    write_masks(tmp_path, {"": 12}, listed=False)
    data = resolve_data(options(tmp_path, ignore_index=(VOID,)))
    assert data.classes == ("class 0", "class 1", "class 2")
    assert "classes of the masks, which no list names: 0 to 2, ignored 9, 255" in capsys.readouterr().err
    assert len(resolve_data(options(tmp_path)).classes) == VOID + 1


def test_another_meaning_is_another_fingerprint(tmp_path):
    write_masks(tmp_path, {"": 12})
    before = resolve_data(options(tmp_path)).fingerprint
    (tmp_path / "classes.csv").write_text("name,index,ignore\nground,1,\ndisc,0,\nbar,2,\nvoid,9,yes")
    assert resolve_data(options(tmp_path)).fingerprint != before


def test_other_colours_are_another_fingerprint(tmp_path):
    write_masks(tmp_path, {"": 12})
    found = []
    for red in ("#ff0000", "#fe0000"):
        rows = [f"ground,0,{red},", "disc,1,#00ff00,", "bar,2,#0000ff,", "void,9,,yes"]
        (tmp_path / "classes.csv").write_text("\n".join(["name,index,colour,ignore", *rows]))
        found.append(resolve_data(options(tmp_path)).fingerprint)
    assert found[0] != found[1]


@pytest.mark.parametrize("split", ["train", "val", "test", "more"])
def test_a_repainted_mask_is_another_fingerprint(folder, split):
    """Two pixels that change places, so that each class has as many as before."""
    write_masks(folder / "more", {"": 2}, listed=False)
    given = options(folder, selection_data=folder / "more" if split == "more" else None)
    before = resolve_data(given).fingerprint
    file = folder / "more/masks/001.png" if split == "more" else folder / f"masks/{split}/001.png"
    mask = np.array(Image.open(file))
    save_mask(file, mask)
    assert resolve_data(given).fingerprint == before
    (row, column), (other_row, other_column) = (np.argwhere(mask == c)[0] for c in (1, 2))
    mask[row, column], mask[other_row, other_column] = 2, 1
    save_mask(file, mask)
    assert resolve_data(given).fingerprint != before


def test_the_number_of_each_class_is_kept(tmp_path):
    write_masks(tmp_path, {"": 12})
    (tmp_path / "classes.csv").write_text("name,index,ignore\nground,1,\ndisc,0,\nbar,2,\nvoid,9,yes")
    assert resolve_data(options(tmp_path)).mask_numbers == [1, 0, 2]
    assert numbered_classes([0, 255]).number_of_each == [0, 255]


@pytest.mark.brings("folder", "masks of black and white alone", "Background and foreground")
def test_black_and_white(tmp_path):
    write_masks(tmp_path, {"": 12}, listed=False)
    for file in (tmp_path / "masks").iterdir():
        save_mask(file, np.where(np.array(Image.open(file)) == 1, 255, 0).astype(np.uint8))
    data = resolve_data(options(tmp_path))
    assert data.classes == ("background", "foreground")
    assert set(np.unique(np.array(data.train.opened(0)[1]))) <= {0, 1}


@pytest.mark.brings("folder", "masks in colours, with a list name,r,g,b", "Read by the colours")
def test_coloured_masks(tmp_path):
    write_masks(tmp_path, {"": 12})
    colours = {0: (0, 0, 0), 1: (255, 0, 0), 2: (0, 0, 255), VOID: (9, 9, 9)}
    expected = {}
    for file in sorted((tmp_path / "masks").iterdir()):
        mask = np.array(Image.open(file))
        expected[file.stem] = np.where(mask == VOID, IGNORED, mask)
        save_mask(file, np.array([colours.get(i, (0, 0, 0)) for i in range(10)], np.uint8)[mask])
    rows = ["ground,0,0,0,", "disc,255,0,0,", "bar,0,0,255,", "void,9,9,9,yes"]
    (tmp_path / "classes.csv").write_text("\n".join(["name,r,g,b,ignore", *rows]))
    data = resolve_data(options(tmp_path))
    assert data.colours == [(0, 0, 0), (255, 0, 0), (0, 0, 255)]
    for i, key in enumerate(data.train.keys):
        assert (np.array(data.train.opened(i)[1]) == expected[key.removesuffix(".png")]).all()
    save_mask(tmp_path / "masks/003.png", np.full((32, 48, 3), 77, np.uint8))
    assert error_of(tmp_path) == (
        f"{tmp_path}/masks/003.png: pixel at row 0, column 0 has the colour (77, 77, 77), which is no class "
        f"of the list: mend the mask, or add the colour to the list (with ignore, if it is to count nowhere)"
    )


def test_a_palette_is_read_by_its_colours_where_all_are_listed(tmp_path):
    write_masks(tmp_path, {"": 12})
    for file in (tmp_path / "masks").iterdir():
        image = Image.fromarray(np.array(Image.open(file))).convert("P")
        mask = np.array(Image.open(file))
        image = Image.new("P", mask.shape[::-1])
        image.putdata(mask.ravel().tolist())
        image.putpalette([1, 1, 1, 2, 2, 2, 3, 3, 3, *(0,) * 18, 9, 9, 9])
        image.save(file)
    by_number = resolve_data(options(tmp_path))
    first = np.array(by_number.train.opened(0)[1])
    rows = ["bar,3,3,3,", "disc,2,2,2,", "ground,1,1,1,", "void,9,9,9,yes"]
    (tmp_path / "classes.csv").write_text("\n".join(["name,r,g,b,ignore", *rows]))
    by_colour = resolve_data(options(tmp_path))
    assert by_colour.classes == ("bar", "disc", "ground")
    turned = np.array(by_colour.train.opened(0)[1])
    assert (turned == np.where(first == IGNORED, IGNORED, 2 - first)).all()


def test_a_palette_is_judged_once_for_all_masks(tmp_path, capsys):
    """A mask of one class shows one colour, here that of void: by itself it would count nowhere."""
    write_masks(tmp_path, {"": 12})
    grey = [level for level in range(256) for _ in range(3)]
    for i, file in enumerate(sorted((tmp_path / "masks").iterdir())):
        mask = np.array(Image.open(file))
        image = Image.fromarray(np.zeros_like(mask) if i < 6 else mask).convert("P")
        image.putpalette(grey)
        image.save(file)
    rows = ["ground,0,#808080,", "disc,1,#800000,", "bar,2,#000080,", f"void,{VOID},#000000,yes"]
    (tmp_path / "classes.csv").write_text("\n".join(["name,index,colour,ignore", *rows]))
    data = resolve_data(options(tmp_path))
    for split in (data.train, data.selection, data.test):
        for i, key in enumerate(split.keys):
            raw = np.array(Image.open(tmp_path / "masks" / key))
            assert (np.array(split.opened(i)[1]) == np.where(raw == VOID, IGNORED, raw)).all()
    said = " ".join(capsys.readouterr().err.split())
    assert "006.png shows the colour (1, 1, 1), which is no class of the list" in said


@pytest.mark.parametrize("coloured", [False, True])
def test_classes_in_another_order_take_their_pixels_along(tmp_path, coloured):
    write_masks(tmp_path / "data", {"": 12})
    paints = np.array([(9, 9, i) for i in range(10)], np.uint8)
    for file in (tmp_path / "data/masks").iterdir() if coloured else ():
        save_mask(file, paints[np.array(Image.open(file))])
    rows = [f"{name},{i},#09090{i}," for i, name in enumerate(CLASSES)]
    (tmp_path / "data/classes.csv").write_text(
        "\n".join(["name,index,colour,ignore", *rows, f"void,{VOID},#090909,yes"])
    )
    (tmp_path / "order.txt").write_text("bar\nground\ndisc\n")
    before = resolve_data(options(tmp_path / "data"))
    after = resolve_data(options(tmp_path / "data", class_order=tmp_path / "order.txt"))
    assert after.classes == ("bar", "ground", "disc")
    assert after.mask_numbers == [2, 0, 1]
    assert after.colours == [(9, 9, 2), (9, 9, 0), (9, 9, 1)]
    assert after.fingerprint != before.fingerprint
    moved_to = np.array([1, 2, 0, *[IGNORED] * 253])
    for i in range(len(before.train)):
        one, other = (np.array(data.train.opened(i)[1]) for data in (before, after))
        assert (moved_to[one] == other).all()
    # What has been decoded holds masks, too.
    list(EvalBatches(before.train, SPEC, options(tmp_path), CPU))
    moved = in_order(before, after.classes)
    seen, expected = (
        torch.cat([batch.labels for batch in EvalBatches(data.train, SPEC, options(tmp_path), CPU)])
        for data in (moved, after)
    )
    assert torch.equal(seen, expected)


def test_a_suffix_that_all_masks_have(folder):
    for file in (folder / "masks").rglob("*.png"):
        file.rename(file.with_name(f"{file.stem}_L.png"))
    assert len(resolve_data(options(folder)).train) == 6


def test_names_of_classes(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("road\nsky\n")
    classes = read_classes(file)
    assert (classes.names, classes.colours) == (("road", "sky"), palette(2))
    assert palette(3) == ((128, 0, 0), (0, 128, 0), (128, 128, 0))  # Pascal VOC's
    assert ranges([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7 to 8"


# --- what is refused


def test_an_image_without_a_mask(folder):
    (folder / "masks/val/001.png").unlink()
    assert error_of(folder) == (
        f"{folder}/images/val/001.png has no mask: expected {folder}/masks/val/001.png; add it, or take the "
        f"image out"
    )


@pytest.mark.brings("folder", "a mask without its image, or the reverse", "Refused; the file is named")
def test_a_mask_without_an_image(folder):
    (folder / "images/train/002.png").unlink()
    (folder / "images/train/003.png").unlink()
    assert error_of(folder) == (
        f"{folder}/masks/train/002.png has no image (2 such masks) in {folder}/images/train: add it, or take "
        f"the mask out"
    )


@pytest.mark.brings("folder", "a mask of another size than its image", "Refused; both sizes are named")
def test_another_size(folder):
    save_mask(folder / "masks/test/001.png", np.zeros((30, 48), np.uint8))
    assert error_of(folder) == (
        f"{folder}/masks/test/001.png has 48 x 30 pixels, and {folder}/images/test/001.png has 48 x 32: a "
        f"mask must have its image's size"
    )


@pytest.mark.brings(
    "folder", "a number in a mask that is no class", "Refused; file, pixel and number are named"
)
def test_a_number_that_is_no_class(folder):
    mask = np.zeros((32, 48), np.uint8)
    mask[5, 7] = 37
    save_mask(folder / "masks/val/000.png", mask)
    assert error_of(folder) == (
        f"{folder}/masks/val/000.png: pixel at row 5, column 7 is 37, which is no class (there are 0 to 2, "
        f"ignored 9, 255): mend the mask, name the class in the list, or pass --ignore-index 37"
    )
    assert len(resolve_data(options(folder, ignore_index=(37,))).classes) == 3


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("number", [-3, -(2**31), 2**31 - 1])
def test_a_number_that_only_32_bits_hold(folder, listed, number):
    mask = np.zeros((32, 48), np.int32)
    mask[5, 7] = number
    Image.fromarray(mask).save(folder / "masks/val/000.tif")
    (folder / "masks/val/000.png").unlink()
    if not listed:
        (folder / "classes.csv").unlink()
    allowed = "0 to 2, ignored 9, 255" if listed else "0 to 9, ignored 255"
    assert error_of(folder) == (
        f"{folder}/masks/val/000.tif: pixel at row 5, column 7 is {number}, which is no class (there are "
        f"{allowed}): mend the mask, numbers of classes are 0 to 65535, and 255 counts nowhere"
    )


def test_other_refusals(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "jpeg")
    Image.open(folder / "masks/train/000.png").convert("L").save(tmp_path / "jpeg/masks/train/000.jpg")
    (tmp_path / "jpeg/masks/train/000.png").unlink()
    assert "000.jpg is a JPEG, which changes the numbers of classes" in error_of(tmp_path / "jpeg")
    shutil.rmtree(folder / "masks/test")
    assert error_of(folder).startswith(f"there is {folder}/images/test but no {folder}/masks/test")
    (folder / "masks/train/000.png").write_bytes(b"no image")
    shutil.rmtree(folder / "images/test")
    assert error_of(folder).startswith(f"cannot decode mask {folder}/masks/train/000.png")
    (tmp_path / "flat").mkdir()
    assert "does not hold images/ and masks/" in error_of(tmp_path / "flat", task="segmentation")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("index,colour\n0,red", "has no column name: its first line should be such as name,r,g,b"),
        ("name,index\na,0\nb,0", "class b: number 0 is there twice"),
        ("name\na\na", "class a: it is there twice"),
        ("name,colour\na,red\nb,", "class a: 'red' is no colour: write #rrggbb"),
        ("name,index\na,x\nb,1", "class a: 'x' is no number of a class"),
        ("name,ignore\na,\nb,yes", "names 1 classes that are not ignored: two or more are needed"),
        ("name,colour\na,#010203\nb,#010203", "class b: its colour (1, 2, 3) is another class's too"),
    ],
)
def test_lists_that_make_no_sense(folder, text, says):
    (folder / "classes.csv").write_text(text)
    assert says in error_of(folder)


# --- augmentation


def marked(folder):
    """Images whose colour tells their class: 80 times it."""
    for file in (folder / "masks").rglob("*.png"):
        mask = np.array(Image.open(file))
        mask[mask == VOID] = 0
        save_mask(file, mask)
        twin = folder / "images" / file.relative_to(folder / "masks")
        save_mask(twin, np.repeat((80 * mask + 40)[..., None].astype(np.uint8), 3, axis=2))
    return folder


def test_image_and_mask_are_augmented_alike(folder):
    """Where colours tell the classes, they still do after scaling, cropping and mirroring."""
    data = resolve_data(options(marked(folder)))
    batches = TrainBatches(data.train, SPEC, options(folder, batch_size=6), 0, CPU)
    batch = next(batches.epoch(0))
    grey = batch.images.mean(dim=1)
    plain = next(iter(EvalBatches(data.train, SPEC, options(folder, batch_size=6), CPU)))
    assert not torch.equal(batch.labels, plain.labels[batch.indices])
    for image, labels in zip(grey, batch.labels, strict=True):
        known = labels != IGNORED
        means = [image[known & (labels == c)].mean().item() for c in range(3) if (labels == c).sum() > 20]
        assert means == sorted(means)
        inner = [image[known & (labels == c)].median().item() for c in labels[known].unique().tolist()]
        assert inner == sorted(inner)
    assert (batch.labels == IGNORED).any()  # a crop beyond the image


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
def test_a_mask_lies_where_its_image_does(scale, axis, monkeypatch):
    """The edge of an image of two halves and that of its mask, over all places where it can be."""
    monkeypatch.setattr(mask_transforms, "SCALES", (scale, scale))
    augmented = MaskTrainTransform(SPEC)
    shifts = []
    for place in range(45, 100):
        mask = np.zeros((140, 150), np.uint8)
        (mask if axis == "rows" else mask.T)[place:] = 1
        torch.manual_seed(place)
        seen = augmented(*(Image.fromarray(pixels) for pixels in (60 + 60 * mask, mask))).float()
        seen = seen if axis == "rows" else seen.mT
        image, labels = seen[0].mean(dim=1), seen[3].amin(dim=1)
        image, labels = image[labels != IGNORED], labels[labels != IGNORED]
        if len(labels.unique()) == 2:  # else the edge is beyond the crop
            light = (image - image.min()) / (image.max() - image.min())
            shifts.append((light.sum() - labels.sum()).item())  # mirrored or not
    assert len(shifts) > 10
    assert abs(np.mean(shifts)) < 0.1


def test_what_an_image_looks_like_depends_on_seed_epoch_and_image_alone(folder, monkeypatch):
    data = resolve_data(options(folder))

    def seen(batch_size: int, workers: int, seed: int = 0, epoch: int = 0) -> dict[int, tuple]:
        given = DataOptions(data=str(folder), batch_size=batch_size, workers=workers)
        batches = TrainBatches(data.train, SPEC, given, seed, CPU)
        return {
            index: (image, labels)
            for batch in batches.epoch(epoch)
            for index, image, labels in zip(batch.indices.tolist(), batch.images, batch.labels, strict=True)
        }

    one, other = seen(6, 0), seen(2, 2)
    assert all(torch.equal(a, b) for i in range(6) for a, b in zip(one[i], other[i], strict=True))
    assert not torch.equal(one[0][0], seen(6, 0, seed=1)[0][0])
    assert not torch.equal(one[0][1], seen(6, 0, epoch=1)[0][1])


def test_masks_of_images_that_do_not_fit_in_memory(folder, monkeypatch):
    data = resolve_data(options(folder))
    held = [b.labels for b in EvalBatches(data.test, SPEC, options(folder), CPU)]
    monkeypatch.setattr(feed, "MEMORY_LIMIT", 0)
    read = [b.labels for b in EvalBatches(resolve_data(options(folder)).test, SPEC, options(folder), CPU)]
    assert torch.equal(torch.cat(held), torch.cat(read))


@pytest.mark.parametrize(
    ("more", "recipe", "says"),
    [
        ({"augment": "affine"}, {}, "--augment affine is for images with a class each"),
        ({}, {"mixup": 0.2}, "--mixup is for images with a class each"),
        ({}, {"random_erasing": 0.2}, "--random-erasing is for images with a class each"),
        ({}, {"rand_augment": "rand-m9"}, "--rand-augment is for images with a class each"),
    ],
)
def test_what_would_change_the_image_alone(folder, more, recipe, says):
    data = resolve_data(options(folder))
    with pytest.raises(ConfigError, match=says):
        TrainBatches(data.train, SPEC, options(folder, **more), 0, CPU, recipe=RecipeOptions(**recipe))
