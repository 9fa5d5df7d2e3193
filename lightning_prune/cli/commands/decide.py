"""``lightning-prune decide``: another pruning decision from what an earlier run measured, without calibrating."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_prune.cli.parser import OUTPUT, PlainParser, some_path, tell
from lightning_prune.runs.config_files import read_config
from lightning_prune.runs.folder import RunFolder, check_label
from lightning_prune.support.errors import UserError

if TYPE_CHECKING:
    from lightning_prune.runs.build import RunBuilder

DESCRIPTION = (
    "Make another pruning decision from the scores of a finished run: a new run folder in seconds, without "
    "calibrating, with the plan that fit makes for the same options. Everything that is not given is as in that run. "
    "May change: --model.pruning_ratio or a --model.target_SIZE, and --model.label of every method; allocation, "
    "round_to, groups_multiple_of, freeze_first_n_layers, freeze_last_n_layers and min_groups_per_layer where groups "
    "are ranked; H-GSP's tau, temperature, collapse_epsilon and score_norm; ShortGPT's n_remove_layers and at_most; "
    "refit and refit_damping, and FLAP's bias_compensation, which read the calibration set again; the evaluation "
    "sets. What the scores were measured with (model, importance, prior, calibration set, precision) may not."
)
EVALUATION = ("eval_datasets", "eval_seq_len", "eval_batch_size", "eval_long_seq_len", "continuations", "cache_dir")


def main(argv: list[str]) -> int:
    """Read ``--run``, change the options given after it, decide, cut, evaluate, and write a new run folder."""
    arguments, options = _parser().parse_known_args(argv)
    run = RunFolder.open(arguments.run, "--run")
    if run.recovery is not None:
        raise UserError(
            f"--run: '{run.path}' trained what another run had pruned. Decide from that one: '{run.recovery.parent}'."
        )
    config = read_config(run.path / "config.yaml", "--run")
    (config.get("data") or {}).setdefault("bos", "never")  # of a run before the option
    _ = run.scores  # a damaged table does not wait for torch either

    # After the first look, so that --help and a wrong folder do not wait for torch.
    from lightning_prune.runs.reuse import reuse
    from lightning_prune.runs.run import prune_and_record
    from lightning_prune.runs.verdict import summary_table

    cli = _built(config, options, run.path)
    if not cli.model.reusable:
        raise UserError(
            f"--run: '{run.metrics.method.label}' of '{run.path}' cannot decide again from its scores: "
            f"{_why_not(cli.model)}. Run fit again."
        )
    if run.metrics.method.base_model_sha256 not in (None, cli.model.checkpoint.fingerprint):
        raise UserError(
            f"--run: the config or the weights of '{cli.model.pretrained}' have changed since '{run.path}' measured "
            "them (SHA-256). Restore the model, or run fit again."
        )
    reuse(cli.model, run)
    cli.datamodule.needs_calibration = cli.model.needs_calibration
    cli.datamodule.take_model(cli.model.checkpoint.limits[1])
    cli.datamodule.setup("fit")
    if cli.model.needs_calibration and run.calibration is not None:
        # A refit, and biases that take over means, must see the text that was scored.
        before, now = run.calibration.fingerprint, cli.datamodule.calibration.manifest.fingerprint
        if now != before:
            raise UserError(
                f"--run: the calibration set is not the one that '{run.path}' measured with (its fingerprint was "
                f"{before}, now it is {now}). Restore the text, or run fit again."
            )
    folder, metrics = prune_and_record(cli.trainer, cli.model, cli.datamodule, cli.resolved_config)
    tell(cli, summary_table(cli.model.label, metrics), metrics, folder)
    return 0


def _built(config: dict[str, Any], options: list[str], run: Path) -> "RunBuilder":
    """The run's configuration with the ``options`` of the command line, which may differ from it only in what the
    decision or the evaluation reads."""
    from lightning_prune.runs.build import RunBuilder, sizes_in, without_size

    own = model.get("init_args") if isinstance(model := config.get("model"), dict) else None
    if isinstance(own, dict) and sizes_in(options):  # in place of the size of the run
        config = config | {"model": config["model"] | {"init_args": without_size(own)}}
    # A run that was made silently, or by compare, says so in its configuration.
    trainer = {name: value for name, value in (config.get("trainer") or {}).items() if name != "enable_progress_bar"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(config | {"trainer": trainer}, allow_unicode=True), encoding="utf-8")
        words = ["--config", str(file)]
        cli = RunBuilder([*words, *options], command="decide", options=OUTPUT)
        before, after = (_options(parsed) for parsed in (cli.parser.parse_args(words), cli.config))
    check_label(cli.model.label)
    allowed = [f"model.{name}" for name in cli.model.decision_options]
    allowed += [f"data.{name}" for name in EVALUATION]
    for name in sorted(before.keys() | after.keys()):
        fixed = name not in allowed and (name.startswith(("model", "data")) or name == "trainer.precision")
        old, new = before.get(name), after.get(name)
        if fixed and old != new:
            raise UserError(
                f"--{name} {new}: the scores of '{run}' were measured with {'the default' if old is None else old}, "
                f"and this option belongs to the measurement. Run fit for that. decide can change "
                f"{', '.join(f'--{option}' for option in allowed)}, and --trainer options but precision."
            )
    return cli


def _why_not(model: Any) -> str:
    """Why the scores of a run do not decide again."""
    if model.steps > 1:
        return f"it pruned in {model.steps} steps, and the table has what the last one measured on a pruned model"
    if getattr(model, "structure", "group") != "group":
        return "it zeroed single weights, which the table does not list"
    return "it changed weights while it measured"


def _options(parsed: Any) -> dict[str, Any]:
    """Options by the name they have on the command line; ``model`` is the class."""
    return {name.replace(".init_args", "").replace(".class_path", ""): value for name, value in parsed.items()}


def _parser() -> PlainParser:
    parser = PlainParser(
        prog="lightning-prune decide",
        usage="lightning-prune decide --run FOLDER [--model.OPTION VALUE ...] [--data.eval_OPTION VALUE ...] "
        "[--trainer.OPTION VALUE ...]",
        description=DESCRIPTION,
        epilog="example: lightning-prune decide --run logs/hgsp_taylor/version_0 --model.pruning_ratio 0.3 "
        "--model.temperature 0.5; lightning-prune fit --method NAME --help says what a method's options mean",
        allow_abbrev=False,
    )
    text = "the run whose scores are used, as fit left it"
    parser.add_argument("--run", type=some_path, required=True, metavar="FOLDER", help=text)
    return parser
