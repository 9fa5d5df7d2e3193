import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.methods import Magnitude
from lightning_prune.runs.run import prune_and_record
from tests.methods.behaviour import Run, config_of, prune, save_tokens, trainer_for
from tests.methods.reference import Unit, block_extras, float64_weights, greedy, group_units, kept_lists
from tests.tiny import make_tiny

MODELS = {
    "llama_gqa": {"family": "llama", "heads": 4, "kv_heads": 2},
    "llama_biases": {"family": "llama", "heads": 4, "kv_heads": 2, "attention_bias": True, "mlp_bias": True},
    "qwen2_biases": {"family": "qwen2", "heads": 4, "kv_heads": 2},
    "qwen3_norms": {"family": "qwen3", "heads": 4, "kv_heads": 2, "tied": False},
    "mha": {"family": "llama", "heads": 4, "kv_heads": 4},
    "mqa": {"family": "llama", "heads": 4, "kv_heads": 1, "tied": False},
}


def magnitude_units(model: Any) -> list[Unit]:
    model = copy.deepcopy(model).double()
    weights = [float64_weights(model, layer) for layer in range(len(model.model.layers))]
    return group_units(model, [{name: np.abs(weight) for name, weight in layer.items()} for layer in weights])


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def kept(run: Run) -> list[tuple[list[int], list[int]]]:
    return [(layer.kept_kv_heads, layer.kept_channels) for layer in run.method.plan.layers]


@pytest.mark.parametrize("kind", MODELS)
def test_importances_and_selection_equal_a_float64_reference(tmp_path: Path, kind: str) -> None:
    model = make_tiny(**MODELS[kind])
    model.save_pretrained(tmp_path / "model")
    units = magnitude_units(model)
    run = prune(Magnitude(str(tmp_path / "model"), 0.29), save_tokens(tmp_path / "c.npy"), tmp_path / "logs")

    scores = run.method.scores
    expected = torch.tensor([unit.importance for unit in units], dtype=torch.float64)
    torch.testing.assert_close(torch.from_numpy(scores.importance), expected, rtol=1e-4, atol=0)
    assert scores.cost.tolist() == [unit.cost for unit in units]
    extras, total = block_extras(model), parameters(model)
    assert kept(run) == kept_lists(units, greedy(units, int(29 * total // 100), extras), 4)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"round_to": 8}, {"round_to": 8}),
        ({"freeze_first_n_layers": 1, "freeze_last_n_layers": 1}, {"frozen": (0, 3)}),
        ({"min_groups_per_layer": 1}, {"keep": 1}),
        ({"min_groups_per_layer": 1, "round_to": 4, "freeze_first_n_layers": 2}, None),
    ],
)
def test_options_of_the_selection_equal_the_reference(tmp_path: Path, options: dict, rule: dict | None) -> None:
    rule = rule or {"keep": 1, "round_to": 4, "frozen": (0, 1)}
    model = make_tiny("qwen2")
    model.save_pretrained(tmp_path / "model")
    units = magnitude_units(model)
    tokens = save_tokens(tmp_path / "c.npy")
    run = prune(Magnitude(str(tmp_path / "model"), 0.3, **options), tokens, tmp_path / "logs")
    expected = greedy(units, 3 * parameters(model) // 10, block_extras(model), **rule)
    assert kept(run) == kept_lists(units, expected, 4)


def test_calibration_dataset_is_never_opened(tmp_path: Path) -> None:
    make_tiny().save_pretrained(tmp_path / "model")
    method = Magnitude(str(tmp_path / "model"), 0.2)
    data = CalibrationDataModule(dataset="no such corpus", eval_datasets=[], tokenizer=str(tmp_path / "model"))
    folder, record = prune_and_record(trainer_for(method, tmp_path / "logs"), method, data, config_of(method))
    assert record.calibration["dataset"] is None
    assert method.plan.calibration_fingerprint is None
    assert "calibrate" not in record.metrics["seconds"]
    assert (folder / "pruned" / "model.safetensors").is_file()
