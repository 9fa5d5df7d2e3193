"""Where a report goes: a folder of its own, or ``--output``, where nothing of anybody else's is touched."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_prune.runs.folder import REPORTS, RunFolder
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import cannot_write, check_writable, new_folder

NAMES = {"report.html", "report.md", "results.csv", "results.tex", "calibration_appendix.md"}
OTHERS = {"precision.csv", "zero_shot.csv", "tensorboard"}  # not in every report


def check_output(output: Path, overwrite: bool) -> None:
    """Raise UserError unless a report may be written to ``output``: it is new, empty, or a report to overwrite."""
    option = "--output"
    try:
        if not os.path.lexists(output):
            check_writable(output, option)
            return
        found = set(os.listdir(output)) if output.is_dir() and not output.is_symlink() else None
    except (OSError, ValueError) as error:
        raise cannot_write(output, option, error) from None
    if found is None:
        raise UserError(f"{option}: '{output}' exists and is no folder. Give a new one.")
    strange = sorted(name for name in found - NAMES - OTHERS if "tfevents" not in name)
    if found and (strange or not found >= NAMES):
        what = f"it holds {strange[0]}" if strange else "files of one are missing"
        raise UserError(f"{option}: '{output}' exists and is no report of this command ({what}). Give a new folder.")
    if found and not overwrite:
        raise UserError(f"{option}: '{output}' holds a report. Give a new folder, or --overwrite to replace that one.")
    check_writable(output.absolute().parent, option)


@contextmanager
def report_folder(root: Path, output: Path | None, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """An empty folder to write the report into, and the name it has afterwards.

    Args:
        root: the report becomes ``root/comparison/version_N`` unless ``output`` is given.
        output, overwrite: as on the command line.

    Raises:
        UserError: it cannot be written, or something else has come to stand at ``output``.
    """
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
