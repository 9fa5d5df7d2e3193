"""A method's real passes, evaluation and cut on fake tensors of the real shapes, on a decoder of a few layers.

Everything a layer needs is what the real code makes there. What depends on the number of layers (residual stores,
findings, weights that stay) is linear in it, layer evaluations are at most quadratic, so two or three short decoders
tell about the long one. Residual stores have their real number of rows, but only the first batches run.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.calibration.loop import Walk
from lightning_prune.calibration.module import STEP_BYTES, LayeredModule
from lightning_prune.calibration.passes import WEIGHT, Batch, Finding, Setting
from lightning_prune.calibration.residuals import ResidualStore
from lightning_prune.calibration.results import Findings
from lightning_prune.calibration.statistics.perplexity import Perplexity
from lightning_prune.checkpoint.cut import pruned_config
from lightning_prune.checkpoint.plan import LayerPlan, PruningPlan
from lightning_prune.checkpoint.pruned import PrunedSource
from lightning_prune.checkpoint.write import write_weights
from lightning_prune.methods import slimgpt_math
from lightning_prune.methods.base import PruningMethod
from lightning_prune.methods.slimgpt import SlimGPTPass
from lightning_prune.methods.slimgpt_math import choose_dtype
from lightning_prune.models.checkpoint import skeleton
from lightning_prune.models.families import LayerAnatomy, family_of
from lightning_prune.models.layered import LayeredModel, Onload
from lightning_prune.models.sources import Prefetching, Source
from lightning_prune.preflight.ledger import Ledger
from lightning_prune.preflight.workload import Workload
from lightning_prune.support.progress import Progress

BATCHES = 2  # the second one meets everything that the first one left


@dataclass(frozen=True)
class Shapes:
    """The model and where it is to run.

    ``stored``, ``dtype``: of the weights on disk and of those that are computed with; ``saved``: of the pruned ones.
    ``gpu``: layers run on a device of its own, the residual stream stays on the host.
    """

    config: Any
    stored: torch.dtype
    dtype: torch.dtype
    saved: torch.dtype
    gpu: bool
    onload: Onload


@dataclass
class PhaseUse:
    """Most that one kind of step held: ``work`` on the device (weights included), ``host`` beside it, residual
    ``stores`` as size → how many."""

    work: int = 0
    host: int = 0
    stores: Counter[int] = field(default_factory=Counter)

    def widen(self, work: int, host: int, stores: Counter[int]) -> None:
        """Take the larger of both."""
        self.work, self.host = max(self.work, work), max(self.host, host)
        if _bytes(stores) > _bytes(self.stores):
            self.stores = Counter(stores)


@dataclass
class DryRun:
    """What a decoder of ``layers`` layers took, by phase."""

    layers: int
    phases: dict[str, PhaseUse]
    evaluations: int
    flops: int
    bytes_read: int
    disk: int


def dry_run(
    method: PruningMethod,
    shapes: Shapes,
    load: Workload,
    layers: int,
    free: int,
    context: Callable[[], AbstractContextManager[object]],
    solves: "Solves",
) -> DryRun:
    """Run evaluation, passes and cut of ``method`` on the first ``layers`` layers of the model.

    ``method`` has seen the config (``check_before_loading``). ``free``: bytes that the whole model leaves where layers
    run, before anything was loaded; solvers choose their precision by it.
    """
    config = shortened(shapes.config, layers)
    plan = _nearly_everything(config)
    net, short = skeleton(config), skeleton(pruned_config(config, plan))
    ledger = Ledger(frozenset({"file", "store", "next", "finding"} if shapes.gpu else {"file", "store"}), shapes.gpu)
    run = DryRun(layers, {}, 0, 0, 0, 0)
    with torch.random.fork_rng(devices=[]), ledger:
        source = DrySource(ledger, net, shapes)
        model = LayeredModel(
            net, InlineReader(ledger, source, shapes.gpu), shapes.dtype, torch.device("cpu"), shapes.onload
        )
        if shapes.onload == "model":
            model.load_all()
        books = Books(ledger, run)
        if load.eval_windows != 0:
            _evaluate(model, shapes, load, books)
        read = model.bytes_read if shapes.onload == "layer" else 0
        findings = DryFindings(books)
        walk = _calibrate(method, plan, model, load, books, findings, free, context, solves)
        run.bytes_read, run.disk = model.bytes_read - read, findings.disk
        model.close()
        del model
        source.gpu = False
        _save(shapes, config, plan, short, source, walk, books)
    return run


class Books:
    """Closes the ledger's page at the end of every phase."""

    def __init__(self, ledger: Ledger, run: DryRun) -> None:
        self.ledger, self.run = ledger, run
        self.stores: Counter[int] = Counter()
        self.most_stores: Counter[int] = Counter()

    @property
    def held(self) -> int:
        """Bytes alive now where layers run."""
        return sum(size for kind, size in self.ledger.live.items() if kind not in self.ledger.aside)

    def store(self, size: int, change: int) -> None:
        """A residual store comes (1) or goes (−1)."""
        self.stores[size] += change
        if _bytes(self.stores) > _bytes(self.most_stores):
            self.most_stores = Counter(self.stores)

    def page(self, phase: str, work: Callable[[], object]) -> None:
        """Do ``work`` and note what it held under ``phase``."""
        self.ledger.start_peak()
        self.most_stores = Counter(self.stores)
        work()
        peak, aside = self.ledger.peak, self.ledger.most
        work_bytes = sum(size for kind, size in peak.items() if kind not in self.ledger.aside)
        host = sum(aside[kind] for kind in ("next", "finding") if kind in self.ledger.aside)
        self.run.phases.setdefault(phase, PhaseUse()).widen(work_bytes, host, self.most_stores)


class DrySource:
    """Parameters without numbers. On the CPU those in the stored dtype are views of the file, and cost nothing."""

    def __init__(self, ledger: Ledger, net: nn.Module, shapes: Shapes) -> None:
        self.ledger, self.stored, self.gpu = ledger, shapes.stored, shapes.gpu
        self.shapes = {name: parameter.shape for name, parameter in net.named_parameters(remove_duplicate=False)}

    def read(self, names: Sequence[str], dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
        """See ``models.sources.Source``."""
        view = not self.gpu and dtype in (None, self.stored)
        with self.ledger.booking("file" if view else "weights"):
            return {name: torch.empty(self.shapes[name], dtype=dtype or self.stored) for name in names}


class InlineReader(Prefetching):
    """Reads ahead at once instead of in a thread; for a GPU what is read ahead stands on the host until it is used."""

    def __init__(self, ledger: Ledger, source: Source, gpu: bool) -> None:
        super().__init__(source)
        self.ledger, self.gpu = ledger, gpu

    def announce(self, names: Sequence[str], dtype: torch.dtype | None, device: torch.device) -> None:
        """Read ``names`` now."""
        key = tuple(names)
        if self._next is None or self._next[0] != key:
            found: Future[dict[str, Tensor]] = Future()
            found.set_result(self.source.read(names, dtype, device))
            if self.gpu:
                for tensor in found.result().values():
                    self.ledger.rebook(tensor, "next")
            self._next = (key, found)

    def read(self, names: Sequence[str], dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
        """See ``Source``."""
        if self._next is None or self._next[0] != tuple(names):
            return self.source.read(names, dtype, device)
        found, self._next = self._next[1].result(), None
        if self.gpu:
            with self.ledger.booking("weights"):
                return {name: torch.empty_like(tensor) for name, tensor in found.items()}
        return found


class DryStore(ResidualStore):
    """Is booked, and never a file."""

    def __init__(self, books: Books, rows: int) -> None:
        super().__init__(rows, Path())
        self.books, self.size = books, 0

    def close(self) -> None:
        """Give the memory back."""
        if self._values is not None:
            self.books.store(self.size, -1)
        super().close()

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
        with self.books.ledger.booking("store"):
            values = torch.empty(shape, dtype=dtype)
        self.size = values.untyped_storage().nbytes()
        self.books.store(self.size, 1)
        return values


@dataclass(frozen=True)
class DrySetting(Setting):
    """Stores of the real size, the first batches alone, and a device with ``free`` bytes for everything."""

    books: Books | None = None
    fed: int = 0
    free: int = 0

    def store(self) -> ResidualStore:
        """A new store."""
        assert self.books is not None
        return DryStore(self.books, self.rows)

    def free_bytes(self, device: torch.device) -> int:
        """Of the device in question, not of the one that this runs on."""
        assert self.books is not None
        return self.free - self.books.held

    def batches(self) -> Iterator[slice]:
        """Those that run."""
        for start in range(0, self.fed, self.batch_size):
            yield slice(start, min(start + self.batch_size, self.fed))


class DryFindings(Findings):
    """New weights go to disk; the rest stays."""

    def __init__(self, books: Books) -> None:
        super().__init__(None)
        self.books, self.disk = books, 0

    def add(self, step: int, finding: Finding) -> None:
        """Keep what a step left."""
        finding = {name: tensor.detach().contiguous() for name, tensor in finding.items()}
        self.disk += sum(tensor.nbytes for tensor in finding.values())
        if "finding" in self.books.ledger.aside:  # from a GPU by way of the host
            with self.books.ledger.booking("finding"):
                copies = [torch.empty_like(tensor) for tensor in finding.values()]
            del copies
        self._found[step] = {name: tensor for name, tensor in finding.items() if not name.startswith(WEIGHT)}
        for tensor in self._found[step].values():
            self.books.ledger.rebook(tensor, "finding")
        with self.books.ledger.booking("file"):
            self._weights[step] = {
                name.removeprefix(WEIGHT): torch.empty_like(tensor)
                for name, tensor in finding.items()
                if name.startswith(WEIGHT)
            }


class Solves:
    """SlimGPT's solver, run once per kind of block: for large matrices it is thousands of operations.

    The block that loses most decides, since it takes the largest rounds; where the solver would run again, only what it
    held is booked.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, torch.dtype], tuple[int, dict[str, tuple[torch.Size, torch.dtype]]]] = {}

    def apply(self, one: SlimGPTPass, books: Books) -> None:
        """Let the pass solve as described."""
        conclude, ledger = one.conclude, books.ledger
        one.counts = [max(one.counts)] * len(one.counts)

        def once(view: LayerAnatomy, role: str) -> Finding:
            before = books.held
            key = (role, choose_dtype(view.linears[role].in_features, one.setting.free_bytes(one.model.device)))
            if key not in self._known:
                outside, ledger.peak = ledger.peak, Counter(ledger.live)
                with _coarse_chunks(view.linears[role].in_features):
                    found = conclude(view, role)
                inside = sum(size for kind, size in ledger.peak.items() if kind not in ledger.aside)
                self._known[key] = inside - before, {name: (one.shape, one.dtype) for name, one in found.items()}
                ledger.peak = max(outside, ledger.peak, key=ledger.total)
                return found
            held, shapes = self._known[key]
            scratch = torch.empty(max(0, held), dtype=torch.uint8)
            del scratch
            one.gram.give_up()
            return {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}

        one.conclude = once  # type: ignore[method-assign]


class DryShards:
    """Takes tensors as a checkpoint's shards do, and writes nothing."""

    def __init__(self, folder: Path, tensors: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> "DryShards":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def write(self, name: str, tensor: Tensor) -> None:
        """One tensor as bytes."""
        tensor.detach().to(device="cpu", dtype=self.dtype).contiguous()


def shortened(config: Any, layers: int) -> Any:
    """The same model with its first ``layers`` layers."""
    found = copy.deepcopy(config)
    found.num_hidden_layers = layers
    for name in family_of(config).per_layer_lists:
        if getattr(found, name, None):
            setattr(found, name, getattr(found, name)[:layers])
    return found


def _evaluate(model: LayeredModel, shapes: Shapes, load: Workload, books: Books) -> None:
    each = load.eval_batch_size * load.eval_seq_len * shapes.config.hidden_size * shapes.dtype.itemsize
    steps = 1 if shapes.onload == "model" else max(1, STEP_BYTES // each)
    windows = min(steps * load.eval_batch_size, load.eval_windows or steps * load.eval_batch_size)
    few = min(windows, BATCHES * load.eval_batch_size)  # the others only wait, as residual streams
    metric = Perplexity()
    module: Any = SimpleNamespace(
        model=model,
        datamodule=SimpleNamespace(eval_batch_size=load.eval_batch_size),
        progress=Progress(shown=False),
        evaluation_phase="",
    )
    batch = (torch.zeros(few, load.eval_seq_len, dtype=torch.int64), torch.ones(few), torch.arange(few))
    waiting = torch.empty(windows - few, load.eval_seq_len, shapes.config.hidden_size, dtype=shapes.dtype)
    with torch.no_grad():
        books.page("evaluate", lambda: LayeredModule._measure(module, batch, metric))
    del waiting


def _calibrate(
    method: PruningMethod,
    plan: PruningPlan,
    model: LayeredModel,
    load: Workload,
    books: Books,
    findings: Findings,
    free: int,
    context: Callable[[], AbstractContextManager[object]],
    solves: "Solves",
) -> Walk:
    fed = min(load.samples, BATCHES * load.batch_size)
    setting = DrySetting(
        model=model,
        rows=load.samples,
        samples=fed,
        batch_size=load.batch_size,
        seq_len=load.seq_len,
        scratch=Path(),
        context=context,
        books=books,
        fed=fed,
        free=free,
    )
    # One walk where a run makes two: a pass of the second does not care what the first one found.
    passes = [] if method.saved is not None else method.passes()
    passes += method.passes_behind(plan.layers, lambda: torch.arange(load.samples) % 2 == 1)
    for one in passes:
        if isinstance(one, SlimGPTPass):
            solves.apply(one, books)
    walk = Walk(passes, setting, findings)
    tokens, index = torch.zeros(fed, load.seq_len, dtype=torch.int64), torch.arange(fed)
    batches = [Batch(tokens[rows], torch.ones(fed)[rows], index[rows], rows) for rows in setting.batches()]
    for number, (one, step) in enumerate(walk.steps):
        last = step.layer + 1 == model.num_layers
        where = ", last layer" if last else ", first layer" if step.layer == 0 else ""

        before = model.evaluations, books.ledger.flops

        def work(number: int = number, reads: bool = one.reads) -> None:
            walk.start(number)
            for batch in batches if reads else ():
                with context():
                    walk.batch(number, batch)
            walk.finish(number)

        books.page(f"{one.name}, {step.phase}{where}", work)
        wanted = _batches(load, getattr(one, "num_samples", None))  # priors may take fewer samples
        times = wanted / min(wanted, len(batches))
        books.run.evaluations += round((model.evaluations - before[0]) * times)
        books.run.flops += round((books.ledger.flops - before[1]) * times)
    walk.close()
    return walk


@contextmanager
def _coarse_chunks(n: int) -> Iterator[None]:
    """Temporaries of at most 1/64 of an n × n matrix instead of 16 MB: a sixth of the operations, and 2 % too much."""
    before = slimgpt_math.CHUNK
    slimgpt_math.CHUNK = max(before, n * n // 64)
    try:
        yield
    finally:
        slimgpt_math.CHUNK = before


def _nearly_everything(config: Any) -> PruningPlan:
    """One group and one channel less in every layer: as much to copy as a plan can leave."""
    stay = family_of(config).whole_attention is not None
    groups = list(range(max(1, config.num_key_value_heads - (not stay))))
    channels = list(range(max(1, config.intermediate_size - 1)))
    kept = [LayerPlan(layer, groups, channels) for layer in range(config.num_hidden_layers)]
    return PruningPlan("dry run", None, 0.0, {"dense": 0, "pruned": 0}, None, "", kept)


def _save(shapes: Shapes, config: Any, plan: PruningPlan, short: Any, source: Source, walk: Walk, books: Books) -> None:
    reader = InlineReader(books.ledger, PrunedSource(source, config, plan, walk.weights_of), False)
    pruned = LayeredModel(short, reader, shapes.saved, torch.device("cpu"), "layer")
    books.page("save", lambda: write_weights(pruned, Path(), lambda layer: None, DryShards))
    pruned.close()


def _batches(load: Workload, num_samples: int | None) -> int:
    """Batches of a pass that reads the first ``num_samples`` samples."""
    samples = load.samples if num_samples is None else min(num_samples, load.samples)
    return -(-samples // load.batch_size)


def _bytes(stores: Counter[int]) -> int:
    return sum(size * count for size, count in stores.items())
