"""Code of the user's own: FILE.py:FUNCTION, run only where the command line (or Python) names it."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any

from stepwell.errors import ModelError, did_you_mean

_PREFIX = "_stepwell_user_"


def is_own_code(text: object) -> bool:
    """Whether an option's value names a function in a file."""
    return isinstance(text, str) and ".py:" in text


def file_digest(source: str) -> str:
    """A fingerprint of the file that `source` names, and of those beside it that it imports: another version
    of them computes something else."""
    file = Path(source.rpartition(":")[0])
    if not file.is_file():
        return "missing"
    content = b"".join(found.read_bytes() for found in _with_imports(file.resolve()))
    return blake2b(content, digest_size=8).hexdigest()


def _with_imports(file: Path) -> list[Path]:
    """A file and all that it, and they, import from beside it; of a package everything."""
    root, found, waiting = _root(file), [], [file]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found.append(current)
        with suppress(SyntaxError, UnicodeDecodeError):  # told when it is imported
            for name in _imported_names(ast.parse(current.read_bytes())):
                waiting += sorted((root / name).rglob("*.py"))
                waiting += [path for path in (root / f"{name}.py",) if path.is_file()]
    return sorted(found, key=lambda path: (path != file, path))


def _imported_names(code: ast.Module) -> set[str]:
    """The first words of what it imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {(node.module or alias.name).partition(".")[0] for alias in node.names}
    return names - {""}


def load_function(source: str, option: str) -> Callable[..., Any]:
    """Import FILE.py and return its function.

    The file may import those beside it, as it could if Python ran it; in a folder with `__init__.py`,
    relative imports work too. Nobody else sees what it has imported from there.

    Args:
        source: FILE.py:FUNCTION.
        option: Where it was given, for errors.

    Raises:
        ModelError: There is no such file or function, or the file cannot be imported.
    """
    file, _, name = source.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ModelError(f"no file {path} (from {option} {source})")
    try:
        with _importing_beside(path):
            module = _imported(path)
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"{path} cannot be imported: {type(error).__name__}: {error}{line_of(error)}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ModelError(f"{path} has no function {name!r}{did_you_mean(name, vars(module))}")

    @functools.wraps(function)
    def call(*args: object, **options: object) -> object:
        with _importing_beside(path):  # functions may import too
            return function(*args, **options)

    return call


def line_of(error: BaseException) -> str:
    """`` (FILE.py, line 3)``, the last line of the user's own that led to an error; or nothing."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not _is_installed(frame.filename) and not frame.filename.startswith("<")
    ]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def _imported(path: Path) -> ModuleType:
    package = ".".join(path.resolve().parent.relative_to(_root(path)).parts)
    if package:
        importlib.import_module(package)
    unique = blake2b(str(path.resolve()).encode(), digest_size=4).hexdigest()
    name = f"{package}.{path.stem}" if package else f"{_PREFIX}{path.stem}_{unique}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def _root(path: Path) -> Path:
    """The folder that imports start from: the file's own, or the one that holds its package."""
    folder = path.resolve().parent
    while (folder / "__init__.py").is_file() and folder != folder.parent:
        folder = folder.parent
    return folder


@contextmanager
def _importing_beside(path: Path) -> Iterator[None]:
    """While it is open, imports look into the file's folder first; afterwards it was never there.

    Two such files may each have a `layers.py` beside them.
    """
    root = _root(path)
    beside = {file.stem for file in root.iterdir() if file.suffix == ".py" or file.is_dir()}
    before = dict(sys.modules)
    for name, module in before.items():
        # Of the same name from elsewhere; but installed packages stay what they are.
        is_beside = name.partition(".")[0] in beside and name != "__main__"
        if is_beside and _is_of_a_user(module) and not _is_in(module, root):
            del sys.modules[name]
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()  # a file that was written a moment ago counts
    try:
        yield
    finally:
        with suppress(ValueError):  # the file may have made a path of its own
            sys.path.remove(str(root))
        for name, module in list(sys.modules.items()):
            is_new = before.get(name) is not module and not name.startswith(_PREFIX)
            if is_new and _is_in(module, root) and _is_of_a_user(module):
                del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name not in sys.modules})


def _is_in(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and _within(file, folder)


def _is_of_a_user(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and not _is_installed(file)


def _within(file: str, folder: Path) -> bool:
    return Path(file).resolve().is_relative_to(folder)


def _is_installed(file: str) -> bool:
    """Whether a file belongs to Python, to an installed package, or to this one."""
    paths = sysconfig.get_paths()
    folders = [paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"]]
    ours = Path(__file__).resolve().parents[1]
    return _within(file, ours) or any(_within(file, Path(folder).resolve()) for folder in folders)
