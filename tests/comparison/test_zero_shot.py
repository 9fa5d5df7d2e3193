import csv
import importlib.util
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import lightning_prune as lp
from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.cli.commands.compare import main
from lightning_prune.comparison import accuracy
from lightning_prune.comparison.accuracy import Accuracy, Score
from lightning_prune.comparison.audit import audit
from lightning_prune.comparison.latex import latex
from lightning_prune.comparison.run import load_run
from lightning_prune.comparison.sections import sections, terminal
from lightning_prune.evaluation import zero_shot
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.support.errors import UserError
from tests.comparison.fake_run import write_run
from tests.cutting import layered_cut
from tests.evaluation.test_zero_shot import task_folder
from tests.tiny import make_tiny, mixed_plan, tiny_tokenizer

__all__ = ["task_folder"]
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two runs of one base model with different checkpoints."""
    dense, base = make_tiny(), tmp_path / "base"
    dense.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    found = []
    for label in ("wanda", "taylor"):
        folder = write_run(tmp_path, label, base_model=str(base), weights=Checkpoint.open(str(base)).fingerprint)
        model = make_tiny(seed=len(found) + 1)
        pruned = layered_cut(model, mixed_plan(model))
        write_checkpoint(pruned, folder / "pruned", beside=Checkpoint.open(str(base)), card="")
        found.append(folder)
    return found


@needs_harness
def test_every_checkpoint_is_measured_once_and_a_changed_task_again(
    folders: list[Path],
    task_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured = []
    real = zero_shot.zero_shot
    monkeypatch.setattr(zero_shot, "zero_shot", lambda *given: measured.append(given) or real(*given))
    runs = ["--runs", *map(str, folders), "--root", str(tmp_path / "logs")]
    asked = [*runs, "--zero-shot", "tiny_choice", "--include-path", str(task_folder)]
    assert main(asked) == 0
    assert len(measured) == 3  # the dense model once for both
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("zero-shot:")]
    assert "acc tiny_choice" in next(line for line in shown if line.startswith("system"))
    assert all(" ± " in next(line for line in shown if line.startswith(name)) for name in ("dense", "wanda", "taylor"))

    def fail(*given: object) -> None:
        raise AssertionError("nothing is left to measure or to open")

    with monkeypatch.context() as patch:
        patch.setattr(zero_shot, "zero_shot", fail)
        patch.setattr(zero_shot, "check_tasks", fail)
        assert main(asked) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[:-1] == shown[:-1]
    reports = [tmp_path / "logs" / "comparison" / f"version_{number}" / "zero_shot.csv" for number in (0, 1)]
    assert reports[0].read_text() == reports[1].read_text()

    options = {"zero_shot": ["tiny_choice"], "include_path": task_folder, "verbose": False}
    with monkeypatch.context() as patch:
        patch.setattr(zero_shot, "zero_shot", fail)
        table = lp.compare(folders, folder=tmp_path / "logs", **options)
    kept = {row["system"]: row for row in csv.DictReader(reports[0].read_text().splitlines()) if row["metric"] == "acc"}
    for _, row in table.iterrows():
        expected = kept[row["system"]]
        assert (str(row["acc tiny_choice"]), str(row["stderr tiny_choice"])) == (expected["value"], expected["stderr"])
    (dense,) = table.attrs["dense"].values()
    assert str(dense["acc tiny_choice"]) == kept["dense"]["value"]
    assert len(measured) == 3
    pd.testing.assert_frame_equal(lp.compare(folders, **options), table)
    assert len(measured) == 6  # kept nowhere

    task = task_folder / "tiny_choice.yaml"
    task.write_text(task.read_text().replace("{{question}}", "{{question}} w3"))
    assert main(asked) == 0
    assert len(measured) == 9
    with pytest.raises(UserError, match=r"--zero-shot: 'tiny_chioce' is no task"):
        main([*runs, "--zero-shot", "tiny_chioce", "--include-path", str(task_folder)])
    with pytest.raises(UserError, match="--include-path belongs to --zero-shot"):
        main([*runs, "--include-path", str(task_folder)])
    make_tiny(seed=9).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"base' is not the model any more that .*wanda"):
        main(asked)


def test_accuracies_stand_in_the_table_and_every_metric_in_a_file(tmp_path: Path) -> None:
    dense = {"piqa": {"acc": Score(0.75, 0.01), "acc_norm": Score(0.8, 0.01)}, "boolq": {"acc": Score(0.65, 0.02)}}
    pruned = {"piqa": {"acc": Score(0.5, 0.01), "acc_norm": Score(0.6, 0.01)}, "boolq": {"acc": Score(0.6, 0.02)}}
    drawn = {0: "a" * 64, 1: "b" * 64}
    loaded = [
        load_run(write_run(tmp_path, "wanda", version=seed, calibration={"seed": seed, "fingerprint": tokens}))
        for seed, tokens in drawn.items()
    ]
    better = pruned | {"piqa": {"acc": Score(0.6, 0.03)}}
    found = audit(
        [
            replace(run, accuracy=Accuracy(mine, dense, "0.4"))
            for run, mine in zip(loaded, (pruned, better), strict=True)
        ]
    )
    lines = terminal(sections(found, [])).splitlines()
    cells = {line.split()[0]: line for line in lines if line.startswith(("system", "dense", "wanda"))}
    assert "acc piqa" in cells["system"]
    assert "mean acc" in cells["system"]
    for text in ("75.00 ± 1.00", "65.00 ± 2.00", "70.00"):
        assert text in cells["dense"]
    for text in ("55.00 ± 2.00", "60.00 ± 2.00", "57.50"):  # means over both seeds
        assert text in cells["wanda"]
    table = latex(found).partition(r"\label{tab:accuracy-1}")[2]
    assert r"System & Ratio & acc piqa & acc boolq & mean acc \\" in table
    assert r"Dense &  & 75.00 $\pm$ 1.00 & 65.00 $\pm$ 2.00 & 70.00 \\" in table
    assert r"wanda & 20\,\% & 55.00 $\pm$ 2.00 & 60.00 $\pm$ 2.00 & 57.50 \\" in table
    rows = list(csv.DictReader(accuracy.csv_text(found).splitlines()))
    assert len(rows) == 3 + 3 + 2
    norm = [(row["system"], row["value"], row["stderr"]) for row in rows if row["metric"] == "acc_norm"]
    assert norm == [("dense", "0.8", "0.01"), ("wanda", "0.6", "0.01")]


def test_task_that_one_seed_lacks_has_no_mean(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path))
    has = replace(run, accuracy=Accuracy({"piqa": {"acc": Score(0.5, None)}}, {}, "0.4"))
    assert accuracy.columns([has]) == ["acc piqa"]
    assert accuracy.cells([has], [has]) == ["50.00"]
    assert accuracy.cells([has, run], [has]) == ["–"]
    assert accuracy.columns([run]) == []
