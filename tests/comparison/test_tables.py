import csv
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_prune.comparison.appendix import appendix
from lightning_prune.comparison.audit import audit
from lightning_prune.comparison.exports import latex, results_csv
from lightning_prune.comparison.repeats import by_size, repeats
from lightning_prune.comparison.sections import leaders, sections
from lightning_prune.comparison.tables import distances, evaluation_sets, results
from lightning_prune.runs.records import Failure, Recovered
from tests.comparison.fake_run import make_run, seeded


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
        (["w/test.txt", "w/test.txt@512", "p/test.txt", "p/test.txt@512"], ["w", "w@512", "p", "p@512"]),
        ([], []),
    ],
)
def test_short_names_are_short_and_tell_apart(tmp_path: Path, names: list[str], short: list[str]) -> None:
    run = make_run(tmp_path)
    perplexity = run.metrics.perplexity.pop("demo")
    run.metrics.perplexity.update(dict.fromkeys(names, perplexity))
    manifest = run.metrics.evaluation.pop("demo")
    for name in names:
        of = name.partition("@")[0] if "@" in name else None
        run.metrics.evaluation[name] = manifest.model_copy(update={"long_windows_of": of})
    assert evaluation_sets([run]) == dict(zip(names, short, strict=True))


def test_answer_names_best_and_next_of_what_is_usable_and_reached_its_ratio(tmp_path: Path) -> None:
    values = {"wanda": 12.0, "taylor": 13.0, "lost": 99.0, "broken": None}
    runs = [make_run(tmp_path, name, perplexity=value) for name, value in values.items()]
    runs.append(make_run(tmp_path, "short", achieved=0.25, perplexity=10.5))
    runs.append(make_run(tmp_path, "lost", 0.5, perplexity=99.0))
    answer = sections(audit(runs), [])[0]
    at_20, at_50 = answer.tables[0][1].to_dict("records")
    assert (at_20["best"], at_20["perplexity"], at_20["times dense"]) == ("wanda", "12.000", "1.20")
    assert (at_20["next"], at_20["calibrate + prune s"]) == ("taylor 13.000", "2.0")
    assert (at_50["best"], at_50["verdict"], at_50["next"]) == ("none is usable", "unusable", "–")
    assert any("--seeds" in text for text in answer.text)  # nothing was repeated, so nothing is known about noise
    (group,) = audit(runs).groups
    assert list(results(repeats(group.all), group).columns[:4]) == ["system", "ratio", "perplexity demo", "verdict"]


@pytest.mark.parametrize(("dense", "said"), [(11.0, False), (25.0, True)])
def test_a_dense_model_that_is_lost_in_long_windows_is_said(tmp_path: Path, dense: float, said: bool) -> None:
    run = make_run(tmp_path, distance={"kl_divergence": 0.02, "top1_agreement": 0.9, "expected_acceptance": 0.8})
    run.metrics.perplexity["demo@512"].dense = dense
    legend = sections(audit([run]), [])[-1].bullets
    assert (
        "demo@512: the dense model itself is 2.5 times worse in these longer windows, so they say little." in legend
    ) is said


def test_the_answer_says_who_is_closer_to_the_dense_model_than_the_lowest_perplexity(tmp_path: Path) -> None:
    near, far = ({"kl_divergence": value, "top1_agreement": 0.9, "expected_acceptance": 0.8} for value in (0.02, 0.06))
    runs = [make_run(tmp_path, "confident", perplexity=9.9, distance=far)]
    runs.append(make_run(tmp_path, "close", perplexity=10.2, distance=near))
    text = sections(audit(runs), [])[0].text
    assert any("what close predicts is closer to the dense model (KL 0.0200 against 0.0600)" in one for one in text)
    runs.append(make_run(tmp_path, "both", perplexity=9.8, distance=near))
    assert not any("closer to the dense model" in one for one in sections(audit(runs), [])[0].text[:2])


def test_the_lowest_perplexity_is_named_where_its_divergence_makes_it_unusable(tmp_path: Path) -> None:
    far, near = ({"kl_divergence": value, "top1_agreement": 0.9, "expected_acceptance": 0.8} for value in (5.0, 0.02))
    runs = [make_run(tmp_path, "far", perplexity=10.1, distance=far)]
    runs.append(make_run(tmp_path, "near", perplexity=10.2, distance=near))
    text = sections(audit(runs), [])[0].text
    assert "At 0.2 on demo, far has a lower perplexity, 10.100, but is unusable (KL)." in text


def test_where_the_divergence_decides_the_verdict_the_cell_says_so(tmp_path: Path) -> None:
    distance = {"kl_divergence": 0.5, "top1_agreement": 0.6, "expected_acceptance": 0.6}
    (line,) = repeats([make_run(tmp_path, "far", perplexity=10.5, distance=distance)])
    assert (line.shown_verdict("demo"), line.verdict("demo")) == ("degraded (KL)", "degraded")


@pytest.mark.parametrize(
    ("values", "leading", "after"),
    [
        # Deviations are 1 and 1: √2 is more than 13 − 12, and less than 15 − 12.
        ({"wanda": [12, 13, 14], "taylor": [11, 12, 13], "far": [14, 15, 16]}, ["taylor", "wanda"], ["far"]),
        ({"taylor": [11, 12, 13], "far": [14, 15, 16]}, ["taylor"], ["far"]),
        ({"a": [12], "b": [12], "c": [99]}, ["a", "b"], []),  # equal numbers tie, and c is not usable
    ],
)
def test_lead_inside_the_spread_is_a_tie_and_outside_is_not(
    tmp_path: Path, values: dict[str, list], leading: list[str], after: list[str]
) -> None:
    lines = repeats(seeded(tmp_path, values))
    first = leaders(lines, "demo")
    assert [line.name for line in first] == leading
    assert [line.name for line in leaders([line for line in lines if line not in first], "demo")] == after


def test_where_nothing_is_ranked_the_answer_says_why(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    trained = replace(run, recovery=Recovered(parent="", parent_label="", tokens_seen=1, seconds=1.0, perplexity={}))
    assert "trained after pruning" in sections(audit([trained]), [])[0].text[-1]
    run.metrics.perplexity.clear()
    run.metrics.evaluation.clear()
    answer = sections(audit([run]), [])[0]
    assert not answer.tables
    assert answer.text == ["Nothing is ranked. No run reached its ratio and was evaluated."]


def test_runs_of_earlier_versions_are_in_the_table_with_gaps(tmp_path: Path) -> None:
    far = {"kl_divergence": 0.0625, "top1_agreement": 0.875, "expected_acceptance": 0.75}
    new, old = make_run(tmp_path, "new", perplexity=10.5, distance=far), make_run(tmp_path, "old", perplexity=10.5)
    found = audit([new, old])
    assert (len(found.groups), found.differences) == (1, [])
    assert any(note.startswith("long windows: 512 in new") and "gap in the tables" in note for note in found.notes)
    lines = repeats([new, old])
    frame = results(lines, found.groups[0]).set_index("system")
    cells = ["perplexity demo@512", "KL demo", "KL demo@512", "verdict"]
    assert list(frame.loc["new", cells]) == ["15.000", "0.0625", "0.2500", "near dense / degraded"]
    assert list(frame.loc["old", cells]) == ["–", "–", "–", "near dense"]
    more = distances(lines, found.groups[0])
    assert more is not None
    assert list(more.set_index("system").loc["new"])[1:3] == ["87.5 %", "75.0 %"]
    assert distances(repeats([old]), audit([old]).groups[0]) is None


@pytest.mark.parametrize(
    ("kind", "limit", "target", "shown"),
    [
        ("memory", 6 * 2**30, "6GiB", "6GiB"),
        ("memory", 1536 * 2**20, "1.5GiB", "1.5GiB"),
        ("memory", 80 * 10**9, "80GB", "80GB"),
        ("memory", 100_001, "100001B", "100001B"),
        ("active_parameters", 800_000_000, "800M active", "800M active"),
        ("parameters", 4_500_000_000, "4.5B", "0.25"),
        ("parameters", 2**62 + 1, str(2**62 + 1), "0.25"),
    ],
)
def test_systems_of_one_target_share_a_line_of_their_size(
    tmp_path: Path, kind: str, limit: int, target: str, shown: str
) -> None:
    facts = {"kind": kind, "limit": limit, "reached": limit, "context": 8192, "batch": 1}
    ratio = 0.25 if kind == "parameters" else None
    result = audit([make_run(tmp_path, name, ratio, one, target=facts) for name, one in (("a", 0.25), ("b", 0.24))])
    assert list(by_size(repeats(result.runs))) == [shown]
    failures = [Failure("c", "7GiB", "broken"), Failure("c", 0.3, "broken")]
    rows = list(csv.DictReader(results_csv(result, failures).splitlines()))
    assert [row["target"] for row in rows] == [target, target, "7GiB", ""]
    assert [row["requested_ratio"] for row in rows] == [*[str(ratio or "")] * 2, "", "0.3"]
    assert f"{shown} (version_0)" in appendix(result)


def test_latex_has_the_divergence_where_it_was_measured(tmp_path: Path) -> None:
    distance = {"kl_divergence": 0.1234, "top1_agreement": 0.9, "expected_acceptance": 0.8}
    text = latex(audit([make_run(tmp_path, "wanda", distance=distance)]))
    before, table = text.split(r"\label{tab:divergence-1}")
    assert r"KL(dense $\|$ pruned)" in before
    assert "0.1234" in table
    assert "Dense" not in table
    assert "divergence" not in latex(audit([make_run(tmp_path / "other", "wanda")]))


def test_active_parameters_stand_beside_all_of_them_where_experts_are_compared(tmp_path: Path) -> None:
    counts = {
        "experts": {"dense_active": 600, "pruned_active": 590},
        "channels": {"dense_active": 600, "pruned_active": 480},
    }
    runs = []
    for label, active in counts.items():
        run = make_run(tmp_path, label)
        parameters = run.metrics.parameters.model_copy(update=active)
        runs.append(replace(run, metrics=run.metrics.model_copy(update={"parameters": parameters})))
    (group,) = audit(runs).groups
    rows = results(repeats(group.all), group).set_index("system")
    assert rows["active"].to_dict() == {"dense": "600", "experts": "590", "channels": "480"}
    assert "active" not in results(repeats([make_run(tmp_path, "wanda")]), audit([make_run(tmp_path, "w")]).groups[0])


def test_the_appendix_cuts_what_a_method_measured_and_keeps_calibration_whole(tmp_path: Path) -> None:
    parts = [{"dataset": f"text{number}.txt", "share": 0.05, "num_samples": 6} for number in range(20)]
    run = make_run(tmp_path, calibration={"parts": parts}, details={"fits": [0.123456] * 500})
    page = appendix(audit([run]))
    assert all(part["dataset"] in page for part in parts)
    assert "all of it: method.json" in page
    assert page.count("0.123456") < 30
