import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.evaluation import perplexity as module
from lightning_prune.evaluation.perplexity import Evaluation, Perplexity, unigram_perplexity
from lightning_prune.models.head import token_losses
from lightning_prune.models.model_slot import load_dtype
from tests.methods.behaviour import save_model, save_tokens, trainer_for
from tests.naive_losses import naive_losses
from tests.tiny import make_tiny, tiny_tokens


def random_logits(batch: int, length: int) -> torch.Tensor:
    return 5 * torch.randn(batch, length, 96, generator=torch.Generator().manual_seed(1))


def losses_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return token_losses(lambda rows: rows, logits, tokens, 96)


@pytest.mark.parametrize("batches", [[8], [1] * 8, [3, 5]])
def test_batching_and_padding_samples_do_not_change_the_value(batches: list[int]) -> None:
    logits, tokens, weight = random_logits(8, 9), tiny_tokens(8, 9), torch.ones(8)
    weight[[2, 7]] = 0
    logits[weight == 0] = torch.nan
    metric = Perplexity()
    for rows, some_tokens, counted in zip(*(x.split(batches) for x in (logits, tokens, weight)), strict=True):
        metric.update(losses_of(rows, some_tokens), counted)
    expected = naive_losses(logits[weight > 0].numpy(), tokens[weight > 0].numpy())
    assert float(metric.reduced()) == pytest.approx(math.exp(np.mean(expected)), rel=1e-6)
    assert int(metric.tokens) == 6 * 8


def test_models_that_know_nothing_or_only_frequencies() -> None:
    metric = Perplexity()
    metric.update(losses_of(torch.zeros(2, 10, 96), tiny_tokens(2, 10)), torch.ones(2))
    assert float(metric.reduced()) == pytest.approx(96, rel=1e-6)
    tokens = torch.tensor([[9, 1, 1], [9, 1, 2]])  # predicted: 1 three times, 2 once, 9 never
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert unigram_perplexity(tokens) == pytest.approx(expected, rel=1e-12)
    assert unigram_perplexity(torch.arange(51).view(1, 51)) == pytest.approx(50.0, rel=1e-12)


def measure(folder: Path, tokens: torch.Tensor, batch_size: int, onload: str, precision: str = "32-true") -> Evaluation:
    if not (folder / "model").exists():
        save_model(folder / "model")
    data = CalibrationDataModule(
        eval_datasets=[str(save_tokens(folder / "one.npy", tokens)), str(save_tokens(folder / "two.npy"))],
        eval_batch_size=batch_size,
        tokenizer=str(folder / "model"),
    )
    data.needs_calibration = False
    measured = Evaluation(str(folder / "model"), onload)
    measured.label = "test"  # type: ignore[assignment]
    trainer_for(measured, folder / "logs", precision).test(measured, data, verbose=False)  # type: ignore[arg-type]
    return measured


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_it_is_that_of_float64_and_where_the_weights_are_does_not_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    tokens = tiny_tokens(7, 16, seed=4)
    model = measure(tmp_path, tokens, 2, "model", precision)
    layer = measure(tmp_path, tokens, 2, "layer", precision)
    monkeypatch.setattr(module, "STEP_BYTES", 1)  # every batch crosses the layers on its own
    singly = measure(tmp_path, tokens, 2, "layer", precision)
    assert layer.perplexity == model.perplexity
    assert singly.perplexity == model.perplexity
    assert list(model.perplexity) == ["one.npy", "two.npy"]
    assert model.perplexity["one.npy"].tokens == 7 * 15
    if precision == "32-true":
        with torch.no_grad():
            logits = make_tiny().double()(input_ids=tokens).logits
        expected = math.exp(np.mean(naive_losses(logits.numpy(), tokens.numpy())))
        for batch_size, found in ((2, model), *((size, measure(tmp_path, tokens, size, "model")) for size in (1, 16))):
            assert found.perplexity["one.npy"].perplexity == pytest.approx(expected, rel=1e-5), batch_size
    # Windows cross together, so each layer was read once per evaluation set; singly, once per batch.
    weights = sum(p.numel() * p.element_size() for p in make_tiny().to(load_dtype(precision)).model.layers.parameters())
    others = layer.slot.model.bytes_read - 2 * weights
    assert model.slot.model.bytes_read == weights + others
    assert singly.slot.model.bytes_read == (4 + 5) * weights + others
