"""docs/what-you-can-bring.md says what the tests marked `brings` show; `pytest --update-golden` rewrites it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent.parent
PAGE = TESTS.parent / "docs" / "what-you-can-bring.md"
KINDS = {
    "checkpoint": "Checkpoints",
    "model": "Models",
    "folder": "Folders",
    "image": "Images",
    "machine": "Machines and runtimes",
}
HEAD = """# What you can bring

What happens to checkpoints, models, folders and images as training scripts and libraries leave them behind: what works,
what is refused and why. Each row is a test of that name; `pytest tests/surface --update-golden` writes this page from them.
A refusal is one line that says what to do, before anything is computed.
"""


class Row(NamedTuple):
    """One `@pytest.mark.brings(kind, what, happens)`."""

    kind: str
    what: str
    happens: str
    file: str
    test: str


def rows_of(file: Path) -> Iterator[Row]:
    """The marks of one file, with the test that each belongs to; nothing is imported."""
    for test in ast.parse(file.read_text()).body:
        if not isinstance(test, ast.FunctionDef):
            continue
        for decorator in test.decorator_list:
            for call in ast.walk(decorator):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.brings":
                    kind, what, happens = (ast.literal_eval(argument) for argument in call.args)
                    yield Row(kind, what, happens, str(file.relative_to(TESTS)), test.name)


def written(rows: list[Row]) -> str:
    """The page."""
    parts = [HEAD]
    for kind, title in KINDS.items():
        of_kind = [row for row in rows if row.kind == kind]
        lines = [
            f"| {row.what} | {row.happens} | [{row.file}](../tests/{row.file}) `{row.test}` |"
            for row in of_kind
        ]
        parts.append(
            "\n".join([f"## {title}", "", "| you bring | what happens | shown by |", "|---|---|---|", *lines])
        )
    return "\n\n".join(part.strip() for part in parts) + "\n"


def test_the_page_says_what_the_tests_show(request):
    rows = [row for file in sorted(TESTS.rglob("test_*.py")) for row in rows_of(file)]
    assert {row.kind for row in rows} == set(KINDS)
    assert len({row.what for row in rows}) == len(rows), "two rows say the same"
    assert not [row for row in rows if "|" in row.what + row.happens or not row.test.startswith("test_")]
    page = written(rows)
    if request.config.getoption("--update-golden"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page, "run pytest tests/surface --update-golden"
