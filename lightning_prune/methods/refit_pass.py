"""The refit after a decision: o and down of every layer are refitted on the columns that are kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_prune.calibration.hooks import Hooks
from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import Batch, BlockPass, Holding, Load, Pass, Setting, Step
from lightning_prune.calibration.statistics.token_statistic import full_precision
from lightning_prune.checkpoint.in_memory_plan import mask_experts
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.methods.columns import columns_of, in_columns, named
from lightning_prune.methods.refit_experts import ExpertRefit
from lightning_prune.methods.refit_math import DAMPINGS, NormalEquations, equation_bytes, fit
from lightning_prune.models.families import LayerStructure
from lightning_prune.models.vocabulary import EXPERTS, OUTPUT_ROLE, Block
from lightning_prune.support.devices import widest
from lightning_prune.support.errors import UserError

Target = Literal["residual", "output"]
AHEAD = "dense stream"  # the phase of steps that run the dense model before anything is fitted


@dataclass(frozen=True)
class Refit:
    """The options of a refit; ``damping``: λ, None chooses it as ``RefitPass`` says."""

    target: Target
    damping: float | None

    @classmethod
    def of(cls, target: Target | Literal["none"], damping: float | Literal["auto"]) -> "Refit | None":
        """Make a ``Refit`` from the options ``refit`` and ``refit_damping``; None without a refit."""
        if damping != "auto" and not 0 < damping <= 100:
            raise UserError(f"--model.refit_damping: found {damping}; it must lie in (0, 100], or be auto.")
        if target == "none":
            return None
        return cls(target, None if damping == "auto" else damping)

    def facts(self, results: Sequence[tuple[Step, LayerResult]]) -> dict[str, Any]:
        """Facts of the refit for ``method.json``: target, damping, and the change of the error on held-out samples."""
        fits = [
            {
                "layer": step.layer,
                "projection": OUTPUT_ROLE.get(Block(step.phase), "down of every expert"),
                "target": result.facts["target"],
                "damping": result.facts["damping"] or None,  # None: left as it was
                "held_out_error": {"before": result.facts["before"], "after": result.facts["after"]},
                **{name: result.facts[name] for name in ("experts",) if name in result.facts},
            }
            for step, result in results
            if result.facts
        ]
        dampings = [one for fit in fits if "experts" in fit for one in fit["experts"]["damping"]]
        if few := dampings.count(None):
            rank_zero_warn(
                f"{few} of {len(dampings)} experts saw fewer tokens than they keep channels and were not refitted; a "
                "larger --data.num_samples reaches more of them."
            )
        return {"target": self.target, "damping": "auto" if self.damping is None else self.damping, "fits": fits}


class RefitPass(BlockPass):
    """Refits what a plan keeps, on the dense model's weights.

    The dense and the pruned residual stream cross the decoder together. With h and h' these streams before a block and
    f(h) what the dense block adds to h:

    residual: Y = h + f(h) − h': the stream after the block meets the dense one (before removed layers the one after
    these), which repairs earlier losses. Not where a norm follows the block, so that what it adds is not linear in W.
    output: Y = W₀·x', the whole projection's output on the pruned stream's own inputs (SlimGPT's target).

    λ of every projection, where it is None, and whether to refit it at all are chosen by the error on ``held_out``
    (bool ``[N]``), samples that the first solve does not see. The dense stream after a layer is what ``earlier`` kept,
    else the dense MLP is run. Where a removed layer follows a kept one (``ahead``), the dense model runs first.
    """

    name = "refit"

    def __init__(self, kept: Sequence[LayerPlan], refit: Refit, held_out: Tensor, earlier: Pass | None) -> None:
        self.kept, self.held_out, self.earlier = kept, held_out, earlier
        self.target, self.damping = refit.target, refit.damping
        removed = [layer.removed for layer in kept]
        self.ahead = self.target == "residual" and any(gone and not before for before, gone in pairwise(removed))

    def steps(self, layers: Sequence[LayerStructure]) -> list[Step]:
        """The steps of the refit; with ``ahead``, the dense model runs through every layer first."""
        ahead = [Step(layer, AHEAD) for layer in range(len(layers))] if self.ahead else []
        return ahead + super().steps(layers)

    def begin(self, setting: Setting) -> None:
        super().begin(setting)
        self.dense = self.store("dense")
        self.boundaries = [] if self.earlier is None else self.earlier.boundaries
        if self.ahead:
            self._close_boundaries()
            self.boundaries = [self.store(f"boundary {layer}") for layer in range(self.model.num_layers + 1)]

    def observe(self, view: LayerStructure, block: Block, hooks: Hooks) -> None:
        """Register no hook: targets need both streams, so ``batch`` makes the sums."""

    def start(self, step: Step) -> None:
        self.tokens = 0
        if step.phase == AHEAD:
            return
        super().start(step)
        self.columns, self.routed = self._columns(step), None
        if self.block(step) is Block.MIXER:
            return
        residual = self.target == "residual" or self.block(step) in EXPERTS
        self.scale = self._scale(step) if residual else None
        if (experts := self.view(step).parts[self.block(step)].experts) is not None:
            if self._crosses(step):
                n, d = experts.width, experts.hidden
                dtype = self._dtype(experts.total * 8 * (n * n + d * n) + equation_bytes(n, d, torch.float64))
                self.routed = ExpertRefit(experts, self.kept[step.layer], self.damping, dtype)
            return
        self.held: list[tuple[Tensor, Tensor]] = []  # inputs and targets of held-out samples, on the host
        n, d = len(self.columns), self.projection(step).weight.shape[0]
        dtype = self._dtype(equation_bytes(n, d, torch.float64))
        self.equations = NormalEquations.zeros(n, d, dtype, self.model.device, self.damping)

    @torch.no_grad()
    def batch(self, step: Step, batch: Batch) -> None:
        """Both streams cross the block; the kept inputs of the projection, and the target, are summed."""
        self.tokens += int((batch.weight > 0).sum()) * batch.tokens.shape[1]
        if step.phase == AHEAD:
            self._run_ahead(step, batch)
            return
        before = self._entering(step, batch)
        dense = self._dense(step, batch) if self._follows_dense(step) else None
        if not self._crosses(step):
            return
        if self.routed is not None:
            self._sum_routed(self.routed, step, batch, before, dense)
            return
        self.catch(step, batch)
        if not len(self.columns):
            return
        projection = self.projection(step)
        inputs = self.inner.get(batch.rows, self.model.device)
        if self.scale is not None and dense is not None:
            wanted = (dense.float() - self.model.beside(step.layer, before).float()) / self.scale
        else:
            wanted = projection.module(inputs).float()
        if (bias := getattr(projection.module, "bias", None)) is not None:
            wanted = wanted - bias.float()
        self._sum(batch, inputs[..., self.columns], wanted)

    @torch.no_grad()
    def skip(self, step: Step, batch: Batch) -> None:
        if step.phase == AHEAD:
            self._run_ahead(step, batch)
            return
        self.columns = self._columns(step)
        self._entering(step, batch)
        if self._follows_dense(step):
            self._dense(step, batch)
        if self._crosses(step) and self.block(step) not in EXPERTS:
            self.catch(step, batch)

    def _follows_dense(self, step: Step) -> bool:
        """Whether the dense stream is needed after the block: not in a removed layer where it is known beyond it."""
        return self.target == "residual" and not (self.ahead and self.kept[step.layer].removed)

    def _crosses(self, step: Step) -> bool:
        """Whether the pruned stream passes the block: something of it is kept."""
        kept, block = self.kept[step.layer], self.block(step)
        return not kept.removed if block in EXPERTS else bool(kept.kept[block])

    def finish(self, step: Step) -> LayerResult:
        expected = self.setting.samples * self.setting.seq_len
        if self.tokens != expected:
            raise RuntimeError(f"the refit saw {self.tokens:,} tokens of {expected:,}.")
        if step.phase == AHEAD:
            return LayerResult()
        with torch.no_grad():
            return self.conclude(self.view(step), self.block(step))

    def conclude(self, view: LayerStructure, block: Block) -> LayerResult:
        """The refitted weight, zero in the removed columns. Facts: ``target``; ``damping``, 0 where the projection is
        left as it is; ``before`` and ``after``, the squared error on held-out samples with the old weight and with the
        one chosen there. Empty for a block that is removed."""
        if self.routed is not None:
            return self._conclude_routed(self.routed, view)
        if not len(self.columns):
            return LayerResult()
        role, linear, equations, held = OUTPUT_ROLE[block], view.projection(block), self.equations, self.held
        del self.equations, self.held
        with named(f"layer {view.index}, {role} projection"):
            fitted = fit(equations, linear.weight[:, self.columns].to(equations.gram.dtype), held, self.damping)
            refitted = in_columns(self.columns, fitted.weight, linear.weight)
        self.setting.finished(1.0)
        target = "residual" if self.scale is not None else "output"
        facts = {"target": target, "damping": fitted.damping, "before": fitted.before, "after": fitted.after}
        return LayerResult(weights={role: refitted}, facts=facts)

    def advance(self, step: Step) -> None:
        """The pruned stream after the block; a removed block adds nothing."""
        if step.phase == AHEAD:
            return
        if len(self.columns):
            super().advance(step)
        elif self.block(step) in EXPERTS and self._crosses(step):
            experts = self.view(step).experts
            assert experts is not None
            mask_experts(experts, self.kept[step.layer])
            with torch.no_grad(), self.setting.context():
                for rows in self.setting.batches():
                    hidden = self.stream.get(rows, self.model.device)
                    self.stream.put(rows, self.model.run_block(step.layer, self.block(step), hidden))
            experts.route_to(None)
        elif not self.kept[step.layer].removed:
            self.pass_by(step)

    def end(self) -> None:
        super().end()
        self._close_boundaries()

    def _close_boundaries(self) -> None:
        for store in self.boundaries:
            store.close()

    def _run_ahead(self, step: Step, batch: Batch) -> None:
        if step.layer == 0:
            self.boundaries[0].put(batch.rows, self.model.embed(batch.tokens))
        before = self.boundaries[step.layer].get(batch.rows, self.model.device)
        self.boundaries[step.layer + 1].put(batch.rows, self.model.run(step.layer, before))

    def holds(self, view: LayerStructure, load: Load) -> Holding:
        """Memory of a block pass, and of the dense stream (after this layer or after all), the normal equations (with
        experts those of each), and an eighth of the tokens, held out."""
        base, d, n = super().holds(view, load), load.hidden_size, load.widest_input
        dtype = torch.float64 if equation_bytes(n, d, torch.float64) <= load.free else torch.float32
        held = load.rows * load.seq_len // 8 * (n * load.dtype.itemsize + 4 * d)
        batch = load.tokens * (n + d) * (dtype.itemsize + 4)
        sums, solving, new = dtype.itemsize * (n * n + d * n), equation_bytes(n, d, dtype), base.new_weights
        if (experts := view.experts) is not None:
            count, n = experts.count, experts.width
            one = equation_bytes(n, d, torch.float64)
            size = 8 if count * 8 * (n * n + d * n) + one <= load.free else 4
            held = max(held, load.rows * load.seq_len // 8 * experts.top_k * 4 * (n + d))
            sums, new = max(sums, count * size * (n * n + d * n)), new + count * d * n
            solving = max(solving, count * size * (n * n + d * n) + one * size // 8)
        return replace(
            base,
            new_weights=new,
            running=sums + batch + (0 if load.accelerated else held),
            finishing=solving + 2 * held,
            stores=(*base.stores, d) + (d,) * (load.num_layers if self.ahead or self.earlier is not None else 0),
        )

    def cost(self, view: LayerStructure, step: Step) -> float:
        if step.phase == AHEAD:
            return 1.0
        block = self.block(step)
        known = self.ahead or self.earlier is not None
        own_pass = self.target == "residual" and not (known and block is view.blocks[-1])
        streams = 2 if own_pass else 1
        if block not in view.prunable:
            return (streams + 2 * (block in EXPERTS)) * view.block_cost(block) / view.num_weights
        projection = view.projection(block)
        inner, outer = projection.in_features, projection.weight.shape[0]
        weights = sum(linear.weight.numel() for linear in view.parts[block].linears.values())
        return (streams * weights + inner * inner / 2 + inner * outer) / view.num_weights

    def cost_to_finish(self, view: LayerStructure, step: Step) -> float:
        """A factorisation and two triangular solves per damping, beside two operations per weight and token."""
        if step.phase == AHEAD or (block := self.block(step)) is Block.MIXER:
            return 0.0
        solves = 1 + len(DAMPINGS) if self.damping is None else 2
        if (experts := view.parts[block].experts) is not None:
            one = experts.width**3 / 3 + 2 * experts.width**2 * experts.hidden
            return experts.total * solves * one / (2 * view.num_weights)
        linear = view.projection(self.block(step))
        inner, outer = linear.in_features, linear.weight.shape[0]
        one = inner**3 / 3 + 2 * inner * inner * outer
        return solves * one / (2 * view.num_weights)

    def _columns(self, step: Step) -> Tensor:
        """Inputs of the projection that are kept, int64."""
        block = self.block(step)
        if block not in self.view(step).prunable:
            return torch.empty(0, dtype=torch.int64)
        units = self.kept[step.layer].kept[block]
        width = self.projection(step).in_features // max(1, self.view(step).units(block))
        return columns_of(torch.tensor(units, dtype=torch.int64, device=self.model.device), width)

    def _entering(self, step: Step, batch: Batch) -> Tensor:
        """The pruned stream before the block; both begin with the embeddings."""
        if self.is_first(step):
            hidden = self.model.embed(batch.tokens)
            self.stream.put(batch.rows, hidden)
            if self.target == "residual":
                self.dense.put(batch.rows, hidden)
        return self.stream.get(batch.rows, self.model.device)

    def _dense(self, step: Step, batch: Batch) -> Tensor:
        """The dense stream after the block, and after removed layers that follow it, kept for the next one."""
        block, following = self.block(step), step.layer + 1
        while self.ahead and following < len(self.kept) and self.kept[following].removed:
            following += 1
        if block is self.view(step).blocks[-1] and following < len(self.boundaries):
            after = self.boundaries[following].get(batch.rows, self.model.device)
        else:
            own = self.ahead and block is self.view(step).stages[0]
            after = (self.boundaries[step.layer] if own else self.dense).get(batch.rows, self.model.device)
            one = len(self.view(step).stages) == 1
            after = self.model.run(step.layer, after) if one else self.model.run_block(step.layer, block, after)
        self.dense.put(batch.rows, after)
        return after

    def _split(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Samples of a batch that are held out, and those to fit on, bool ``[B]`` each, on the host."""
        counted = batch.weight.cpu() > 0
        # A sample that only fills up a batch has no index of its own.
        index = batch.index.cpu().clamp(max=len(self.held_out) - 1)
        return self.held_out[index] & counted, ~self.held_out[index] & counted

    def _sum(self, batch: Batch, inputs: Tensor, wanted: Tensor) -> None:
        chosen, fitted = self._split(batch)
        if bool(chosen.any()):
            rows = chosen.to(inputs.device)
            self.held.append((inputs[rows].flatten(0, 1).cpu(), wanted[rows].flatten(0, 1).cpu()))
        rows = fitted.to(inputs.device)
        with full_precision(inputs.device):
            self.equations.add(inputs[rows].flatten(0, 1), wanted[rows].flatten(0, 1))

    def _sum_routed(self, routed: ExpertRefit, step: Step, batch: Batch, before: Tensor, dense: Tensor | None) -> None:
        """Add a batch to the sums of the experts, which share what the pruned block lacks."""
        if self.scale is None:
            return  # what the block adds is not linear in its experts' outputs: they stay as they are
        block = self.block(step)
        wanted = self.model.run_block(step.layer, block, before) if dense is None else dense
        with routed.pruned() as seen:
            after = self.model.run_block(step.layer, block, before)
        missing = (wanted.float() - after.float()).flatten(0, 1) / self.scale
        chosen, fitted = (rows.to(missing.device).repeat_interleave(before.shape[1]) for rows in self._split(batch))
        routed.add(seen[0], missing, fitted, chosen)

    def _conclude_routed(self, routed: ExpertRefit, view: LayerStructure) -> LayerResult:
        self.routed = None
        result = routed.conclude(f"layer {view.index}, experts")
        self.setting.finished(1.0)
        return replace(result, facts={"target": self.target, "damping": 0.0, **result.facts})

    def _dtype(self, needed: int) -> torch.dtype:
        """The dtype of normal equations that take ``needed`` bytes in float64."""
        enough = needed <= self.setting.free_bytes(self.model.device)
        return widest(self.model.device) if enough else torch.float32

    def _scale(self, step: Step) -> float | None:
        """m, where the block adds m times what its projection outputs; None where that is not linear, or where experts
        write to a latent space."""
        size = self.model.config.hidden_size
        if (experts := self.view(step).parts[self.block(step)].experts) is not None and experts.hidden != size:
            return None
        weight = self.projection(step).weight if experts is None else experts.module.down_proj
        ones = torch.ones(1, 1, size, device=self.model.device).to(weight.dtype)
        once, twice = (
            self.model.add(step.layer, torch.zeros_like(ones), self.block(step), factor * ones, alone=True)
            for factor in (1, 2)
        )
        linear = bool((twice == 2 * once).all() and (once == once[..., :1]).all())  # exact in binary floating point
        return float(once[0, 0, 0]) if linear else None
