import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_prune.evaluation.module import EvaluatedModel

from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.evaluation.perplexity import Perplexity, token_losses
from tests.methods.behaviour import save_model, save_tokens, trainer_for
from tests.tiny import make_tiny, tiny_tokens


def naive_losses(logits: np.ndarray, tokens: np.ndarray) -> list[list[float]]:
    """-log softmax of the next token, one position after the other, in float64."""
    found = []
    for sample, ids in zip(logits.astype(np.float64), tokens, strict=True):
        row = []
        for position in range(len(ids) - 1):
            scores = sample[position] - sample[position].max()
            row.append(math.log(np.exp(scores).sum()) - scores[ids[position + 1]])
        found.append(row)
    return found


def random_logits(batch: int, length: int) -> torch.Tensor:
    return 5 * torch.randn(batch, length, 96, generator=torch.Generator().manual_seed(1))


def test_losses_equal_a_float64_reference() -> None:
    logits, tokens = random_logits(3, 7), tiny_tokens(3, 7)
    losses = token_losses(logits, tokens)
    assert losses.shape == (3, 6)
    np.testing.assert_allclose(losses.numpy(), naive_losses(logits.numpy(), tokens.numpy()), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_taken_in_fp32(dtype: torch.dtype) -> None:
    logits, tokens = random_logits(2, 5).to(dtype), tiny_tokens(2, 5)
    losses = token_losses(logits, tokens)
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.numpy(), naive_losses(logits.float().numpy(), tokens.numpy()), rtol=1e-5)


@pytest.mark.parametrize("batches", [[8], [1] * 8, [3, 5], [4, 4]])
def test_batching_does_not_change_the_value(batches: list[int]) -> None:
    logits, tokens = random_logits(8, 9), tiny_tokens(8, 9)
    metric = Perplexity()
    for some_logits, some_tokens in zip(logits.split(batches), tokens.split(batches), strict=True):
        metric.update(some_logits, some_tokens, torch.ones(len(some_tokens)))
    expected = math.exp(np.mean(naive_losses(logits.numpy(), tokens.numpy())))
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-6)
    assert int(metric.tokens) == 8 * 8


def test_padding_samples_do_not_count() -> None:
    logits, tokens = random_logits(4, 6), tiny_tokens(4, 6)
    logits[2:] = torch.nan
    metric = Perplexity()
    metric.update(logits, tokens, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    expected = math.exp(np.mean(naive_losses(logits[:2].numpy(), tokens[:2].numpy())))
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-6)
    assert int(metric.tokens) == 2 * 5


def test_model_that_knows_nothing_has_the_perplexity_of_the_vocabulary() -> None:
    metric = Perplexity()
    metric.update(torch.zeros(2, 10, 96), tiny_tokens(2, 10), torch.ones(2))
    assert float(metric.compute()) == pytest.approx(96, rel=1e-6)


def test_nothing_seen_is_not_a_number() -> None:
    with pytest.warns(UserWarning, match="compute"):
        assert math.isnan(float(Perplexity().compute()))


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_trainer_measures_what_the_reference_does(tmp_path: Path, batch_size: int) -> None:
    model, tokens = make_tiny(), tiny_tokens(7, 16, seed=4)
    save_model(tmp_path / "model")
    data = CalibrationDataModule(
        eval_datasets=[str(save_tokens(tmp_path / "one.npy", tokens)), str(save_tokens(tmp_path / "two.npy"))],
        eval_batch_size=batch_size,
        tokenizer=str(tmp_path / "model"),
    )
    data.needs_calibration = False
    measured = EvaluatedModel(str(tmp_path / "model"))
    measured.label = "test"  # type: ignore[assignment]
    trainer_for(measured, tmp_path / "logs").test(measured, data, verbose=False)  # type: ignore[arg-type]

    with torch.no_grad():
        logits = copy.deepcopy(model).double()(input_ids=tokens).logits
    expected = math.exp(np.mean(naive_losses(logits.numpy(), tokens.numpy())))
    assert list(measured.perplexity) == ["one.npy", "two.npy"]
    assert measured.perplexity["one.npy"].perplexity == pytest.approx(expected, rel=1e-5)
    assert measured.perplexity["one.npy"].tokens == 7 * 15
