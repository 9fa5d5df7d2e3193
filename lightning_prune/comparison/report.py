"""The report folder: HTML, Markdown, CSV, LaTeX and the calibration appendix."""

from collections.abc import Sequence
from pathlib import Path

from lightning_prune.comparison import accuracy
from lightning_prune.comparison.appendix import appendix
from lightning_prune.comparison.audit import Audit
from lightning_prune.comparison.figures import plots, shared
from lightning_prune.comparison.html import page
from lightning_prune.comparison.latex import latex
from lightning_prune.comparison.precision import csv_text as precision_csv
from lightning_prune.comparison.precision import pairs
from lightning_prune.comparison.sections import Section, markdown, sections
from lightning_prune.comparison.tables import csv_text
from lightning_prune.comparison.tensorboard import log_comparison
from lightning_prune.runs.failure import Failure
from lightning_prune.support.files import write_text

TITLE = "Pruning methods compared"


def write_report(audit: Audit, failures: Sequence[Failure], folder: Path) -> list[Section]:
    """Write the report into ``folder``, which exists: ``report.html``, ``report.md``, ``results.csv``, ``results.tex``,
    ``calibration_appendix.md`` and the folder ``tensorboard``; ``precision.csv`` where precisions are compared, and
    ``zero_shot.csv`` where tasks were measured.

    Returns:
        The sections, for the terminal.
    """
    found, together = sections(audit, failures), shared(audit.groups)
    figures = list(plots(together))
    write_text(folder / "report.md", markdown(TITLE, found))
    write_text(folder / "results.csv", csv_text(audit, failures))
    runs = [run for group in audit.groups for run in group.all]
    if any(run.accuracy is not None for run in runs):
        write_text(folder / "zero_shot.csv", accuracy.csv_text(audit))
    if half := pairs(runs):
        write_text(folder / "precision.csv", precision_csv(half))
    write_text(folder / "results.tex", latex(audit))
    write_text(folder / "calibration_appendix.md", appendix(audit))
    log_comparison(figures, together, folder)
    write_text(folder / "report.html", page(TITLE, found, figures))
    return found
