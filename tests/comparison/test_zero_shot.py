import csv
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lightning_prune as lp
from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.cli.commands.compare import main
from lightning_prune.comparison import accuracy, zero_shot
from lightning_prune.comparison.audit import audit
from lightning_prune.comparison.exports import accuracy_csv, latex
from lightning_prune.comparison.records import Accuracy, Score
from lightning_prune.comparison.run import load_run
from lightning_prune.comparison.sections import sections, terminal
from lightning_prune.comparison.zero_shot import ZeroShot
from lightning_prune.evaluation.zero_shot import Metric, ZeroShotResult
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


@pytest.mark.slow
@needs_harness
def test_command_and_call_show_what_the_harness_measured(
    folders: list[Path], task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "logs"
    options = ["--zero-shot", "tiny_choice", "--include-path", str(task_folder)]
    assert main(["--runs", *map(str, folders), "--root", str(root), *options]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("zero-shot:")]
    assert any(line.startswith("system") and "acc tiny_choice" in line for line in shown)
    for name in ("dense", "wanda", "taylor"):
        assert any(line.startswith(name) and " ± " in line for line in shown)
    report = root / "comparison" / "version_0" / "zero_shot.csv"
    kept = {row["system"]: row for row in csv.DictReader(report.open()) if row["metric"] == "acc"}
    table = lp.compare(folders, folder=root, zero_shot=["tiny_choice"], include_path=task_folder, verbose=False)
    for _, row in table.iterrows():
        expected = kept[row["system"]]
        assert (str(row["acc tiny_choice"]), str(row["stderr tiny_choice"])) == (expected["value"], expected["stderr"])
    (dense,) = table.attrs["dense"].values()
    assert str(dense["acc tiny_choice"]) == kept["dense"]["value"]


def test_every_checkpoint_is_measured_once_and_a_changed_task_again(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []

    def harness(model: Any, tokenizer: Any, tasks: list[str], manager: object, batch: int) -> ZeroShotResult:
        measured.append(model)
        return ZeroShotResult({task: {"acc": Metric(0.25 * len(measured), 0.01)} for task in tasks}, "0.4")

    monkeypatch.setattr(zero_shot, "zero_shot", harness)
    monkeypatch.setattr(zero_shot, "check_tasks", lambda tasks, include_path: object())
    task = tmp_path / "tasks" / "tiny.yaml"
    task.parent.mkdir()
    task.write_text("one")
    runs = [load_run(folder) for folder in folders]

    def measure() -> list[Accuracy | None]:
        tasks = ZeroShot(["tiny"], task.parent, tmp_path / "logs")
        tasks.check()
        return [run.accuracy for run in tasks.measure(runs)]

    first, second = measure()
    assert first is not None
    assert second is not None
    assert len(measured) == 3  # the dense model once for both
    assert first.dense == second.dense == {"tiny": {"acc": Score(0.25, 0.01)}}
    assert (first.pruned["tiny"]["acc"].value, second.pruned["tiny"]["acc"].value) == (0.5, 0.75)
    assert measure() == [first, second]
    assert len(measured) == 3
    task.write_text("two")
    measure()
    assert len(measured) == 6
    make_tiny(seed=9).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"base' is not the model any more that .*wanda"):
        measure()


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
    assert r" & ratio & acc piqa & acc boolq & mean acc \\" in table
    assert r"dense & 0 & 75.00 $\pm$ 1.00 & 65.00 $\pm$ 2.00 & 70.00 \\" in table
    assert r"wanda & 0.2 & 55.00 $\pm$ 2.00 & 60.00 $\pm$ 2.00 & 57.50 \\" in table
    rows = list(csv.DictReader(accuracy_csv(found).splitlines()))
    assert len(rows) == 3 + 3 + 2
    norm = [(row["system"], row["value"], row["stderr"]) for row in rows if row["metric"] == "acc_norm"]
    assert norm == [("dense", "0.8", "0.01"), ("wanda", "0.6", "0.01")]


def test_task_that_one_seed_lacks_has_no_mean(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path))
    has = replace(run, accuracy=Accuracy({"piqa": {"acc": Score(0.5, None)}}, {}, "0.4"))
    assert accuracy.cells([has], [has]) == {"acc piqa": "50.00"}
    assert accuracy.cells([has, run], [has]) == {"acc piqa": "–"}
    assert accuracy.cells([run], [run]) == {}
