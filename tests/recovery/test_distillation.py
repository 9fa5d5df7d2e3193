"""The distillation losses against loops over single tokens in float64."""

import numpy as np
import pytest
import torch

from lightning_prune.recovery.distillation import hidden_distillation, logit_distillation, matching_states


def naive_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> float:
    """T² · mean over tokens of Σ p · (ln p − ln q), one token at a time."""
    found = []
    for q_logits, p_logits in zip(student.double().reshape(-1, 7), teacher.double().reshape(-1, 7), strict=True):
        q = np.exp(q_logits.numpy() / temperature)
        p = np.exp(p_logits.numpy() / temperature)
        q, p = q / q.sum(), p / p.sum()
        found.append(sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True)))
    return temperature**2 * float(np.mean(found))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_that_of_a_loop_over_tokens(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 7), 3 * torch.randn(2, 3, 7)
    found = float(logit_distillation(student, teacher, temperature))
    assert found == pytest.approx(naive_divergence(student, teacher, temperature), rel=1e-5)


def test_divergence_is_zero_for_equal_predictions_and_teaches_the_student_only() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 3, 7, requires_grad=True), torch.randn(1, 3, 7, requires_grad=True)
    assert logit_distillation(teacher + 4.0, teacher).item() == pytest.approx(0, abs=1e-6)  # a shift changes no softmax
    logit_distillation(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    # ∂KL/∂student = (q − p) / tokens
    expected = (student.softmax(-1) - teacher.softmax(-1)).detach() / 3
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-6)


def test_hidden_distance_is_relative_so_that_scale_does_not_matter() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    expected = float(((student.double() - teacher.double()) ** 2).sum() / (teacher.double() ** 2).sum())
    assert float(hidden_distillation([student], [teacher])) == pytest.approx(expected, rel=1e-6)
    both = hidden_distillation([student, 100 * student], [teacher, 100 * teacher])
    assert float(both) == pytest.approx(expected, rel=1e-6)


def test_hidden_states_are_compared_behind_the_layers_that_both_models_have() -> None:
    dense = [torch.full((1, 1, 1), float(index)) for index in range(6)]  # embeddings, five layers
    mine, theirs = matching_states(["embeddings", "a", "b", "normed"], dense, kept=[0, 2, 3])  # type: ignore[list-item]
    assert mine == ["a", "b", "normed"]
    assert [float(one) for one in theirs] == [1, 3, 5]  # layers 0 and 2, and what leaves the decoder
