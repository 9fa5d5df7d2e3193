"""The life of every pruning method: check, load, calibrate, decide, cut, save."""

import time
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_prune.errors import UserError
from lightning_prune.evaluation.module import EvaluatedModel
from lightning_prune.files import write_json
from lightning_prune.methods.scores import Scores
from lightning_prune.statistics.hooks import Hooks
from lightning_prune.statistics.replay import LayerWalk
from lightning_prune.surgery.anatomy import LayerAnatomy, anatomy, count_parameters
from lightning_prune.surgery.checkpoint import save_checkpoint
from lightning_prune.surgery.cut import cut, layout_of
from lightning_prune.surgery.loading import meta_model
from lightning_prune.surgery.model_card import model_card
from lightning_prune.surgery.plan import LayerPlan, PruningPlan


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


class PruningMethod(EvaluatedModel):
    """Calibrates on the shared set, decides on the last batch, prunes in ``on_fit_end``.

    A method overrides ``attach`` (register hooks for one epoch), ``decide`` (statistics → scores → plan) and,
    where a plain forward is not what it needs, ``calibrate``. ``num_epochs`` passes are made over the set.

    Args:
        pretrained: Model folder or hub id to prune. ``demo`` is the small model inside the package.
        pruning_ratio: Share of all parameters (embeddings and head included) to remove, between 0 and 1.
        label: Name of this system in run folders, TensorBoard and tables. Default: the method's own name.
    """

    needs_calibration = True
    epochs_per_layer = 1  # of layer-wise methods; 2: attention, then MLP
    reusable = True  # whether a saved score table is enough to decide again
    decision_options: tuple[str, ...] = ("pruning_ratio", "label")  # those that do not change what is measured
    plan: PruningPlan
    scores: Scores

    def __init__(self, pretrained: str = "demo", pruning_ratio: float = 0.2, label: str | None = None) -> None:
        super().__init__(pretrained)
        if not 0 < pruning_ratio < 1:
            raise UserError(
                f"--model.pruning_ratio: found {pruning_ratio:g}; it is a share of all parameters and must lie "
                "between 0 and 1, both excluded (0.2 removes a fifth)."
            )
        self.automatic_optimization = False
        self.pruning_ratio = pruning_ratio
        self._label = label
        self.run_folder: Path | None = None
        self.hooks = Hooks()
        self.pruned_folder: Path | None = None
        self.self_check: dict[str, Any] | None = None  # what was compared once the checkpoint was written
        self.dense_parameters = 0
        self.num_layers = 0
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
    def layerwise(self) -> bool:
        """Whether layer l is calibrated on what the already pruned layers before it put out, one epoch per layer."""
        return False

    @property
    def num_epochs(self) -> int:
        """Passes over the calibration set."""
        return self.num_layers * self.epochs_per_layer if self.layerwise else 1

    @property
    def current_layer(self) -> LayerAnatomy:
        """The layer that this epoch calibrates, for layer-wise methods."""
        return self.layers[self.current_epoch // self.epochs_per_layer]

    @property
    def expected_tokens(self) -> int:
        """Calibration tokens that every hooked module must have seen on this rank after one epoch."""
        samples, length = self.datamodule.calibration.tokens.shape
        return len(range(self.trainer.global_rank, samples, self.trainer.world_size)) * length

    # What a method says about itself

    @abstractmethod
    def decide(self) -> None:
        """Set ``self.scores`` and ``self.plan`` from the statistics; the model is still whole."""

    def attach(self) -> None:
        """Register this epoch's hooks through ``self.hooks``."""

    def calibrate(self, tokens: Tensor, weight: Tensor, batch_idx: int) -> None:
        """One calibration step: a forward without gradients, of the model or of one layer, which the hooks watch."""
        with torch.no_grad():
            if self.layerwise:
                self.walk.step(self.model, self.layers, self.current_epoch, batch_idx, tokens)
            else:
                self.model.base_model(input_ids=tokens, use_cache=False)

    def check_tokens(self) -> None:
        """Raise RuntimeError unless every hooked module saw every calibration token once in this epoch."""
        self.hooks.assert_tokens(self.expected_tokens)

    def finish_epoch(self) -> None:
        """Called on the last batch of every epoch, with the hooks already removed; layer-wise methods prune here."""

    def transform(self, model: PreTrainedModel) -> PreTrainedModel:
        """Make the planned model out of the dense one, whose layers are taken apart."""
        return cut(model, self.plan)

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
        return {"prunable_fraction": prunable / self.dense_parameters}

    # The life cycle, in the order Lightning calls it

    def check_before_loading(self, config: Any) -> None:
        """Refuse what the shapes alone can tell."""
        skeleton = meta_model(config)
        self.num_layers = config.num_hidden_layers
        self.check_ratio(anatomy(skeleton), count_parameters(skeleton))

    def setup(self, stage: str) -> None:
        """Check, then tell the trainer how many passes the method makes."""
        super().setup(stage)
        if self.net is not None:
            self.num_layers = self.model.config.num_hidden_layers
        if stage == "fit":
            self.trainer.fit_loop.max_epochs = self.num_epochs

    def on_fit_start(self) -> None:
        """Methods without data have no batch to wait for."""
        self.layers = anatomy(self.model)
        self.num_layers = len(self.layers)
        self.walk = LayerWalk(by_block=self.epochs_per_layer == 2)
        self.dense_parameters = count_parameters(self.model)
        self._calibration_started = time.perf_counter()
        if not self.needs_calibration:
            self._decide()

    def on_train_epoch_start(self) -> None:
        """Hooks live only while batches run: validation and sanity batches never reach the statistics."""
        self.hooks.remove()
        self.hooks = Hooks()
        self.attach()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The calibration step: tokens ``[B, L]`` and sample weights ``[B]``, 0 for padding samples."""
        tokens, weight = batch
        try:
            self.hooks.set_weight(weight)
            self.calibrate(tokens, weight, batch_idx)
        except BaseException:
            self.hooks.remove()
            raise

    def on_train_batch_end(self, outputs: Any, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """On the last batch the strategy is still up, so sums can be reduced over ranks: decide here."""
        if not self.trainer.is_last_batch:
            return
        self.hooks.remove()
        self.check_tokens()
        with self.timed("prune layers" if self.layerwise else "decide"), torch.no_grad():
            self.finish_epoch()
        if self.current_epoch + 1 == self.num_epochs:
            pruning = self.seconds.get("prune layers", 0.0)
            self.seconds["calibrate"] = time.perf_counter() - self._calibration_started - pruning
            self._decide()

    def _decide(self) -> None:
        with self.timed("decide"), torch.no_grad():
            self.decide()
            self._details = self.details()

    def on_fit_end(self) -> None:
        """Prune: the strategy is torn down, the module is whole and on the CPU. Rank 0 saves."""
        folder = self.run_folder or Path(self.trainer.log_dir or self.trainer.default_root_dir)
        self.walk = LayerWalk()
        with self.timed("prune"), torch.no_grad():
            self.net = self.transform(self.model)
        if self.trainer.is_global_zero:
            with self.timed("save"):
                self.scores.save(folder / "scores.csv")
                self.plan.save(folder / "plan.json")
                facts = {"method": self.method, "label": self.label, **self._details}
                if self.saved is not None and self.saved.run is not None:
                    facts["measured_by"] = self.saved.run
                write_json(folder / "method.json", facts)
                card = model_card(self.plan, layout_of(self.model), self.calibration_facts())
                card += f"\n{self.note}\n" if self.note else ""
                self.self_check = save_checkpoint(
                    self.model, folder / "pruned", tokenizer_from=self.pretrained, card=card
                )
        self.pruned_folder = folder / "pruned"

    def calibration_facts(self) -> dict[str, Any] | None:
        """The manifest of the calibration set, None for methods without data."""
        if self.saved is not None:
            return self.saved.calibration
        return self.datamodule.calibration.manifest.to_json() if self.needs_calibration else None

    def make_plan(self, kept: list[LayerPlan], pruned_parameters: int, weights_updated: bool = False) -> PruningPlan:
        """A plan with this run's facts filled in; ``pruned_parameters`` counts what is left."""
        return PruningPlan(
            method=self.method,
            pruning_ratio=self.pruning_ratio,
            achieved_ratio=1 - pruned_parameters / self.dense_parameters,
            parameters={"dense": self.dense_parameters, "pruned": pruned_parameters},
            calibration_fingerprint=(self.calibration_facts() or {}).get("fingerprint"),
            base_model=self.pretrained,
            layers=kept,
            dtype=str(self.model.dtype).removeprefix("torch."),
            weights_updated=weights_updated,
        )
