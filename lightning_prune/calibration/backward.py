"""The backward order: the chain rule cut at layer boundaries, where the residual stream is kept on the way forward.

From the last layer to the first, each is run again and differentiated with the gradient of its output: the gradients
of the whole model for one more forward, without the model or its gradients in memory.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import Batch, Holding, Load, Pass, Setting, Step
from lightning_prune.calibration.statistics.token_statistic import TokenStatistic
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.devices import deterministic, widened


class RemovalSlopes(TokenStatistic):
    """Σ s_i and Σ s_i² of the P ``pieces`` of one layer, itself the first: float64 ``[P]`` each.

    What the loss would gain without a piece, from its gradient alone. A piece (the layer, or one of its blocks) adds c
    to the residual stream, where the loss has the gradient g. For sample i with the summed loss ℓ_i, to second order
    along c and with the empirical Fisher matrix g·gᵀ for the Hessian,

        ℓ_i(without) − ℓ_i ≈ −s_i + ½·s_i²,   s_i = Σ over tokens of g·c
    """

    slopes: Tensor
    squares: Tensor

    def __init__(self, pieces: int) -> None:
        super().__init__(slopes=(pieces,), squares=(pieces,))

    def update(self, pieces: list[tuple[Tensor, Tensor]], tokens: int) -> None:
        """Add samples that predict ``tokens``: for every piece its g and its c, ``[B, L, D]`` each."""
        slopes = torch.stack([widened((g.float() * c.float()).flatten(1).sum(1)) for g, c in pieces])
        self.slopes += slopes.sum(1)
        self.squares += slopes.square().sum(1)
        self.tokens += tokens

    def compute(self) -> Tensor:
        """Δ ``[P]`` in nats per token: of the layer, then of its blocks in order."""
        return (0.5 * self.squares - self.slopes) / self.tokens


class BackwardPass(Pass):
    """Forward once, backward layer by layer.

    ``priors``: also estimate the loss increase without the layer and its blocks: the fact ``delta``, three numbers, of
    the layer and by the blocks' ``place``; 0 for a block that the layer does not have.
    """

    def __init__(self, priors: bool = False, num_samples: int | None = None) -> None:
        self.priors, self.num_samples = priors, num_samples

    def steps(self, layers: Sequence[LayerStructure]) -> list[Step]:
        forward = super().steps(layers)
        return forward + [Step(step.layer, "backward") for step in reversed(forward)]

    def begin(self, setting: Setting) -> None:
        super().begin(setting)
        self.boundaries = [self.store(f"boundary {layer}") for layer in range(self.model.num_layers)]
        self.cotangent = self.store("cotangent")

    @abstractmethod
    def watch(self, view: LayerStructure) -> None:
        """Let the layer's weights take gradients; the loss is a sum over tokens."""

    def expect(self, tokens: int) -> None:
        """Say how many tokens the next backward's summed loss is taken over."""

    @abstractmethod
    def conclude(self, view: LayerStructure) -> LayerResult:
        """Return the result of a layer, from the sums over all processes; its weights take no more gradients."""

    def start(self, step: Step) -> None:
        self.seen = 0
        if step.phase == "backward":
            self.watch(self.view(step))
            pieces = 1 + len(self.view(step).blocks)
            self.slopes = RemovalSlopes(pieces).to(self.model.device) if self.priors else None

    def batch(self, step: Step, batch: Batch) -> None:
        self.seen += int((batch.weight > 0).sum())
        self._cross(step, batch, watched=True)

    def skip(self, step: Step, batch: Batch) -> None:
        self._cross(step, batch, watched=False)

    def finish(self, step: Step) -> LayerResult:
        if self.seen != self.setting.samples:
            raise RuntimeError(
                f"layer {step.layer}, {step.phase}: {self.seen} samples passed, expected {self.setting.samples}."
            )
        if step.phase == "forward":
            return LayerResult()
        with torch.no_grad():
            result = self.conclude(self.view(step))
            if self.slopes is not None:
                self.slopes.raise_if_not_finite(f"layer {step.layer}, loss increase without its pieces")
                layer, *blocks = self.slopes.reduced().tolist()
                result.facts["delta"] = delta = [layer, 0.0, 0.0]
                for block, value in zip(self.view(step).blocks, blocks, strict=True):
                    delta[1 + block.place] = value
        return result

    def advance(self, step: Step) -> None:
        if step.phase == "backward" and not self.keeps_stream:
            self.boundaries[step.layer].close()

    def cost(self, view: LayerStructure, step: Step) -> float:
        return 1.0 if step.phase == "forward" else 3.0

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        """A stream at every layer boundary and one gradient; what backward keeps of a layer, and its gradients. The
        product of all experts makes a gradient of their weights, whether anybody wants it or not."""
        kept = 8 * load.hidden_size + 10 * load.widest_input + 2 * load.routed
        return Holding(
            running=(load.tokens * kept + (load.largest_parameter if load.routed else 0)) * load.dtype.itemsize,
            stores=(load.hidden_size,) * (load.num_layers + 1),
            per_logit=12,
        )

    def _cross(self, step: Step, batch: Batch, watched: bool) -> None:
        if step.phase == "backward" or self.num_samples is not None:
            batch = batch.counted(self.num_samples)
        if not len(batch.tokens):
            return
        if step.phase == "forward":
            self._forward(step, batch)
            return
        hidden = self.boundaries[step.layer].get(batch.rows, self.model.device).detach()
        cotangent = self.cotangent.get(batch.rows, self.model.device)
        if watched:
            self.expect(len(batch.tokens) * (self.setting.seq_len - 1))
        with deterministic(self.model.device):
            gradient = self._differentiate(step.layer, hidden, cotangent, self.slopes if watched else None)
        if gradient is not None:
            self.cotangent.put(batch.rows, gradient)

    @torch.no_grad()
    def _forward(self, step: Step, batch: Batch) -> None:
        if step.layer == 0:
            self.boundaries[0].put(batch.rows, self.model.embed(batch.tokens))
        output = self.model.run(step.layer, self.boundaries[step.layer].get(batch.rows, self.model.device))
        if step.layer + 1 < self.model.num_layers:
            self.boundaries[step.layer + 1].put(batch.rows, output)
        else:
            self.cotangent.put(batch.rows, self.model.loss_gradient(output, batch.tokens, batch.weight))

    def _differentiate(
        self, layer: int, hidden: Tensor, cotangent: Tensor, slopes: RemovalSlopes | None
    ) -> Tensor | None:
        """The gradient of the layer's input; None for the first layer."""
        # A mixer's weights take no gradients, so that what it hands on would have none in the first layer.
        mixer = slopes is not None and Block.MIXER in self.model.views[layer].blocks
        hidden.requires_grad_(layer > 0 or mixer)
        with torch.enable_grad():
            if slopes is None:
                output = self.model.run(layer, hidden)
            else:
                before, *between, output = self.model.streams(layer, hidden)
                for middle in between:  # of blocks side by side, it is not what the next one reads
                    middle.retain_grad()
        if output.requires_grad:  # not the first layer's, when its weights are not watched
            torch.autograd.backward(output, cotangent.to(output.dtype))
        if slopes is not None:
            gradients = [cotangent if middle.grad is None else middle.grad for middle in between] + [cotangent]
            streams = [stream.detach() for stream in (before, *between, output)]
            ends = [*streams[:-2], self.model.scaled(layer, streams[-2])]  # what is there without each block
            added = [after - without for without, after in zip(ends, streams[1:], strict=True)]
            pieces = [(cotangent, streams[-1] - streams[0]), *zip(gradients, added, strict=True)]
            slopes.update(pieces, len(hidden) * (self.setting.seq_len - 1))
        if hidden.grad is not None:
            self.model.overflow.watch(f"layer {layer}, gradient of its input", hidden.grad)
        return hidden.grad
