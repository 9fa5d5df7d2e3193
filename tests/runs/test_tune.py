"""The search over options, and that a trial's loss is that of the run it stands for."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_prune.cli import main
from lightning_prune.data.sampling import held_out_samples
from lightning_prune.runs import tune
from lightning_prune.runs.tune import search
from tests.methods.running import save_base
from tests.tiny import make_tiny, tiny_tokens


def test_search_finds_the_lowest_along_every_option_and_tries_nothing_twice() -> None:
    tried = []

    def loss(options):
        tried.append(tuple(options.values()))
        return abs(options["a"] - 2) + abs(options["b"] - 5)

    found = list(search({"a": 0, "b": 5, "c": 1}, (("a", (0, 1, 2)), ("b", (5, 6)), ("d", (1, 2))), loss, 50))
    assert min(found, key=lambda one: one[1])[0] == {"a": 2, "b": 5, "c": 1}
    assert len(set(tried)) == len(tried) == len(found) == 4


def test_search_goes_round_again_while_something_helps_and_stops_at_its_limit() -> None:
    def loss(options):  # b helps only once a has changed, a again only once b has
        return {(0, 0): 9, (1, 0): 8, (1, 1): 7, (2, 1): 6}.get((options["a"], options["b"]), 10)

    axes = (("a", (0, 1, 2)), ("b", (0, 1)))
    assert min(one[1] for one in search({"a": 0, "b": 0}, axes, loss, 50)) == 6
    assert len(list(search({"a": 0, "b": 0}, axes, loss, 2))) == 2


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_base(make_tiny(layers=3), tmp_path / "base")
    np.save(tmp_path / "tokens.npy", tiny_tokens(24, 16).numpy())
    (tmp_path / "there.yaml").touch()
    return tmp_path


def arguments(place: Path, *more: str) -> list[str]:
    return [
        *("tune", "--config", "hgsp_taylor", "--model.pretrained", str(place / "base")),
        *("--data.dataset", str(place / "tokens.npy"), "--model.pruning_ratio", "0.25", "--trainer.accelerator", "cpu"),
        *("--output", str(place / "tuned.yaml"), *more),
    ]


def test_the_loss_of_a_trial_is_that_of_the_run_with_its_options(place: Path, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    assert main(arguments(place, "--trials", "4")) == 0
    shown = capsys.readouterr()
    # Calibrating, which may take long, says how far it is; trials have lines of their own.
    assert [line.partition(":")[0] for line in shown.err.splitlines()] == [
        "perplexity of the dense model",
        "calibrating",
    ]
    with (place / "tuned.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert [trial["refit"] for trial in trials[:3]] == ["none", "residual", "output"]
    best = min(trials, key=lambda trial: float(trial["held_out_loss"]))
    tuned = yaml.safe_load((place / "tuned.yaml").read_text())["model"]["init_args"]
    assert tuned["refit"] == best["refit"]
    assert "pretrained" not in tuned
    assert "label" not in tuned

    # The same as fit makes it, from files that are split as the documentation says.
    tokens = tiny_tokens(24, 16)
    held = held_out_samples(tokens)
    np.save(place / "seven_eighths.npy", tokens[~held].numpy())
    np.save(place / "an_eighth.npy", tokens[held].numpy())
    words = ["fit", "--config", str(place / "tuned.yaml"), "--model.pretrained", str(place / "base")]
    words += ["--data.dataset", str(place / "seven_eighths.npy")]
    words += ["--data.eval_datasets", json.dumps([str(place / "an_eighth.npy")])]
    assert main([*words, "--trainer.default_root_dir", str(place / "logs"), "--trainer.accelerator", "cpu"]) == 0
    (metrics,) = (place / "logs").rglob("metrics.json")
    (found,) = json.loads(metrics.read_text())["perplexity"].values()
    assert math.log(found["pruned"]) == pytest.approx(float(best["held_out_loss"]), abs=2e-4)
    assert f"{math.log(found['dense']):.4f}" in shown.out


def test_shifts_keep_the_size_lower_the_loss_and_are_what_fit_does(place: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--model.temperature", "0", "--trials", "1", "--shifts", "9"]
    assert main(arguments(place, *words)) == 0
    kept = json.loads((place / "tuned.json").read_text())
    first, best = kept["trials"][0], min(kept["trials"], key=lambda trial: trial["loss"])
    assert best["loss"] < first["loss"]
    assert best["move"]
    assert len(kept["trials"]) == 10
    tuned = yaml.safe_load((place / "tuned.yaml").read_text())["model"]["init_args"]
    assert tuned["block_weights"] == best["options"]["block_weights"]
    events = EventAccumulator(str(place / "tuned.tensorboard")).Reload()
    assert [round(point.value, 4) for point in events.Scalars("held-out loss/trial")] == [
        round(trial["loss"], 4) for trial in kept["trials"]
    ]
    shares = EventAccumulator(str(place / "tuned.tensorboard" / "best")).Reload().Scalars("kept fraction/mlp")
    assert [point.value for point in shares] == pytest.approx(best["kept"]["mlp"])

    tokens = tiny_tokens(24, 16)
    held = held_out_samples(tokens)
    np.save(place / "seven_eighths.npy", tokens[~held].numpy())
    np.save(place / "an_eighth.npy", tokens[held].numpy())
    ratios = []
    for more in ([], ["--model.block_weights", "null"]):
        root = place / f"logs{len(more)}"
        line = ["fit", "--config", str(place / "tuned.yaml"), "--model.pretrained", str(place / "base"), *more]
        line += ["--data.dataset", str(place / "seven_eighths.npy"), "--trainer.accelerator", "cpu"]
        line += ["--data.eval_datasets", json.dumps([str(place / "an_eighth.npy")])]
        assert main([*line, "--trainer.default_root_dir", str(root)]) == 0
        (metrics,) = root.rglob("metrics.json")
        (found,) = json.loads(metrics.read_text())["perplexity"].values()
        trial = first if more else best
        assert math.log(found["pruned"]) == pytest.approx(trial["loss"], abs=2e-4)
        plan = json.loads((metrics.parent / "plan.json").read_text())
        assert [len(layer["kept_channels"]) / 40 for layer in plan["layers"]] == pytest.approx(trial["kept"]["mlp"])
        ratios.append(plan["parameters"]["pruned"])
    assert abs(ratios[0] - ratios[1]) < 2 * 3 * 32 * 8  # a GQA group is the largest unit


def test_a_search_that_was_killed_goes_on_and_one_of_something_else_does_not(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["--model.temperature", "0", "--trials", "2", "--shifts", "5"]
    assert main(arguments(place, *words)) == 0
    expected = {name: (place / name).read_text() for name in ("tuned.yaml", "tuned.json")}
    whole = json.loads(expected["tuned.json"])
    (place / "tuned.yaml").unlink()
    (place / "tuned.json").write_text(json.dumps(whole | {"trials": whole["trials"][:4]}))  # as if killed then
    capsys.readouterr()
    assert main(arguments(place, *words)) == 2
    assert "go on with its trials: --resume" in capsys.readouterr().err
    made = []
    real = tune._perplexity
    monkeypatch.setattr(tune, "_perplexity", lambda run: made.append(run) or real(run))
    assert main(arguments(place, *words, "--resume")) == 0
    assert len(made) == 3
    assert (place / "tuned.yaml").read_text() == expected["tuned.yaml"]
    again = json.loads((place / "tuned.json").read_text())
    for mine, other in zip(again["trials"], whole["trials"], strict=True):
        assert {**mine, "seconds": 0} == {**other, "seconds": 0}
    capsys.readouterr()
    assert main(arguments(place, *words, "--resume", "--model.pruning_ratio", "0.3")) == 2
    assert "model.pruning_ratio: 0.25 then, 0.3 now" in capsys.readouterr().err


def test_options_that_are_tried_make_a_difference(place: Path) -> None:
    assert main(arguments(place, "--model.temperature", "0", "--trials", "9")) == 0
    with (place / "tuned.csv").open() as file:
        trials = list(csv.DictReader(file))
    losses = {trial["score_norm"]: trial["held_out_loss"] for trial in trials if trial["allocation"] == "global"}
    assert losses["block"] != losses["none"]
    assert {trial["temperature"] for trial in trials} == {"0.0"}  # priors were not measured


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--trials", "0"], "--trials: found '0'"),
        (["--shifts", "-1"], "--shifts: found '-1'"),
        (["--resume"], "no trials in"),
        (["--data.num_samples", "7"], "7 samples leave none to hold out"),
        (["--model", "lightning_prune.methods.SlimGPT"], "cannot be tuned"),
        (["--output", "{place}/tokens.npy"], "ends in .yaml"),
        (["--output", "{place}/there.yaml"], "exists"),
    ],
)
def test_mistakes_end_in_one_sentence(more: list[str], says: str, place: Path, capsys: pytest.CaptureFixture) -> None:
    words = [word.replace("{place}", str(place)) for word in more]
    config = [] if "--model" in words else ["--config", "hgsp_taylor"]
    line = ["tune", *config, *words, "--model.pretrained", str(place / "base"), "--trainer.accelerator", "cpu"]
    line += ["--data.dataset", str(place / "tokens.npy")]
    assert main(line) == 2
    assert says in capsys.readouterr().err
