import math

import pytest
import torch

from lightning_prune.evaluation.unigram import unigram_perplexity


def test_unigram_perplexity_counts_predicted_tokens_only() -> None:
    # Predicted: 1 three times, 2 once. The leading 9s are never predicted.
    tokens = torch.tensor([[9, 1, 1], [9, 1, 2]])
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert unigram_perplexity(tokens) == pytest.approx(expected, rel=1e-12)
    assert unigram_perplexity(torch.arange(51).view(1, 51)) == pytest.approx(50.0, rel=1e-12)
