"""How much the loss grows when one piece of the model is missing, without running what comes before it again.

Everything before the removed piece is the same as in the dense model. So one dense pass keeps the residual stream at
every layer, and each removal restarts right behind its piece: L + L + 3·L(L−1)/2 layer evaluations for L layers where
measuring each removal with a whole forward takes (3L + 1)·L.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedModel

from lightning_prune.statistics.block_influence import BlockInfluence
from lightning_prune.statistics.replay import capture
from lightning_prune.statistics.token_loss import token_losses
from lightning_prune.surgery.anatomy import LayerAnatomy, final_norm_of

PIECES = ("layer", "attention", "mlp")


class RemovalPrior(Metric):
    """Loss increase Δ in nats per token for each removed piece, relative to the dense model.

    ``removed[p, l]`` sums the token losses without piece p (``PIECES``) of layer l: the layer replaced by identity, or
    only its attention or MLP contributing zero to the residual stream. Sums are fp64; losses are taken in fp32.
    """

    full_state_update = False
    dense: Tensor
    removed: Tensor
    tokens: Tensor

    def __init__(self, num_layers: int, blocks: bool = True) -> None:
        """``blocks=False`` measures whole layers only (τ = ∞ needs no more)."""
        super().__init__()
        self.blocks = blocks
        self.layer_evaluations = 0
        self.add_state("dense", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("removed", torch.zeros(3, num_layers, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, model: PreTrainedModel, layers: Sequence[LayerAnatomy], tokens: Tensor) -> None:
        """Measure every removal on one batch ``[B, L]`` of tokens."""
        modules = [view.layer for view in layers]
        replay = capture(model, modules, tokens)

        def loss_from(start: int, hidden: Tensor) -> Tensor:
            for index in range(start, len(modules)):
                hidden = replay.run(modules[index], index, hidden)
                self.layer_evaluations += 1
            logits = model.get_output_embeddings()(final_norm_of(model)(hidden))
            return token_losses(logits, tokens).double().sum()

        hidden = replay.hidden
        for index, view in enumerate(layers):
            self.removed[0, index] += loss_from(index + 1, hidden)
            with attention_output(view) as attention:
                after = replay.run(view.layer, index, hidden)
            self.layer_evaluations += 1
            if self.blocks:
                self.removed[2, index] += loss_from(index + 1, hidden + attention[0])
                self.layer_evaluations += 1
                without_attention = replay.feed(view, hidden)
                self.removed[1, index] += loss_from(index + 1, without_attention)
            hidden = after
        self.dense += loss_from(len(modules), hidden)
        self.tokens += tokens.shape[0] * (tokens.shape[1] - 1)

    def compute(self) -> Tensor:
        """Δ ``[3, L]`` fp64: layer, attention, mlp; NaN where blocks were not measured."""
        increase = (self.removed - self.dense) / self.tokens
        if not self.blocks:
            increase[1:] = torch.nan
        return increase


class SimilarityPrior(nn.Module):
    """1 − mean cos(input, output) of every layer and of every block's step along the residual stream, from one dense
    pass: cheap, and in the same layout as the removal prior."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.influence = nn.ModuleList(nn.ModuleList(BlockInfluence() for _ in range(num_layers)) for _ in PIECES)

    def update(self, model: PreTrainedModel, layers: Sequence[LayerAnatomy], tokens: Tensor) -> None:
        """Add one batch ``[B, L]`` of tokens."""
        modules = [view.layer for view in layers]
        replay = capture(model, modules, tokens)
        hidden = replay.hidden
        for index, view in enumerate(layers):
            with attention_output(view) as attention:
                after = replay.run(view.layer, index, hidden)
            middle = hidden + attention[0]
            for piece, (before, behind) in enumerate(((hidden, after), (hidden, middle), (middle, after))):
                self.influence[piece][index].update(before, behind)  # type: ignore[index]
            hidden = after

    def compute(self) -> Tensor:
        """``[3, L]`` fp64: layer, attention, mlp."""
        rows = [[float(metric.compute()) for metric in row] for row in self.influence]  # type: ignore[union-attr, attr-defined]
        return torch.tensor(rows, dtype=torch.float64)


class attention_output:
    """Context in which the attention block's contribution to the residual stream ``[B, L, D]`` is kept."""

    def __init__(self, view: LayerAnatomy) -> None:
        self.module = view.attention
        self.found: list[Tensor] = []

    def __enter__(self) -> list[Tensor]:
        self.handle = self.module.register_forward_hook(self._keep)
        return self.found

    def __exit__(self, *error: object) -> None:
        self.handle.remove()

    def _keep(self, module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self.found.append(output[0] if isinstance(output, tuple) else output)
