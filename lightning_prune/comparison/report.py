"""The report folder: where it is written, and what is in it."""

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lightning_prune.comparison.appendix import appendix
from lightning_prune.comparison.audit import Audit
from lightning_prune.comparison.charts import GRID, INK, charts
from lightning_prune.comparison.exports import accuracy_csv, csv_text, latex, results_csv
from lightning_prune.comparison.sections import Section, continuations, markdown, sections
from lightning_prune.comparison.selection import precision_rows
from lightning_prune.comparison.tables import numeric_column
from lightning_prune.comparison.tensorboard import log_comparison
from lightning_prune.runs.folder import REPORTS, RunFolder
from lightning_prune.runs.records import Failure
from lightning_prune.support.errors import UserError
from lightning_prune.support.escape import plain, public_name
from lightning_prune.support.files import cannot_write, check_writable, new_folder, write_text

TITLE = "Pruning methods compared"
NAMES = {"report.html", "report.md", "results.csv", "results.tex", "calibration_appendix.md"}
OTHERS = {"precision.csv", "zero_shot.csv", "tensorboard"}  # not in every report


def write_report(audit: Audit, failures: Sequence[Failure], folder: Path) -> list[Section]:
    """Write the report into ``folder``, which exists: ``NAMES``, and ``OTHERS`` where there is something to
    say. Returns its sections, for the terminal."""
    parts, methods = sections(audit, failures), appendix(audit)
    models = dict.fromkeys(public_name(run.metrics.method.base_model) for run in audit.runs)
    title = ": ".join(filter(None, [TITLE, ", ".join(models)]))
    write_text(folder / "report.md", markdown(title, parts))
    write_text(folder / "results.csv", results_csv(audit, failures))
    if any(run.accuracy is not None for run in audit.runs):
        write_text(folder / "zero_shot.csv", accuracy_csv(audit))
    if half := precision_rows(audit.runs):
        write_text(folder / "precision.csv", csv_text(half))
    write_text(folder / "results.tex", latex(audit))
    write_text(folder / "calibration_appendix.md", methods)
    log_comparison(audit, folder)
    front = bool(audit.runs) + bool(failures)  # what comes before the charts: the answer, and what has failed
    drawn = charts(audit)
    folded = [(heading, list(some)) for heading, some in groupby(drawn[1:], lambda one: one.heading)]
    written = continuations(audit)
    page = _page(
        title=title, sections=parts, front=front, first=drawn[:1], folded=folded, written=written, appendix=methods
    )
    write_text(folder / "report.html", page)
    return parts


def _page(**content: Any) -> str:
    """One file that opens offline: only its own two scripts may run, and nothing is loaded."""
    environment = Environment(
        loader=PackageLoader("lightning_prune.comparison", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if hasattr(value, "__html__") else plain(value),
    )
    environment.filters |= {"sha256": _sha256, "numeric_column": numeric_column, "data": _data}
    content["appendix"] = Markup.escape(content["appendix"])  # its cells are plain
    bokeh = Markup(Resources(mode="inline", components=["bokeh"]).js_raw[0])
    template = environment.get_template("report.html.jinja")
    return template.render(bokeh=bokeh, ink=INK, grid=GRID, **content)


def _data(value: object) -> Markup:
    """JSON inside a script element, which no text in it can close."""
    return Markup(json.dumps(value).replace("<", "\\u003c"))


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def check_output(output: Path, overwrite: bool) -> None:
    """Raise UserError unless a report may be written to ``output``: it is new, empty, or a report to overwrite."""
    try:
        if not os.path.lexists(output):
            check_writable(output, "--output")
            return
        if output.is_symlink() or not output.is_dir():
            raise UserError(f"--output: '{output}' exists and is not a folder. Give a new one.")
        names = set(os.listdir(output))
    except (OSError, ValueError) as error:
        raise cannot_write(output, "--output", error) from None
    strange = sorted(names - NAMES - OTHERS)
    if names and (strange or not names >= NAMES):
        what = f"it holds {strange[0]}" if strange else "files of one are missing"
        raise UserError(f"--output: '{output}' exists and is not a report of this command ({what}). Give a new folder.")
    if names and not overwrite:
        raise UserError(f"--output: '{output}' holds a report. Give a new folder, or --overwrite to replace that one.")
    check_writable(output.absolute().parent, "--output")


@contextmanager
def report_folder(root: Path, output: Path | None, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """An empty folder to write the report into, and the name it has afterwards: ``root/comparison/version_N`` unless
    ``output`` is given, where nothing else may have been put meanwhile."""
    if output is None:
        with RunFolder.claim(root, REPORTS, "--root") as folder:
            yield folder.path, folder.path
        return
    try:
        with new_folder(output, replace=overwrite) as temporary:
            yield temporary, output
            check_output(output, overwrite)
    except OSError as error:
        raise cannot_write(output, "--output", error) from error
