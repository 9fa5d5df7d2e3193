"""``lightning-prune compare``: the whole experiment, or runs that exist, as one audited report."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_prune.cli.commands.evaluate import TASKS
from lightning_prune.cli.parser import PlainParser
from lightning_prune.support.errors import UserError

if TYPE_CHECKING:
    from lightning_prune.comparison.zero_shot import ZeroShot

UNFAIR = 3
DEFAULT_ROOT = Path("logs")


def main(argv: list[str]) -> int:
    """Run what is missing of an experiment (``--config``) or take runs that exist (``--runs``); write the report.

    Returns:
        0 done, 1 a run failed, 3 with ``--strict`` when the audit found a difference.

    Raises:
        UserError: a mistake in the options or the configuration, or no finished run to compare.
    """
    arguments, rest = _parser().parse_known_args(argv)
    options = _dotted(rest)
    if (arguments.config is None) == (arguments.runs is None):
        raise UserError("give either --config FILE (run an experiment) or --runs FOLDER … (compare runs that exist).")

    # After the arguments, so that --help does not wait for torch and matplotlib.
    from lightning_prune.comparison.audit import audit
    from lightning_prune.comparison.records import load_run
    from lightning_prune.comparison.report import check_output, report_folder, write_report
    from lightning_prune.comparison.sections import terminal
    from lightning_prune.runs.records import Failure

    if arguments.output is not None:
        check_output(arguments.output, arguments.overwrite)
    elif arguments.overwrite:
        raise UserError("--overwrite belongs to --output, which is not given.")
    failures: list[Failure] = []
    if arguments.config is None:
        of_runs = [
            name for name in ("pretrained", "ratios", "seeds", "systems") if getattr(arguments, name) is not None
        ]
        for option in (*of_runs, *options):
            raise UserError(f"--{option} has no meaning with --runs: those runs are made. Leave it out.")
        folders, root = _finished(arguments.runs), arguments.root or DEFAULT_ROOT
        tasks = _tasks(arguments, root)
    else:
        from lightning_prune.runs.experiment import run_experiment
        from lightning_prune.runs.settings import read_settings

        given = arguments
        settings = read_settings(
            given.config, given.root, given.pretrained, given.ratios, given.systems, options, given.seeds
        )
        root = settings.root
        tasks = _tasks(arguments, root)
        folders, failures = run_experiment(settings)

    runs = [load_run(folder) for folder in folders]
    result = audit(runs if tasks is None else tasks.measure(runs))
    with report_folder(root, arguments.output, arguments.overwrite) as (folder, name):
        found = write_report(result, failures, folder)
    print(terminal(found))
    print(f"report: {name / 'report.html'}")
    if failures:
        return 1
    return UNFAIR if arguments.strict and not result.fair else 0


def _tasks(arguments: argparse.Namespace, root: Path) -> "ZeroShot | None":
    """What measures the tasks asked for, after a look at them; None where none are."""
    if arguments.zero_shot is None:
        if arguments.include_path is not None:
            raise UserError("--include-path belongs to --zero-shot, which is not given.")
        return None
    from lightning_prune.comparison.zero_shot import ZeroShot

    found = ZeroShot(list(dict.fromkeys(arguments.zero_shot)) or list(TASKS), arguments.include_path, root)
    found.check()
    return found


def _finished(folders: list[Path]) -> list[Path]:
    """The finished runs among ``folders``; says which are left out."""
    from lightning_prune.runs.folder import RunFolder

    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--runs: no folder at '{folder}'. Give run folders, such as logs/*/version_*.")
        if any(folder.samefile(other) for other in found):
            raise UserError(f"--runs: '{folder}' is given twice. Name it once.")
        if RunFolder(folder).is_pruning_run:
            found.append(folder)
        elif not (folder / "report.html").is_file():  # an earlier comparison below the same root
            print(f"left out, no finished pruning run: {folder}")
    if not found:
        raise UserError("--runs: none of these folders holds a finished pruning run.")
    return found


def _dotted(rest: list[str]) -> dict[str, str]:
    """``--data.seed 1 --trainer.precision=bf16-true`` as a dict; anything else is a mistake."""
    found: dict[str, str] = {}
    waiting = list(rest)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith(("--data.", "--trainer.")):
            raise UserError(f"unrecognized argument '{word}'. See lightning-prune compare --help.")
        if not equals and not waiting:
            raise UserError(f"--{name} needs a value.")
        found[name] = value if equals else waiting.pop(0)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog="lightning-prune compare",
        allow_abbrev=False,
        description="Compare pruning methods on one model, one calibration set and one evaluation. With --config, run "
        "every system at every ratio (what is finished already is kept, so an interrupted experiment goes on where it "
        "stopped); with --runs, take runs that exist. Both check that the runs may be compared and write report.html, "
        "report.md, results.csv, results.tex and calibration_appendix.md.",
        epilog="Options of the calibration set (--data.OPTION) and of Lightning (--trainer.OPTION) overrule the file. "
        "example: lightning-prune compare --config compare --ratios 0.2 0.5 --systems wanda hgsp_taylor "
        "--data.seed 1 --trainer.precision bf16-true",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="the experiment: a file, or the shipped 'compare'")
    parser.add_argument("--runs", type=Path, nargs="+", metavar="FOLDER", help="run folders: logs/*/version_*")
    parser.add_argument("--root", type=Path, metavar="FOLDER", help="where runs and report go (default: logs)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="report folder (ROOT/comparison/version_N)")
    parser.add_argument("--overwrite", action="store_true", help="replace the report that stands at --output")
    parser.add_argument(
        "--pretrained", "--model.pretrained", dest="pretrained", metavar="MODEL", help="a folder, a hub id, or 'demo'"
    )
    parser.add_argument("--ratios", type=float, nargs="+", metavar="R", help="pruning ratios between 0 and 1")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="repeat every run over these seeds of the calibration samples, and show mean and standard deviation",
    )
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="only these systems of the file")
    parser.add_argument(
        "--zero-shot",
        nargs="*",
        metavar="TASK",
        help="add accuracy on tasks of the LM Evaluation Harness, each measured once per checkpoint (pip install "
        f"'lightning-prune[eval]'). Without names: {' '.join(TASKS)}",
    )
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="folder with further tasks as YAML files")
    parser.add_argument("--strict", action="store_true", help="exit with status 3 when runs differ in setting or ratio")
    return parser
