"""The search over options, and that a trial's distance and loss are those of the run it stands for."""

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
from lightning_prune.methods import HGSP
from lightning_prune.runs.tune import Axes, search
from lightning_prune.support.errors import UserError
from tests.methods.running import save_base
from tests.tiny import make_tiny, tiny_tokens


@pytest.mark.parametrize(
    ("axes", "losses", "limit", "trials", "best"),
    [  # losses by (a, b), 10 elsewhere
        ((("a", (0, 1, 2)), ("d", (1, 2))), {(2, 0): 1, (1, 0): 2}, 50, 3, 1),
        # b helps only once a has changed, a again only once b has
        ((("a", (0, 1, 2)), ("b", (0, 1))), {(0, 0): 9, (1, 0): 8, (1, 1): 7, (2, 1): 6}, 50, 6, 6),
        ((("a", (0, 1, 2)), ("b", (0, 1))), {}, 2, 2, 10),
    ],
)
def test_search_goes_round_while_something_helps_and_tries_nothing_twice(
    axes: Axes, losses: dict[tuple[int, int], float], limit: int, trials: int, best: float
) -> None:
    def loss(options: dict[str, int]) -> float:
        return losses.get((options["a"], options["b"]), 10)

    found = list(search({"a": 0, "b": 0}, axes, loss, limit))
    assert min(map(loss, found)) == best
    assert len({tuple(options.items()) for options in found}) == len(found) == trials


def test_what_is_refused_after_the_first_trial_is_left_out() -> None:
    def loss(options: dict[str, int]) -> float:
        if options["a"] == refused:
            raise UserError("--model.a: not with this model")
        return -options["a"]

    refused = 1
    with pytest.warns(UserWarning, match="Left out a 1: --model.a: not with"):
        assert list(search({"a": 0}, (("a", (0, 1, 2)),), loss, 9)) == [{"a": 0}, {"a": 2}]
    refused = 0
    with pytest.raises(UserError):
        list(search({"a": 0}, (("a", (0, 1, 2)),), loss, 9))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_base(make_tiny(layers=3), tmp_path / "base")
    np.save(tmp_path / "tokens.npy", tiny_tokens(24, 16).numpy())
    (tmp_path / "there.yaml").touch()
    return tmp_path


def arguments(place: Path, *more: str, method: str = "--config hgsp_taylor") -> list[str]:
    words = f"tune {method} --model.pretrained {place}/base --data.dataset {place}/tokens.npy"
    words += f" --model.pruning_ratio 0.25 --trainer.accelerator cpu --output {place}/tuned.yaml"
    return [*words.split(), *more]


def test_distance_and_loss_of_a_trial_are_those_of_the_run_with_its_options(
    place: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(arguments(place, "--trials", "3")) == 0
    assert "calibrating" in capsys.readouterr().err  # may take long; trials have lines of their own
    kept = json.loads((place / "tuned.json").read_text())
    with (place / "tuned.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["refit"] for row in rows[:3]] == ["none", "residual", "output"]
    for name in ("loss", "divergence"):
        assert [float(row[f"held_out_{name}"]) for row in rows] == [trial[name] for trial in kept["trials"]]
    best = min(kept["trials"], key=lambda trial: trial["divergence"])
    tuned = yaml.safe_load((place / "tuned.yaml").read_text())["model"]["init_args"]
    assert tuned == tuned | best["options"]
    assert not {"pretrained", "label"} & tuned.keys()
    events = EventAccumulator(str(place / "tuned.tensorboard")).Reload()
    losses = [trial["loss"] for trial in kept["trials"]]
    assert [point.value for point in events.Scalars("held-out loss/trial")] == pytest.approx(losses)
    shares = EventAccumulator(str(place / "tuned.tensorboard" / "best")).Reload().Scalars("kept fraction/mlp")
    assert [point.value for point in shares] == pytest.approx(best["kept"]["mlp"])

    # The same as fit makes it, from files that are split as the documentation says.
    tokens = tiny_tokens(24, 16)
    held = held_out_samples(tokens)
    np.save(place / "seven_eighths.npy", tokens[~held].numpy())
    np.save(place / "an_eighth.npy", tokens[held].numpy())
    words = f"fit --config {place}/tuned.yaml --model.pretrained {place}/base --trainer.default_root_dir {place}/logs"
    words += f" --data.dataset {place}/seven_eighths.npy --data.eval_datasets [{place}/an_eighth.npy]"
    assert main([*words.split(), "--trainer.accelerator", "cpu"]) == 0
    (path,) = (place / "logs").rglob("metrics.json")
    metrics = json.loads(path.read_text())
    (distance,), (perplexity,) = metrics["distance"].values(), metrics["perplexity"].values()
    assert distance["kl_divergence"] == pytest.approx(best["divergence"], abs=2e-5)
    assert math.log(perplexity["pruned"]) == pytest.approx(best["loss"], abs=2e-4)
    assert math.log(perplexity["dense"]) == pytest.approx(kept["dense_loss"], abs=2e-4)
    plan = json.loads((path.parent / "plan.json").read_text())
    assert [len(layer["kept"]["mlp"]) / 40 for layer in plan["layers"]] == pytest.approx(best["kept"]["mlp"])


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_and_one_of_something_else_does_not(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["--model.temperature", "0", "--trials", "6"]
    assert main(arguments(place, *words)) == 0
    expected = {name: (place / name).read_text() for name in ("tuned.yaml", "tuned.json")}
    whole = json.loads(expected["tuned.json"])
    by_norm = {trial["options"]["score_norm"]: trial["divergence"] for trial in whole["trials"]}
    assert by_norm["kind"] != by_norm["none"]  # what is tried makes a difference
    assert {trial["options"]["temperature"] for trial in whole["trials"]} == {0.0}  # priors were not measured
    (place / "tuned.yaml").unlink()
    (place / "tuned.json").write_text(json.dumps(whole | {"trials": whole["trials"][:4]}))  # as if killed then
    capsys.readouterr()
    assert main(arguments(place, *words)) == 2
    assert "--resume to continue it" in capsys.readouterr().err
    decided = []
    real = HGSP.decide
    monkeypatch.setattr(HGSP, "decide", lambda method: decided.append(method) or real(method))
    assert main(arguments(place, *words, "--resume")) == 0
    assert len(decided) == 3  # the measurement again, and the two trials that were missing
    assert (place / "tuned.yaml").read_text() == expected["tuned.yaml"]
    again = json.loads((place / "tuned.json").read_text())
    for mine, other in zip(again["trials"], whole["trials"], strict=True):
        assert {**mine, "seconds": 0} == {**other, "seconds": 0}
    capsys.readouterr()
    assert main(arguments(place, *words, "--resume", "--model.pruning_ratio", "0.3")) == 2
    assert "model.pruning_ratio: 0.25 then, 0.3 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--trials", "0"], "--trials: found '0'"),
        (["--resume"], "no trials in"),
        (["--data.num_samples", "7"], "7 samples leave none to hold out"),
        (["--output", "{place}/tokens.npy"], "ends in .yaml"),
        (["--output", "{place}/there.yaml"], "exists"),
    ],
)
def test_mistakes_end_in_one_sentence(more: list[str], says: str, place: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments(place, *(word.replace("{place}", str(place)) for word in more))) == 2
    assert says in capsys.readouterr().err


def test_a_method_that_cannot_decide_again_is_refused(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments(place, method="--model SlimGPT")) == 2
    assert "cannot be tuned" in capsys.readouterr().err
