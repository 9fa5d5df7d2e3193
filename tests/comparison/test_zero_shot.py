import csv
import re
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
from lightning_prune.comparison.records import Accuracy, Score, load_run
from lightning_prune.comparison.sections import sections, terminal
from lightning_prune.comparison.zero_shot import ZeroShot
from lightning_prune.evaluation.zero_shot import Metric, ZeroShotResult
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.support.errors import UserError
from tests.comparison.fake_run import make_run, seeded, write_run
from tests.cutting import layered_cut
from tests.evaluation.test_zero_shot import needs_harness, task_folder
from tests.tiny import make_tiny, mixed_plan, tiny_tokenizer

__all__ = ["task_folder"]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two runs of one base model with different checkpoints."""
    base, found = tmp_path / "base", []
    make_tiny().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    opened = Checkpoint.open(str(base))
    for seed, label in enumerate(("wanda", "taylor"), start=1):
        model, folder = (
            make_tiny(seed=seed),
            write_run(tmp_path, label, base_model=str(base), weights=opened.fingerprint),
        )
        write_checkpoint(layered_cut(model, mixed_plan(model)), folder / "pruned", beside=opened, card="")
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

    def measure() -> list[Any]:
        tasks = ZeroShot(["tiny"], task.parent, tmp_path / "logs")
        tasks.check()
        return [run.accuracy for run in tasks.measure([load_run(folder) for folder in folders])]

    first, second = measure()
    assert len(measured) == 3  # the dense model once for both
    assert first.dense == second.dense == {"tiny": {"acc": Score(0.25, 0.01)}}
    assert (first.pruned["tiny"]["acc"].value, second.pruned["tiny"]["acc"].value) == (0.5, 0.75)
    assert measure() == [first, second]
    assert len(measured) == 3
    task.write_text("two")
    measure()
    assert len(measured) == 6
    make_tiny(seed=9).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"base' has changed since .*wanda"):
        measure()


def test_accuracies_are_in_the_tables_and_every_metric_in_a_file(tmp_path: Path) -> None:
    dense = {"piqa": {"acc": Score(0.75, 0.01), "acc_norm": Score(0.8, 0.01)}, "boolq": {"acc": Score(0.65, 0.02)}}
    first = {"piqa": {"acc": Score(0.5, 0.01), "acc_norm": Score(0.6, 0.01)}, "boolq": {"acc": Score(0.6, 0.02)}}
    runs = seeded(tmp_path, {"wanda": [12.0, 12.0]})
    by_seed = zip(runs, (first, first | {"piqa": {"acc": Score(0.6, 0.03)}}), strict=True)
    result = audit([replace(run, accuracy=Accuracy(pruned, dense, "0.4")) for run, pruned in by_seed])
    lines = terminal(sections(result, [])).splitlines()
    table = latex(result).partition(r"\label{tab:accuracy-1}")[2]
    assert r" & ratio & acc piqa & acc boolq & mean acc \\" in table
    cells = {"dense": ["75.00 ± 1.00", "65.00 ± 2.00", "70.00"], "wanda": ["55.00 ± 2.00", "60.00 ± 2.00", "57.50"]}
    for name, expected in cells.items():  # of the pruned models means over both seeds
        shown = next(line for line in lines if line.startswith(name))
        assert [text for text in expected if text not in shown] == []
        row = " & ".join(expected).replace("±", r"$\pm$")
        assert re.search(rf"{name} & [\d.]+ & {re.escape(row)} ", table)
    rows = list(csv.DictReader(accuracy_csv(result).splitlines()))
    assert len(rows) == 3 + 3 + 2
    norm = [(row["system"], row["value"], row["stderr"]) for row in rows if row["metric"] == "acc_norm"]
    assert norm == [("dense", "0.8", "0.01"), ("wanda", "0.6", "0.01")]


def test_task_that_one_seed_lacks_has_no_mean(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    has = replace(run, accuracy=Accuracy({"piqa": {"acc": Score(0.5, None)}}, {}, "0.4"))
    assert accuracy.cells([has], [has]) == {"acc piqa": "50.00"}
    assert accuracy.cells([has, run], [has]) == {"acc piqa": "–"}
    assert accuracy.cells([run], [run]) == {}
