"""Importances that are sums over weights, and the selection they lead to, against references in float64."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.methods import HGSP, Magnitude, Wanda
from lightning_prune.methods.wanda import weight_scores
from lightning_prune.runs.run import prune_and_record
from tests.methods import reference
from tests.methods.behaviour import config_of, trainer_for
from tests.methods.reference import Row
from tests.tiny import make_tiny, tiny_tokens

IMPORTANCES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "magnitude": (Magnitude, reference.sizes),
    "wanda": (Wanda, reference.activations),
    "taylor": (partial(HGSP, temperature=0), reference.slopes),
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama_gqa": {},
    "llama_biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2_biases": {"family": "qwen2"},
    "qwen3_norms": {"family": "qwen3", "tied": False},
    "mha": {"kv_heads": 4},
    "mqa": {"kv_heads": 1, "tied": False},
}


def removed(method: Any, rows: list[Row]) -> set[Row]:
    return {row for row in rows if method.scores.pruned[row.place]}


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Which weights are a unit's is the same for every importance.
@pytest.mark.parametrize(
    ("importance", "shape"),
    [
        *(("magnitude", shape) for shape in SHAPES),
        *(("wanda", shape) for shape in ("llama_biases", "mqa")),
        *(("taylor", shape) for shape in ("qwen2_biases", "mha")),
    ],
)
def test_importances_and_selection_equal_a_float64_reference(run: Any, importance: str, shape: str) -> None:
    model, tokens = make_tiny(**SHAPES[shape]), tiny_tokens(7, 16, seed=3)
    make, weight_score = IMPORTANCES[importance]
    exact = copy.deepcopy(model).double()
    rows = reference.group_rows(exact, weight_score(exact, tokens))
    method = run(model, make, 0.29, tokens, batch_size=3)
    assert method.scores.cost.tolist() == [row.cost for row in rows]
    np.testing.assert_allclose(method.scores.importance / method.scores.cost, [row.base for row in rows], rtol=1e-4)
    budget, extras = 29 * parameters(model) // 100, reference.block_extras(model)
    assert removed(method, rows) == reference.prefix(rows, set(rows), budget, extras, round_to=1)


@pytest.mark.parametrize(
    ("round_to", "frozen", "keep"), [(8, (0, 0), 0), (1, (1, 1), 0), (1, (0, 0), 1), (4, (2, 0), 1)]
)
def test_options_of_the_selection_equal_the_reference(
    run: Any, round_to: int, frozen: tuple[int, int], keep: int
) -> None:
    model = make_tiny("qwen2")
    rows = reference.group_rows(model, reference.sizes(model, tiny_tokens()))
    options = {"round_to": round_to, "min_groups_per_layer": keep}
    options |= {"freeze_first_n_layers": frozen[0], "freeze_last_n_layers": frozen[1]}
    method = run(model, Magnitude, 0.3, **options)
    free = {row for row in reference.unprotected(rows, keep) if frozen[0] <= row.layer < 4 - frozen[1]}
    budget, extras = 3 * parameters(model) // 10, reference.block_extras(model)
    assert removed(method, rows) == reference.prefix(rows, free, budget, extras, round_to)


def test_magnitude_never_opens_the_calibration_dataset(tmp_path: Path) -> None:
    make_tiny().save_pretrained(tmp_path / "model")
    method = Magnitude(str(tmp_path / "model"), 0.2)
    data = CalibrationDataModule(dataset="no such corpus", eval_datasets=[], tokenizer=str(tmp_path / "model"))
    folder, metrics = prune_and_record(trainer_for(method, tmp_path / "logs"), method, data, config_of(method))
    assert json.loads((folder / "calibration.json").read_text())["dataset"] is None
    assert method.plan.calibration_fingerprint is None
    assert "calibrate" not in metrics["seconds"]
    assert (folder / "pruned" / "model.safetensors").is_file()


def test_wanda_scores_a_weight_by_its_size_times_the_norm_of_what_it_reads() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.5, 0.0]], dtype=torch.bfloat16)
    score = weight_scores(weight, torch.tensor([3.0, 4.0], dtype=torch.float64))
    assert score.dtype == torch.float32
    assert score.tolist() == [[3.0, 8.0], [1.5, 0.0]]
