"""Losses and their gradient from the last residual, a few tokens at a time."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.models import head as head_module
from lightning_prune.models.head import loss_gradient, token_losses
from tests.naive_losses import naive_losses
from tests.tiny import tiny_tokens

VOCABULARY = 96


def random_hidden(batch: int, length: int, width: int = 8) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1))


def make_head(width: int = 8, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A norm and an output embedding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        head = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, VOCABULARY, bias=False))
    return head.to(dtype).requires_grad_(False)


def watched(head: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    """The head, and the number of rows of each of its calls."""
    rows: list[int] = []
    return lambda hidden: (rows.append(len(hidden)), head(hidden))[1], rows


def test_losses_equal_a_float64_reference() -> None:
    head, hidden, tokens = make_head(), random_hidden(3, 7), tiny_tokens(3, 7)
    losses = token_losses(head, hidden, tokens, VOCABULARY)
    assert losses.shape == (3, 6)
    logits = make_head(dtype=torch.float64)(hidden.double())
    np.testing.assert_allclose(losses.numpy(), naive_losses(logits.numpy(), tokens.numpy()), rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert token_losses(head, hidden, tokens, VOCABULARY).dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        half = logits.to(dtype)
        losses = token_losses(lambda rows: rows, half, tokens, VOCABULARY)
        assert losses.dtype == torch.float32
        np.testing.assert_allclose(losses.numpy(), naive_losses(half.float().numpy(), tokens.numpy()), rtol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 7, 1000])
def test_chunks_of_any_size_give_the_losses_and_gradients_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    head, hidden, tokens = make_head(), random_hidden(3, 7), tiny_tokens(3, 7)
    weight = torch.tensor([1.0, 0.0, 1.0])
    whole = token_losses(head, hidden, tokens, VOCABULARY), loss_gradient(head, hidden, tokens, weight, VOCABULARY)
    monkeypatch.setattr(head_module, "LOGITS_BYTES", 4 * VOCABULARY * size)
    spy, rows = watched(head)
    torch.testing.assert_close(token_losses(spy, hidden, tokens, VOCABULARY), whole[0], rtol=1e-6, atol=0)
    assert (sum(rows), max(rows)) == (3 * 6, min(size, 18))  # the logits of more tokens never exist
    rows.clear()
    found = loss_gradient(spy, hidden, tokens, weight, VOCABULARY)
    torch.testing.assert_close(found, whole[1], rtol=1e-5, atol=1e-6)
    assert (sum(rows), max(rows)) == (3 * 6, min(size, 18))


def exact_gradient(head: Callable[[Tensor], Tensor], hidden: Tensor, tokens: Tensor, samples: list[int]) -> Tensor:
    """Autograd of the loss of some samples, summed over their tokens, in float64."""
    leaf = hidden.double().requires_grad_(True)
    shares = torch.log_softmax(head(leaf), -1)
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        for position in range(tokens.shape[1] - 1):
            total = total - shares[sample, position, tokens[sample, position + 1]]
    return torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float32, 1e-4, 1e-6), (torch.bfloat16, 0.1, 0.05)])
@torch.no_grad()  # as a pass runs
def test_gradient_is_that_of_the_sum_over_real_samples(dtype: torch.dtype, rtol: float, atol: float) -> None:
    """Sum, not mean; samples of weight 0 get no gradient; in the dtype of the residual."""
    head, hidden, tokens = make_head(dtype=dtype), random_hidden(4, 6).to(dtype), tiny_tokens(4, 6)
    found = loss_gradient(head, hidden, tokens, torch.tensor([1.0, 1.0, 0.0, 1.0]), VOCABULARY)
    with torch.enable_grad():
        expected = exact_gradient(make_head(dtype=torch.float64), hidden, tokens, [0, 1, 3])
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)
    assert (found.dtype, found.requires_grad, hidden.requires_grad) == (dtype, False, False)
    assert all(parameter.grad is None for parameter in head.parameters())
    assert not bool(found[2].any())
    assert not bool(found[:, -1].any())  # the last token predicts nothing
    assert not bool(loss_gradient(head, hidden[:, :1], tokens[:, :1], torch.ones(4), VOCABULARY).any())


def test_summed_fp16_losses_do_not_underflow() -> None:
    """A mean over 4096 tokens would leave steps below 2⁻²⁴, all that fp16 knows below its normal numbers."""
    hidden, tokens = 0.01 * random_hidden(1, 2, VOCABULARY), tiny_tokens(1, 2)
    small = torch.eye(VOCABULARY) * 1e-3  # logits that hardly depend on the residual

    def head(rows: Tensor) -> Tensor:
        return rows @ small.to(rows.dtype)

    found = loss_gradient(head, hidden.half(), tokens, torch.ones(1), VOCABULARY)
    exact = exact_gradient(head, hidden, tokens, [0])
    assert float(exact.abs()[exact != 0].min()) / 4096 < 2**-24  # what a mean would have been
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=2**-24)
    assert bool((found[0, 0] != 0).all())
