"""``lightning-prune methods``: what there is to prune with."""

from lightning_prune.cli.parser import PlainParser
from lightning_prune.runs.config_files import shipped_methods

HEADINGS = {"none": "without a refit", "residual": "with what is kept refitted (docs/quality.md)"}


def main(argv: list[str]) -> int:
    """Print every shipped method with the first sentence of its configuration."""
    text = "List the methods, what each removes and reads, and the configuration to start from."
    PlainParser(prog="lightning-prune methods", description=text).parse_args(argv)
    methods = shipped_methods()
    width = max(map(len, methods))
    print("Methods, by the name that `lightning-prune fit --method NAME` takes:")
    for refit, heading in HEADINGS.items():
        print(f"\n{heading}:")
        for name, method in methods.items():
            if method.options.get("refit", "none") == refit:
                print(f"  {name:<{width}}  {method.sentence}{f' ({method.paper})' if method.paper else ''}")
    print(
        "\nMagnitude reads no data; Wanda, FLAP, ShortGPT and SlimGPT take one or two forwards of the calibration set, "
        "Taylor, Fisher and K-FAC a backward,\nGISP one per step, removal priors about 3·L²/2 layer evaluations. "
        "`lightning-prune check --method NAME` says what a run takes, and\n"
        "`lightning-prune fit --method NAME --help` lists its options."
    )
    return 0
