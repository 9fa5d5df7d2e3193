import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.cli.commands.decide import main as decide
from lightning_prune.cli.commands.fit import main as fit
from lightning_prune.support.errors import UserError
from tests.tiny import make_tiny, tiny_tokenizer, tiny_tokens

Fit = Callable[..., Path]
SILENT = (
    *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"),
    "--data.continuations=0",  # half of a run
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and three token arrays."""
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for seed, name in enumerate(("calibration", "held_out", "other")):
        np.save(folder / f"{name}.npy", tiny_tokens(8, 16, seed).numpy())
    return folder


@pytest.fixture(scope="module")
def fitted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """``fitted("Wanda", "--model.x=1")``: the run folder that fit leaves; the same call again gives the same folder."""

    @functools.cache
    def run(method: str, *more: str) -> Path:
        root = tmp_path_factory.mktemp(method)
        options = [f"--model={method}", f"--model.pretrained={inputs / 'base'}", *SILENT, *more]
        options += [] if "eval_datasets" in str(more) else [f"--data.eval_datasets=[{inputs / 'held_out.npy'}]"]
        options += [f"--data.dataset={inputs / 'calibration.npy'}", f"--trainer.default_root_dir={root}"]
        assert fit(options) == 0
        return only_run(root)

    return run


def only_run(root: Path) -> Path:
    (found,) = root.glob("*/version_*")
    return found


def decided(run: Path, root: Path, *more: str) -> Path:
    assert decide([f"--run={run}", f"--trainer.default_root_dir={root}", *more]) == 0
    return only_run(root)


def read(run: Path, name: str) -> dict:
    return json.loads((run / name).read_text())


CHANGES = [
    ("Wanda", ["--model.allocation=uniform", "--model.min_groups_per_layer=1", "--model.freeze_first_n_layers=1"]),
    ("Magnitude", ["--model.pruning_ratio=0.4", "--model.round_to=8"]),
    ("ShortGPT", ["--model.n_remove_layers=2", "--model.refit=residual"]),
    ("HGSP", ["--model.pruning_ratio=0.35", "--model.collapse_epsilon=0.4"]),
    ("HGSP", ["--model.tau=0"]),
    ("HGSP", ["--model.tau=.inf", "--model.temperature=0.5"]),
    ("HGSP", ["--model.temperature=0"]),
    ("HGSP", ["--model.score_norm=kind"]),
    ("HGSP", ["--model.target_parameters=24000"]),
    ("Wanda", ["--model.target_memory=150KB", "--model.context=64"]),
]


@pytest.mark.parametrize(
    ("method", "change"),
    [*CHANGES[:3], *(pytest.param(*case, marks=pytest.mark.slow) for case in CHANGES[3:])],
)
def test_decision_is_the_one_fit_makes_with_the_same_options(
    fitted: Fit, tmp_path: Path, method: str, change: list[str]
) -> None:
    again = decided(fitted(method), tmp_path, *change)
    whole = fitted(method, *change)
    assert PruningPlan.load(again / "plan.json") == PruningPlan.load(whole / "plan.json")
    scores = (again / "scores.csv").read_bytes()
    assert scores == (whole / "scores.csv").read_bytes()
    assert scores != (fitted(method) / "scores.csv").read_bytes()  # else the change shows nothing
    weights = "pruned/model.safetensors"
    assert (again / weights).read_bytes() == (whole / weights).read_bytes()
    assert read(again, "metrics.json")["perplexity"] == read(whole, "metrics.json")["perplexity"]


@pytest.mark.parametrize(("method", "size"), [("Wanda", "target_parameters=25k"), ("ShortGPT", "n_remove_layers=1")])
def test_a_ratio_takes_the_place_of_the_size_that_the_run_had(
    fitted: Fit, tmp_path: Path, method: str, size: str
) -> None:
    again = decided(fitted(method, f"--model.{size}"), tmp_path, "--model.pruning_ratio=0.45")
    whole = fitted(method, "--model.pruning_ratio=0.45")
    assert PruningPlan.load(again / "plan.json") == PruningPlan.load(whole / "plan.json")


def test_no_calibration_data_is_needed(fitted: Fit, inputs: Path, tmp_path: Path) -> None:
    run = fitted("HGSP")
    hidden = (inputs / "calibration.npy").rename(inputs / "hidden.npy")
    try:
        again = decided(run, tmp_path, "--model.pruning_ratio=0.3")
    finally:
        hidden.rename(inputs / "calibration.npy")
    spared = {"calibrate", "finish layers"}
    assert not spared & read(again, "metrics.json")["seconds"].keys()
    assert spared <= read(run, "metrics.json")["seconds"].keys()
    assert read(again, "calibration.json") == read(run, "calibration.json")


def test_another_evaluation_set_is_measured_on_both_models(fitted: Fit, inputs: Path, tmp_path: Path) -> None:
    other = f"--data.eval_datasets=[{inputs / 'other.npy'}]"
    again = decided(fitted("Wanda"), tmp_path, other)
    assert read(again, "metrics.json")["perplexity"] == read(fitted("Wanda", other), "metrics.json")["perplexity"]
    assert "evaluate dense" in read(again, "metrics.json")["seconds"]


def test_decision_of_a_decision_keeps_the_priors_and_names_the_run_that_calibrated(fitted: Fit, tmp_path: Path) -> None:
    run = fitted("HGSP")
    without = decided(run, tmp_path / "1", "--model.temperature=0")
    back = decided(without, tmp_path / "2", "--model.temperature=1")
    assert PruningPlan.load(back / "plan.json") == PruningPlan.load(run / "plan.json")
    assert read(without, "method.json")["measured_by"] == read(back, "method.json")["measured_by"] == str(run)
    assert "measured_by" not in read(run, "method.json")


def test_priors_that_were_not_measured_are_refused(fitted: Fit, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--model.temperature 1: .* measured no priors"):
        decided(fitted("HGSP", "--model.temperature=0"), tmp_path, "--model.temperature=1")
    with pytest.raises(UserError, match=r"--model.tau: .* measured no block priors"):
        decided(fitted("HGSP", "--model.tau=.inf"), tmp_path, "--model.tau=0.1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "options", "why"),
    [
        (
            "HGSP",
            ["--model.steps=2", "--model.label=mine"],
            "'mine' of .* it pruned in 2 steps, and the table has what",
        ),
        ("Wanda", ["--model.structure=2:4"], "'wanda' of .* it zeroed single weights, which"),
        ("SlimGPT", [], "'slimgpt' of .* it changed weights while"),
    ],
)
def test_a_run_that_cannot_decide_again_says_why(
    fitted: Fit, tmp_path: Path, method: str, options: list[str], why: str
) -> None:
    with pytest.raises(UserError, match=f"{why}.*Run fit again"):
        decided(fitted(method, *options), tmp_path)
