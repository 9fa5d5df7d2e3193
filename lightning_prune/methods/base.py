"""The life of every pruning method: check, walk the decoder, decide, cut, save."""

import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.errors import UserError
from lightning_prune.files import write_json
from lightning_prune.methods.scores import Scores
from lightning_prune.models.layered import skeleton
from lightning_prune.surgery.anatomy import LayerAnatomy, anatomy, count_parameters
from lightning_prune.surgery.cut import layout_of
from lightning_prune.surgery.model_card import model_card
from lightning_prune.surgery.plan import LayerPlan, PruningPlan
from lightning_prune.surgery.pruned import open_pruned, stored_dtype
from lightning_prune.surgery.write import write_checkpoint
from lightning_prune.walk.findings import Findings
from lightning_prune.walk.module import LayeredModule
from lightning_prune.walk.passes import Batch, Finding, Pass, Setting
from lightning_prune.walk.walk import Walk

SAVE_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SavedMeasurement:
    """What an earlier run measured, so that another decision needs no calibration.

    ``details`` is its ``method.json``, ``calibration`` its ``calibration.json`` (None for methods without data),
    ``run`` its folder, which the new record names.
    """

    scores: Scores
    details: dict[str, Any]
    calibration: dict[str, Any] | None
    run: str | None = None


class PruningMethod(LayeredModule):
    """Walks the decoder on the shared set, one layer per epoch, decides behind the last, prunes in ``on_fit_end``.

    A method says which passes it makes (``passes``: what is observed in a layer, and what is left of it) and what follows
    from what they found (``decide``).

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
        self.run_folder: Path | None = None
        self.pruned_folder: Path | None = None
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

    # What a method says about itself

    @abstractmethod
    def passes(self) -> list[Pass]:
        """The passes it makes over the decoder, fresh ones; none where scores are reused."""

    @abstractmethod
    def decide(self) -> None:
        """Set ``self.scores`` and ``self.plan`` from what the passes found."""

    def check_ratio(self, layers: list[LayerAnatomy], total_parameters: int) -> None:
        """Raise UserError when the ratio cannot be reached; ``layers`` are on the meta device."""

    @property
    def note(self) -> str:
        """A sentence that table and model card must carry, if any."""
        return ""

    def details(self) -> dict[str, Any]:
        """What the method measured and chose beside its scores, for ``method.json``: thresholds, damping, ratios."""
        prunable = sum(view.attention_unit_cost * view.num_kv_heads for view in self.layers)
        prunable += sum(view.mlp_unit_cost * view.num_channels for view in self.layers)
        return {"prunable_fraction": prunable / self.dense_parameters, "onload": self.placement}

    def found(self, name: str) -> list[Finding]:
        """What the steps of the pass ``name`` left, in the order of the layers."""
        found = sorted(self.walk.findings_of(name), key=lambda pair: pair[0].layer)
        return [finding for _, finding in found if finding]

    # The life cycle, in the order Lightning calls it

    def check_before_loading(self, config: Any) -> None:
        """Refuse what the shapes alone can tell; then tell the trainer how many epochs there will be."""
        net = skeleton(config)
        self._views = anatomy(net)
        self.dense_parameters = count_parameters(net)
        self.check_ratio(self._views, self.dense_parameters)
        self._passes = [] if self.saved is not None else self.passes()
        steps = [step for one in self._passes if one.reads for step in one.steps(len(self._views))]
        self.trainer.fit_loop.max_epochs = len(steps)

    def on_fit_start(self) -> None:
        """Open the model; work that needs no batch is done before the first one."""
        folder = self._folder()
        model = self.open_model(self.pretrained)
        self._views = model.views
        tokens = self.datamodule.calibration.tokens if self.needs_calibration else torch.empty(0, 1)
        world, rank = self.trainer.world_size, self.trainer.global_rank
        batch_size = self.datamodule.batch_size
        per_step = world * batch_size
        padded = len(tokens) if world == 1 else -(-len(tokens) // per_step) * per_step
        setting = Setting(
            model=model,
            rows=padded // world,
            samples=len(range(rank, len(tokens), world)),
            batch_size=batch_size,
            seq_len=tokens.shape[1],
            scratch=folder,
            context=self._precision_context,
        )
        self.walk = Walk(self._passes, setting, self.findings())
        self._epochs = [number for number, (one, _) in enumerate(self.walk.steps) if one.reads]
        self._calibration_started = time.perf_counter()
        self._next = 0
        with self.timed("finish layers"):
            self._take_steps_without_batches()
        if not self._epochs:
            self._decide()

    def findings(self) -> Findings:
        """Where finished layers leave what was found."""
        return Findings()

    def on_train_epoch_start(self) -> None:
        """An epoch is a step: this one's layer comes in, hooks live while its batches run."""
        self.walk.start(self._next)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """The calibration step of one layer on one batch: tokens ``[B, L]``, sample weights ``[B]``, indices ``[B]``."""
        tokens, weight, index = batch
        start = batch_idx * self.datamodule.batch_size
        self.walk.batch(self._next, Batch(tokens, weight, index, slice(start, start + len(tokens))))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Behind the last batch the strategy is still up, so sums are reduced over processes: finish the layer."""
        if not self.trainer.is_last_batch:
            return
        with self.timed("finish layers"):
            self.walk.finish(self._next)
            self._next += 1
            self._take_steps_without_batches()
        if self._next == len(self.walk):
            self._decide()

    def _take_steps_without_batches(self) -> None:
        while self._next < len(self.walk) and self._next not in self._epochs:
            self.walk.start(self._next)
            self.walk.finish(self._next)
            self._next += 1

    def _decide(self) -> None:
        if self._epochs:
            spent = time.perf_counter() - self._calibration_started
            self.seconds["calibrate"] = spent - self.seconds["finish layers"]
        with self.timed("decide"), torch.no_grad():
            self.decide()
            self._details = self.details()

    def on_fit_end(self) -> None:
        """Prune: the strategy is torn down. Rank 0 cuts layer by layer, and writes."""
        folder = self._folder()
        self.close_model()
        if self.trainer.is_global_zero:
            with self.timed("save"), torch.no_grad():
                self.scores.save(folder / "scores.csv")
                self.plan.save(folder / "plan.json")
                facts = {"method": self.method, "label": self.label, **self._details}
                if self.saved is not None and self.saved.run is not None:
                    facts["measured_by"] = self.saved.run
                write_json(folder / "method.json", facts)
            with self.timed("prune"), torch.no_grad():
                pruned = open_pruned(self.pretrained, self.plan, self.walk.weights_of)
                card = model_card(self.plan, layout_of(pruned.config), self.calibration_facts())
                card += f"\n{self.note}\n" if self.note else ""
                write_checkpoint(pruned, folder / "pruned", tokenizer_from=self.pretrained, card=card)
                pruned.close()
        self.pruned_folder = folder / "pruned"
        self.evaluated = str(self.pruned_folder)

    def _folder(self) -> Path:
        return self.run_folder or Path(self.trainer.log_dir or self.trainer.default_root_dir)

    def _precision_context(self) -> AbstractContextManager[object]:
        context: Callable[[], AbstractContextManager[object]] = self.trainer.precision_plugin.forward_context
        return context()

    def calibration_facts(self) -> dict[str, Any] | None:
        """The manifest of the calibration set, None for methods without data."""
        if self.saved is not None:
            return self.saved.calibration
        return self.datamodule.calibration.manifest.to_json() if self.needs_calibration else None

    def make_plan(self, kept: list[LayerPlan], pruned_parameters: int, weights_updated: bool = False) -> PruningPlan:
        """A plan with this run's facts filled in; ``pruned_parameters`` counts what is left."""
        dtype = stored_dtype(self.pretrained) if self.save_dtype == "auto" else getattr(torch, self.save_dtype)
        return PruningPlan(
            method=self.method,
            pruning_ratio=self.pruning_ratio,
            achieved_ratio=1 - pruned_parameters / self.dense_parameters,
            parameters={"dense": self.dense_parameters, "pruned": pruned_parameters},
            calibration_fingerprint=(self.calibration_facts() or {}).get("fingerprint"),
            base_model=self.pretrained,
            layers=kept,
            dtype=str(dtype).removeprefix("torch."),
            weights_updated=weights_updated,
        )
