"""How much the loss grows when one piece of the model is missing, for every piece, in one pass over the layers.

A variant begins after its missing piece. At layer l the dense state and every earlier variant cross together: 2·L +
3·L(L−1)/2 layer evaluations for L layers, each brought in once, where whole forwards take (3L + 1)·L.
"""

import torch
from torch import Tensor

from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import Batch, Holding, Load, Pass, Setting, Step
from lightning_prune.calibration.statistics.token_statistic import TokenStatistic
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.devices import widened

PIECES = (Block.LAYER, Block.ATTENTION, Block.MLP)  # of a layer with a mixer, that in the place of attention
Piece = tuple[Block, int]  # and its layer


class RemovalLosses(TokenStatistic):
    """Summed token losses of the dense model and without each piece, fp64.

    ``removed[p, l]``, of layer l: p = 0 for the layer replaced by identity, 1 + ``Block.place`` for a block adding 0.
    """

    dense: Tensor
    removed: Tensor

    def __init__(self, num_layers: int) -> None:
        super().__init__(dense=(), removed=(3, num_layers))

    def update(self, piece: Piece | None, losses: Tensor) -> None:
        """Add token losses without a piece, or of the dense model."""
        if piece is None:
            self.dense += widened(losses).sum()
            self.tokens += losses.numel()
        else:
            row = 0 if piece[0] is Block.LAYER else 1 + piece[0].place
            self.removed[row, piece[1]] += widened(losses).sum()

    def compute(self) -> Tensor:
        """Loss increase Δ ``[3, L]`` in nats per token, fp64."""
        return (self.removed - self.dense) / self.tokens


class RemovalPass(Pass):
    """Δ of every layer and block on the first ``num_samples`` calibration samples (None: all).

    ``blocks``: whether attention and MLP are measured apart; τ = ∞ needs whole layers only, NaN for the others.
    """

    name = "prior"

    def __init__(self, num_samples: int | None = None, blocks: bool = True) -> None:
        self.num_samples, self.blocks = num_samples, blocks

    def begin(self, setting: Setting) -> None:
        super().begin(setting)
        self.losses = RemovalLosses(setting.model.num_layers).to(setting.model.device)

    @torch.no_grad()
    def batch(self, step: Step, batch: Batch) -> None:
        """Every earlier variant crosses the layer, then the dense state, from which the new variants begin."""
        batch = batch.counted(self.num_samples)
        layer, tokens, rows = step.layer, batch.tokens, batch.rows
        if not len(tokens):
            return
        hidden = self.model.embed(tokens) if layer == 0 else self._state(None, rows)
        for piece in ((kind, earlier) for earlier in range(layer) for kind in self._pieces(earlier)):
            self._keep(step, piece, rows, self.model.run(layer, self._state(piece, rows)), tokens)
        _, *between, after = self.model.streams(layer, hidden)
        self._keep(step, (Block.LAYER, layer), rows, hidden, tokens)
        if len(self._pieces(layer)) > 1:
            first, second = self.model.views[layer].blocks
            self._keep(step, (second, layer), rows, self.model.scaled(layer, between[0]), tokens)
            self._keep(step, (first, layer), rows, self.model.run_without(layer, first, hidden), tokens)
        self._keep(step, None, rows, after, tokens)

    def finish(self, step: Step) -> LayerResult:
        if step.layer + 1 < self.model.num_layers:
            return LayerResult()
        samples = self.num_samples or self.setting.samples
        if not torch.distributed.is_initialized():
            expected = min(samples, self.setting.samples) * (self.setting.seq_len - 1)
            assert int(self.losses.tokens) == expected, (int(self.losses.tokens), expected)
        delta = self.losses.reduced().cpu()
        for view in self.model.views if self.blocks else ():
            if len(view.blocks) == 1:  # without its one block it is without anything
                delta[1:, view.index] = 0
                delta[1 + view.blocks[0].place, view.index] = delta[0, view.index]
        measured = PIECES if self.blocks else PIECES[:1]
        for piece, layer in (~torch.isfinite(delta[: len(measured)])).nonzero().tolist():
            raise FloatingPointError(f"layer {layer}: the loss without its {PIECES[piece]} is NaN or infinite.")
        delta[len(measured) :] = torch.nan
        return LayerResult(facts={"delta": delta.tolist()})

    def cost(self, view: LayerStructure, step: Step) -> float:
        return 2.0 + 3 * step.layer if self.blocks else 1.0 + step.layer

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        """The dense state, and the variants of every layer but the last, whose losses are taken at once."""
        states = 1 + (3 if self.blocks else 1) * (load.num_layers - 1)
        two = 2 * load.tokens * load.hidden_size * load.dtype.itemsize
        return Holding(running=two, stores=(load.hidden_size,) * states, per_logit=8)

    def _pieces(self, layer: int) -> tuple[Block, ...]:
        """The pieces that the model is run without: the layer, and each of its blocks where there are two."""
        blocks = self.model.views[layer].blocks if self.blocks else ()
        return (Block.LAYER, *blocks) if len(blocks) > 1 else (Block.LAYER,)

    def _state(self, piece: Piece | None, rows: slice) -> Tensor:
        return self.store(f"without {piece}").get(rows, self.model.device)

    def _keep(self, step: Step, piece: Piece | None, rows: slice, hidden: Tensor, tokens: Tensor) -> None:
        if step.layer + 1 == self.model.num_layers:
            self.losses.update(piece, self.model.losses(hidden, tokens))
        else:
            self.store(f"without {piece}").put(rows, hidden)
