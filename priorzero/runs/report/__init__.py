"""The report of a run: ``report.html`` in its folder, one file that a browser shows without a network."""

from __future__ import annotations

from pathlib import Path

from loguru import logger

from priorzero.runs.files import ERROR, REPORT, is_locked
from priorzero.runs.report.data import read_run
from priorzero.runs.report.page import render
from priorzero.runtime.paths import replace_text


def write_report(folder: Path, *, running: bool | None = None, error: str | None = None) -> Path:
    """Write the report of a run.

    Args:
        folder: the run's.
        running: whether the run is going on; None: find out.
        error: the error that ended the run, "" if there was none; None: find out.

    Returns:
        The path of the report.

    Raises:
        UserError: the folder is not a run's, or one of its files cannot be read.
        OSError: the report cannot be written.
    """
    run = read_run(folder)
    if error is None:
        error = (folder / ERROR).read_text(encoding="utf-8") if (folder / ERROR).exists() else ""
    page = render(run, running=is_locked(folder) if running is None else running, error=error)
    path = folder / REPORT
    replace_text(path, page)
    return path


def report_at_end(folder: Path, *, error: BaseException | None) -> None:
    """Write the report of a run that ends, and log its path. If that fails, the reason is logged and nothing raised.

    The error is kept in a file, for reports that are written later.

    Args:
        folder: the run's.
        error: the error that ends the run.
    """
    try:
        if error is not None:
            (folder / ERROR).write_text(" ".join(f"{type(error).__name__}: {error}".split()), encoding="utf-8")
        path = write_report(folder, running=False)
    except Exception as problem:  # of any kind: what the run has learned is saved, and its result must be returned
        logger.warning(f"the report could not be written ({' '.join(str(problem).split()) or type(problem).__name__})")
    else:
        logger.log("INFO" if error else "DEBUG", f"report: {path}")  # the summary of a run without an error names it
