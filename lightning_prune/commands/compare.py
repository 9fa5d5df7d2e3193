"""``lightning-prune compare``: the whole experiment, or runs that exist, as one audited report."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from lightning_prune.errors import UserError

UNFAIR = 3


def main(argv: list[str]) -> int:
    """Run what is missing of an experiment (``--config``) or take runs that exist (``--runs``); write the report.

    Returns:
        0 done, 1 a run failed, 3 with ``--strict`` when the audit found a difference.

    Raises:
        UserError: a mistake in the options, the configuration, or a folder that is no finished run.
    """
    arguments = _parser().parse_args(argv)
    if (arguments.config is None) == (not arguments.runs):
        raise UserError("give either --config FILE (run an experiment) or --runs FOLDER … (compare runs that exist).")

    # After the arguments, so that --help does not wait for numpy and matplotlib.
    from lightning_prune.comparison.audit import audit
    from lightning_prune.comparison.report import write_report
    from lightning_prune.comparison.run import is_finished, load_run
    from lightning_prune.comparison.sections import sections, terminal
    from lightning_prune.comparison.tables import Failure

    failures: Sequence[Failure] = []
    if arguments.runs:
        unused = [name for name, value in _overrides(arguments).items() if value]
        if unused:
            raise UserError(f"--{unused[0]} has no meaning with --runs: the runs are there already.")
        unfinished = [folder for folder in arguments.runs if folder.is_dir() and not is_finished(folder)]
        for folder in unfinished:
            print(f"left out, not a finished run: {folder}")
        folders = [folder for folder in arguments.runs if folder not in unfinished]
        if not folders:
            raise UserError("--runs: none of the folders holds a finished pruning run.")
        root = arguments.root or Path("logs")
    else:
        from lightning_prune.comparison.experiment import run_experiment
        from lightning_prune.comparison.settings import read_settings

        settings = read_settings(arguments.config, arguments.root, **_overrides(arguments))
        folders, failures = run_experiment(settings)
        root = settings.root
    result = audit([load_run(folder) for folder in folders])
    output = arguments.output or root / "comparison"
    write_report(result, failures, output)
    if arguments.config is not None:
        from lightning_prune.comparison.tensorboard import log_comparison

        log_comparison(result, root / "comparison")
    print(terminal(sections(result, failures)))
    print(f"report: {output / 'report.html'}")
    if failures:
        return 1
    return UNFAIR if arguments.strict and not result.fair else 0
