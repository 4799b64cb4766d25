"""The cells of a comparison, side by side: each in a process of its own, what is finished not again."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from stepwell.compare.cells import Cell, CellResult, run_cell
from stepwell.errors import StepwellError
from stepwell.run import progress
from stepwell.run.distributed import from_main
from stepwell.run.processes import world


def run_all(cells: Sequence[Cell], jobs: int, what: str) -> list[CellResult]:
    """The results of all cells, in their order; what is finished is not run again.

    Args:
        cells: Each is a run of its own.
        jobs: Processes that run side by side; the work of each is written to a log beside its result. Where
            several processes make every run together, the cells come one after another.
        what: For progress.

    Raises:
        StepwellError: Of the first cell that fails; those that are finished stay.
    """
    results = from_main(lambda: [cell.finished() for cell in cells])
    todo = [i for i, result in enumerate(results) if result is None]
    if not todo:
        return [result for result in results if result is not None]
    if world() > 1:
        return [result or run_cell(cell) for cell, result in zip(cells, results, strict=True)]
    with (
        progress.progress(what, len(cells)) as advance,
        ProcessPoolExecutor(min(jobs, len(todo)), mp_context=get_context("spawn")) as pool,
    ):
        for _ in range(len(cells) - len(todo)):
            advance("")
        waiting = {pool.submit(_in_silence, cells[i]): i for i in todo}
        try:
            for future in as_completed(waiting):
                i = waiting[future]
                results[i] = future.result()
                advance(f"{cells[i].arm}, seed {cells[i].config.seed}")
        except BrokenProcessPool:
            raise StepwellError(
                f"{what}: a process ended without a word, as it does when memory runs out: fewer --jobs; "
                f"what it did last is in a log in {cells[0].file.parent}"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [result for result in results if result is not None]


def _in_silence(cell: Cell) -> CellResult:
    """Run a cell in a process of its own: what it says goes into a file, which stays if it fails."""
    log = cell.file.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file, contextlib.redirect_stderr(file):
        try:
            result = run_cell(cell)
        except Exception as error:
            traceback.print_exc()
            # An exception of another package may not survive the way back to the first process.
            known = isinstance(error, StepwellError)
            kind = type(error) if known else StepwellError
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            raise kind(f"{cell.arm}, seed {cell.config.seed}: {reason} (log: {log})") from None
    log.unlink()
    return result
