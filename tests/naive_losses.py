"""Token losses one position after the other, in float64."""

import math

import numpy as np


def naive_losses(logits: np.ndarray, tokens: np.ndarray) -> list[list[float]]:
    """-log softmax of the next token."""
    found = []
    for sample, ids in zip(logits.astype(np.float64), tokens, strict=True):
        row = []
        for position in range(len(ids) - 1):
            scores = sample[position] - sample[position].max()
            row.append(math.log(np.exp(scores).sum()) - scores[ids[position + 1]])
        found.append(row)
    return found
