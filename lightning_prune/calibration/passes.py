"""A pass over the decoder as a sequence of steps: it owns the order of layers, here forward, and the residual stream.

A subclass says what is observed in a layer, and what its result is once it is finished (one value per unit).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_prune.calibration.hooks import Hooks
from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.residuals import ResidualStore
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.layered import LayeredModel
from lightning_prune.models.projection import Projection
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.devices import free_bytes


@dataclass(frozen=True)
class Step:
    """One epoch: what is done with one layer."""

    layer: int
    phase: str


@dataclass(frozen=True)
class Setting:
    """What a pass needs to know about the run."""

    model: LayeredModel
    rows: int  # samples of this process, those of weight 0 included
    samples: int  # without them
    batch_size: int
    seq_len: int
    scratch: Path
    context: Callable[[], AbstractContextManager[object]]  # the trainer's precision, outside the training step
    finished: Callable[[float], None] = lambda share: None  # told what share of ``finish`` was done since last time

    def free_bytes(self, device: torch.device) -> int:
        """Free memory on a device; solvers choose their precision by it."""
        return free_bytes(device)

    def batches(self) -> Iterator[slice]:
        """The batches of the loader as rows of a store."""
        return (slice(start, start + self.batch_size) for start in range(0, self.rows, self.batch_size))


@dataclass(frozen=True)
class Batch:
    """Samples that cross a layer together."""

    tokens: Tensor  # [B, L]
    weight: Tensor  # [B], 0 for samples that only give every process equally many
    index: Tensor  # [B], in the calibration set
    rows: slice  # that they take in residual stores

    def counted(self, num_samples: int | None) -> "Batch":
        """The batch's samples of weight 1, which come first, among the set's first ``num_samples`` (None: all)."""
        chosen = self.weight > 0
        if num_samples is not None:  # of the shared set, whatever the batch size and the number of processes
            chosen &= self.index < num_samples
        size = int(chosen.sum())
        rows = slice(self.rows.start, self.rows.start + size)
        return Batch(self.tokens[:size], self.weight[:size], self.index[:size], rows)


@dataclass(frozen=True)
class Load:
    """What the memory of a pass depends on."""

    num_layers: int
    hidden_size: int
    widest_input: int  # columns of output or down, whichever has more
    layer_weights: int  # numbers in all weights of a layer
    largest_weight: int  # numbers in its largest matrix
    largest_parameter: int  # the same; it may be of all experts
    routed: int  # numbers that a block of experts makes of a token, 0 without
    rows: int  # samples of this process
    batch_size: int
    seq_len: int
    dtype: torch.dtype  # of weights and activations
    accelerated: bool  # layers run on a device of their own
    free: int  # bytes there beside the weights

    @property
    def tokens(self) -> int:
        """Number of tokens in one batch."""
        return self.batch_size * self.seq_len


@dataclass(frozen=True)
class Holding:
    """The most that a pass holds beside the model's weights and what one layer's forward takes, in bytes."""

    running: int = 0  # where layers run, while batches run
    finishing: int = 0  # there, after the last batch of a layer
    stores: tuple[int, ...] = ()  # the last dimension of every residual store that is there at the same time
    per_logit: int = 0  # where the head runs: 8 for losses, 12 for their gradient
    new_weights: int = 0  # what it rewrites of a layer, in numbers


class Pass(ABC):
    """``begin`` once; for every step ``start``, ``batch`` for every batch, ``finish``, ``advance``; at last ``end``."""

    name: str
    reads = True  # whether steps need the calibration batches at all
    changes = False  # whether steps change the weights of their layer
    keeps_stream = False  # ``boundaries`` outlive the pass; whoever takes them closes them
    num_samples: int | None = None  # only the first so many calibration samples are read; None: all
    boundaries: Sequence[ResidualStore] = ()  # the stream before every layer; one store where no layer keeps its own
    result_of: Callable[[str, int], LayerResult]  # of an earlier pass of the same loop, by its name and the layer
    setting: Setting
    stores: dict[str, ResidualStore]  # everything that later steps need beside results, between two steps
    hooks: Hooks

    def steps(self, layers: Sequence[LayerStructure]) -> list[Step]:
        """All steps, in order."""
        return [Step(view.index, "forward") for view in layers]

    def begin(self, setting: Setting) -> None:
        """Prepare the pass; called once before the first step."""
        self.setting, self.stores, self.hooks = setting, {}, Hooks()

    def store(self, name: str) -> ResidualStore:
        """One of ``stores``, made when it is first used."""
        rows = min(self.setting.rows, self.num_samples or self.setting.rows)
        return self.stores.setdefault(name, ResidualStore(rows, self.setting.scratch, self.model.device))

    def start(self, step: Step) -> None:  # noqa: B027 - some passes need nothing
        """Prepare a step; the weights of its layer are loaded."""

    def batch(self, step: Step, batch: Batch) -> None:
        """Run one batch of this step."""
        raise NotImplementedError(f"the pass {self.name} reads no batches")

    @abstractmethod
    def finish(self, step: Step) -> LayerResult:
        """Return the step's result after its last batch. Sums are reduced over processes here."""

    def skip(self, step: Step, batch: Batch) -> None:
        """Run a batch of a step whose result is known: compute only what later steps need."""
        self.batch(step, batch)

    def advance(self, step: Step) -> None:  # noqa: B027 - most passes need nothing
        """Called after the step's result is stored and its weights are updated."""

    def cost(self, view: LayerStructure, step: Step) -> float:
        """Work per token of this step, in plain evaluations of a layer; an estimate for the progress bar."""
        return 1.0

    def cost_to_finish(self, view: LayerStructure, step: Step) -> float:
        """Work of ``finish``, in tokens through the layer; an estimate for the progress bar."""
        return 0.0

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        """The memory that the pass takes; ``view`` is on the meta device."""
        return Holding()

    def end(self) -> None:
        """Free everything but what outlives the pass."""
        self.hooks.remove()
        for store in self.stores.values():
            if not (self.keeps_stream and store in self.boundaries):
                store.close()

    def replace_stream(self, stream: ResidualStore, change: Callable[[slice, Tensor], Tensor]) -> None:
        """Put ``change(rows, hidden)`` in the place of every batch of ``stream``, outside the training step."""
        with torch.no_grad(), self.setting.context():
            for rows in self.setting.batches():
                stream.put(rows, change(rows, stream.get(rows, self.model.device)))

    @property
    def model(self) -> LayeredModel:
        """The layered model that the pass runs over."""
        return self.setting.model

    def view(self, step: Step) -> LayerStructure:
        """The parts of the step's layer."""
        return self.model.views[step.layer]


class WeightsPass(Pass):
    """A pass that looks at the weights of every layer and reads no batch."""

    reads = False

    @abstractmethod
    def conclude(self, view: LayerStructure) -> LayerResult:
        """Return the result of a layer."""

    def finish(self, step: Step) -> LayerResult:
        return self.conclude(self.view(step))

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        """Two fp32 copies of a weight: its magnitudes, and a step on the way there."""
        return Holding(finishing=8 * load.largest_weight)


class ForwardPass(Pass):
    """A pass from the first layer to the last: one evaluation per layer, a second only where it ``rewrites`` layers."""

    rewrites = False  # whether the next layer sees the weights that ``conclude`` changed

    def begin(self, setting: Setting) -> None:
        super().begin(setting)
        layers = range(self.model.num_layers)
        self.boundaries = [self.store(f"boundary {layer}" if self.keeps_stream else "stream") for layer in layers]

    @abstractmethod
    def observe(self, view: LayerStructure, hooks: Hooks) -> None:
        """Register this layer's hooks."""

    @abstractmethod
    def conclude(self, view: LayerStructure) -> LayerResult:
        """Return the result of a layer, from the sums over all processes."""

    def start(self, step: Step) -> None:
        self.hooks, view = Hooks(), self.view(step)
        self.observe(view, self.hooks)
        if not self.hooks.tokens:  # those that pass are counted all the same
            self.hooks.on_input(f"layer {view.index}", view.layer, lambda x, weight: None)

    @torch.no_grad()
    def batch(self, step: Step, batch: Batch) -> None:
        self.hooks.set_weight(batch.weight)
        if step.layer == 0:
            self.boundaries[0].put(batch.rows, self.model.embed(batch.tokens))
        output = self.model.run(step.layer, self.boundaries[step.layer].get(batch.rows, self.model.device))
        if not self.rewrites and step.layer + 1 < self.model.num_layers:
            self.boundaries[step.layer + 1].put(batch.rows, output)

    @torch.no_grad()
    def skip(self, step: Step, batch: Batch) -> None:
        if not self.rewrites:
            self.batch(step, batch)
        elif step.layer == 0:
            self.boundaries[0].put(batch.rows, self.model.embed(batch.tokens))

    @torch.no_grad()
    def finish(self, step: Step) -> LayerResult:
        self.hooks.finish(self.setting.samples * self.setting.seq_len)
        return self.conclude(self.view(step))

    def advance(self, step: Step) -> None:
        """Compute the residual stream after this layer, whose changed weights are in place."""
        if self.rewrites and step.layer + 1 < self.model.num_layers:
            self.replace_stream(self.boundaries[step.layer], lambda _, hidden: self.model.run(step.layer, hidden))

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        """The residual stream; a projection's inputs in fp32, twice; at last a weight and its scores in fp32."""
        stores = (load.hidden_size,) * (load.num_layers if self.keeps_stream else 1)
        return Holding(8 * load.tokens * load.widest_input, 8 * load.largest_weight, stores)


class BlockPass(Pass):
    """A forward pass that rewrites each block but mixers from the outputs of the rewritten blocks before it.
    One beside the MLP is part of its step, because both read the same stream.

    The inputs of a block's output projection are kept while it is open: its second evaluation is that projection alone.
    """

    changes = True

    def steps(self, layers: Sequence[LayerStructure]) -> list[Step]:
        return [Step(layer, block) for layer, view in enumerate(layers) for block in view.stages]

    def begin(self, setting: Setting) -> None:
        super().begin(setting)
        self.stream, self.inner = self.store("stream"), self.store("inner")

    @abstractmethod
    def observe(self, view: LayerStructure, block: Block, hooks: Hooks) -> None:
        """Register the hooks of one block of the layer."""

    @abstractmethod
    def conclude(self, view: LayerStructure, block: Block) -> LayerResult:
        """Return the result of a block, with the new weight of its output projection."""

    def block(self, step: Step) -> Block:
        """The block of the layer that the current step rewrites."""
        return Block(step.phase)

    def projection(self, step: Step) -> Projection:
        """The projection that this step rewrites: the one that writes to the residual stream."""
        return self.view(step).projection(self.block(step))

    def is_first(self, step: Step) -> bool:
        """Whether this is the model's first block."""
        return step.layer == 0 and self.block(step) is self.view(step).stages[0]

    def start(self, step: Step) -> None:
        self.hooks = Hooks()
        if self.block(step) is not Block.MIXER:
            self.observe(self.view(step), self.block(step), self.hooks)

    def batch(self, step: Step, batch: Batch) -> None:
        self.hooks.set_weight(batch.weight)
        self.skip(step, batch)

    @torch.no_grad()
    def skip(self, step: Step, batch: Batch) -> None:
        if self.is_first(step):
            self.stream.put(batch.rows, self.model.embed(batch.tokens))
        self.catch(step, batch)

    def catch(self, step: Step, batch: Batch) -> None:
        """Store the inputs of the block's output projection, all columns; the stream after a mixer replaces the
        stream."""
        block, hidden = self.block(step), self.stream.get(batch.rows, self.model.device)
        if block is Block.MIXER:
            self.stream.put(batch.rows, self.model.run_block(step.layer, block, hidden))
            return
        if self.projection(step).in_features:  # else nothing of the block is there to be kept
            self.inner.put(batch.rows, self.model.inner(step.layer, block, hidden))

    @torch.no_grad()
    def finish(self, step: Step) -> LayerResult:
        view, block = self.view(step), self.block(step)
        if block is Block.MIXER:
            return LayerResult()
        if view.units(block):
            self.hooks.finish(self.setting.samples * self.setting.seq_len)
        return self.conclude(view, block)

    def advance(self, step: Step) -> None:
        """Add the outputs of the rewritten projection, which is in place, to the residual stream."""
        view, block = self.view(step), self.block(step)
        last = step.layer + 1 == self.model.num_layers and block is view.blocks[-1]
        if block is Block.MIXER or last:
            return
        if not view.units(block):
            self.pass_by(step)
            return
        projection = self.projection(step).module

        def add(rows: slice, hidden: Tensor) -> Tensor:
            output = projection(self.inner.get(rows, self.model.device))
            added = self.model.add(step.layer, hidden, block, output)
            self.model.overflow.watch(f"layer {step.layer}, output", added)
            return added

        self.replace_stream(self.stream, add)
        self.inner.close()

    def pass_by(self, step: Step) -> None:
        """Advance the stream past a skipped block: one beside it still adds to it, and the layer may scale it."""
        view = self.view(step)
        if view.side_by_side or (view.scale and self.block(step) is view.blocks[-1]):
            layer, model = step.layer, self.model
            self.replace_stream(self.stream, lambda _, hidden: model.scaled(layer, model.beside(layer, hidden)))

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        """The residual stream, and the inputs of one projection; those of a batch in fp32."""
        new = sum(view.projection(block).weight.numel() for block in view.prunable)
        stores = (load.hidden_size, load.widest_input)
        return Holding(4 * load.tokens * load.widest_input, stores=stores, new_weights=new)
