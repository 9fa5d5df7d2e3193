"""How much the loss grows when one piece of the model is missing, for every piece, in one pass over the layers.

Everything before a missing piece is as in the dense model, so a variant begins behind its piece. At layer l the dense
state and every variant that lost an earlier piece cross together: L + L + 3·L(L−1)/2 layer evaluations for L layers,
each layer brought in once, where measuring each removal with a whole forward takes (3L + 1)·L.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import Batch, Holding, Load, Pass, Setting, Step
from lightning_prune.calibration.residuals import ResidualStore
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import Block

PIECES = (Block.LAYER, Block.ATTENTION, Block.MLP)


class RemovalLosses(Metric):
    """Summed token losses of the dense model and without each piece, fp64.

    ``removed[p, l]``: without piece p (``PIECES``) of layer l, the layer replaced by identity, or only its attention or
    MLP contributing zero to the residual stream.
    """

    full_state_update = False
    dense: Tensor
    removed: Tensor
    tokens: Tensor

    def __init__(self, num_layers: int, blocks: bool = True) -> None:
        super().__init__()
        self.blocks = blocks
        self.add_state("dense", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("removed", torch.zeros(3, num_layers, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, piece: tuple[Block, int] | None, losses: Tensor) -> None:
        """Add token losses without a piece, or of the dense model."""
        if piece is None:
            self.dense += losses.double().sum()
            self.tokens += losses.numel()
        else:
            self.removed[PIECES.index(piece[0]), piece[1]] += losses.double().sum()

    def compute(self) -> Tensor:
        """Loss increase Δ ``[3, L]`` in nats per token, fp64: layer, attention, mlp; NaN where not measured."""
        increase = (self.removed - self.dense) / self.tokens
        if not self.blocks:
            increase[1:] = torch.nan
        return increase


class RemovalPass(Pass):
    """Δ of every layer and block on the first ``num_samples`` calibration samples.

    Args:
        num_samples: None for all.
        blocks: whether attention and MLP are measured apart; τ = ∞ needs whole layers only.
    """

    name = "prior"

    def __init__(self, num_samples: int | None = None, blocks: bool = True) -> None:
        self.num_samples, self.blocks = num_samples, blocks

    def steps(self, num_layers: int) -> list[Step]:
        return [Step(layer, "removal") for layer in range(num_layers)]

    def begin(self, setting: Setting) -> None:
        super().begin(setting)
        self.states: dict[tuple[Block, int] | None, ResidualStore] = {None: setting.store()}
        self.losses = RemovalLosses(setting.model.num_layers, self.blocks).to(setting.model.device)

    def start(self, step: Step) -> None:
        """Nothing to prepare: variants get room when they begin."""

    def batch(self, step: Step, batch: Batch) -> None:
        """Every earlier variant crosses the layer, then the dense state, from which the new variants begin."""
        tokens = first_samples(batch, self.num_samples)
        if len(tokens) == 0:
            return
        layer, device = step.layer, self.model.device
        rows = slice(batch.rows.start, batch.rows.start + len(tokens))
        last = layer + 1 == self.model.num_layers
        with torch.no_grad():
            hidden = self.model.embed(tokens) if layer == 0 else self.states[None].get(rows, device)
            for piece, store in self.states.items():
                if piece is not None and piece[1] < layer:
                    self._put(piece, rows, self.model.run(layer, store.get(rows, device)), tokens, last)
            middle, after = self.model.split(layer, hidden)
            self._put((Block.LAYER, layer), rows, hidden, tokens, last)
            if self.blocks:
                self._put((Block.MLP, layer), rows, middle, tokens, last)
                self._put((Block.ATTENTION, layer), rows, self.model.feed(layer, hidden), tokens, last)
            self._put(None, rows, after, tokens, last)

    def finish(self, step: Step) -> LayerResult:
        if step.layer + 1 < self.model.num_layers:
            return LayerResult()
        samples = self.num_samples or self.setting.samples
        if not torch.distributed.is_initialized():
            expected = min(samples, self.setting.samples) * (self.setting.seq_len - 1)
            assert int(self.losses.tokens) == expected, (int(self.losses.tokens), expected)
        delta = self.losses.compute().cpu()
        measured = delta if self.blocks else delta[:1]
        for piece, layer in (~torch.isfinite(measured)).nonzero().tolist():
            raise FloatingPointError(f"layer {layer}: the loss without its {PIECES[piece]} is NaN or infinite.")
        return LayerResult(facts={"delta": delta.tolist()})

    def cost(self, view: LayerStructure, step: Step) -> float:
        return 2.0 + 3 * step.layer if self.blocks else 1.0 + step.layer

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        """The dense state, and the variants of every layer but the last, whose losses are taken at once."""
        states = 1 + (3 if self.blocks else 1) * (load.num_layers - 1)
        two = 2 * load.tokens * load.hidden_size * load.dtype.itemsize
        return Holding(running=two, stores=(load.hidden_size,) * states, per_logit=8)

    def stores(self) -> dict[str, ResidualStore]:
        return {" ".join(map(str, piece or ("dense",))): store for piece, store in self.states.items()}

    def put_back(self, name: str, values: Tensor) -> None:
        kind, _, layer = name.partition(" ")
        piece = next(((one, int(layer)) for one in PIECES if one == kind), None)
        self.states.setdefault(piece, self.setting.store()).put(slice(0, len(values)), values)

    def end(self) -> None:
        for store in self.states.values():
            store.close()

    def _put(self, piece: tuple[Block, int] | None, rows: slice, hidden: Tensor, tokens: Tensor, last: bool) -> None:
        if last:
            self.losses.update(piece, self.model.losses(hidden, tokens))
        else:
            if piece not in self.states:
                self.states[piece] = self.setting.store()
            self.states[piece].put(rows, hidden)


def first_samples(batch: Batch, num_samples: int | None) -> Tensor:
    """The tokens ``[b, L]`` of the batch's samples that count: real ones, and the first ``num_samples`` of the shared
    set alone, whatever the batch size and the number of processes. They stand at the batch's front."""
    counted = batch.weight > 0
    if num_samples is not None:
        counted &= batch.index < num_samples
    return batch.tokens[: int(counted.sum())]
