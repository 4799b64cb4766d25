"""Images of more than 8 bits, of floats, and of every mode: which grey comes out, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data import error_of, resolve

from stepwell.data.depth import likely_white, to_8_bits
from stepwell.data.images import FolderReader, ImageSet
from stepwell.data.spec import InputSpec
from stepwell.data.transforms import eval_transform
from stepwell.errors import DataError

RAMP = np.linspace(0, 1, 16).reshape(4, 4)
GREYS = np.rint(255 * RAMP)
"""What the ramp from black to white must become."""


def write_set(folder: Path, values: np.ndarray, ending: str, num_images: int = 6) -> Path:
    """Two classes of equal images; the last of each is darker: no image says what is white by itself."""
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for i in range(num_images):
            shown = values if i < num_images - 1 else (values / 2).astype(values.dtype)
            Image.fromarray(shown).save(folder / name / f"{i}{ending}")
    return folder


@pytest.mark.parametrize(
    ("values", "ending", "white"),
    [
        pytest.param(
            RAMP.astype(np.float32),
            ".tif",
            1,
            marks=pytest.mark.brings("image", "float TIFF in 0..1", "1 is white; nothing becomes zeros."),
        ),
        ((RAMP * 1.02).astype(np.float32), ".tif", 1),
        ((RAMP * 255).astype(np.float32), ".tif", 255),
        ((RAMP * 60000).astype(np.float32), ".tif", 65535),
        pytest.param(
            np.rint(RAMP * 4095).astype(np.uint16),
            ".png",
            4095,
            marks=pytest.mark.brings(
                "image",
                "12 bits in 16-bit PNG or TIFF",
                "4095 is white where the training images stay below it, for every image and for `predict`.",
            ),
        ),
        (np.rint(RAMP * 1023).astype(np.uint16), ".png", 1023),
        (np.rint(RAMP * 16383).astype(np.uint16), ".tif", 16383),
        (np.rint(RAMP * 65535).astype(np.uint16), ".png", 65535),
        pytest.param(
            np.rint(RAMP * 255).astype(np.int32),
            ".tif",
            255,
            marks=pytest.mark.brings(
                "image", "32-bit integers", "As 16 bits: the level that holds them is white."
            ),
        ),
        (np.rint(RAMP * 4095).astype(np.int32), ".tif", 4095),
    ],
)
def test_one_level_for_the_set(tmp_path, capsys, values, ending, white):
    data = resolve(write_set(tmp_path, values, ending))
    assert data.white_level == white
    assert f"{white} is white (--white-level sets another)" in capsys.readouterr().err
    for images in (data.train, data.selection, data.test):
        for i, key in enumerate(images.keys):
            share = 0.5 if key.endswith(f"5{ending}") else 1
            expected = np.minimum(values.astype(float) * share * 255 / white, 255)
            assert np.abs(np.asarray(images.open(i)) - expected).max() <= 0.6


def test_a_level_that_is_given(tmp_path):
    folder = write_set(tmp_path, np.rint(RAMP * 3000).astype(np.uint16), ".png")
    data = resolve(folder, white_level=10000)
    assert data.white_level == 10000
    brightest = max(np.asarray(data.train.open(i)).max() for i in range(len(data.train)))
    assert brightest == round(255 * 0.3)


def test_what_the_file_says_needs_no_level(tmp_path):
    """PGM: Pillow itself stretches 0..maxval to 16 bits."""
    folder = tmp_path / "a"
    folder.mkdir()
    values = np.rint(RAMP * 4095).astype(">u2")
    (folder / "0.pgm").write_bytes(b"P5 4 4 4095\n" + values.tobytes())
    image = ImageSet(("0.pgm",), (0,), FolderReader(folder)).open(0)
    assert np.array_equal(np.asarray(image), GREYS)


def test_twelve_bits_in_the_header_of_a_tiff():
    image = Image.fromarray(np.rint(RAMP * 4095).astype(np.uint16))
    image.tag_v2 = {258: (12,)}  # type: ignore[attr-defined]
    assert np.array_equal(np.asarray(to_8_bits(image, 65535)), GREYS)


@pytest.mark.brings("image", "NaN in a float image", "Refused by name, or left out by --skip-bad-images.")
def test_nan(tmp_path):
    folder = write_set(tmp_path, RAMP.astype(np.float32), ".tif", num_images=8)
    bad = RAMP.astype(np.float32)
    bad[0, 0] = np.nan
    Image.fromarray(bad).save(folder / "a" / "0.tif")
    data = resolve(folder)
    images = next(each for each in (data.train, data.selection, data.test) if "a/0.tif" in each.keys)
    with pytest.raises(DataError) as caught:
        images.open(images.keys.index("a/0.tif"))
    assert str(caught.value) == (
        f"cannot decode image {folder / 'a' / '0.tif'} (it holds NaN or infinite values): "
        "replace it, or pass --skip-bad-images to leave such images out"
    )
    assert resolve(folder, skip_bad_images=True).num_bad_images == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((RAMP * 3).astype(np.float32), "values from 0 to 3, and no way to know which of them is white"),
        (
            (RAMP - 0.5).astype(np.float32),
            "values from -0.5 to 0.5, and no way to know which of them is white",
        ),
        (np.rint(RAMP * 1e6).astype(np.int32), "values from 0 to 1e+06, and no way to know which of them"),
    ],
)
def test_values_that_no_rule_fits(tmp_path, values, message):
    folder = write_set(tmp_path, values, ".tif")
    line = error_of(folder)
    assert line.startswith(f"{folder}: {message}")
    assert line.endswith("pass --white-level, or save the images with 8 bits")


def test_floats_beside_integers(tmp_path):
    folder = write_set(tmp_path, RAMP.astype(np.float32), ".tif")
    Image.fromarray(np.rint(RAMP * 4095).astype(np.uint16)).save(folder / "a" / "x.png")
    assert error_of(folder) == (
        f"{folder} holds images of floats beside images of more than 8 bits: save all in one kind"
    )


def test_an_image_beyond_white_is_refused_not_clipped():
    image = Image.fromarray(np.array([[0, 60000]], np.uint16))
    with pytest.raises(DataError) as caught:
        to_8_bits(image, 4095)
    assert str(caught.value) == (
        "its values run from 0 to 60000, but 4095 is white; --white-level sets another"
    )
    with pytest.raises(
        DataError, match="from 0 to 60000, while the training images have 8 bits: say with --wh"
    ):
        to_8_bits(image, None)


@pytest.mark.parametrize(
    ("high", "is_float", "level"),
    [(1, True, 1), (1.1, True, 1), (32, True, 255), (255, False, 255), (256, False, 1023), (5, False, 255)],
)
def test_likely_white(high, is_float, level):
    assert likely_white(0, high, is_float) == level


@pytest.mark.brings("image", "images that use a small part of the range", "A warning says how dark they are.")
def test_nearly_black_images_are_told(tmp_path, capsys):
    resolve(write_set(tmp_path, np.full((4, 4, 3), 15, np.uint8), ".png"))
    told = capsys.readouterr().err
    assert told.startswith(f"warning: {tmp_path} looks nearly black: no pixel of ")
    assert "training images is above 15 of 255; deep colour images are read by their upper 8 bits" in told


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        pytest.param(
            "RGBA",
            (10, 200, 30),
            marks=pytest.mark.brings(
                "image",
                "transparency (RGBA, LA, palettes)",
                "It is dropped, as timm and torchvision drop it: a transparent pixel shows its own colour.",
            ),
        ),
        ("LA", (124, 124, 124)),
        ("PA", None),
        ("CMYK", (10, 200, 30)),
        ("YCbCr", (10, 200, 30)),
        ("HSV", (10, 200, 30)),
    ],
)
def test_modes_come_out_as_their_colour(mode, expected):
    image = Image.new("RGBA", (4, 4), (10, 200, 30, 0))
    image = image.convert("RGB").convert("P").convert("PA") if mode == "PA" else image
    if mode in ("CMYK", "YCbCr", "HSV"):
        image = image.convert("RGB")
    image = image if mode == "PA" else image.convert(mode)
    assert image.mode == mode
    pixels = eval_transform(InputSpec((4, 4), 3, (0.5,) * 3, (0.5,) * 3))(image)[:, 0, 0].tolist()
    # A palette has the nearest of its colours.
    tolerance = 26 if mode == "PA" else 3
    assert max(abs(a - b) for a, b in zip(pixels, expected or (10, 200, 30), strict=True)) <= tolerance


@pytest.mark.parametrize(
    ("of_model", "of_images", "agreed"),
    [(None, None, None), (None, 4095, 4095), (4095, 4095, 4095), (1, None, 1)],
)
def test_white_of_model_and_images(of_model, of_images, agreed):
    spec = InputSpec((4, 4), 1, (0.5,), (0.5,), white_level=of_model)
    assert spec.for_images(of_images).white_level == agreed


def test_white_of_model_and_images_differ():
    spec = InputSpec((4, 4), 1, (0.5,), (0.5,), white_level=4095)
    with pytest.raises(DataError) as caught:
        spec.for_images(1023)
    assert str(caught.value) == (
        "the model was trained with 4095 as white, but of these images it would be 1023: "
        "pass --white-level 4095 to read them as it was trained"
    )
