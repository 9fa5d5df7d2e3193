"""How far the pruned model is from the dense one: in what it predicts, and in what its layers put out."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def logit_distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · KL(p ‖ q) in nats, mean over tokens, with p = softmax(teacher / T) and q = softmax(student / T) in fp32.

    Hinton, Vinyals, Dean 2015, section 2: T² keeps the size of the gradient when T changes.

    Args:
        student, teacher: logits ``[B, L, V]`` in any floating dtype; no gradient flows into ``teacher``.
        temperature: T > 0.

    Returns:
        fp32 scalar.
    """
    predicted = functional.log_softmax(student.float().flatten(0, -2) / temperature, dim=-1)
    target = functional.log_softmax(teacher.detach().float().flatten(0, -2) / temperature, dim=-1)
    return functional.kl_div(predicted, target, reduction="batchmean", log_target=True) * temperature**2


def hidden_distillation(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """‖student − teacher‖² / ‖teacher‖² of every pair of hidden states ``[B, L, D]``, mean over pairs; fp32 scalar.

    Relative, because the residual stream grows with depth and the last layers would outweigh the others.
    """
    shares = []
    for mine, theirs in zip(student, teacher, strict=True):
        target = theirs.detach().float()
        shares.append((mine.float() - target).square().sum() / target.square().sum())
    return torch.stack(shares).mean()


def matching_states(student: Sequence[Tensor], teacher: Sequence[Tensor], kept: Sequence[int]) -> list[list[Tensor]]:
    """The hidden states behind the layers that both models have, and what leaves the two decoders.

    Args:
        student, teacher: as transformers gives them: embeddings, then one per layer, the last behind the final norm.
        kept: number in the dense model of every layer of the student.
    """
    mine = [student[index + 1] for index in range(len(kept) - 1)]
    theirs = [teacher[layer + 1] for layer in kept[:-1]]
    return [[*mine, student[-1]], [*theirs, teacher[-1]]]
