"""``lightning-prune decide``: another pruning decision from what an earlier run measured, without calibrating."""

import argparse
import inspect
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_prune.cli.parser import OUTPUT, PlainParser, tell
from lightning_prune.runs.config_files import read_config
from lightning_prune.runs.folder import FinishedRun, RunFolder, check_label
from lightning_prune.support.errors import UserError

if TYPE_CHECKING:
    from lightning_prune.runs.build import RunBuilder

EVALUATION_OPTIONS = ("eval_datasets", "eval_seq_len", "eval_batch_size", "cache_dir")


def main(argv: list[str]) -> int:
    """Read ``--run``, change the options given after it, decide, cut, evaluate, and leave a new run folder.

    The plan is the one that ``fit`` makes with the same options.

    Raises:
        UserError: no finished run there, a method whose scores cannot be reused, an option that would change the
            measurement, or a base model that is no longer the same.
    """
    arguments, options = _parser().parse_known_args(argv)
    run = RunFolder.open(arguments.run, "--run")
    if run.recovery is not None:
        raise UserError(
            f"--run: '{run.path}' trained what another run had pruned. Decide from that one: '{run.recovery.parent}'."
        )
    config = read_config(run.path / "config.yaml", "--run")
    _ = run.scores  # a damaged table does not wait for torch either

    # After the first look, so that --help and a wrong folder do not wait for torch.
    from lightning_prune.runs.reuse import known_perplexities, reuse
    from lightning_prune.runs.run import prune_and_record
    from lightning_prune.runs.verdict import summary_table

    cli = _built(config, options, run.path)
    if not cli.model.reusable:
        raise UserError(
            f"--run: method '{cli.model.method}' of '{run.path}' cannot decide again from its scores: it changes "
            "weights while it measures, or prunes single weights, which the table does not list. Run fit again."
        )
    _check_base_model(cli.model.pretrained, run)
    reuse(cli.model, run)
    cli.datamodule.needs_calibration = cli.model.needs_calibration
    cli.datamodule.setup("fit")
    _check_calibration(cli, run)
    same_device = run.environment.device == str(cli.trainer.strategy.root_device)
    dense = known_perplexities(run, cli.datamodule) if same_device else None
    folder, record = prune_and_record(cli.trainer, cli.model, cli.datamodule, cli.resolved_config, dense)
    if cli.trainer.is_global_zero:
        table = summary_table(cli.model.label, record.metrics)
        tell(cli, table, record.metrics, folder, f"pruned model: {folder / 'pruned'}")
    return 0


def _built(config: dict[str, Any], options: list[str], run: Path) -> "RunBuilder":
    """The run's configuration with the ``options`` of the command line."""
    from lightning_prune.runs.build import RunBuilder
    from lightning_prune.runs.trainer import calibration_trainer

    # Of the trainer what it still has; a run that was made silently, or by compare, says so in its configuration.
    known = inspect.signature(calibration_trainer).parameters.keys() - {"enable_progress_bar"}
    trainer = {
        name: value for name, value in (config.get("trainer") or {}).items() if name in known and value is not None
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(config | {"trainer": trainer}, allow_unicode=True), encoding="utf-8")
        words = ["--config", str(file)]
        cli = RunBuilder([*words, *options], command="decide", options=OUTPUT)
        before = cli.parser.parse_args(words)
    check_label(cli.model.label)
    _check_options(cli, _flat(cli.parser, before), _flat(cli.parser, cli.config), run)
    return cli


def _check_options(cli: "RunBuilder", before: dict[str, Any], after: dict[str, Any], run: Path) -> None:
    """Refuse options that differ from the run's and are not read by the decision or the evaluation."""
    allowed = [f"model.{name}" for name in cli.model.decision_options]
    allowed += [f"data.{name}" for name in EVALUATION_OPTIONS]
    for name in sorted(before.keys() | after.keys()):
        fixed = name not in allowed and (name.startswith(("model", "data")) or name == "trainer.precision")
        old, new = before.get(name), after.get(name)
        if fixed and old != new:
            raise UserError(
                f"--{name} {new}: the scores of '{run}' were measured with {'the default' if old is None else old}, "
                f"and this option belongs to the measurement. Run fit for that. decide can change "
                f"{', '.join(f'--{option}' for option in allowed)}, and --trainer options but precision."
            )


def _flat(parser: Any, parsed: Any) -> dict[str, Any]:
    """Options by the name they have on the command line; ``model`` is the class."""
    config = json.loads(parser.dump(parsed, format="json", skip_none=False))
    model = config["model"]
    return {
        "model": model["class_path"],
        **{f"model.{name}": value for name, value in model.get("init_args", {}).items()},
        **{f"data.{name}": value for name, value in config.get("data", {}).items()},
        "trainer.precision": config["trainer"].get("precision"),
    }


def _check_base_model(pretrained: str, run: FinishedRun) -> None:
    from lightning_prune.models.checkpoint import Checkpoint
    from lightning_prune.models.families import count_parameters

    checkpoint = Checkpoint.open(pretrained)
    found, measured = count_parameters(checkpoint.meta), run.metrics.parameters.dense
    if found != measured:
        raise UserError(
            f"--run: '{run.path}' measured a model of {measured:,} parameters; '{pretrained}' now has {found:,}. "
            "Put the model back, or run fit again."
        )
    recorded = run.metrics.method.base_model_sha256
    if recorded is not None and recorded != checkpoint.fingerprint:
        raise UserError(
            f"--run: the config or the weights of '{pretrained}' have changed since '{run.path}' measured them "
            "(SHA-256). Put the model back, or run fit again."
        )


def _check_calibration(cli: "RunBuilder", run: FinishedRun) -> None:
    """A refit, and biases that take over means, must see the text that was scored."""
    before = run.calibration.fingerprint if run.calibration is not None else None
    if not cli.model.needs_calibration or before is None:
        return
    if (found := cli.datamodule.calibration.manifest.fingerprint) != before:
        raise UserError(
            f"--run: the calibration set is not the one that '{run.path}' measured with (its fingerprint was "
            f"{before}, now it is {found}). Put the text back, or run fit again."
        )


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog="lightning-prune decide",
        usage="lightning-prune decide --run FOLDER [--model.OPTION VALUE ...] [--data.eval_OPTION VALUE ...] "
        "[--trainer.OPTION VALUE ...]",
        description="Make another pruning decision from the scores of a finished run: a new run folder in seconds, "
        "without calibrating, with the plan that fit makes for the same options. Everything that is not given is as "
        "in that run. May change: --model.pruning_ratio and --model.label of every method; allocation, round_to, "
        "freeze_first_n_layers, freeze_last_n_layers and min_groups_per_layer where groups are ranked; H-GSP's tau, "
        "temperature, collapse_epsilon and score_norm; ShortGPT's n_remove_layers and at_most; refit and "
        "refit_damping, and FLAP's bias_compensation, which read the calibration set again; the "
        "evaluation sets. "
        "What the scores were measured with (model, importance, prior, calibration set, precision) may not.",
        epilog="example: lightning-prune decide --run logs/hgsp_taylor/version_0 --model.pruning_ratio 0.3 "
        "--model.temperature 0.5; lightning-prune fit --method NAME --help says what a method's options mean",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run", type=Path, required=True, metavar="FOLDER", help="the run whose scores are used, as fit left it"
    )
    return parser
