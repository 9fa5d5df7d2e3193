"""Memory, disk and work of a run, computed from shapes and from what passes say that they hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import lightning as L
import torch

from lightning_prune.calibration.passes import Load, Pass
from lightning_prune.calibration.residuals import SHARE
from lightning_prune.checkpoint.cut import unpruned
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.data.token_arrays import is_token_array, load_token_array
from lightning_prune.evaluation.perplexity import STEP_BYTES
from lightning_prune.methods.base import PruningMethod
from lightning_prune.methods.shortgpt import without
from lightning_prune.models.checkpoint import Checkpoint, meta_model
from lightning_prune.models.families import LayerStructure, family_of
from lightning_prune.models.head import LOGITS_BYTES
from lightning_prune.models.layered import Onload
from lightning_prune.models.model_slot import load_dtype
from lightning_prune.models.vocabulary import EXPERTS, Block
from lightning_prune.runs.verdict import size
from lightning_prune.support.devices import free_bytes
from lightning_prune.support.errors import UserError
from lightning_prune.support.memory import anonymous_bytes, free_host_bytes
from lightning_prune.support.regular_files import expanded

ERROR = 1.15  # times as much as estimated a run may take
ROOM = 0.9  # of the memory that ``auto`` fills with a whole model: an estimate is not a measurement
# What no tensor shows. Device: context, kernels, workspaces; host: heaps, threads, compiled kernels.
DEVICE_OVERHEAD, HOST_OVERHEAD = 700 * 2**20, 110 * 2**20
UNREAD_TOKENS = 300_000  # of an evaluation text that was not read: about WikiText-2's test split
UNIT_BYTES = 400  # scores, decision and plan of one unit, and what writing them takes


@dataclass(frozen=True)
class Estimate:
    """Estimated memory, disk and work of one run."""

    onload: Onload
    phase: str  # that needs most of the device, or of the host where layers run there
    device_bytes: int | None  # peak; None where layers run on the host
    host_bytes: int  # expected peak of anonymous memory of this process, with the streams that are kept in memory
    host_need_bytes: int  # the same with every stream in a file: what the run cannot do without
    stream_bytes: int  # residual streams, at most: in memory as far as they fit, else in files
    stream_phase: str  # where they are
    share: float  # that it needs of the device or the host, whichever is fuller; above 1 it does not fit
    mapped_bytes: int  # residual streams in temporary files
    new_weights_bytes: int  # on disk until the checkpoint is written
    checkpoint_bytes: int
    bytes_read: int  # of parameters, while calibrating
    layer_evaluations: int
    flops: int  # in all
    solve_flops: int  # of them in inverses and solves, which no number of tokens changes

    @property
    def disk(self) -> int:
        """Peak number of bytes on disk beside the dense model."""
        return max(self.mapped_bytes, self.checkpoint_bytes) + self.new_weights_bytes


class Peak(NamedTuple):
    """The most bytes that one phase takes; ``need`` is ``host`` without streams."""

    device: int
    need: int
    host: int
    mapped: int
    streams: int


class Memory:
    """A method, a model and a text, and the bytes that this process may hold.

    ``device`` and ``host`` are sizes of machines that are not here. Without a device layers run on the host.

    Raises:
        UserError: what shapes and options alone can tell.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        method: PruningMethod,
        data: CalibrationDataModule,
        device: int | None = None,
        host: int | None = None,
    ) -> None:
        self.method, self.data = method, data
        method.trainer = trainer
        if not method.layers:
            there = any(
                expanded(method.pretrained, "--model.pretrained").glob("*.safetensors")
            )  # else the config is enough
            method.checkpoint = Checkpoint.open(method.pretrained, weights=there)
            method.check_shapes(meta_model(method.checkpoint.config))
        samples, self.seq_len, self.eval_seq_len = data.num_samples, data.seq_len, data.eval_seq_len
        if method.needs_calibration and data.source and is_token_array(data.source):
            samples, self.seq_len = load_token_array(data.source).shape
        self.windows: int | None = None  # of evaluation: all that the options allow
        arrays = []
        if data.eval_datasets == []:
            self.windows = self.eval_seq_len = 0
        elif data.eval_datasets and all(map(is_token_array, data.eval_datasets)):
            arrays = [load_token_array(name).shape for name in data.eval_datasets]
            self.windows, self.eval_seq_len = max(arrays, key=lambda shape: shape.numel())
        kept = sum(one.tokens.numel() for one in data.evaluation) or sum(shape.numel() for shape in arrays)
        if not kept and self.windows is None:
            kept = UNREAD_TOKENS * len(data.eval_datasets or [0]) * (2 if data.eval_long_seq_len else 1)
        positions = method.checkpoint.limits[1] or self.seq_len + self.eval_seq_len
        for option, length in {"eval_seq_len": self.eval_seq_len, "seq_len": self.seq_len}.items():
            if length > positions and (option != "seq_len" or method.needs_calibration):
                raise UserError(
                    f"--data.{option}: found windows of {length} tokens; the model has {positions} positions. Lower "
                    f"--data.{option}."
                )
        self.dtype = load_dtype(str(trainer.precision))  # of the weights while they are computed with
        try:
            self.stored = method.checkpoint.stored_dtype
        except UserError:  # a config alone
            named = getattr(method.checkpoint.config, "dtype", None)
            self.stored = named if isinstance(named, torch.dtype) else torch.bfloat16
        place, self.held = trainer.strategy.root_device, anonymous_bytes()  # held before the run
        self.host = host or self.held + free_host_bytes() // trainer.num_devices
        self.device = device or (max(1, free_bytes(place)) if place.type != "cpu" else None)
        # Of this process: samples, and tokens of evaluation whose dense residual streams are kept until the end.
        self.samples, self.kept_tokens = -(-samples // trainer.world_size), -(-kept // trainer.world_size)

    def estimate(self, onload: Onload) -> Estimate:
        """Estimate the run with its weights placed as ``onload`` says."""
        method, size = self.method, self.dtype.itemsize
        view, layers = self._largest, len(method.layers)
        layer, inside = view.cost, sum(one.cost for one in method.layers)
        outside = method.dense_parameters - inside
        copied = self.device is not None or self.dtype != self.stored  # else they are views of the files
        joined = 0 if copied else self._joined  # of each layer, copies all the same
        weights = (outside + (layer if onload == "layer" else inside)) * size if copied else 0
        weights += joined * (1 if onload == "layer" else layers)
        weights += 2 * layer if "mixed" in str(method.trainer.precision) else 0
        ahead = 0 if onload == "model" or layers == 1 else layer * size if copied else joined
        free = self.host - self.held if self.device is None else self.device - DEVICE_OVERHEAD
        load, passes = self._load(max(0, free - weights)), self._passes()
        saved = self.stored if method.save_dtype == "auto" else getattr(torch, method.save_dtype)
        # One layer and the next, cut, and a parameter of experts before it is cut.
        # Where only experts are removed, every layer loses the same.
        alike = not method.uneven or {*method.kinds(method.layers)} <= {*EXPERTS}
        removed = (method.requested_ratio or 0.0) * method.dense_parameters / layers if alike else 0.0
        writing = int(min(2, layers) * (layer - removed)) * saved.itemsize
        writing += load.largest_parameter * size if joined else 0
        writing += outside * saved.itemsize if saved != self.stored else 0
        units = sum(one.units(block) for one in method.layers for block in one.prunable) if method.uneven else 0
        work = self._evaluation(load, onload)
        peaks = {
            "evaluation": self._peak(weights + work, ahead + UNIT_BYTES * units),
            "writing": self._peak(0, writing),
        }
        for one in passes:
            work, new, stores = self._calibration(one, load)
            peaks[one.name] = self._peak(weights + work, ahead + new, stores)
        where = 1 if self.device is None else 0
        loads, evaluations, flops, solving = self._work(load, passes)
        most = Peak(*map(max, zip(*peaks.values(), strict=True)))
        return Estimate(
            onload=onload,
            phase=max(peaks, key=lambda name: peaks[name][where]),
            device_bytes=None if self.device is None else most.device,
            host_bytes=most.host,
            host_need_bytes=most.need,
            stream_bytes=most.streams,
            stream_phase=max(peaks, key=lambda name: peaks[name].streams),
            share=max(self.shares(most.device, most.need).values()),
            mapped_bytes=most.mapped,
            new_weights_bytes=layers * size * sum(one.holds(view, load).new_weights for one in passes),
            checkpoint_bytes=int(method.dense_parameters * (1 - (method.requested_ratio or 0.0))) * saved.itemsize,
            bytes_read=size * (method.steps * loads * layer if onload == "layer" else method.dense_parameters),
            layer_evaluations=round(method.steps * evaluations),
            flops=round(method.steps * flops),
            solve_flops=round(method.steps * solving),
        )

    def shares(self, device: int, host: int) -> dict[str, float]:
        """The shares that so many bytes are of the memory there is, by place."""
        shares = {} if self.device is None else {"device": device / self.device}
        return shares | {"host": host / self.host}

    @property
    def forward_flops(self) -> int:
        """Operations of one forward of the calibration text through all layers, as ``Estimate.flops`` counts them."""
        return 2 * self._largest.num_weights * len(self.method.layers) * self.samples * self.seq_len

    @property
    def _joined(self) -> int:
        """Bytes of a layer's experts, where files hold every matrix of them apart."""
        experts, names = self._largest.experts, family_of(self.method.checkpoint.config).experts
        if experts is None or names is None or names.stored is None:
            return 0
        return experts.count * experts.expert_cost * self.dtype.itemsize

    @property
    def _largest(self) -> LayerStructure:
        """The layer with the most parameters: all are alike but in a model that was pruned before."""
        return max(self.method.layers, key=lambda view: view.cost)

    def _passes(self) -> list[Pass]:
        """The passes of the method, as if every unit were kept (for a method that removes layers: all but the last)."""
        measuring = [] if self.method.saved is not None else self.method.passes()
        layers = self.method.layers
        kept = without(layers, [len(layers) - 1]) if self.method.whole_layers else unpruned(layers)
        return measuring + self.method.refit_passes(kept, lambda: torch.zeros(0))

    def _load(self, free: int) -> Load:
        view = self._largest
        sizes = [linear.weight.numel() for linear in view.linears.values()]
        # The input, gate and up, the product and the output, as it is and weighed, of every expert of a token.
        experts, routed, whole = view.experts, 0, []
        if experts is not None:
            routed = experts.top_k * (3 * experts.width + 3 * experts.hidden)
            whole = [weight.numel() for weight in experts.weights().values()]
            sizes += [each // experts.count for each in whole]
        return Load(
            num_layers=len(self.method.layers),
            hidden_size=self.method.checkpoint.config.hidden_size,
            widest_input=max(one.projection(kind).in_features for one in self.method.layers for kind in one.prunable),
            layer_weights=view.num_weights,
            largest_weight=max(sizes),
            largest_parameter=max(sizes + whole),
            routed=routed,
            rows=self.samples,
            batch_size=min(self.data.batch_size, self.samples),
            seq_len=self.seq_len,
            dtype=self.dtype,
            accelerated=self.device is not None,
            free=free,
        )

    def _evaluation(self, load: Load, onload: Onload) -> int:
        """Windows that wait between two layers, and one batch in a layer or in the head."""
        batch, window = self.data.eval_batch_size, self.eval_seq_len * load.hidden_size * load.dtype.itemsize
        most = batch * (1 if onload == "model" or not window else max(1, STEP_BYTES // (batch * window)))
        windows = most if self.windows is None else min(most, self.windows)
        tokens = min(batch, windows) * self.eval_seq_len
        return windows * window + max(self._forward(tokens, load), self._head(tokens, 8))

    def _calibration(self, one: Pass, load: Load) -> tuple[int, int, list[int]]:
        """Bytes where layers run, on the host beside them, and of every residual store."""
        holding, size, rows = one.holds(self._largest, load), load.dtype.itemsize, _rows(one, load)
        running = holding.running + (self._forward(load.tokens, load) if one.reads else 0)
        new = holding.new_weights * size
        work = max(running, self._head(load.tokens, holding.per_logit), holding.finishing + new)
        return work, new if load.accelerated else 0, [rows * load.seq_len * width * size for width in holding.stores]

    def _forward(self, tokens: int, load: Load) -> int:
        """Three of the MLP's inner states, or as much in attention, or what a mixer's weights or experts make of the
        hidden size, beside what enters, as it is and normed."""
        views = self.method.layers
        attention = [2 * one.projection(Block.ATTENTION).in_features for one in views if Block.ATTENTION in one.parts]
        mixers = [view.block_cost(Block.MIXER) // (3 * load.hidden_size) for view in views]
        inner = max(3 * max(load.widest_input, *attention, *mixers), load.routed)
        return tokens * load.dtype.itemsize * (inner + 2 * load.hidden_size)

    def _head(self, tokens: int, per_logit: int) -> int:
        """The logits of one chunk."""
        vocabulary = self.method.checkpoint.limits[0]
        return min(tokens, max(1, LOGITS_BYTES // (4 * vocabulary))) * vocabulary * per_logit

    def _peak(self, work: int, beside: int, stores: Sequence[int] = ()) -> Peak:
        """Bytes of one phase: a store is a file where it takes more than its share. The dense model's residual streams
        on the evaluation sets are there in every phase."""
        kept = self.kept_tokens * self.method.checkpoint.config.hidden_size * self.dtype.itemsize
        device = 0 if self.device is None else work + DEVICE_OVERHEAD
        need = self.held + HOST_OVERHEAD + beside + (work if self.device is None else 0)
        host, mapped = need, 0
        for store in sorted([*stores, kept]):
            fits = store <= SHARE * (self.host - host)
            host, mapped = (host + store, mapped) if fits else (host, mapped + store)
        return Peak(device, need, host, mapped, sum(stores) + kept)

    def _work(self, load: Load, passes: list[Pass]) -> tuple[int, float, float, float]:
        """Number of times a layer is loaded; work on batches of all passes in layers' forwards of one; operations in
        all, and of them in solves."""
        loads, evaluations, flops, solving = 0, 0.0, 0.0, 0.0
        for one in passes:
            steps, rows = one.steps(self.method.layers), _rows(one, load)
            pairs = [(self.method.layers[step.layer], step) for step in steps]
            loads += 1 + sum(before.layer != step.layer for before, step in pairwise(steps))
            cost = sum(one.cost(*pair) for pair in pairs) if one.reads else 0.0
            evaluations += cost * -(-rows // load.batch_size)
            solves = 2 * load.layer_weights * sum(one.cost_to_finish(*pair) for pair in pairs)
            flops += 2 * load.layer_weights * cost * rows * load.seq_len + solves
            solving += solves
        return loads, evaluations, flops, solving

    def refusal(self, estimate: Estimate) -> str:
        """Message on an estimate that does not fit: what is missing, and what would help, with what it then takes."""
        where = self._fullest(estimate)
        room = self.device if where == "device" and self.device is not None else self.host
        found = {"--model.onload layer": self.estimate("layer")}
        found |= {option: self._estimate_with(estimate.onload, *change) for option, change in self._changes.items()}
        now = _taken(estimate, where)
        helps = [f"{option} ({size(it)})" for option, one in found.items() if (it := _taken(one, where)) < 0.99 * now]
        return (
            f"--model.onload {estimate.onload} takes {size(now)} of {where} memory ({estimate.phase}), there is room "
            f"for {size(room)}. {_remedies(helps)}"
        )

    def advice(self) -> str:
        """The options that make anything smaller: memory may run out where the estimate is not fullest."""
        return _remedies(["--model.onload layer"] * (self.method.slot.onload != "layer") + list(self._changes))

    @property
    def _changes(self) -> dict[str, tuple[Any, str, Any]]:
        """Options that make a run smaller than it is: what has them, their names there and the values."""
        half, method, data = torch.bfloat16, self.method, self.data
        smaller = {
            "--trainer.precision bf16-true": (self, "dtype", half, self.dtype.itemsize > half.itemsize),
            "--model.refit none": (method, "refit", None, method.refit is not None),
            "--model.temperature 0": (method, "temperature", 0.0, getattr(method, "temperature", 0) > 0),
            "--data.batch_size 1": (data, "batch_size", 1, data.batch_size > 1),
            "--data.eval_batch_size 1": (data, "eval_batch_size", 1, data.eval_batch_size > 1),
        }
        return {option: (of, name, value) for option, (of, name, value, larger) in smaller.items() if larger}

    def _fullest(self, estimate: Estimate) -> str:
        """Where most of the room is taken: ``device`` or ``host``."""
        shares = self.shares(estimate.device_bytes or 0, estimate.host_need_bytes)
        return max(shares, key=shares.__getitem__)

    def _estimate_with(self, onload: Onload, of: Any, option: str, value: Any) -> Estimate:
        """The estimate if an option of the run had another value."""
        before = getattr(of, option)
        setattr(of, option, value)
        try:
            return self.estimate(onload)
        finally:
            setattr(of, option, before)


def _remedies(options: list[str]) -> str:
    return "What may help: " + "; ".join([*options, "another method; a larger device."])


def _taken(estimate: Estimate, where: str) -> int:
    return (estimate.device_bytes or 0) if where == "device" else estimate.host_need_bytes


def _rows(one: Pass, load: Load) -> int:
    return load.rows if one.num_samples is None else min(one.num_samples, load.rows)


def place(trainer: L.Trainer, method: PruningMethod, data: CalibrationDataModule) -> None:
    """Turn ``onload auto`` into ``model`` where the whole model fits with room to spare, else ``layer``. UserError,
    which says what is missing and what would help, where what was requested does not fit."""
    method.trainer = trainer
    if method.saved is not None and not method.needs_calibration:  # only the evaluation runs
        return
    memory = Memory(trainer, method, data)
    if method.slot.onload == "auto":
        method.slot.onload = "model" if memory.estimate("model").share <= ROOM else "layer"
    estimate = memory.estimate(method.slot.onload)  # type: ignore[arg-type]
    if estimate.share > 1:
        raise UserError(memory.refusal(estimate))
