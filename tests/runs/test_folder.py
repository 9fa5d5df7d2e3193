import errno
import json
import multiprocessing
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.runs.folder import UNFINISHED, RunFolder, check_label, sweep_runs
from lightning_prune.runs.records import as_dict
from lightning_prune.support import files
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import Lock
from tests.comparison.fake_run import ENVIRONMENT, EVALUATION, write_run

NOTHING = {"dataset": None}
METRICS: dict[str, Any] = {
    "perplexity": {"demo": {"dense": 10.0, "pruned": 12.5, "tokens": 1270}},
    "evaluation": {"demo": EVALUATION},
    "parameters": {"dense": 1000, "pruned": 800},
    "pruning_ratio": {"requested": 0.2, "achieved": 0.2},
    "seconds": {"total": 3.5},
    "peak_memory_bytes": 1,
    "method": {"name": "wanda", "label": "wanda", "base_model": "demo", "base_model_sha256": None},
}


def finish(root: Path, label: str = "wanda", config: str = "a: 1\n", metrics: dict[str, Any] = METRICS) -> Path:
    with RunFolder.claim(root, label) as folder:
        folder.write_config(config)
        folder.write_results(NOTHING, ENVIRONMENT, metrics)
    return folder.path


def killed(root: Path, name: str, *others: str, config: str = "a: 1\n") -> Path:
    """What SIGKILL leaves: nobody holds ``unfinished``."""
    folder = root / "wanda" / name
    folder.mkdir(parents=True)
    for file in (UNFINISHED, *others):
        (folder / file).touch()
    (folder / "config.yaml").write_text(config)
    return folder


def test_numbers_go_up(tmp_path: Path) -> None:
    (tmp_path / "wanda").mkdir()
    for name in ("version_4", "version_10", "version_x"):
        (tmp_path / "wanda" / name).mkdir()
        (tmp_path / "wanda" / name / "file").touch()
    (tmp_path / "wanda" / "version_11").touch()  # a file takes the number, too
    others = sorted(tmp_path.rglob("*"))
    assert finish(tmp_path).name == "version_12"
    assert set(others) <= set(tmp_path.rglob("*")), "folders of somebody else are not touched"
    assert finish(tmp_path).name == "version_13"
    assert finish(tmp_path, "other").name == "version_0"


def test_folder_of_a_running_process_is_marked_held_and_left_alone(tmp_path: Path) -> None:
    with RunFolder.claim(tmp_path, "wanda") as folder:
        assert json.loads((folder.path / UNFINISHED).read_text())["process"] == os.getpid()
        assert Lock.take(folder.path / UNFINISHED) is None
        sweep_runs(tmp_path / "wanda")
        assert folder.path.is_dir()
        with RunFolder.claim(tmp_path, "wanda") as other:
            assert other.path != folder.path
            for one in (folder, other):
                one.write_results(NOTHING, ENVIRONMENT, METRICS)
    assert not list(tmp_path.rglob(UNFINISHED))


def layer_results(folder: RunFolder) -> None:
    (folder.path / "started.json").touch()
    (folder.path / "layer_results").mkdir()
    (folder.path / "layer_results" / "step_00001.safetensors").touch()


@pytest.mark.parametrize(
    ("error", "write", "notes"),
    [
        (ValueError("early"), lambda folder: None, None),
        (
            KeyboardInterrupt(),
            lambda folder: (folder.path / "scores.csv").touch(),
            ["'{path}' stays and is not finished; it holds config.yaml, scores.csv, unfinished"],
        ),
        (
            KeyboardInterrupt(),
            lambda folder: folder.write_results(NOTHING, ENVIRONMENT, METRICS),
            ["'{path}' stays and is finished; it holds calibration.json, config.yaml, environment.json, metrics.json, "
             "unfinished"],
        ),
        (
            KeyboardInterrupt(),
            layer_results,
            ["'{path}' stays and is not finished; it holds config.yaml, layer_results, started.json, unfinished",
             "'lightning-prune fit --config {path}/config.yaml --resume' continues from there"],
        ),
        (UserError("would end the same way again"), layer_results, None),
        (FloatingPointError("would end the same way again"), layer_results, None),
    ],
)  # fmt: skip
def test_run_that_fails_keeps_what_is_of_use_and_says_so_and_else_not_even_the_root(
    tmp_path: Path, error: BaseException, write: Callable[[RunFolder], Any], notes: list[str] | None
) -> None:
    def fail() -> None:
        with RunFolder.claim(tmp_path / "root", "wanda") as folder:
            folder.write_config("a: 1\n")
            write(folder)
            raise error

    with pytest.raises(type(error)):
        fail()
    path = tmp_path / "root" / "wanda" / "version_0"
    assert getattr(error, "__notes__", None) == (notes and [note.format(path=path) for note in notes])
    if notes and "not finished" in notes[0]:
        lock = Lock.take(path / UNFINISHED)
        assert lock is not None, "a dead run's mark is held by nobody"
        lock.release()
    else:
        assert not list(tmp_path.rglob(UNFINISHED))
    if not notes:
        assert list(tmp_path.iterdir()) == []


def test_next_run_tidies_up_after_killed_ones(tmp_path: Path) -> None:
    useless = killed(tmp_path, "version_0", "7.5%", ".pruned.ab12.tmp", "report.md", "results.csv", "tensorboard")
    scored = killed(tmp_path, "version_1", "scores.csv", ".scores.csv.ab12.tmp", config="b: 2\n")
    (scored / "layer_results").mkdir()
    (scored / "layer_results" / ".step_00002.safetensors.ab12.tmp").touch()
    finished = finish(tmp_path, config="c: 3\n")
    (finished / ".metrics.json.ab12.tmp").touch()
    (finished / UNFINISHED).touch()  # killed after the last file and before the mark was taken away
    (tmp_path / ".compare.tmp").touch()
    (tmp_path / "wanda" / "version_9").mkdir()  # killed before it was marked
    assert not useless.exists()
    newest = finish(tmp_path, config="d: 4\n")
    assert [path.name for path in tmp_path.rglob(".*")] == []
    assert {path.name for path in (tmp_path / "wanda").iterdir()} == {scored.name, finished.name, newest.name}
    assert {path.name for path in scored.iterdir()} == {UNFINISHED, "config.yaml", "layer_results", "scores.csv"}
    assert not (finished / UNFINISHED).exists()
    # A finished run of the same configuration takes the place of the killed one.
    finish(tmp_path, config="b: 2\n")
    assert not scored.exists()


def _claim_often(root: Path, results: Any) -> None:
    for number in range(20):
        with suppress(RuntimeError):
            with RunFolder.claim(root, "wanda") as folder:
                folder.write_config(str(os.getpid()))
                if number % 3 == 0:
                    raise RuntimeError
                folder.write_results(NOTHING, ENVIRONMENT, METRICS)
            results.put((os.getpid(), folder.path.name))


def test_processes_never_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    workers = [context.Process(target=_claim_often, args=(tmp_path, results)) for _ in range(6)]
    for worker in workers:
        worker.start()
    made = [results.get(timeout=60) for _ in range(6 * 13)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert sorted(path.name for path in (tmp_path / "wanda").iterdir()) == sorted(name for _, name in made)
    for process, name in made:
        assert (tmp_path / "wanda" / name / "config.yaml").read_text() == str(process)
        assert RunFolder(tmp_path / "wanda" / name).is_finished


def test_labels_are_plain_names_and_others_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for label in ("a", "hgsp_taylor", "wanda-2.4", "_", "-x", "A" * 200, "0"):
        assert check_label(label) == label
    for label in ("", "..", ".hidden", "../evil", "/abs", "a\\b", "a b", "a\n", "ä", "a\0", "<b>", "A" * 201):
        with pytest.raises(UserError, match=r"--model.label: found .*letters"), RunFolder.claim(tmp_path, label):
            pytest.fail("claimed")
    assert list(tmp_path.iterdir()) == []


def test_place_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    places = [tmp_path / "file", tmp_path / "file" / "below", tmp_path / "loop", tmp_path / "loop" / "below"]
    places += [tmp_path / ("x" * 300), tmp_path / "/".join(["y" * 200] * 30), Path("/proc/nowhere"), Path("a\0b")]
    before = sorted(tmp_path.rglob("*"))
    for place in places:
        with pytest.raises(UserError, match=r"--trainer\.default_root_dir: cannot write below"):
            finish(place)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("step", range(8))
def test_full_disk_at_any_write_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Every call that takes space fails in its turn; nothing stays that looks like a run."""
    calls = []

    def full(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(real)
            if len(calls) > step:
                raise OSError(errno.ENOSPC, "No space left on device", str(arguments[0]))
            return real(*arguments, **options)

        return call

    for owner, name in ((files.os, "mkdir"), (files.os, "pwrite"), (files.Path, "touch")):
        monkeypatch.setattr(owner, name, full(getattr(owner, name)))
    with pytest.raises(UserError, match=r"cannot write below .*No space left"):
        finish(tmp_path / "root")
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*"))


def test_finished_run_is_read_as_types(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    run = RunFolder.open(folder, "--run")
    for record, name in ((run.metrics, "metrics"), (run.environment, "environment"), (run.details, "method")):
        assert as_dict(record) == json.loads((folder / f"{name}.json").read_text())
    assert run.calibration is not None
    assert run.scores.num_layers == len(run.plan.layers)
    assert RunFolder.open(write_run(tmp_path, "free", no_data=True), "--run").calibration is None
    (folder / "scores.csv").write_bytes((write_run(tmp_path, "other", 0.5) / "scores.csv").read_bytes())
    with pytest.raises(UserError, match=r"--run: .*scores.csv' does not belong to its plan \(layer \d keeps other"):
        _ = RunFolder.open(folder, "--run").scores


def test_metrics_come_last_so_they_mean_a_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    real = files.write_bytes
    monkeypatch.setattr(files, "write_bytes", lambda path, data: (written.append(path.name), real(path, data)))
    overflowed = METRICS | {"perplexity": {"demo": {"dense": 10.0, "pruned": float("inf"), "tokens": 1}}}
    folder = finish(tmp_path, metrics=overflowed)
    assert written == ["config.yaml", "calibration.json", "environment.json", "metrics.json"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(written)
    assert json.loads((folder / "metrics.json").read_text())["perplexity"]["demo"]["pruned"] is None


WRONG = [  # one of a kind; tests/hostile/test_runs.py damages every field
    ("metrics.json", "perplexity", "demo", {"dense": "10", "pruned": 1.0, "tokens": 1},
     "perplexity.demo.dense is '10', allowed: a valid number"),
    ("metrics.json", "perplexity", "other", {}, "perplexity.other.dense is missing"),
    ("metrics.json", "evaluation", "other", EVALUATION, "perplexity and evaluation with the same sets"),
    ("metrics.json", "parameters", "dense", True, "parameters.dense is True, allowed: a valid integer"),
    ("plan.json", "parameters", "dense", 999, "metrics.json in '{folder}' are of different runs"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "field", "inner", "value", "message"), WRONG)
def test_wrong_field_is_named_with_what_was_found_and_what_is_allowed(
    tmp_path: Path, name: str, field: str, inner: str, value: Any, message: str
) -> None:
    folder = write_run(tmp_path)
    raw = json.loads((folder / name).read_text())
    raw[field] |= {inner: value}
    (folder / name).write_text(json.dumps(raw))
    with pytest.raises(UserError, match=rf"^--run: .*{name}.*{re.escape(message.format(folder=folder))}"):
        RunFolder.open(folder, "--run")


def test_run_without_a_file_names_it_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / "scores.csv").unlink()
    os.mkfifo(folder / "scores.csv")
    with pytest.raises(UserError, match=r"not a finished pruning run: it has no scores\.csv"):
        RunFolder.open(folder, "--run")
    with pytest.raises(UserError, match="regular file"):
        files.read_file(folder / "scores.csv", 10, "--run")
    with pytest.raises(UserError, match="at most 10 are read"):
        files.read_file(folder / "metrics.json", 10, "--run")
