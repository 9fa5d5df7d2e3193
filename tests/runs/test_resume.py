"""``fit --resume``: the bytes of an undisturbed run wherever the process died, and a refusal that says why."""

import os
import signal
from pathlib import Path

import pytest

from benchmarks import kills
from lightning_prune.runs.folder import RunFolder
from lightning_prune.runs.resume import differences, facts_of, unfinished_run
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import Lock, write_json
from tests.killing import REPOSITORY, Ended, Forks, Kill
from tests.methods.behaviour import MODELS, save_model, save_tokens
from tests.tiny import tiny_tokens

OPTIONS: dict[str, list[str]] = {
    "hgsp_taylor": ["--config", "hgsp_taylor"],
    "slimgpt": ["--config", "slimgpt"],
    "shortgpt": ["--config", "shortgpt_refit", "--model.label", "shortgpt"],
    "wanda_2to4": ["--config", "wanda", "--model.structure", "2:4", "--model.label", "wanda_2to4"],
    "experts": ["--config", "hgsp_kfac_refit", "--model.label", "experts", "--model.pruning_ratio", "0.3"],
}
# Calls before which the process is killed, one after the other: the second and later ones kill a resumed run.
PRIOR = Kill("lightning_prune.calibration.wavefront:RemovalPass.batch", 8)
BACKWARD = Kill("lightning_prune.calibration.backward:BackwardPass._differentiate", 5)
MLP = Kill("lightning_prune.calibration.loop:CalibrationLoop.finish", 4)
REFIT = Kill("lightning_prune.methods.refit_experts:ExpertRefit.add", 9)
AHEAD = Kill("lightning_prune.methods.refit_pass:RefitPass._run_ahead", 5)
KEEPING = Kill("lightning_prune.calibration.results:Results.add", 3)
DECISION = Kill("lightning_prune.runs.folder:RunFolder.write_decision")
SHARDS = Kill("lightning_prune.checkpoint.write:_Shards.write", 20)
STREAMS = Kill("lightning_prune.calibration.stream_checkpoints:StreamCheckpoints.offer")
CHECK = Kill("lightning_prune.checkpoint.write:_check")
EVALUATION = Kill("lightning_prune.evaluation.perplexity:Evaluation.on_test_epoch_end")
RECORD = Kill("lightning_prune.runs.folder:RunFolder.write_results")


class Fit:
    """``fit`` on a tiny model below ``root``."""

    def __init__(self, folder: Path, forks: Forks) -> None:
        self.folder, self.forks = folder, forks
        save_model(folder / "model")
        save_model(folder / "experts", **MODELS["moe"])
        save_tokens(folder / "tokens.npy")
        save_tokens(folder / "held_out.npy", tiny_tokens(6, 16, seed=3))

    def __call__(self, system: str, root: str, *more: str, kill: Kill | None = None) -> Ended:
        model = "experts" if system == "experts" else "model"
        options = ["--model.pretrained", f"{self.folder}/{model}", "--data.dataset", f"{self.folder}/tokens.npy"]
        options += ["--data.eval_datasets", f"[{self.folder}/held_out.npy]", "--trainer.accelerator", "cpu"]
        options += ["--trainer.default_root_dir", f"{self.folder}/{root}", "--trainer.logger", "false"]
        options += ["--data.continuations", "0"]
        return self.forks.run(["fit", *OPTIONS[system], *options, *more], kill)

    def result(self, system: str, root: str) -> dict[str, bytes]:
        (metrics,) = (self.folder / root / system).glob("version_*/metrics.json")
        names = ["plan.json", "scores.csv", "config.yaml", "pruned/model.safetensors", "pruned/config.json"]
        found = {name: (metrics.parent / name).read_bytes() for name in names}
        found["config.yaml"] = found["config.yaml"].replace(f"/{root}".encode(), b"")
        return found


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Fit:
    return Fit(tmp_path_factory.mktemp("resume"), forks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("system", "kills"),
    [
        ("hgsp_taylor", [BACKWARD, KEEPING, PRIOR, STREAMS, SHARDS, EVALUATION]),
        ("slimgpt", [MLP, MLP, DECISION, CHECK]),
        ("shortgpt", [AHEAD, MLP, STREAMS, DECISION]),
        ("wanda_2to4", [KEEPING, SHARDS, RECORD]),
        ("experts", [BACKWARD, STREAMS, REFIT, MLP, SHARDS, EVALUATION]),
    ],
)
def test_a_run_that_was_killed_again_and_again_ends_with_the_bytes_of_an_undisturbed_one(
    fit: Fit, system: str, kills: list[Kill]
) -> None:
    assert fit(system, "undisturbed").status == 0
    for number, kill in enumerate(kills):
        more = ["--resume"] if number else []
        ended = fit(system, "killed", "--model.onload", "layer", *more, kill=kill)
        assert ended.status == -signal.SIGKILL, ended.printed
        assert not list((fit.folder / "killed" / system).rglob("metrics.json"))
    ended = fit(system, "killed", "--model.onload", "layer", "--resume")
    assert ended.status == 0, ended.printed
    folder = fit.folder / "killed" / system / "version_0"
    left = {path.name for path in folder.rglob("*")}
    assert not [
        name for name in left if name.startswith(".") or name in ("unfinished", "layer_results", "started.json")
    ]
    expected, found = fit.result(system, "undisturbed"), fit.result(system, "killed")
    expected["config.yaml"] = expected["config.yaml"].replace(b"onload: auto", b"onload: layer")
    assert found == expected


@pytest.fixture(scope="module")
def interrupted(fit: Fit) -> Path:
    """The folder of a run that was interrupted after its second layer; says how to go on."""
    kill = Kill("lightning_prune.calibration.results:Results.add", 3, signal=signal.SIGTERM)
    ended = fit("wanda_2to4", "interrupted", kill=kill)
    folder = fit.folder / "interrupted" / "wanda_2to4" / "version_0"
    assert ended.status == 143
    assert f"'lightning-prune fit --config {folder}/config.yaml --resume' continues from there" in ended.printed
    return folder


@pytest.mark.slow
def test_what_differs_is_named_and_nothing_is_lost(fit: Fit, interrupted: Path) -> None:
    save_model(fit.folder / "other", seed=1)
    for option, value, named in (
        ("--model.pruning_ratio", "0.3", "model.pruning_ratio: 0.2 then, 0.3 now"),
        ("--data.dataset", f"{fit.folder}/held_out.npy", "calibration tokens (SHA-256)"),
        ("--model.pretrained", f"{fit.folder}/other", "weights of the model (SHA-256)"),
    ):
        ended = fit("wanda_2to4", "interrupted", option, value, "--resume")
        assert ended.status == 2
        assert named in ended.printed
        assert (interrupted / "layer_results").is_dir()
    assert fit("wanda_2to4", "interrupted", "--resum").status == 2


@pytest.mark.slow
def test_what_the_message_says_works_and_then_nothing_is_unfinished(fit: Fit, interrupted: Path) -> None:
    assert fit.forks.run(["fit", "--config", f"{interrupted}/config.yaml", "--resume"]).status == 0
    assert RunFolder(interrupted).is_finished
    ended = fit("wanda_2to4", "interrupted", "--resume")
    assert ended.status == 2
    assert "There is none at all" in ended.printed
    assert os.listdir(interrupted.parent) == ["version_0"]


@pytest.mark.slow
def test_smaller_batches_and_other_spellings_go_on_and_end_in_the_same_plan(fit: Fit) -> None:
    system = "hgsp_taylor"
    kill = Kill("lightning_prune.calibration.results:Results.add", 5)
    assert fit(system, "smaller", kill=kill).status == -signal.SIGKILL
    folder = fit.folder / "smaller" / system / "version_0"

    def known() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (folder / "layer_results").glob("step_*")}

    before = known()
    assert len(before) == 4
    more = ["--data.batch_size", "1", "--data.eval_batch_size", "3", "--trainer.enable_progress_bar", "false"]
    more += ["--data.dataset", os.path.relpath(fit.folder / "tokens.npy", REPOSITORY)]
    more += ["--data.cache_dir", f"{fit.folder}/cache", "--model.onload", "layer"]
    again = Kill("lightning_prune.calibration.results:Results.add", 1)
    assert fit(system, "smaller", *more, "--resume", kill=again).status == -signal.SIGKILL
    assert known() == before  # not made again
    (fit.folder / "link").unlink(missing_ok=True)
    (fit.folder / "link").symlink_to(fit.folder / "model")
    link = ["--model.pretrained", os.path.relpath(fit.folder / "link", REPOSITORY) + "/"]
    assert fit(system, "smaller", *more, *link, "--resume", kill=again).status == -signal.SIGKILL
    ended = fit(system, "smaller", *more, "--resume")
    assert ended.status == 0, ended.printed
    assert os.listdir(folder.parent) == ["version_0"]
    assert fit(system, "whole", "--data.batch_size", "4").status == 0
    assert fit.result(system, "smaller")["plan.json"] == fit.result(system, "whole")["plan.json"]


def test_what_changes_no_decision_is_no_fact_and_all_else_is() -> None:
    options = {"model.pretrained": "a/model", "model.pruning_ratio": 0.2, "model.onload": "auto", "data.seed": 0}
    options |= {"data.dataset": "t.npy", "data.batch_size": 4, "data.eval_batch_size": 16, "data.cache_dir": None}
    options |= {"data.tokenizer": "a", "trainer.precision": None, "trainer.logger": None}

    def facts(name: str = "data.seed", value: object = 0) -> dict[str, object]:
        groups: dict[str, dict[str, object]] = {"model": {}, "data": {}, "trainer": {}}
        for option, given in (options | {name: value}).items():
            group, _, short = option.partition(".")
            groups[group][short] = given
        return facts_of(groups | {"model": {"class_path": "Wanda", "init_args": groups["model"]}}, "w", "t", 1)

    free = {"model.pretrained": "/x/a/model/", "model.onload": "layer", "model.label": "b", "trainer.logger": False}
    free |= {"data.batch_size": 1, "data.eval_batch_size": 1, "data.cache_dir": "c", "data.dataset": "/x/t.npy"}
    free |= {"data.tokenizer": "/x/a", "trainer.precision": "32-true", "trainer.enable_progress_bar": False}
    for name, value in free.items():
        assert differences(facts(), facts(name, value)) == []
    for name, value in {"model.pruning_ratio": 0.3, "data.seed": 1, "trainer.precision": "bf16-true"}.items():
        (difference,) = differences(facts(), facts(name, value))
        assert difference.startswith(name)
    # What an earlier version wrote down beside that.
    assert differences(facts() | {"model.pretrained": "a/model", "data.batch_size": 4}, facts()) == []


FACTS = {"model": "Wanda", "model.pruning_ratio": 0.2, "processes": 1, "tau": float("inf")}


def test_the_newest_unfinished_run_of_the_same_facts_is_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is none at all"):
        unfinished_run(tmp_path, "wanda", FACTS)
    for number in (0, 1, 10, 11, 12):
        folder = tmp_path / "wanda" / f"version_{number}"
        folder.mkdir(parents=True)
        (folder / "unfinished").touch()
        write_json(folder / "started.json", FACTS | {"processes": 2} if number == 11 else FACTS)
    (folder / "metrics.json").touch()  # finished
    newest = tmp_path / "wanda" / "version_10"
    assert unfinished_run(tmp_path, "wanda", FACTS) == newest
    with pytest.raises(UserError, match=r"version_11 differs in processes: 2 then, 3 now\. version_10 differs"):
        unfinished_run(tmp_path, "wanda", FACTS | {"processes": 3})
    locks = [Lock.take(newest.parent / name / "unfinished") for name in ("version_10", "version_1", "version_0")]
    alive = unfinished_run(tmp_path, "wanda", FACTS)
    with pytest.raises(UserError, match="still under way"), RunFolder.claim(tmp_path, "wanda", again=alive):
        pytest.fail("claimed")
    for lock in locks:
        assert lock is not None
        lock.release()


class Bench(kills.Bench):
    """Without what takes most of a run on a tiny model and has nothing of what is checked: continuations, and the event
    files of ``compare``; those of ``fit`` tell runs side by side apart."""

    def options(self, root: Path) -> list[str]:
        return [*super().options(root), "--data.continuations", "0"]

    def compare(self, root: Path) -> list[str]:
        return [*super().compare(root), "--data.continuations", "0", "--trainer.logger", "false"]


@pytest.mark.slow
def test_whatever_is_killed_nothing_is_lost_mixed_or_believed(
    tmp_path: Path, forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random kills, interrupts and runs side by side, a few of each; ``benchmarks/kills.py`` takes any number."""
    monkeypatch.setattr(kills, "Forks", lambda: forks)
    bench = Bench(tmp_path, seed=0, systems=["wanda"])
    bench.kills(2)
    bench.resumes(1)
    bench.interrupts(2)
    bench.together(2)
    assert bench.wrong == []
