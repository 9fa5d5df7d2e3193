"""The report folder: HTML, Markdown, CSV, LaTeX and the calibration appendix."""

from collections.abc import Sequence
from pathlib import Path

from lightning_prune.comparison.appendix import appendix
from lightning_prune.comparison.audit import Audit
from lightning_prune.comparison.figures import plots
from lightning_prune.comparison.html import page
from lightning_prune.comparison.latex import latex
from lightning_prune.comparison.sections import markdown, sections
from lightning_prune.comparison.tables import Failure, csv_text
from lightning_prune.comparison.tensorboard import log_plots
from lightning_prune.files import new_folder, write_text

TITLE = "Pruning methods compared"


def write_report(audit: Audit, failures: Sequence[Failure], folder: Path) -> None:
    """Write ``report.html``, ``report.md``, ``results.csv``, ``results.tex``, ``calibration_appendix.md`` and an
    events file with the plots.

    The folder appears whole; a report that stood there is replaced.
    """
    found, figures = sections(audit, failures), list(plots(audit))
    with new_folder(folder) as temporary:
        write_text(temporary / "report.html", page(TITLE, found, figures))
        write_text(temporary / "report.md", markdown(TITLE, found))
        write_text(temporary / "results.csv", csv_text(audit, failures))
        write_text(temporary / "results.tex", latex(audit))
        write_text(temporary / "calibration_appendix.md", appendix(audit))
        log_plots(figures, temporary)


def next_version(parent: Path) -> Path:
    """``parent/version_N`` with the next free N."""
    taken = [int(path.name[8:]) for path in parent.glob("version_*") if path.name[8:].isdigit()]
    return parent / f"version_{max(taken, default=-1) + 1}"
