"""Training windows in an order that a run which was interrupted takes up where it stopped."""

from collections.abc import Iterator

import torch
from torch import Tensor


class ShuffledWindows:
    """An endless stream of batches, every window once before any comes again.

    Lightning takes ``len`` batches as an epoch. The order is a function of the seed and the position alone, so the
    position is all there is to keep.

    Args:
        tokens: int64 ``[N, L]``.
        batch_size: windows per batch; the last one of every round is smaller where it does not divide N.
        seed: of the order.
    """

    def __init__(self, tokens: Tensor, batch_size: int, seed: int) -> None:
        self.tokens, self.batch_size, self.seed = tokens, batch_size, seed
        self.position = 0  # batches handed out so far

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        shuffled, order = -1, torch.empty(0, dtype=torch.int64)
        while True:
            number, batch = divmod(self.position, len(self))
            if number != shuffled:
                generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
                shuffled, order = number, torch.randperm(len(self.tokens), generator=generator)
            self.position += 1
            yield self.tokens[order[batch * self.batch_size : (batch + 1) * self.batch_size]]

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind that position."""
        self.position = int(state["position"])
