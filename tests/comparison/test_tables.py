from pathlib import Path

import pytest

from lightning_prune.comparison.audit import audit
from lightning_prune.comparison.repeats import repeats
from lightning_prune.comparison.run import load_run
from lightning_prune.comparison.sections import leaders, sections
from lightning_prune.comparison.tables import evaluation_sets, results
from tests.comparison.fake_run import write_run


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
        ([], []),
    ],
)
def test_short_names_are_short_and_tell_apart(tmp_path: Path, names: list[str], short: list[str]) -> None:
    run = load_run(write_run(tmp_path))
    perplexity = run.metrics.perplexity.pop("demo")
    run.metrics.perplexity.update(dict.fromkeys(names, perplexity))
    assert evaluation_sets([run]) == dict(zip(names, short, strict=True))


def test_perplexity_follows_system_and_ratio(tmp_path: Path) -> None:
    (group,) = audit([load_run(write_run(tmp_path))]).groups
    assert list(results(repeats(group.all), group).columns[:4]) == ["system", "ratio", "perplexity demo", "verdict"]


def test_answer_names_best_and_next_of_what_is_usable_and_reached_its_ratio(tmp_path: Path) -> None:
    values = {"wanda": 12.0, "taylor": 13.0, "lost": 99.0, "broken": None}
    folders = [write_run(tmp_path, name, perplexity=value) for name, value in values.items()]
    folders.append(write_run(tmp_path, "short", achieved=0.25, perplexity=10.5))
    folders.append(write_run(tmp_path, "lost", 0.5, perplexity=99.0, version=1))
    found = sections(audit([load_run(folder) for folder in folders]), [])[0]
    at_20, at_50 = found.tables[0][1].to_dict("records")
    assert (at_20["best"], at_20["perplexity"], at_20["times dense"]) == ("wanda", "12.000", "1.20")
    assert at_20["next"] == "taylor 13.000"
    assert at_20["seconds to prune"] == "2.0"
    assert (at_50["best"], at_50["verdict"], at_50["next"]) == ("none is usable", "unusable", "–")
    assert any("--seeds" in text for text in found.text)  # nothing was repeated, so nothing is known about noise


def test_lead_inside_the_spread_is_a_tie_and_outside_is_not(tmp_path: Path) -> None:
    values = {"wanda": (12.0, 13.0, 14.0), "taylor": (11.0, 12.0, 13.0), "far": (14.0, 15.0, 16.0)}
    folders = [
        write_run(
            tmp_path, name, perplexity=value, version=seed, calibration={"seed": seed, "fingerprint": str(seed) * 64}
        )
        for name, found in values.items()
        for seed, value in enumerate(found)
    ]
    (group,) = audit([load_run(folder) for folder in folders]).groups
    lines = repeats(group.all)
    # Deviations are 1 and 1: √2 is more than 13 − 12, and less than 15 − 12.
    assert [line.name for line in leaders(lines, "demo")] == ["taylor", "wanda"]
    assert [line.name for line in leaders([lines[1], lines[2]], "demo")] == ["taylor"]


def test_equal_numbers_tie_without_any_repetition_and_nothing_leads_where_nothing_is_usable(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path, name, perplexity=99.0 if name == "c" else 12.0)) for name in "abc"]
    lines = repeats(runs)
    assert [line.name for line in leaders(lines, "demo")] == ["a", "b"]
    assert leaders(lines[2:], "demo") == []


def test_nothing_evaluated_is_said(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path))
    run.metrics.perplexity.clear()
    run.metrics.evaluation.clear()
    found = sections(audit([run]), [])[0]
    assert not found.tables
    assert "nothing is ranked" in found.text[0]
