"""``lightning-prune apply``: carry out a saved plan again, without calibrating."""

from lightning_prune.cli.parser import PlainParser, some_path


def main(argv: list[str]) -> int:
    """Cut ``--model`` as ``--plan`` says and write the checkpoint to ``--output``."""
    parser = PlainParser(
        prog="lightning-prune apply",
        description="Carry out a saved pruning plan on its base model. No calibration, no training data; the "
        "weights are byte for byte those of the run that made the plan.",
        epilog="example: lightning-prune apply --plan logs/hgsp/version_0/plan.json --model demo --output pruned-demo",
    )
    parser.add_argument("--plan", type=some_path, required=True, metavar="FILE", help="plan.json of a run folder")
    parser.add_model()
    text = "where to write the checkpoint: new or empty"
    parser.add_argument("--output", type=some_path, required=True, metavar="FOLDER", help=text)
    arguments = parser.parse_args(argv)

    from lightning_prune.checkpoint.apply import apply  # after the arguments: --help does not wait for torch

    apply(arguments.plan, arguments.model, arguments.output)
    return 0
