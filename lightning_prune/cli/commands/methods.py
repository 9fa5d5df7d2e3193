"""``lightning-prune methods``: what there is to prune with."""

from lightning_prune.cli.parser import PlainParser
from lightning_prune.runs.shipped_configs import described

TITLE = "Methods, by the name that `lightning-prune fit --method NAME` takes:"
PLAIN, REFITTED = "as their papers have them", "with what is kept refitted (docs/quality.md)"


def main(argv: list[str]) -> int:
    """Print every shipped method with the first line of its configuration."""
    _parser().parse_args(argv)
    found = described()
    width = max(map(len, found))
    print(TITLE)
    for heading, refitted in ((PLAIN, False), (REFITTED, True)):
        print(f"\n{heading}:")
        for name, text in found.items():
            if name.endswith("_refit") == refitted:
                print(f"  {name:<{width}}  {text}")
    print(
        "\nMagnitude reads no data; Wanda, FLAP, ShortGPT and SlimGPT take one or two forwards of the calibration set, "
        "Taylor, Fisher and K-FAC a backward,\nGISP one per step, removal priors about 3·L²/2 layer evaluations. "
        "`lightning-prune check --method NAME` says what a run takes, and\n"
        "`lightning-prune fit --method NAME --help` lists its options."
    )
    return 0


def _parser() -> PlainParser:
    return PlainParser(
        prog="lightning-prune methods",
        description="List the methods, what each removes and reads, and the configuration to start from.",
    )
