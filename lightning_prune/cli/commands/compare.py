"""``lightning-prune compare``: the whole experiment, or runs that exist, as one audited report."""

import argparse
import sys
from pathlib import Path

from lightning_prune.cli.commands.evaluate import TASKS
from lightning_prune.cli.parser import PlainParser, some_path
from lightning_prune.support.errors import UserError

UNFAIR = 3


def main(argv: list[str]) -> int:
    """Run what is missing of an experiment (``--config``) or take runs that exist (``--runs``); write the report.
    Returns 0 done, 1 a run failed, 3 with ``--strict`` when the audit found a difference."""
    given, rest = _parser().parse_known_args(argv)
    options = _dotted(rest)
    if (given.config is None) == (given.runs is None):
        raise UserError("give either --config FILE (run an experiment) or --runs FOLDER … (compare runs that exist).")
    if given.zero_shot is None and given.include_path is not None:
        raise UserError("--include-path belongs to --zero-shot, which is not given.")
    if given.output is None and given.overwrite:
        raise UserError("--overwrite belongs to --output, which is not given.")

    # After the arguments, so that --help does not wait for torch and matplotlib.
    from lightning_prune.comparison.audit import audit
    from lightning_prune.comparison.records import load_run
    from lightning_prune.comparison.report import check_output, report_folder, write_report
    from lightning_prune.comparison.sections import terminal
    from lightning_prune.runs.records import Failure

    if given.output is not None:
        check_output(given.output, given.overwrite)
    settings, tasks = None, None
    failures: list[Failure] = []
    if given.config is None:
        of_experiments = ("pretrained", "ratios", "targets", "seeds", "systems")
        if idle := [*(name for name in of_experiments if getattr(given, name) is not None), *options]:
            raise UserError(f"--{idle[0]} has no meaning with --runs: those runs exist already. Leave it out.")
        folders, root = _finished(given.runs), given.root or Path("logs")
    else:
        from lightning_prune.runs.experiment import run_experiment
        from lightning_prune.runs.settings import read_settings

        choices = (given.pretrained, given.ratios, given.systems, options, given.seeds, given.targets)
        settings = read_settings(given.config, given.root, *choices)
        root = settings.root
    if given.zero_shot is not None:
        from lightning_prune.comparison.zero_shot import ZeroShot

        tasks = ZeroShot(list(dict.fromkeys(given.zero_shot or TASKS)), given.include_path, root)
        tasks.check()
    if settings is not None:
        folders, failures = run_experiment(settings)

    if not folders:
        for one in failures:
            print(f"{one.label} at {one.requested}: {one.message}", file=sys.stderr)
        print("no run finished, so there is nothing to compare", file=sys.stderr)
        return 1
    runs = [load_run(folder) for folder in folders]
    result = audit(runs if tasks is None else tasks.measure(runs))
    with report_folder(root, given.output, given.overwrite) as (folder, name):
        sections = write_report(result, failures, folder)
    print(f"{terminal(sections)}\nreport: {name / 'report.html'}")
    return 1 if failures else UNFAIR if given.strict and result.differences else 0


def _finished(folders: list[Path]) -> list[Path]:
    """The finished runs among ``folders``; says which are left out."""
    from lightning_prune.runs.folder import RunFolder, meant

    finished: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--runs: no folder at '{folder}'. Give run folders, such as logs/*/version_*.")
        if any(folder.samefile(other) for other in finished):
            raise UserError(f"--runs: '{folder}' is given twice. Name it once.")
        if RunFolder(folder).is_pruning_run:
            finished.append(folder)
        elif not (folder / "report.html").is_file():  # an earlier comparison below the same root
            print(f"left out, not a finished pruning run: {folder}")
    if not finished:
        hint = next(filter(None, map(meant, folders)), ".")
        raise UserError(f"--runs: none of these folders is a finished pruning run{hint}")
    return finished


def _dotted(rest: list[str]) -> dict[str, str]:
    """``--data.seed 1 --trainer.precision=bf16-true`` as a dict; anything else is a mistake."""
    options: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith(("--data.", "--trainer.")):
            raise UserError(f"unrecognized argument '{word}'. See lightning-prune compare --help.")
        options[name] = value if equals else next(words, "")
        if not equals and not options[name]:
            raise UserError(f"--{name} needs a value.")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog="lightning-prune compare",
        allow_abbrev=False,
        description="Compare pruning methods on one model, one calibration set and one evaluation. With --config, run "
        "every system at every ratio (what is finished already is kept, so an interrupted experiment can be "
        "continued); with --runs, take runs that exist. Both check that the runs may be compared and write "
        "report.html, report.md, results.csv, results.tex and calibration_appendix.md.",
        epilog="Options of the calibration set (--data.OPTION) and of Lightning (--trainer.OPTION) overrule the file. "
        "example: lightning-prune compare --config compare --ratios 0.2 0.5 --systems wanda hgsp_taylor "
        "--data.seed 1 --trainer.precision bf16-true",
    )
    add = parser.add_argument
    add("--config", type=some_path, metavar="FILE", help="the experiment: a file, or the shipped 'compare'")
    add("--runs", type=some_path, nargs="+", metavar="FOLDER", help="run folders: logs/*/version_*")
    add("--root", type=some_path, metavar="FOLDER", help="where runs and report go (default: logs)")
    add("--output", type=some_path, metavar="FOLDER", help="report folder (ROOT/comparison/version_N)")
    add("--overwrite", action="store_true", help="replace the report at --output")
    add("--model", "--model.pretrained", dest="pretrained", metavar="MODEL", help="a folder, a hub id, or 'demo'")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--ratios", type=float, nargs="+", metavar="R", help="pruning ratios between 0 and 1")
    text = "parameters (4.5B) or memory with the KV cache (6GiB) to keep at most, in place of ratios"
    sizes.add_argument("--targets", nargs="+", metavar="N", help=text)
    text = "repeat every run over these seeds of the calibration samples, and show mean and standard deviation"
    add("--seeds", type=int, nargs="+", metavar="N", help=text)
    text = "only these systems of the file, other methods by name, or files of your own (mine.yaml)"
    add("--systems", nargs="+", metavar="NAME", help=text)
    text = (
        "add accuracy on tasks of the LM Evaluation Harness, each measured once per checkpoint "
        f"(lm-eval: pip install '.[eval]'). Without names: {' '.join(TASKS)}"
    )
    add("--zero-shot", nargs="*", metavar="TASK", help=text)
    add("--include-path", type=some_path, metavar="FOLDER", help="folder with further tasks as YAML files")
    add("--strict", action="store_true", help="exit with status 3 when runs differ in setting or ratio")
    return parser
