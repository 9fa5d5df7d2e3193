"""Training on what is evaluated is found by name, hash and tokens."""

from typing import Any

import pytest
import torch

from lightning_prune.recovery.overlap import refuse_overlap, shared_windows
from lightning_prune.support.errors import UserError
from tests.tiny import tiny_tokens


def manifest(**facts: Any) -> dict[str, Any]:
    return {"dataset": "a.txt", "split": "all", "text_sha256": "1" * 64, "fingerprint": "2" * 64} | facts


OTHER = {"dataset": "b.txt", "text_sha256": "3" * 64, "fingerprint": "4" * 64}


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (OTHER | {"dataset": "a.txt"}, "name and the split"),
        (OTHER | {"text_sha256": "1" * 64}, "same text"),
        (OTHER | {"fingerprint": "2" * 64}, "same tokens"),
    ],
)
def test_a_fact_in_common_is_refused(facts: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"--data.dataset.*{says}.*'test'.*--data.eval_datasets"):
        refuse_overlap(manifest(), tiny_tokens(4, 80), "test", manifest(**facts), tiny_tokens(4, 80, seed=1))


def test_unknown_hashes_of_token_arrays_are_no_fact_in_common() -> None:
    first, second = manifest(text_sha256=None), manifest(**OTHER | {"text_sha256": None})
    refuse_overlap(first, tiny_tokens(4, 80), "test", second, tiny_tokens(4, 80, seed=1))


def test_evaluation_text_inside_a_longer_text_is_found_wherever_it_begins() -> None:
    evaluation, other = tiny_tokens(6, 80, seed=1), tiny_tokens(10, 80)
    stream = torch.cat([other.flatten()[:37], evaluation.flatten(), other.flatten()])
    training = stream[: len(stream) // 50 * 50].view(-1, 50)
    assert shared_windows(training, evaluation) == 1
    assert shared_windows(other, evaluation) == 0
    half = torch.cat([evaluation[:3], tiny_tokens(3, 80, seed=9)])
    assert shared_windows(training, half) == 0.5
    with pytest.raises(UserError, match="holds 100% of the windows"):
        refuse_overlap(manifest(), training, "test", manifest(**OTHER), evaluation)


def test_a_text_shorter_than_a_window_shares_nothing() -> None:
    assert shared_windows(tiny_tokens(1, 8), tiny_tokens(2, 80)) == 0
