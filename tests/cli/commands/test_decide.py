import json
import shutil
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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and three token arrays."""
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for seed, name in enumerate(("calibration", "held_out", "other")):
        np.save(folder / f"{name}.npy", tiny_tokens(8, 16, seed).numpy())
    return folder


def options(inputs: Path, root: Path) -> list[str]:
    return [
        f"--model.pretrained={inputs / 'base'}",
        f"--data.dataset={inputs / 'calibration.npy'}",
        f"--data.eval_datasets=[{inputs / 'held_out.npy'}]",
        f"--trainer.default_root_dir={root}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.logger=false",
    ]


@pytest.fixture(scope="module")
def fitted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """``fitted("Wanda", "--model.x=1")``: the run folder that fit leaves; the same call again gives the same folder."""
    made: dict[tuple[str, ...], Path] = {}

    def run(method: str, *more: str) -> Path:
        key = (method, *more)
        if key not in made:
            root = tmp_path_factory.mktemp(method)
            assert fit([f"--model={method}", *options(inputs, root), *more]) == 0
            made[key] = only_run(root)
        return made[key]

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
    ("Wanda", ["--model.pruning_ratio=0.35"]),
    ("Wanda", ["--model.allocation=uniform", "--model.min_groups_per_layer=1", "--model.freeze_first_n_layers=1"]),
    ("Magnitude", ["--model.pruning_ratio=0.4", "--model.round_to=8"]),
    ("ShortGPT", ["--model.n_remove_layers=2"]),
    ("HGSP", ["--model.pruning_ratio=0.35", "--model.collapse_epsilon=0.4"]),
    ("HGSP", ["--model.tau=0"]),
    ("HGSP", ["--model.tau=.inf", "--model.temperature=0.5"]),
    ("HGSP", ["--model.temperature=0"]),
    ("HGSP", ["--model.score_norm=kind"]),
]


@pytest.mark.parametrize(("method", "change"), CHANGES)
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


def test_neither_calibration_data_nor_the_dense_evaluation_is_needed(fitted: Fit, inputs: Path, tmp_path: Path) -> None:
    run = fitted("HGSP")
    hidden = (inputs / "calibration.npy").rename(inputs / "hidden.npy")
    try:
        again = decided(run, tmp_path, "--model.pruning_ratio=0.3")
    finally:
        hidden.rename(inputs / "calibration.npy")
    seconds = read(again, "metrics.json")["seconds"]
    assert not {"calibrate", "evaluate dense"} & seconds.keys()
    assert {"calibrate", "evaluate dense"} <= read(run, "metrics.json")["seconds"].keys()
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
    ("change", "option"),
    [
        ("--model.importance=wanda", "--model.importance wanda"),
        ("--model.prior=similarity", "--model.prior similarity"),
        ("--model.prior_num_samples=3", "--model.prior_num_samples 3"),
        ("--model.pretrained=demo", "--model.pretrained demo"),
        ("--data.num_samples=7", "--data.num_samples 7"),
        ("--data.seed=1", "--data.seed 1"),
        ("--trainer.precision=bf16-true", "--trainer.precision bf16-true"),
    ],
)
def test_options_of_the_measurement_are_refused_by_name(fitted: Fit, tmp_path: Path, change: str, option: str) -> None:
    with pytest.raises(UserError, match=f"^{option}: .* decide can change --model.pruning_ratio, .*--model.tau"):
        decided(fitted("HGSP"), tmp_path, change)
    assert not list(tmp_path.iterdir())


def test_scores_of_masked_weights_are_refused(fitted: Fit, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--run: method 'wanda' .* cannot decide again"):
        decided(fitted("Wanda", "--model.structure=unstructured"), tmp_path, "--model.pruning_ratio=0.3")


def test_run_that_is_unfinished_or_damaged_is_refused(fitted: Fit, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"--run: .* has no metrics.json"):
        decided(tmp_path, tmp_path / "out")
    shutil.copytree(fitted("Wanda"), run)
    table = (run / "scores.csv").read_text()
    (run / "scores.csv").write_text("\n".join(table.splitlines()[:-3]) + "\n")
    with pytest.raises(UserError, match=r"scores.csv' does not belong to its plan \(layer 3 keeps other units"):
        decided(run, tmp_path / "out")
    plan = PruningPlan.load(run / "plan.json")  # cut in the same way, so that only the model knows
    plan.layers[3].kept_channels[:] = [channel for channel in plan.layers[3].kept_channels if channel < 37]
    plan.save(run / "plan.json")
    with pytest.raises(UserError, match=r"lists 165 units, the model has 168"):  # 4 × (2 groups + 40 channels)
        decided(run, tmp_path / "out")
    (run / "scores.csv").write_text("layer,block\n")
    with pytest.raises(UserError, match=r"scores.csv"):
        decided(run, tmp_path / "out")
    (run / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"--run: .* has no metrics.json"):
        decided(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (3, "nan", "importance is nan, allowed: finite"),
        (4, "inf", "scores.csv"),
        (4, "-5", "cost is -5, allowed: 1 or more"),
        (4, "5", "that cost is 5, the model's is 1536"),  # two query heads, key, value, output: 6 x 8 x 32
        (0, "1000000000", "layer is 1000000000, allowed: below the number of rows"),
    ],
)
def test_scores_that_cannot_be_this_models_are_refused(
    fitted: Fit, tmp_path: Path, column: int, value: str, message: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(fitted("Wanda"), run)
    lines = (run / "scores.csv").read_text().splitlines()
    fields = lines[1].split(",")
    fields[column] = value
    (run / "scores.csv").write_text("\n".join([lines[0], ",".join(fields), *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=f"--run: .*scores.csv.*{message}|{message}"):
        decided(run, tmp_path / "out", "--model.pruning_ratio=0.3")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("method.json", b'{"method": "hgsp", "label": "hgsp"}'),
        ("method.json", b'{"method": "hgsp", "label": "hgsp", "prior": {"delta": {"layer": [1.0]}}}'),
        ("config.yaml", b"\xff\xfe\x00"),
        ("environment.json", b'{"device": 3}'),
        ("metrics.json", b"[]"),
    ],
)
def test_records_that_are_damaged_are_one_message(fitted: Fit, tmp_path: Path, name: str, content: bytes) -> None:
    run = tmp_path / "run"
    shutil.copytree(fitted("HGSP"), run)
    (run / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^--run: .*{name}"):
        decided(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_base_model_that_changed_is_refused(tmp_path: Path) -> None:
    for name, model in (("base", make_tiny()), ("tuned", make_tiny(seed=1)), ("wider", make_tiny(channels=48))):
        model.save_pretrained(tmp_path / name)
    np.save(tmp_path / "held_out.npy", tiny_tokens(4, 16).numpy())
    assert fit(["--model=Magnitude", *options(tmp_path, tmp_path / "runs")]) == 0
    run = only_run(tmp_path / "runs")
    for name, message in (("tuned", "have changed since"), ("wider", r"measured a model of .* parameters")):
        shutil.rmtree(tmp_path / "base")
        shutil.copytree(tmp_path / name, tmp_path / "base")
        with pytest.raises(UserError, match=message):
            decided(run, tmp_path / "out")


def test_help_says_what_may_change(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        decide(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(word in text for word in ("--run FOLDER", "pruning_ratio", "temperature", "n_remove_layers", "may not"))
