"""Whether a text that is trained on holds what perplexity is measured on."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_prune.support.errors import UserError

RUN = 64  # equal tokens in a row that are no coincidence; shorter windows are compared whole
SHARE = 0.01  # of the evaluation windows that may begin with words of the training text: licences, boilerplate
BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2^64


def refuse_overlap(
    training: Mapping[str, Any], tokens: Tensor, name: str, evaluation: Mapping[str, Any], windows: Tensor
) -> None:
    """Refuse to train on an evaluation text: by its name and split, by its fingerprints, and by the tokens themselves.

    Args:
        training: manifest of the training text: dataset, split, text_sha256, fingerprint.
        tokens: all of it, held-out share included, int64 ``[N, L]``, in the order of the text.
        name: of the evaluation set.
        evaluation: its manifest.
        windows: int64 ``[M, W]``.

    Raises:
        UserError: they share text.
    """
    found = ""
    if all(training[key] == evaluation[key] for key in ("dataset", "split")):
        found = "has the name and the split of"
    elif training["text_sha256"] is not None and training["text_sha256"] == evaluation["text_sha256"]:
        found = "is the same text (SHA-256) as"
    elif training["fingerprint"] == evaluation["fingerprint"]:
        found = "has the same tokens (fingerprint) as"
    elif (share := shared_windows(tokens, windows)) > SHARE:
        found = f"holds {share:.0%} of the windows of"
    if found:
        raise UserError(
            f"--data.dataset: the training text '{training['dataset']}' {found} the evaluation set '{name}', on which "
            "perplexity is reported. Train on another text (the split train, another file), or report on another one "
            "with --data.eval_datasets."
        )


def shared_windows(tokens: Tensor, windows: Tensor) -> float:
    """Share of ``windows`` ``[M, W]`` whose first ``RUN`` tokens (or all, if fewer) occur somewhere in the text
    ``tokens`` ``[N, L]``, read as one stream."""
    stream = tokens.flatten().numpy()
    length = min(RUN, windows.shape[1])
    if len(stream) < length:
        return 0.0
    heads = np.concatenate([_hashes(row, length) for row in windows[:, :length].contiguous().numpy()])
    return float(np.isin(heads, _hashes(stream, length)).mean())


def _hashes(stream: NDArray[np.int64], length: int) -> NDArray[np.uint64]:
    """Of every run of ``length`` tokens: Σ (t + 1) · BASE^(length − k) modulo 2^64, by differences of prefix sums."""
    with np.errstate(over="ignore"):
        inverse = np.uint64(pow(BASE, -1, 2**64))
        powers = np.cumprod(np.full(len(stream), BASE, dtype=np.uint64), dtype=np.uint64)
        inverses = np.cumprod(np.full(len(stream), inverse, dtype=np.uint64), dtype=np.uint64)
        prefix = np.concatenate([[np.uint64(0)], np.cumsum((stream.astype(np.uint64) + np.uint64(1)) * inverses)])
        sums: NDArray[np.uint64] = (prefix[length:] - prefix[:-length]) * powers[: len(stream) - length + 1]
    return sums
