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
from lightning_prune.files import new_folder, write_text

TITLE = "Pruning methods compared"


def write_report(audit: Audit, failures: Sequence[Failure], folder: Path) -> None:
    """Write ``report.html``, ``report.md``, ``results.csv``, ``results.tex`` and ``calibration_appendix.md``.

    The folder appears whole; a report that stood there is replaced.
    """
    found = sections(audit, failures)
    with new_folder(folder) as temporary:
        write_text(temporary / "report.html", page(TITLE, found, list(plots(audit))))
        write_text(temporary / "report.md", markdown(TITLE, found))
        write_text(temporary / "results.csv", csv_text(audit, failures))
        write_text(temporary / "results.tex", latex(audit))
        write_text(temporary / "calibration_appendix.md", appendix(audit))
