import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_prune.calibration.statistics.channel_sums import InputMoments
from lightning_prune.methods import FLAP
from lightning_prune.methods.flap import in_deviations
from tests.methods.behaviour import prune, save_tokens
from tests.methods.running import inputs_of, projections
from tests.tiny import make_tiny, tiny_tokens


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_scores_equal_a_float64_reference_and_the_lowest_leave(kv_heads: int, tmp_path: Path) -> None:
    model = make_tiny(kv_heads=kv_heads)
    model.save_pretrained(tmp_path / "model")
    tokens = tiny_tokens(7, 16, seed=3)
    run = prune(FLAP(str(tmp_path / "model"), 0.29), save_tokens(tmp_path / "c.npy", tokens), tmp_path / "logs")
    exact = copy.deepcopy(model).double()
    scores = run.method.scores
    for layer in range(4):
        for name, block, units in (("o_proj", "attention", kv_heads), ("down_proj", "mlp", 40)):
            linear = projections(exact, layer)[name]
            x, weight = inputs_of(exact, linear, tokens).numpy(), linear.weight.detach().numpy()
            metric = [x[:, j].var(ddof=1) * sum(w * w for w in weight[:, j]) for j in range(weight.shape[1])]
            z = (np.array(metric) - np.mean(metric)) / np.std(metric, ddof=1)
            expected = [z[j * len(z) // units : (j + 1) * len(z) // units].mean() for j in range(units)]
            found = torch.from_numpy(scores.score[scores.of(layer, block)])
            torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=1e-4)
    # Everything below the first unit that no longer fitted is gone: the lowest that stays is above all that went.
    assert float(scores.score[scores.pruned].max()) <= float(scores.score[~scores.pruned].min())


def test_a_variance_beside_a_large_mean_is_not_lost() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, 50, 3, generator=generator, dtype=torch.float64)
    x = (noise * torch.tensor([1.0, 1e-1, 1e-2]) + torch.tensor([0.0, 100.0, 100.0])).float()
    moments = InputMoments(3)
    for part in (x[:2], x[2:5], x[5:]):
        moments.update(part)
    mean, variance = moments.reduced()
    exact = x.double().reshape(-1, 3)
    torch.testing.assert_close(mean, exact.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance, exact.var(0), rtol=2e-3, atol=0)


def test_samples_that_only_fill_up_a_batch_do_not_count() -> None:
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1))
    padded, alone = InputMoments(3), InputMoments(3)
    padded.update(x, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    alone.update(x[[0, 1, 3]])
    torch.testing.assert_close(padded.reduced(), alone.reduced())
    assert int(padded.tokens) == 15


def test_channels_that_all_agree_have_the_score_zero() -> None:
    assert torch.equal(in_deviations(torch.full((4,), 3.0), 2), torch.zeros(2))
