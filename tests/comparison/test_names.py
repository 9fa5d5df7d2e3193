import pytest

from lightning_prune.comparison.names import LONGEST, short_names
from lightning_prune.comparison.tables import header


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["demo"], ["demo"]),
        (["wikitext2/test.txt", "ptb/test.txt"], ["wikitext2", "ptb"]),
        (["wikitext2/test.txt"], ["wikitext2/test"]),
        (["wikitext2/test.txt", "ptb/valid.txt"], ["wikitext2/test", "ptb/valid"]),
        (["c4.json.gz", "e.npy"], ["c4", "e"]),
        (["a.txt", "a.npy"], ["a.txt", "a.npy"]),  # would be the same
        (["test", "a/test"], ["test", "a/test"]),
        (
            ["the_first_windows_of_128.npy", "first_of_all_windows_of_1024.npy"],
            ["…windows_of_128", "…all_windows_of_1024"],
        ),
        (["x" * 30], ["…" + "x" * 19]),
        ([], []),
    ],
)
def test_short_names_are_short_and_tell_apart(names: list[str], short: list[str]) -> None:
    assert list(short_names(names).items()) == list(zip(names, short, strict=True))


def test_short_names_fit_whatever_the_names() -> None:
    names = [f"{'word_' * count}end.txt" for count in range(1, 12)]
    found = short_names([names[0], names[-1]])
    assert all(0 < len(name) <= LONGEST for name in found.values())


def test_perplexity_stands_behind_system_and_ratio() -> None:
    columns = header(["wikitext2/test.txt", "ptb/test.txt"])
    assert columns[:5] == ("system", "ratio", "perplexity wikitext2", "perplexity ptb", "verdict")
