"""docs/what-you-can-bring.md says what tests marked `brings` show; `pytest --update-golden` rewrites it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "what-you-can-bring.md"
KINDS = {
    "checkpoint": "Checkpoints",
    "model": "Models",
    "folder": "Folders",
    "image": "Images",
    "machine": "Machines and runtimes",
}
HEAD = """# What you can bring

What happens to checkpoints, models, folders and images as training scripts and libraries leave them behind:
what works, what is refused and why. Every row is the test that it links to; `pytest --update-golden` writes
this page from them. A refusal is one line that says what to do, before anything is computed."""
COLUMNS = ("| you bring | what happens | test |", "|---|---|---|")


def rows_of(items) -> dict[str, dict[str, str]]:
    """For each kind a line for each thing that is brought, in the order of the tests."""
    rows: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    for item in items:
        for mark in item.iter_markers("brings"):
            kind, what, happens = mark.args
            file = item.path.relative_to(ROOT)
            test = f"[`{item.originalname}`](../{file})"
            line = f"| {sentence(what)} | {sentence(happens)} | {test} |"
            assert "\n" not in line
            assert line.count("|") == 4
            assert rows[kind].setdefault(sentence(what), line) == line, f"two tests tell of {what!r}"
    return rows


def sentence(text: str) -> str:
    """Every row begins and ends alike, whoever wrote it."""
    return (text[0].upper() + text[1:]).rstrip(".")


def test_the_page_says_what_the_tests_show(request, collected):
    rows = rows_of(sorted(collected, key=lambda item: str(item.path)))
    sections = [
        "\n".join([f"## {title}", "", *COLUMNS, *rows[kind].values()]) for kind, title in KINDS.items()
    ]
    page = "\n\n".join([HEAD, *sections]) + "\n"
    everything = [Path(arg).name for arg in request.config.args] == request.config.getini("testpaths")
    everything = everything and not request.config.getoption("ignore_glob")  # some files are left out
    if everything and request.config.getoption("--update-golden"):
        PAGE.write_text(page)
    there = set(PAGE.read_text().splitlines())
    missing = [line for of_kind in rows.values() for line in of_kind.values() if line not in there]
    assert not missing, "run pytest --update-golden"
    assert not everything or PAGE.read_text() == page, "run pytest --update-golden"
