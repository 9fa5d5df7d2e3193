import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_prune.methods import Wanda
from lightning_prune.methods.wanda import weight_scores
from tests.methods.behaviour import prune, save_tokens
from tests.methods.reference import block_extras, float64_weights, greedy, group_units, input_norms, kept_lists
from tests.methods.test_magnitude import MODELS, kept, parameters
from tests.tiny import make_tiny, tiny_tokens


@pytest.mark.parametrize("kind", MODELS)
def test_importances_and_selection_equal_a_float64_reference(tmp_path: Path, kind: str) -> None:
    model = make_tiny(**MODELS[kind])
    model.save_pretrained(tmp_path / "model")
    tokens = tiny_tokens(7, 16, seed=3)
    run = prune(Wanda(str(tmp_path / "model"), 0.29), save_tokens(tmp_path / "c.npy", tokens), tmp_path / "logs")

    exact = copy.deepcopy(model).double()
    scores = [
        {name: np.abs(weight) * norms[name] for name, weight in float64_weights(exact, layer).items()}
        for layer, norms in enumerate(input_norms(exact, tokens))
    ]
    units = group_units(exact, scores)
    expected = torch.tensor([unit.importance for unit in units], dtype=torch.float64)
    torch.testing.assert_close(torch.from_numpy(run.method.scores.importance), expected, rtol=1e-4, atol=0)
    removed = greedy(units, 29 * parameters(model) // 100, block_extras(model))
    assert kept(run) == kept_lists(units, removed, 4)


def test_score_of_a_weight_is_its_size_times_the_norm_of_what_it_reads() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.5, 0.0]], dtype=torch.bfloat16)
    score = weight_scores(weight, torch.tensor([3.0, 4.0], dtype=torch.float64))
    assert score.dtype == torch.float32
    assert score.tolist() == [[3.0, 8.0], [1.5, 0.0]]


def test_overflowing_activations_name_the_layer(tmp_path: Path) -> None:
    model = make_tiny()
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.fill_(float("inf"))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(FloatingPointError, match=r"layer [23], input of"):
        prune(Wanda(str(tmp_path / "model")), save_tokens(tmp_path / "c.npy"), tmp_path / "logs")
