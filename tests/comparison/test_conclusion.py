import json
from pathlib import Path

from lightning_prune.comparison.audit import audit
from lightning_prune.comparison.conclusion import conclusion
from lightning_prune.comparison.run import Run, load_run
from tests.comparison.fake_run import EVALUATION, write_run


def second_set(folder: Path, perplexity: float) -> Run:
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["perplexity"]["ptb"] = {"dense": 20.0, "pruned": perplexity, "tokens": 1270}
    metrics["evaluation"]["ptb"] = EVALUATION
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return load_run(folder)


def test_only_comparable_runs_are_ranked_and_the_others_are_named(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path, "wanda", perplexity=12.0),
        write_run(tmp_path, "taylor", perplexity=13.0),
        write_run(tmp_path, "short", achieved=0.25, perplexity=10.5),
        write_run(tmp_path, "short_512", perplexity=10.1, calibration={"seq_len": 512, "fingerprint": "7" * 64}),
    ]
    told = conclusion(audit([load_run(folder) for folder in folders]))
    assert told[0] == "By perplexity on demo (dense 10.000), wanda is best at 20 % (12.000, 1.20 × dense)."
    assert told[-1] == (
        "Not ranked here: short at 20 % reached another ratio than the one asked for; short_512 (table 2, "
        "another calibration sequence length)."
    )
    assert len(told) == 4


def test_set_that_the_answer_is_about_is_named_and_where_others_disagree(tmp_path: Path) -> None:
    runs = [
        second_set(write_run(tmp_path, "wanda", perplexity=12.0), 25.0),
        second_set(write_run(tmp_path, "taylor", perplexity=13.0), 24.0),
    ]
    told = conclusion(audit(runs))
    assert told[0].startswith("By perplexity on demo (dense 10.000), wanda is best")
    assert told[3] == "This is about demo, the first of 2 evaluation sets; on ptb it is taylor at 20 %."
    more = [
        second_set(write_run(tmp_path, "wanda", 0.3, perplexity=14.0, version=1), 28.0),
        second_set(write_run(tmp_path, "taylor", 0.3, perplexity=15.0, version=1), 27.0),
    ]
    assert conclusion(audit([*runs, *more]))[3].endswith("on ptb it is taylor at 20 % and 30 %.")
    runs = [second_set(run.folder, value) for run, value in zip(runs, (24.0, 25.0), strict=True)]
    assert conclusion(audit(runs))[3].endswith("on ptb the same systems lead.")


def test_nothing_evaluated_is_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    metrics = json.loads((folder / "metrics.json").read_text()) | {"perplexity": {}, "evaluation": {}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert conclusion(audit([load_run(folder)])) == [
        "Nothing here may be ranked: no run reached its ratio and was evaluated."
    ]
