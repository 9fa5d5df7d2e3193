"""The life of every pruning method: check, walk the decoder, decide, cut, save."""

import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_prune.calibration.loop import Walk
from lightning_prune.calibration.module import LayeredModule
from lightning_prune.calibration.passes import Batch, Finding, Pass, Setting
from lightning_prune.calibration.results import Findings
from lightning_prune.calibration.stream_checkpoints import Waypoints
from lightning_prune.checkpoint.cut import layout_of
from lightning_prune.checkpoint.family_check import prove
from lightning_prune.checkpoint.in_memory_plan import Overlay
from lightning_prune.checkpoint.model_card import model_card
from lightning_prune.checkpoint.plan import LayerPlan, PruningPlan
from lightning_prune.checkpoint.pruned import open_pruned
from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.data.sampling import held_out_samples
from lightning_prune.methods.scores import Scores
from lightning_prune.models.checkpoint import skeleton
from lightning_prune.models.families import LayerAnatomy, anatomy, count_parameters
from lightning_prune.support.errors import UserError

FINDINGS = "findings"
CALIBRATING, REFITTING, WRITING = "calibrating", "refitting", "writing the pruned model"
PHASE_SECONDS = {CALIBRATING: "calibrate", REFITTING: "refit"}  # as they stand in metrics.json
LAYER_TO_WRITE = 1000.0  # about what cutting and writing a layer costs, in tokens through it
FEW_PASSES = 3  # forwards that calibrating may cost, as long as the passes are not known
SAVE_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SavedMeasurement:
    """What an earlier run measured, so that another decision needs no calibration.

    ``details`` is its ``method.json``, ``calibration`` its ``calibration.json`` (None for methods without data),
    ``run`` its folder, which the new record names, ``seconds`` what measuring cost by phase.
    """

    scores: Scores
    details: dict[str, Any]
    calibration: dict[str, Any] | None
    run: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class DecisionFolder(Protocol):
    """Where a run's results go."""

    path: Path

    @property
    def pruned(self) -> Path:
        """The checkpoint's folder, which does not exist yet."""

    def write_decision(self, scores: Scores, plan: PruningPlan, details: dict[str, Any]) -> None:
        """Keep what was measured and decided, each file whole or not at all."""

    def write_step(self, plan: PruningPlan, write: Callable[[Path], None]) -> None:
        """Keep a decision that is not the last one: its plan, and the checkpoint that ``write`` makes of a folder."""


class PruningMethod(LayeredModule):
    """Walks the decoder on the shared set, one layer per epoch, decides behind the last, prunes in ``on_fit_end``.

    A method says which passes it makes (``passes``: what is observed in a layer, and what is left of it) and what
    follows from what they found (``decide``).

    Args:
        pretrained: Model folder or hub id to prune. ``demo`` is the small model inside the package.
        pruning_ratio: Share of all parameters (embeddings and head included) to remove, between 0 and 1.
        label: Name of this system in run folders, TensorBoard and tables. Default: the method's own name.
        onload: ``model`` keeps all weights on the device, ``layer`` brings in one decoder layer at a time and needs
            memory for two of them, ``auto`` takes what fits. The result is the same.
        save_dtype: Of the pruned checkpoint's weights: float32, bfloat16, float16, or auto, which keeps the dense
            checkpoint's own.
    """

    needs_calibration = True
    steps = 1  # how often it measures and decides
    reusable = True  # whether a saved score table is enough to decide again
    decision_options: tuple[str, ...] = ("pruning_ratio", "label", "onload", "save_dtype")  # change no measurement
    plan: PruningPlan
    scores: Scores

    def __init__(
        self,
        pretrained: str = "demo",
        pruning_ratio: float = 0.2,
        label: str | None = None,
        onload: str = "auto",
        save_dtype: str = "auto",
    ) -> None:
        super().__init__(pretrained, onload)
        if not 0 < pruning_ratio < 1:
            raise UserError(
                f"--model.pruning_ratio: found {pruning_ratio:g}; it is a share of all parameters and must lie "
                "between 0 and 1, both excluded (0.2 removes a fifth)."
            )
        if save_dtype not in SAVE_DTYPES:
            raise UserError(f"--model.save_dtype: found '{save_dtype}'; allowed: {', '.join(SAVE_DTYPES)}.")
        self.automatic_optimization = False
        self.pruning_ratio = pruning_ratio
        self.save_dtype = save_dtype
        self._label = label
        self.run_folder: DecisionFolder | None = None
        self.pruned_folder: Path | None = None
        self.writes = True  # a checkpoint; else what is decided is only laid over the dense model, and can be measured
        self._folder: Path | None = None
        self._finish_work = 0.0
        self._at = ""  # pass and layer of the step that is under way
        self.self_check: dict[str, Any] | None = None  # what was compared once the checkpoint was written
        self.dense_parameters = 0
        self.saved: SavedMeasurement | None = None

    def reuse(self, saved: SavedMeasurement) -> None:
        """Decide from an earlier run's scores; no calibration data is opened."""
        self.saved = saved
        self.needs_calibration = False

    @property
    def method(self) -> str:
        """The method's own name, as it stands in ``plan.json``."""
        return type(self).__name__.lower()

    @property
    def label(self) -> str:
        """The name of this system in run folders and tables."""
        return self._label or self.method

    @property
    def layers(self) -> list[LayerAnatomy]:
        """The dense model's layers: shapes always, weights only where the walk is."""
        return self._views

    @property
    def uneven(self) -> bool:
        """Whether layers end up with widths of their own."""
        return True

    @property
    def requested_ratio(self) -> float | None:
        """The pruning ratio that was asked for; None where something else was."""
        return self.pruning_ratio

    # What a method says about itself

    @abstractmethod
    def passes(self) -> list[Pass]:
        """The passes it makes over the decoder, fresh ones; none where scores are reused."""

    @abstractmethod
    def decide(self) -> None:
        """Set ``self.scores`` and ``self.plan`` from what the passes found."""

    def passes_behind(self, kept: list[LayerPlan], held_out: Callable[[], Tensor]) -> list[Pass]:
        """The passes it makes once it is decided what is ``kept``; new weights they leave are the pruned model's.

        Args:
            kept: of every layer.
            held_out: gives bool ``[N]``, calibration samples to check on; asked by those who check.
        """
        return []

    def stages(self) -> Iterator[tuple[str, list[Pass]]]:
        """Walk after walk, the passes of each and what it is called; the decision falls between two of them."""
        if self.saved is None:
            yield CALIBRATING, self._passes
        yield from self.decide_and_refit()

    def decide_and_refit(self) -> Iterator[tuple[str, list[Pass]]]:
        """The decision, and what follows it."""
        with self.timed("decide"), torch.no_grad():
            self.decide()
        behind = self.passes_behind(self.plan.layers, lambda: held_out_samples(self.datamodule.calibration.tokens))
        if behind:
            self.model.change_layers(None)
            yield REFITTING, behind
            self.plan = replace(self.plan, weights_updated=True)

    def overlay(self) -> Overlay:
        """What is decided so far, to be laid over the dense model."""
        return Overlay(self.plan.layers, self.walk.weights_of)

    def check_ratio(self, layers: list[LayerAnatomy], total_parameters: int) -> None:
        """Raise UserError when the ratio cannot be reached; ``layers`` are on the meta device."""

    @property
    def note(self) -> str:
        """A sentence that table and model card must carry, if any."""
        return ""

    def details(self) -> dict[str, Any]:
        """What the method measured and chose beside its scores, for ``method.json``: thresholds, damping, ratios."""
        prunable = sum(view.attention_unit_cost * view.num_kv_heads for view in self.layers if not view.whole_attention)
        prunable += sum(view.mlp_unit_cost * view.num_channels for view in self.layers)
        return {"prunable_fraction": prunable / self.dense_parameters, "onload": self.placement}

    def found(self, name: str) -> list[Finding]:
        """What the steps of the pass ``name`` left, in the order of the layers."""
        found = sorted(self.walk.findings_of(name), key=lambda pair: pair[0].layer)
        return [finding for _, finding in found if finding]

    # The life cycle, in the order Lightning calls it

    def check_model(self) -> None:
        """As in the base class; and the ratio can be reached, and the family does what its record says."""
        super().check_model()
        net = self.checkpoint.meta
        self.check_ratio(anatomy(net), count_parameters(net))
        prove(net.config)

    def setup(self, stage: str) -> None:
        """As in the base class; while the dense model is evaluated, what follows is expected roughly."""
        self.known_as = "dense" if self.evaluated == self.pretrained else "pruned"
        super().setup(stage)
        if stage == "test" and self.progress.shown and self.evaluated == self.pretrained:
            layers = self.checkpoint.config.num_hidden_layers
            if self.needs_calibration:
                tokens = self.datamodule.num_samples * self.datamodule.seq_len
                self.progress.expect(CALIBRATING, float(FEW_PASSES * layers * tokens))
            self._expect_end(layers)

    def check_before_loading(self, config: Any) -> None:
        """Refuse what the shapes alone can tell; then tell the trainer how many epochs there will be."""
        net = skeleton(config)
        self._views = anatomy(net)
        self.dense_parameters = count_parameters(net)
        self.check_ratio(self._views, self.dense_parameters)
        prove(config)
        self._passes = [] if self.saved is not None else self.passes()
        steps = [step for one in self._passes if one.reads for step in one.steps(len(self._views))]
        self.trainer.fit_loop.max_epochs = len(steps)

    def on_fit_start(self) -> None:
        """Open the model; work that needs no batch is done before the first one."""
        here = "" if self.run_folder is None else str(self.run_folder.path)
        shared = self.trainer.strategy.broadcast(here)
        self._folder = Path(shared) if shared else None
        model = self.open_model(self.pretrained)
        self._views = model.views
        tokens = self.datamodule.calibration.tokens if self.needs_calibration else torch.empty(0, 1)
        world, rank = self.trainer.world_size, self.trainer.global_rank
        batch_size = self.datamodule.batch_size
        per_step = world * batch_size
        padded = len(tokens) if world == 1 else -(-len(tokens) // per_step) * per_step
        self._setting = Setting(
            model=model,
            rows=padded // world,
            samples=len(range(rank, len(tokens), world)),
            batch_size=batch_size,
            seq_len=tokens.shape[1],
            scratch=self._folder or Path(tempfile.gettempdir()),
            context=self._precision_context,
            finished=self._advance_finish,
        )
        self.trainer.fit_loop.max_epochs = 0
        self._expect_work(tokens.numel() // world)
        self.walk = Walk([], self._setting, Findings())
        self._stages = enumerate(self.stages())
        self._next_stage()

    def _next_stage(self) -> None:
        """Walk on with the next stage's passes; behind the last one everything is known."""
        following = next(self._stages, None)
        if following is None:
            with torch.no_grad():
                self._details = self.details()
            return
        number, (self._phase, passes) = following
        self._stage_started, self._finish_before = time.perf_counter(), self.seconds.get("finish layers", 0.0)
        folder = self._findings_folder
        self._walk_on(passes, folder / f"stage_{number}" if folder is not None and number else folder)
        self._take_steps_without_batches()

    def _walk_on(self, passes: list[Pass], folder: Path | None) -> None:
        """Make ready to take ``passes``; what is known of them is in ``folder``."""
        findings = Findings(folder, self.trainer.is_global_zero)
        # Several processes would have to stand at the same waypoint: they walk a pass from its beginning.
        waypoints = Waypoints(folder if self.trainer.world_size == 1 else None)
        self.walk = Walk(passes, self._setting, findings, waypoints)
        self.trainer.strategy.barrier()  # all have read what is known before one writes more
        self._open_steps = self.walk.open_steps()
        epochs = sum(self.walk.steps[step][0].reads for step in self._open_steps)
        self.trainer.fit_loop.max_epochs += epochs  # type: ignore[operator]

    def _end_stage(self) -> None:
        self.walk.close()
        self.progress.finish(self._phase)
        finishing = self.seconds.get("finish layers", 0.0) - self._finish_before
        spent = time.perf_counter() - self._stage_started - finishing
        if any(one.reads for one in self.walk.passes):
            name = PHASE_SECONDS[self._phase]
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
        self._next_stage()

    @property
    def _findings_folder(self) -> Path | None:
        """Where finished layers leave what was found; nowhere in a run without a folder."""
        return self._folder / FINDINGS if self._folder is not None else None

    def on_train_epoch_start(self) -> None:
        """An epoch is a step: this one's layer comes in, hooks live while its batches run."""
        self._start_step()

    def _start_step(self) -> None:
        one, step = self.walk.steps[self._open_steps[0]]
        self._at = f"{one.name}, layer {step.layer + 1} of {len(self.layers)}"
        self.walk.start(self._open_steps[0])

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """The calibration step of one layer: tokens ``[B, L]``, sample weights ``[B]`` and indices ``[B]``."""
        tokens, weight, index = batch
        start = batch_idx * self.datamodule.batch_size
        self._work, self._finish_work = self.walk.cost(self._open_steps[0], tokens.numel())
        self.walk.batch(self._open_steps[0], Batch(tokens, weight, index, slice(start, start + len(tokens))))
        self.progress.advance(self._phase, self._work, self._at)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Behind the last batch the strategy is still up, so sums are reduced over processes: finish the layer."""
        if not self.trainer.is_last_batch:
            return
        with self.timed("finish layers"):
            self.walk.finish(self._open_steps.pop(0))
        self._take_steps_without_batches()

    def _expect_work(self, tokens: int) -> None:
        """All that is to do, as far as the shapes tell; ``tokens`` of this process."""
        everything = [LayerPlan(v.index, list(range(v.num_kv_heads)), list(range(v.num_channels))) for v in self.layers]
        behind = self.passes_behind(everything, lambda: torch.zeros(0))
        for phase, passes in ((CALIBRATING, self._passes), (REFITTING, behind)):
            if passes:
                walk = Walk(passes, self._setting, Findings())
                work = sum(sum(walk.cost(number, tokens)) for number in range(len(walk)))
                self.progress.expect(phase, self.steps * work)
        self._expect_end(len(self.layers))

    def _expect_end(self, layers: int) -> None:
        if not self.writes:
            return
        self.progress.expect(WRITING, LAYER_TO_WRITE * layers)
        self.progress.expect("perplexity of the pruned model", self.evaluation_work(layers) * (1 - self.pruning_ratio))

    def _advance_finish(self, share: float) -> None:
        self.progress.advance(self._phase, share * self._finish_work, self._at)

    def _take_steps_without_batches(self) -> None:
        while self._open_steps and not self.walk.steps[self._open_steps[0]][0].reads:
            with self.timed("finish layers"):
                self._start_step()
                self.walk.finish(self._open_steps.pop(0))
        if not self._open_steps:
            self._end_stage()

    def on_fit_end(self) -> None:
        """Prune: the strategy is torn down. Rank 0 cuts layer by layer, and writes."""
        if not self.writes:
            self.model.change_layers(self.overlay())
            return
        self.close_model()
        if self.run_folder is not None:  # on the rank that writes
            with self.timed("save"):
                facts = {"method": self.method, "label": self.label, **self._details}
                if self.saved is not None and self.saved.run is not None:
                    facts["measured_by"] = self.saved.run
                self.run_folder.write_decision(self.scores, self.plan, facts)
            with self.timed("prune"), torch.no_grad():
                self._write_pruned(self.run_folder.pruned)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the others evaluate what this one writes
        if self._folder is not None:
            self.pruned_folder = self._folder / "pruned"
            self.evaluated = str(self.pruned_folder)

    def write_step(self) -> None:
        """Leave the plan and the checkpoint of a step that is not the last one in the run folder."""
        if self.run_folder is not None:
            with self.timed("save"), torch.no_grad():
                self.run_folder.write_step(self.plan, self._write_pruned)
        self.trainer.strategy.barrier()

    def _write_pruned(self, folder: Path) -> None:
        pruned = open_pruned(self.checkpoint, self.plan, self.walk.weights_of)
        card = model_card(self.plan, layout_of(pruned.config), self.calibration_facts(), self.checkpoint)
        card += f"\n{self.note}\n" if self.note else ""
        self.self_check = write_checkpoint(
            pruned,
            folder,
            beside=self.checkpoint,
            card=card,
            progress=lambda layer: self.progress.advance(
                WRITING, LAYER_TO_WRITE, f"layer {layer + 1} of {len(self.layers)}"
            ),
        )
        self.progress.finish(WRITING)
        pruned.close()

    def _precision_context(self) -> AbstractContextManager[object]:
        context: Callable[[], AbstractContextManager[object]] = self.trainer.precision_plugin.forward_context
        return context()

    def calibration_facts(self) -> dict[str, Any] | None:
        """The manifest of the calibration set, None for methods without data."""
        if self.saved is not None and not self.needs_calibration:
            return self.saved.calibration
        return self.datamodule.calibration.manifest.to_json() if self.needs_calibration else None

    def make_plan(self, kept: list[LayerPlan], pruned_parameters: int, weights_updated: bool = False) -> PruningPlan:
        """A plan with this run's facts filled in; ``pruned_parameters`` counts what is left."""
        dtype = self.checkpoint.stored_dtype if self.save_dtype == "auto" else getattr(torch, self.save_dtype)
        return PruningPlan(
            method=self.method,
            pruning_ratio=self.requested_ratio,
            achieved_ratio=1 - pruned_parameters / self.dense_parameters,
            parameters={"dense": self.dense_parameters, "pruned": pruned_parameters},
            calibration_fingerprint=(self.calibration_facts() or {}).get("fingerprint"),
            base_model=self.pretrained,
            layers=kept,
            dtype=str(dtype).removeprefix("torch."),
            weights_updated=weights_updated,
        )
