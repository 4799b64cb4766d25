"""FILE.py:FUNCTION: what such a file may import, and what is said where it fails."""

from __future__ import annotations

import sys

import pytest

from stepwell.config.own_code import file_digest, load_function
from stepwell.errors import ModelError
from stepwell.models.factory import load_factory


def write(folder, **files):
    for name, text in files.items():
        file = folder / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return f"{folder / 'model.py'}:build"


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    path, names = list(sys.path), set(sys.modules)
    yield
    assert sys.path == path
    assert all(name.startswith("_stepwell_user_") for name in set(sys.modules) - names)


@pytest.mark.brings("model", "A FILE.py that imports a file beside it", "imported, as if Python ran it")
def test_two_files_that_each_import_a_file_beside_them(tmp_path):
    """Both are called `layers`; neither is taken for the other's, nor for one that is imported already."""
    build = "from layers import WIDTH\nimport timm\ndef build():\n    return WIDTH, timm.__name__"
    one = write(tmp_path / "one", model=build, layers="WIDTH = 1")
    two = write(tmp_path / "two", model=build, layers="WIDTH = 2")
    assert load_function(one, "--teacher")() == (1, "timm")
    assert load_function(two, "--teacher")() == (2, "timm")
    sys.path.insert(0, str(tmp_path / "one"))
    try:
        import layers  # pyright: ignore[reportMissingImports]

        assert load_function(two, "--teacher")() == (2, "timm")
        assert sys.modules["layers"] is layers
    finally:
        sys.path.remove(str(tmp_path / "one"))
        del sys.modules["layers"]


def test_an_import_inside_of_the_function(tmp_path):
    source = write(
        tmp_path, model="def build():\n    from layers import WIDTH\n    return WIDTH", layers="WIDTH = 3"
    )
    assert load_function(source, "--teacher")() == 3


@pytest.mark.brings(
    "model", "A FILE.py in a package, with relative imports", "imported as part of its package"
)
def test_a_file_in_a_package(tmp_path):
    package = tmp_path / "nets"
    write(package / "vision", __init__="", layers="from ..common import WIDTH")
    write(package, __init__="", common="WIDTH = 4")
    source = write(package / "vision", model="from .layers import WIDTH\ndef build():\n    return WIDTH")
    assert load_function(source, "--teacher")() == 4


@pytest.mark.brings("model", "A FILE.py with a mistake in it", "refused; the message names file and line")
@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"model": "import layers", "layers": "\nx = undefined"},
            r"NameError.*'undefined'.* \(layers\.py, line 2\)",
        ),
        ({"model": "def build():\n    return layers"}, r"NameError.*'layers'.* \(model\.py, line 2\)"),
        (
            {"model": "\nimport torch\ntorch.zeros(2) @ torch.zeros(3)"},
            r"RuntimeError.* \(model\.py, line 3\)",
        ),
        ({"model": "def build(: ..."}, r"SyntaxError.*\(model\.py, line 1\)$"),
        ({"model": "def build():\n    exit(1)"}, r"failed: SystemExit: 1 \(model\.py, line 2\)"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path, files, said):
    with pytest.raises(ModelError, match=said):
        load_factory(write(tmp_path, **files))()


def test_a_file_beside_is_part_of_the_fingerprint(tmp_path):
    source = write(tmp_path, model="import layers", layers="from nets import small", unused="")
    write(tmp_path / "nets", __init__="", small="WIDTH = 1")
    before = file_digest(source)
    write(tmp_path, unused="changed")
    assert file_digest(source) == before
    write(tmp_path / "nets", __init__="", small="WIDTH = 2")
    assert file_digest(source) != before
