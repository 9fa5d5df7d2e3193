"""The life of every pruning method: check, calibrate, decide, refit, cut, save."""

import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning as L
import torch
from torch import Tensor

from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.loop import CalibrationLoop
from lightning_prune.calibration.passes import Batch, Pass, Setting
from lightning_prune.calibration.results import Results
from lightning_prune.calibration.stream_checkpoints import StreamCheckpoints
from lightning_prune.checkpoint.family_check import prove
from lightning_prune.checkpoint.in_memory_plan import Overlay
from lightning_prune.checkpoint.plan import LayerPlan, PruningPlan
from lightning_prune.checkpoint.pruned import stored_dtype
from lightning_prune.checkpoint.write import write_pruned
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.data.sampling import held_out_samples
from lightning_prune.methods.refit import Refit
from lightning_prune.methods.scores import Scores
from lightning_prune.models.families import LayerAnatomy, anatomy, count_parameters
from lightning_prune.models.layered import LayeredModel
from lightning_prune.models.loading import check_model
from lightning_prune.models.model_slot import ModelSlot, load_dtype
from lightning_prune.models.vocabulary import ROLES_OF, Block
from lightning_prune.support.errors import UserError
from lightning_prune.support.progress import Progress
from lightning_prune.support.timing import Seconds

FINDINGS = "findings"
CALIBRATING, REFITTING, WRITING = "calibrating", "refitting", "writing the pruned model"
PHASE_SECONDS = {CALIBRATING: "calibrate", REFITTING: "refit"}  # their names in metrics.json
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


class PruningMethod(L.LightningModule):
    """Calibrates on the shared set, one layer per epoch, decides after the last, prunes in ``on_fit_end``.

    A method says which passes it makes (``passes``: what is observed in a layer, and what is left of it) and what
    follows from their results (``decide``).

    Args:
        pretrained: Model folder or hub id to prune. ``demo`` is the small model inside the package.
        pruning_ratio: Share of all parameters (embeddings and head included) to remove, between 0 and 1.
        refit: Refit what is kept of o_proj and down_proj in every layer, by least squares on the calibration set.
            ``residual`` fits the residual stream to the dense model's, ``output`` each projection to its own output on
            the pruned model's inputs. The papers of these methods do not refit, so ``none`` is the default.
        refit_damping: λ, the pull of every column towards the old weight, times ‖x‖² of its input over the tokens.
            ``auto`` tries 0.001 to 1 for every projection on an eighth of the samples that it did not see.
        label: Name of this system in run folders, TensorBoard and tables. Default: the method's own name.
        onload: ``model`` keeps all weights on the device, ``layer`` brings in one decoder layer at a time and needs
            memory for two of them, ``auto`` takes what fits. The result is the same.
        save_dtype: Of the pruned checkpoint's weights: float32, bfloat16, float16, or auto, which keeps the dense
            checkpoint's own.
    """

    steps = 1  # how often it measures and decides
    reusable = True  # whether a saved score table is enough to decide again
    # Options that change no measurement:
    decision_options: tuple[str, ...] = ("pruning_ratio", "label", "onload", "save_dtype", "refit", "refit_damping")
    plan: PruningPlan
    scores: Scores

    def __init__(
        self,
        pretrained: str = "demo",
        pruning_ratio: float = 0.2,
        refit: Literal["none", "residual", "output"] = "none",
        refit_damping: float | Literal["auto"] = "auto",
        label: str | None = None,
        onload: str = "auto",
        save_dtype: str = "auto",
    ) -> None:
        super().__init__()
        if not 0 < pruning_ratio < 1:
            raise UserError(
                f"--model.pruning_ratio: found {pruning_ratio:g}; it is a share of all parameters and must lie "
                "between 0 and 1, both excluded (0.2 removes a fifth)."
            )
        if save_dtype not in SAVE_DTYPES:
            raise UserError(f"--model.save_dtype: found '{save_dtype}'; allowed: {', '.join(SAVE_DTYPES)}.")
        self.automatic_optimization = False
        self.pretrained = pretrained
        self.pruning_ratio = pruning_ratio
        self.refit = Refit.of(refit, refit_damping)
        self.save_dtype = save_dtype
        self._label = label
        self.seconds = Seconds()
        self.slot = ModelSlot(onload, self.seconds)
        self.progress = Progress(shown=False)
        self.saved: SavedMeasurement | None = None
        self.writes = True  # a checkpoint; else the plan is only applied to the open model, which can be measured
        self.run_folder: DecisionFolder | None = None
        self.pruned_folder: Path | None = None
        self.self_check: dict[str, Any] | None = None  # what was compared once the checkpoint was written
        self.layers: list[LayerAnatomy] = []  # the dense model's: shapes always, weights only while a layer is in
        self.dense_parameters = 0

    # What a method says about itself

    @abstractmethod
    def passes(self) -> list[Pass]:
        """The passes it makes over the decoder, fresh ones."""

    @abstractmethod
    def decide(self) -> None:
        """Set ``self.scores`` and ``self.plan`` from the results of the passes."""

    @property
    def measures_text(self) -> bool:
        """Whether the passes read the calibration set."""
        return True

    @property
    def needs_calibration(self) -> bool:
        """Whether the run reads the calibration set at all."""
        return self.refit is not None or (self.saved is None and self.measures_text)

    @property
    def method(self) -> str:
        """The method's own name, as in ``plan.json``."""
        return type(self).__name__.lower()

    @property
    def label(self) -> str:
        """The name of this system in run folders and tables; with a refit it is another system."""
        return self._label or (self.method if self.refit is None else f"{self.method}_refit")

    @property
    def uneven(self) -> bool:
        """Whether layers end up with widths of their own."""
        return True

    @property
    def requested_ratio(self) -> float | None:
        """The requested pruning ratio; None where something else was requested."""
        return self.pruning_ratio

    @property
    def note(self) -> str:
        """A sentence that table and model card must carry, if any."""
        return ""

    def check_ratio(self, layers: list[LayerAnatomy], total_parameters: int) -> None:
        """Raise UserError when the ratio cannot be reached; ``layers`` are on the meta device."""

    def refit_passes(self, kept: list[LayerPlan], held_out: Callable[[], Tensor]) -> list[Pass]:
        """The passes it makes once it is decided what is ``kept``; their new weights are the pruned model's.

        Args:
            kept: of every layer.
            held_out: gives bool ``[N]``, calibration samples to check on.
        """
        return [] if self.refit is None else self.refit.passes(kept, held_out())

    def details(self) -> dict[str, Any]:
        """What the method measured and chose beside its scores, for ``method.json``: thresholds, damping, ratios."""
        prunable = sum(
            view.unit_cost(block) * view.units(block)
            for view in self.layers
            for block in ROLES_OF
            if block is Block.MLP or not view.whole_attention
        )
        return {
            "refit": None if self.refit is None else self.refit.facts(self.loop.results_of("refit")),
            "prunable_fraction": prunable / self.dense_parameters,
            "onload": self.slot.placement,
        }

    # What others ask of it

    def reuse(self, saved: SavedMeasurement) -> None:
        """Decide from an earlier run's scores; calibration data is only opened for a refit."""
        self.saved = saved

    def results(self, name: str, block: Block | None = None) -> list[LayerResult]:
        """Results of the pass ``name`` in the order of the layers; of one ``block`` where its steps are blocks."""
        return [result for _, result in self.loop.results_of(name, block) if result.importance or result.facts]

    def in_memory_plan(self) -> Overlay:
        """The plan so far, to be applied to the open dense model."""
        return Overlay(self.plan.layers, self.loop.new_parameters_of)

    def calibration_facts(self) -> dict[str, Any] | None:
        """The manifest of the calibration set, None for methods without data."""
        if self.saved is not None and not self.needs_calibration:
            return self.saved.calibration
        return self.datamodule.calibration.manifest.to_json() if self.needs_calibration else None

    def make_plan(self, kept: list[LayerPlan], remaining_parameters: int, weights_updated: bool = False) -> PruningPlan:
        """A plan with this run's facts filled in."""
        dtype = stored_dtype(self.pretrained) if self.save_dtype == "auto" else getattr(torch, self.save_dtype)
        return PruningPlan(
            method=self.method,
            pruning_ratio=self.requested_ratio,
            achieved_ratio=1 - remaining_parameters / self.dense_parameters,
            parameters={"dense": self.dense_parameters, "pruned": remaining_parameters},
            calibration_fingerprint=(self.calibration_facts() or {}).get("fingerprint"),
            base_model=self.pretrained,
            layers=kept,
            dtype=str(dtype).removeprefix("torch."),
            weights_updated=weights_updated,
        )

    @property
    def datamodule(self) -> CalibrationDataModule:
        """The trainer's calibration and evaluation sets."""
        return self.trainer.datamodule  # type: ignore[attr-defined, no-any-return]

    @property
    def model(self) -> LayeredModel:
        """The open model."""
        return self.slot.model

    @property
    def evaluation_work(self) -> float:
        """Work of one evaluation of the dense model, in tokens through a layer."""
        return float(len(self.layers) * sum(item.tokens.numel() for item in self.datamodule.evaluation))

    def expect_roughly(self, data: CalibrationDataModule) -> None:
        """Tell the progress bar what follows the evaluation of the dense model, before the passes are known."""
        if not self.progress.shown:
            return
        layers = len(self.layers)
        if self.needs_calibration:
            self.progress.expect(CALIBRATING, float(FEW_PASSES * layers * data.num_samples * data.seq_len))
        self.progress.expect(WRITING, LAYER_TO_WRITE * layers)

    # The life cycle, in the order Lightning calls it

    def check_model(self) -> None:
        """Refuse what needs no weights and no text, once: model, family, ratio; set ``layers``.

        Raises:
            UserError: the model cannot be opened, its family is unknown or a tiny model of it does not behave as its
                record says, or the ratio cannot be reached.
        """
        if self.layers:
            return
        net = check_model(self.pretrained)
        layers, total = anatomy(net), count_parameters(net)
        self.check_ratio(layers, total)
        prove(net.config)
        self.layers, self.dense_parameters, self.config = layers, total, net.config

    def setup(self, stage: str) -> None:
        """Everything that can be refused without weights is refused here.

        Raises:
            UserError: see ``check_model``; or tokens that do not fit the model.
        """
        self.check_model()
        positions = getattr(self.config, "max_position_embeddings", None)
        self.datamodule.check_against_model(self.config.vocab_size, positions)

    def configure_optimizers(self) -> None:
        """No optimizer: pruning reads the weights, it does not train them."""

    def on_fit_start(self) -> None:
        """Open the model; work that needs no batch is done before the first one."""
        here = "" if self.run_folder is None else str(self.run_folder.path)
        shared = self.trainer.strategy.broadcast(here)
        self._folder = Path(shared) if shared else None
        model = self.slot.open(self.pretrained, load_dtype(str(self.trainer.precision)), self.device)
        self.layers = model.views
        tokens = self.datamodule.calibration.tokens if self.needs_calibration else torch.empty(0, 1)
        world, batch_size = self.trainer.world_size, self.datamodule.batch_size
        padded = len(tokens) if world == 1 else -(-len(tokens) // (world * batch_size)) * world * batch_size
        self._setting = Setting(
            model=model,
            rows=padded // world,
            samples=len(range(self.trainer.global_rank, len(tokens), world)),
            batch_size=batch_size,
            seq_len=tokens.shape[1],
            scratch=self._folder or Path(tempfile.gettempdir()),
            context=self.trainer.precision_plugin.forward_context,
            finished=lambda share: self.loop.advance_finish(share),
        )
        self.loop = CalibrationLoop([], self._setting, Results())
        self.trainer.fit_loop.max_epochs = 0
        self._stages = enumerate(self.stages())
        self._next_stage()

    def stages(self) -> Iterator[tuple[str, list[Pass]]]:
        """What is calibrated, stage by stage: the name of each and its passes; decisions fall between two of them."""
        for step in range(1, self.steps + 1):
            self.begin_step(step)
            if self.saved is None:
                passes = self.passes()
                self._expect_work(passes, first=step == 1)
                yield CALIBRATING, passes
            else:
                self._expect_work([], first=True)
            with self.seconds.measure("decide"), torch.no_grad():
                self.decide()
            refits = self.refit_passes(self.plan.layers, lambda: held_out_samples(self.datamodule.calibration.tokens))
            if refits:
                self.model.change_layers(None)
                yield REFITTING, refits
                self.plan = replace(self.plan, weights_updated=True)
            if step < self.steps:
                self._write_step()
                self.model.change_layers(self.in_memory_plan())

    def begin_step(self, step: int) -> None:
        """Measuring and deciding for the ``step``-th time, from 1 on."""

    def _next_stage(self) -> None:
        """Calibrate with the next stage's passes; after the last one everything is decided."""
        following = next(self._stages, None)
        if following is None:
            with torch.no_grad():
                self._details = self.details()
            return
        number, (self._phase, passes) = following
        self._stage_started, self._finish_before = time.perf_counter(), self.seconds.get("finish layers", 0.0)
        folder = self._folder / FINDINGS if self._folder is not None else None
        folder = folder / f"stage_{number}" if folder is not None and number else folder
        results = Results(folder, self.trainer.is_global_zero)
        # Several processes would have to stop at the same layer: they run a pass from its beginning.
        streams = StreamCheckpoints(folder if self.trainer.world_size == 1 else None)
        phase = self._phase
        advance = lambda work, where: self.progress.advance(phase, work, where)  # noqa: E731
        self.loop = CalibrationLoop(passes, self._setting, results, streams, advance)
        self.trainer.strategy.barrier()  # all have read what is known before one writes more
        self.trainer.fit_loop.max_epochs += self.loop.epochs  # type: ignore[operator]
        self._take_steps_without_batches()

    def on_train_epoch_start(self) -> None:
        """An epoch is a step: this one's layer comes in, hooks live while its batches run."""
        self.loop.start()

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """The calibration step of one layer: tokens ``[B, L]``, sample weights ``[B]`` and indices ``[B]``."""
        tokens, weight, index = batch
        start = batch_idx * self.datamodule.batch_size
        self.loop.batch(Batch(tokens, weight, index, slice(start, start + len(tokens))))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the last batch the strategy is still up, so sums are reduced over processes: finish the layer."""
        if self.trainer.is_last_batch:
            with self.seconds.measure("finish layers"):
                self.loop.finish()
            self._take_steps_without_batches()

    def _take_steps_without_batches(self) -> None:
        while self.loop.remaining and not self.loop.reads:
            with self.seconds.measure("finish layers"):
                self.loop.start()
                self.loop.finish()
        if not self.loop.remaining:
            self._end_stage()

    def _end_stage(self) -> None:
        self.loop.close()
        self.progress.finish(self._phase)
        if any(current.reads for current in self.loop.passes):
            finishing = self.seconds.get("finish layers", 0.0) - self._finish_before
            self.seconds.add(PHASE_SECONDS[self._phase], time.perf_counter() - self._stage_started - finishing)
        self._next_stage()

    def _expect_work(self, passes: list[Pass], first: bool) -> None:
        """Tell the progress bar all that is to do, as far as the shapes tell."""
        if not first or not self.progress.shown:
            return
        tokens = self._setting.rows * self._setting.seq_len
        everything = [LayerPlan(v.index, list(range(v.num_kv_heads)), list(range(v.num_channels))) for v in self.layers]
        for phase, of in ((CALIBRATING, passes), (REFITTING, self.refit_passes(everything, lambda: torch.zeros(0)))):
            if of:
                loop = CalibrationLoop(of, self._setting, Results())
                work = sum(sum(loop.work(number, tokens)) for number in range(len(loop.steps)))
                self.progress.expect(phase, self.steps * work)
        if self.writes:
            self.progress.expect(WRITING, LAYER_TO_WRITE * len(self.layers))
            self.progress.expect("perplexity of the pruned model", self.evaluation_work * (1 - self.pruning_ratio))

    def on_fit_end(self) -> None:
        """Prune: the strategy is torn down. Rank 0 cuts layer by layer, and writes."""
        if not self.writes:
            self.model.change_layers(self.in_memory_plan())
            return
        self.slot.close()
        if self.run_folder is not None:  # on the rank that writes
            with self.seconds.measure("save"):
                facts = {"method": self.method, "label": self.label, **self._details}
                if self.saved is not None and self.saved.run is not None:
                    facts["measured_by"] = self.saved.run
                self.run_folder.write_decision(self.scores, self.plan, facts)
            with self.seconds.measure("prune"), torch.no_grad():
                self._write_pruned(self.run_folder.pruned)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the others evaluate what this one writes
        if self._folder is not None:
            self.pruned_folder = self._folder / "pruned"

    def _write_step(self) -> None:
        """Leave the plan and the checkpoint of a step that is not the last one in the run folder."""
        if self.run_folder is not None:
            with self.seconds.measure("save"), torch.no_grad():
                self.run_folder.write_step(self.plan, self._write_pruned)
        self.trainer.strategy.barrier()

    def _write_pruned(self, folder: Path) -> None:
        layers = len(self.layers)
        self.self_check = write_pruned(
            self.pretrained,
            self.plan,
            self.loop.new_parameters_of,
            folder,
            calibration=self.calibration_facts(),
            note=self.note,
            progress=lambda at: self.progress.advance(WRITING, LAYER_TO_WRITE, f"layer {at + 1} of {layers}"),
        )
        self.progress.finish(WRITING)
