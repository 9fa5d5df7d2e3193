"""The life of every pruning method: check, calibrate, decide, refit, cut, save."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from lightning_prune.calibration.driver import CALIBRATING, REFITTING, CalibrationDriver, Stage
from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.calibration.passes import Pass
from lightning_prune.checkpoint.cut import parameters_after, prunable_parameters, unpruned
from lightning_prune.checkpoint.expert_plans import parameter_counts
from lightning_prune.checkpoint.family_check import check_family
from lightning_prune.checkpoint.in_memory_plan import InMemoryPlan
from lightning_prune.checkpoint.plan import LayerPlan, PruningPlan
from lightning_prune.checkpoint.scores import Scores
from lightning_prune.checkpoint.write import write_pruned
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.data.sampling import held_out_samples
from lightning_prune.methods.measurement import DecisionFolder, SavedMeasurement
from lightning_prune.methods.refit_pass import Refit, RefitPass
from lightning_prune.methods.target import SIZES, Target, check_share
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.families import LayerStructure, count_parameters, layer_structures
from lightning_prune.models.layered import LayeredModel
from lightning_prune.models.model_slot import ModelSlot, load_dtype
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError
from lightning_prune.support.names import PRUNED
from lightning_prune.support.progress import Progress
from lightning_prune.support.timing import Seconds

SAVE_DTYPES = ("auto", "float32", "bfloat16", "float16")
WRITING = "writing the pruned model"
LAYER_TO_WRITE = 1000.0  # about what cutting and writing a layer costs, in tokens through it
FEW_PASSES = 3  # forwards that calibrating may cost, as long as the passes are not known


class PruningMethod(L.LightningModule):
    """Calibrates on the shared set, one layer per epoch, decides after the last, prunes in ``on_fit_end``.

    A method says which passes it makes (``passes``: what is observed in a layer, and its result) and what follows from
    the results (``decide``).

    Args:
        pretrained: Model folder or hub id to prune. ``demo`` is the small model inside the package.
        pruning_ratio: Share of all parameters (embeddings and head included) to remove, between 0 and 1.
        refit: Refit what is kept of o_proj and down_proj in every layer, by least squares on the calibration set.
            ``residual`` fits the residual stream to the dense model's, ``output`` each projection to its own output on
            the pruned model's inputs. The papers of these methods do not refit, so ``none`` is the default.
        refit_damping: λ, the pull of every column towards the old weight, times ‖x‖² of its input over the tokens.
            ``auto`` tries 0.001 to 1 for every projection on an eighth of the samples that it did not see.
        target_parameters: Parameters that may be left, such as 4.5B, instead of a pruning ratio; never more are.
        target_active_parameters: The same of those that one token passes: all but the experts that are not chosen.
        target_memory: Memory that the model may take, such as 6GiB, instead of a pruning ratio: weights in the saved
            dtype, and the KV cache of ``batch`` sequences of ``context`` tokens in the same, without states of mixers.
        context: Tokens in the KV cache of ``target_memory``, at most those that the model has positions for.
        batch: Sequences in the KV cache of ``target_memory``.
        label: Name of this system in run folders, TensorBoard and tables; ``{method}`` in it is the method's own name,
            which is the default.
        onload: ``model`` keeps all weights on the device, ``layer`` takes memory for two layers, ``auto`` what fits.
        save_dtype: Of the pruned weights: float32, bfloat16, float16, or auto, which keeps the dense checkpoint's own.
        keep: Of Gemma 3, Mistral 3, Qwen-VL and Qwen3.5: the ``text`` model, or, where layers are equal, the ``whole``.
    """

    steps = 1  # how often it measures and decides
    step = 1  # the one that is being made
    measures_text = True  # whether the passes read the calibration set
    uneven = True  # whether layers end up with widths of their own
    whole_layers = False  # whether nothing smaller than a layer is removed
    experts: bool | Literal["only"] = False  # whether models with experts are pruned, or no others
    reusable = True  # whether a saved score table is enough to decide again
    # Options that change no measurement:
    decision_options: tuple[str, ...] = (
        *("pruning_ratio", *SIZES, "context", "batch"),
        *("label", "onload", "save_dtype", "keep", "refit", "refit_damping"),
    )
    plan: PruningPlan
    scores: Scores

    def __init__(
        self,
        pretrained: str = "demo",
        pruning_ratio: float = 0.2,
        refit: Literal["none", "residual", "output"] = "none",
        refit_damping: float | Literal["auto"] = "auto",
        target_parameters: str | int | None = None,
        target_active_parameters: str | int | None = None,
        target_memory: str | None = None,
        context: int = 8192,
        batch: int = 1,
        label: str | None = None,
        onload: str = "auto",
        save_dtype: str = "auto",
        keep: Literal["text", "whole"] = "text",
    ) -> None:
        super().__init__()
        check_share(pruning_ratio, "--model.pruning_ratio")
        if save_dtype not in SAVE_DTYPES:
            raise UserError(f"--model.save_dtype: found '{save_dtype}'; allowed: {', '.join(SAVE_DTYPES)}.")
        self.automatic_optimization = False
        self.pretrained = pretrained
        self.pruning_ratio = pruning_ratio
        sizes = {"parameters": target_parameters, "active_parameters": target_active_parameters}
        self.target = Target.of(sizes | {"memory": target_memory}, context, batch)
        self.reached: Fraction | None = None  # the ratio that meets the target
        self.refit = Refit.of(refit, refit_damping)
        self.dense_stream: Pass | None = None  # one that keeps the dense residual stream for the refit
        self.save_dtype, self.keep = save_dtype, keep
        self._label = label
        self.seconds = Seconds()
        self.slot = ModelSlot(onload, self.seconds)
        self.progress = Progress(shown=False)
        self.saved: SavedMeasurement | None = None
        self.writes = True  # a checkpoint; else the plan is only applied to the open model, which can be measured
        self.run_folder: DecisionFolder | None = None
        self.pruned_folder: Path | None = None
        self.self_check: dict[str, Any] | None = None  # what was compared once the checkpoint was written
        self.layers: list[LayerStructure] = []  # the dense model's: shapes always, weights only while a layer is in
        self.dense_parameters = 0

    @abstractmethod
    def passes(self) -> list[Pass]:
        """New passes over the decoder, in the order in which they run."""

    @abstractmethod
    def decide(self) -> None:
        """Set ``self.scores`` and ``self.plan`` from the results of the passes."""

    @property
    def needs_calibration(self) -> bool:
        """Whether the run reads the calibration set."""
        return self.refit is not None or (self.saved is None and self.measures_text)

    @property
    def method(self) -> str:
        """Name of the pruning method, whether it refits or not."""
        return type(self).__name__.lower()

    @property
    def system(self) -> str:
        """The method's name; with a refit it is another system."""
        return self.method if self.refit is None else f"{self.method}_refit"

    @property
    def label(self) -> str:
        """The name of this system in run folders and tables."""
        return (self._label or self.system).replace("{method}", self.system)

    @property
    def requested_ratio(self) -> float | None:
        """Ratio requested for the current step, the full one at the last step; None if a size was requested instead."""
        if self.target is None:
            return float(Fraction(str(self.pruning_ratio)) * self.step / self.steps)
        return 1 - self.target.limit / self.dense_parameters if self.target.kind == "parameters" else None

    @property
    def ratio(self) -> Fraction:
        """Share of all parameters to remove in this step, exact."""
        return Fraction(str(self.requested_ratio or 0)) if self.reached is None else self.reached

    def meet_target(self, keep: Callable[[], list[LayerPlan]], layers: list[LayerStructure], total: int) -> None:
        """Find the ratio with which ``keep``, which decides by ``ratio``, meets the target, if there is one."""
        if (target := self.target) is None:
            return

        def size_at(ratio: Fraction) -> int:
            self.reached = ratio
            kept = keep() if ratio else unpruned(layers)
            left = self.parameters_left(layers, total, kept) if ratio else total
            return target.size(left, layers, kept, self.checkpoint.config, self.written_dtype.itemsize)

        self.reached = target.reach(size_at, total, target.remedy(layers))
        self.pruning_ratio = float(self.reached)  # as loggers and progress have it

    def parameters_left(self, layers: list[LayerStructure], total: int, kept: list[LayerPlan]) -> int:
        """Parameters of the pruned model."""
        return parameters_after(layers, total, kept)

    @property
    def written_dtype(self) -> torch.dtype:
        """The dtype of the pruned checkpoint."""
        return self.checkpoint.stored_dtype if self.save_dtype == "auto" else getattr(torch, self.save_dtype)  # type: ignore[no-any-return]

    @property
    def note(self) -> str:
        """A sentence that table and model card must carry, if any."""
        return ""

    def check_ratio(self, layers: list[LayerStructure], total_parameters: int) -> None:
        """Raise UserError when the ratio cannot be reached; ``layers`` are on the meta device."""

    def arranged(self, layers: list[LayerStructure]) -> list[LayerStructure]:
        """The layers with the units of experts that this method removes."""
        return layers

    def kinds(self, layers: list[LayerStructure]) -> tuple[Block, ...]:
        """The kinds of units that may be removed."""
        return (Block.ATTENTION, Block.MLP)

    def refit_passes(self, kept: list[LayerPlan], held_out: Callable[[], Tensor]) -> list[Pass]:
        """Passes after the decision, whose new weights are the pruned model's; ``held_out``: samples to check on."""
        return [] if self.refit is None else [RefitPass(kept, self.refit, held_out(), self.dense_stream)]

    def details(self) -> dict[str, Any]:
        """The content of ``method.json``: what the method measured and chose beside its scores (damping, ratios)."""
        return {
            "refit": None if self.refit is None else self.refit.facts(self.driver.loop.results_of(RefitPass.name)),
            "prunable_fraction": prunable_parameters(self.layers) / self.dense_parameters,
            "onload": self.slot.placement,
        }

    def reuse(self, saved: SavedMeasurement) -> None:
        """Decide from an earlier run's scores."""
        self.saved = saved

    def results(self, name: str) -> list[LayerResult]:
        """Results of the pass ``name``, one per layer; empty where there is nothing to measure."""
        if name not in (own := [one.name for one in self.driver.loop.passes]):
            raise UserError(f"{type(self).__name__}: none of its passes is named '{name}'; they are {', '.join(own)}.")
        results = {step.layer: it for step, it in self.driver.loop.results_of(name) if it.importance or it.facts}
        return [results.get(view.index, LayerResult()) for view in self.layers]

    def in_memory_plan(self) -> InMemoryPlan:
        """The plan so far, to be applied to the open dense model."""
        return InMemoryPlan(self.plan.layers, self.driver.loop.new_parameters_of)

    def calibration_facts(self) -> dict[str, Any] | None:
        """The manifest of the calibration set, None for methods without data."""
        if self.saved is not None and not self.needs_calibration:
            return self.saved.calibration
        return self.datamodule.calibration.manifest.to_json() if self.needs_calibration else None

    def make_plan(self, kept: list[LayerPlan], weights_updated: bool = False) -> PruningPlan:
        """A plan with this run's facts filled in."""
        left = self.parameters_left(self.layers, self.dense_parameters, kept)
        return PruningPlan(
            method=self.system,
            pruning_ratio=self.requested_ratio,
            achieved_ratio=1 - left / self.dense_parameters,
            parameters=parameter_counts(self.layers, self.dense_parameters, kept, left),
            calibration_fingerprint=(self.calibration_facts() or {}).get("fingerprint"),
            base_model=self.pretrained,
            layers=kept,
            dtype=str(self.written_dtype).removeprefix("torch."),
            weights_updated=weights_updated,
            keep=self.keep,
        )

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The dense model, opened once."""
        return Checkpoint.open(self.pretrained)

    @property
    def datamodule(self) -> CalibrationDataModule:
        """The trainer's calibration and evaluation sets."""
        return self.trainer.datamodule  # type: ignore[attr-defined, no-any-return]

    @property
    def model(self) -> LayeredModel:
        """The open dense model, all of it or one layer at a time in memory."""
        return self.slot.model

    def check_model(self) -> None:
        """Refuse what needs no weights and no text, once; set ``layers``. Raises UserError: the model cannot be opened,
        its family is unknown or does not behave as its record says, or the ratio cannot be reached."""
        if not self.layers:
            self.checkpoint.check(self.keep == "whole")
            self.target = self.target and self.target.around(self.checkpoint, "text" if self.uneven else self.keep)
            self.check_shapes(self.checkpoint.meta)

    def check_shapes(self, net: Any) -> None:
        """Make the checks of ``check_model`` that need only the shapes of a model on the meta device."""
        layers, total = self.arranged(layer_structures(net)), count_parameters(net)
        if not self.experts and any(view.experts for view in layers):
            raise UserError(
                f"--model: '{self.pretrained}' is a mixture of experts, which {self.method} does not prune. Use Wanda, "
                "Magnitude, HGSP, REAP, HEAPr or ShortGPT."
            )
        if self.target is not None and (positions := self.checkpoint.limits[1]) is not None:
            self.target = self.target.within(positions)
        self.check_ratio(layers, total)
        check_family(self.checkpoint.config)
        self.layers, self.dense_parameters = layers, total

    def setup(self, stage: str) -> None:
        """``check_model``, and refuse tokens that do not fit the model."""
        self.check_model()
        self.datamodule.check_against_model(*self.checkpoint.limits)

    def configure_optimizers(self) -> None:
        """No optimizer: pruning reads the weights, it does not train them."""

    def on_fit_start(self) -> None:
        """Open the model and begin the first stage."""
        shared = self.trainer.strategy.broadcast("" if self.run_folder is None else str(self.run_folder.path))
        self._folder = Path(shared) if shared else None
        model = self.slot.open(self.checkpoint, load_dtype(str(self.trainer.precision)), self.device)
        self.layers = self.arranged(model.views)
        tokens = self.datamodule.calibration.tokens if self.needs_calibration else torch.empty(0, 1)
        size = self.datamodule.batch_size
        self.driver = CalibrationDriver(self.trainer, model, tokens, size, self._folder, self.progress, self.seconds)
        self.driver.begin(self.stages())

    def stages(self) -> Iterator[Stage]:
        """Yield one stage of passes after the other; decisions are made between them."""
        for step in range(1, self.steps + 1):
            self.step = step
            passes = [] if self.saved is not None else self.passes()
            if step == 1 and self.progress.shown:
                refits = self.refit_passes(unpruned(self.layers), lambda: torch.zeros(0))  # as if nothing were removed
                self._expect(*(self.steps * self.driver.work(of) for of in (passes, refits)))
            if passes:
                yield CALIBRATING, passes, step / self.steps
            with self.seconds.measure("decide"), torch.no_grad():
                self.decide()
            refits = self.refit_passes(self.plan.layers, lambda: held_out_samples(self.datamodule.calibration.tokens))
            if refits:
                self.model.change_layers(None)  # the refit measures the dense weights, not an earlier step's
                yield REFITTING, refits, step / self.steps
                self.plan = replace(self.plan, weights_updated=True)
            if step < self.steps:
                self._write_step()
                self.model.change_layers(self.in_memory_plan())
        with torch.no_grad():  # the driver exhausts this generator in its last epoch
            self._details = self.details()

    def on_train_epoch_start(self) -> None:
        """Begin the next layer of a pass, which is one epoch."""
        self.driver.loop.start()

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """The calibration step of one layer: tokens ``[B, L]``, sample weights ``[B]`` and indices ``[B]``."""
        self.driver.batch(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Finish the layer after its last batch: the strategy is still up, so sums are reduced over processes."""
        if self.trainer.is_last_batch:
            self.driver.end_epoch()

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
            self.pruned_folder = self._folder / PRUNED

    def expect_roughly(self, data: CalibrationDataModule) -> None:
        """Tell the progress bar what follows the evaluation of the dense model, before the passes are known."""
        tokens = len(self.layers) * data.num_samples * data.seq_len
        self._expect(float(FEW_PASSES * tokens * self.needs_calibration), 0.0)

    def _expect(self, calibrating: float, refitting: float) -> None:
        writing = LAYER_TO_WRITE * len(self.layers) * self.writes
        for phase, work in ((CALIBRATING, calibrating), (REFITTING, refitting), (WRITING, writing)):
            if work:
                self.progress.expect(phase, work)

    def _write_step(self) -> None:
        """Write the plan and the checkpoint of a step that is not the last one to the run folder."""
        if self.run_folder is not None:
            with self.seconds.measure("save"), torch.no_grad():
                self.run_folder.write_step(self.plan, self._write_pruned)
        self.trainer.strategy.barrier()

    def _write_pruned(self, folder: Path) -> None:
        self.self_check = write_pruned(
            self.checkpoint,
            self.plan,
            self.driver.loop.new_parameters_of,
            folder,
            calibration=self.calibration_facts(),
            note=self.note,
            progress=lambda at: self.progress.advance(WRITING, LAYER_TO_WRITE, f"layer {at + 1} of {len(self.layers)}"),
        )
        self.progress.finish(WRITING)
