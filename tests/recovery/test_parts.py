"""The parts of a recovery: loss, adapters, zeros, order and overlap of text, learning rate, the share regained."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_prune.data.calibration import shared_windows
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.recovery.data import ShuffledWindows
from lightning_prune.recovery.module import cosine_with_warmup, divergence
from lightning_prune.recovery.weights import attach_adapters, count_zeros, hold_zeros, linears_of, zeros_of
from lightning_prune.runs.verdict import regained, share
from lightning_prune.support.errors import CheckpointError
from tests.tiny import make_tiny, tiny_tokens

TOKENS = tiny_tokens()


def test_divergence_is_that_of_a_loop_over_tokens_and_teaches_the_student_only() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 7, requires_grad=True), (3 * torch.randn(2, 3, 7)).requires_grad_()
    loss = divergence(student, teacher)
    each = []
    for q_logits, p_logits in zip(student.detach().reshape(-1, 7), teacher.detach().reshape(-1, 7), strict=True):
        q, p = (np.exp(one.double().numpy()) for one in (q_logits, p_logits))
        q, p = q / q.sum(), p / p.sum()
        each.append(sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True)))
    assert float(loss.detach()) == pytest.approx(np.mean(each), rel=1e-5)
    loss.backward()
    assert teacher.grad is None
    expected = (student.softmax(-1) - teacher.softmax(-1)).detach() / 6  # ∂KL/∂student = (q − p) / tokens
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["uneven widths", "phi3", "qwen2"])
def test_every_linear_of_the_layers_is_adapted_and_merged(family: str, pruned: Path) -> None:
    net: Any = Checkpoint.open(str(pruned)).load(torch.float32) if family == "uneven widths" else make_tiny(family)
    if family == "uneven widths":
        assert len({linear.weight.shape for linear in linears_of(net).values()}) > 4
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    untouched = net(TOKENS).logits.detach()
    adapted = attach_adapters(net, 3, False)
    torch.testing.assert_close(adapted(input_ids=TOKENS).logits, untouched, rtol=0, atol=0)  # B is zero at first
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if parameter.requires_grad:
            parameter.data.copy_(0.3 * torch.randn_like(parameter))
    logits = adapted(input_ids=TOKENS).logits.detach()
    assert float((logits - untouched).abs().max()) > 0.1
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, logits, rtol=1e-3, atol=1e-3)
    assert [name for name, _ in merged.named_parameters()] == list(before)
    changed = {name for name, parameter in merged.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {f"{name}.weight" for name in linears_of(merged)}


def test_zeroed_weights_stay_zero_under_an_optimizer_and_the_count_sees_one_that_does_not() -> None:
    """Of all weights; slow tests train adapters too."""
    net: Any = make_tiny()
    name, linear = next(iter(linears_of(net).items()))
    linear.weight.data[:, ::2] = 0
    zeros = zeros_of(net)
    hold_zeros(net, zeros)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        net(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    assert count_zeros(net, zeros) == linear.weight.numel() // 2
    linear.weight.data[tuple(zeros[name].nonzero()[0])] = 1e-6
    with pytest.raises(CheckpointError, match=f"1 weights of {name}"):
        count_zeros(net, zeros)


def test_every_window_comes_once_before_any_comes_again_and_a_position_is_all_it_takes_to_go_on() -> None:
    tokens = torch.arange(10).view(10, 1)
    reader = iter(ShuffledWindows(tokens, 4, seed=5))
    batches = [next(reader).flatten().tolist() for _ in range(9)]
    rounds = [[*batches[start], *batches[start + 1], *batches[start + 2]] for start in (0, 3, 6)]
    assert all(sorted(one) == list(range(10)) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    for stopped in range(9):
        other = iter(ShuffledWindows(tokens, 4, seed=5, position=stopped))
        assert [next(other).flatten().tolist() for _ in range(stopped, 9)] == batches[stopped:]


def test_evaluation_text_inside_a_longer_text_is_found_wherever_it_begins() -> None:
    evaluation, other = tiny_tokens(6, 80, seed=1), tiny_tokens(10, 80)
    stream = torch.cat([other.flatten()[:37], evaluation.flatten(), other.flatten()])
    training = stream[: len(stream) // 50 * 50].view(-1, 50)
    assert shared_windows(training, evaluation) == 1
    assert shared_windows(other, evaluation) == 0
    assert shared_windows(training, torch.cat([evaluation[:3], tiny_tokens(3, 80, seed=9)])) == 0.5
    assert shared_windows(tiny_tokens(1, 8), evaluation) == 0  # shorter than a window


def test_rate_rises_to_the_peak_and_falls_to_zero() -> None:
    rates = [cosine_with_warmup(step / 100, 0.1) for step in range(101)]
    assert [rates[step] for step in (0, 5, 10, 55, 100)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert cosine_with_warmup(0, 0) == 1


@pytest.mark.parametrize(
    ("values", "expected", "words"),
    [
        ((10, 40, 20), 0.5, "50%"),  # 10 → 40 doubles twice; 20 is one doubling back
        ((10, 40, 10), 1, "100%"),
        ((10, 40, 80), -0.5, "-50%"),
        ((10, 10, 9), None, "–"),  # nothing was lost
        ((None, 40, 20), None, "–"),
        ((10, 40, math.inf), None, "–"),
    ],
)
def test_regained_is_a_share_of_the_lost_log_perplexity(values: Any, expected: float | None, words: str) -> None:
    value = regained(*values)
    assert value == (None if expected is None else pytest.approx(expected))
    assert share(value) == words
