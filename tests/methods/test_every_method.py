"""The promises every pruning method keeps. A new method is one line in ``behaviour.SYSTEMS``."""

import csv
import json
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torchmetrics import Metric
from transformers import PreTrainedModel

import lightning_prune
from lightning_prune.data.calibration import fingerprint
from lightning_prune.methods.base import PruningMethod
from lightning_prune.models.families import LayerStructure, count_parameters, layer_structures
from lightning_prune.models.layered import LayeredModel
from lightning_prune.models.vocabulary import Block
from tests.methods.behaviour import (
    DENSE_SYSTEMS,
    FAST_DENSE,
    FAST_SYSTEMS,
    MEASURES,
    MODELS,
    SYSTEMS,
    Run,
    logits,
    prune,
    save_model,
    save_tokens,
    temporary_files,
)
from tests.tiny import CUTTABLE, EVERY_FAMILY, FAMILIES, WHOLE_ATTENTION, tiny_tokens

RATIO = 0.29
KINDS = MODELS | {  # of attention, by KV heads for 4 query heads
    "gqa-untied": {"kv_heads": 2, "tied": False},
    "mha-tied": {"kv_heads": 4},
    "mqa-untied": {"kv_heads": 1, "tied": False},
}
KINDS |= {family: {"family": family} for family in EVERY_FAMILY if family not in FAMILIES}
pytestmark = pytest.mark.usefixtures("trusted_families")
every_system = pytest.mark.parametrize("system", SYSTEMS)
# A family changes what calibration runs, not what a method makes of it, and tests/models and tests/calibration take
# every family forward and backward. Groups that stay meet every system. Of the others each meets two kinds of pass in
# turn, and those whose layers are attention and an MLP of one shape, as Llama's, meet one.
UNLIKE = ("gqa-tied", "olmo2")
ALIKE = CUTTABLE[len(FAMILIES) : CUTTABLE.index("gemma4_text")]
FAST_KINDS = ("mqa-untied", "phi3", "gemma3_text", "olmo2")  # one of each layout; the others are slow


def slow_unless(fast: bool, *values: Any) -> Any:
    return pytest.param(*values, marks=() if fast else pytest.mark.slow)


def is_fast(system: str, kind: str) -> bool:
    return kind == SYSTEMS[system].kind or (kind in FAST_KINDS and system in FAST_SYSTEMS)


def systems_for(kind: str) -> tuple[str, ...]:
    if kind == "moe":
        return (*(name for name in SYSTEMS if SYSTEMS[name].kind == kind), "shortgpt")
    if kind in UNLIKE:
        return DENSE_SYSTEMS
    every = 4 if kind in ALIKE else 2
    return FAST_DENSE if kind in FAST_KINDS else FAST_DENSE[list(KINDS).index(kind) % every :: every]


def each_pass_with(fast: Any, *slow: Any) -> list[Any]:
    """One system of each kind of pass with ``fast``, and where slow tests run with ``slow``."""
    return [slow_unless(value == fast, system, value) for value in (fast, *slow) for system in FAST_SYSTEMS]


# What Lightning takes for 16-mixed on the CPU is bf16-mixed; the command refuses it there.
ROUNDING = {"bf16-true": 2.0**-8, "16-true": 2.0**-11, "bf16-mixed": 2.0**-8}


@dataclass
class Watched:
    """Dtypes that were seen during a run: of layers that came in, of the open model, and of every statistic whenever it
    took something up."""

    layers: set[torch.dtype] = field(default_factory=set)
    states: dict[str, set[torch.dtype]] = field(default_factory=lambda: defaultdict(set))


def watch(patch: pytest.MonkeyPatch, method: PruningMethod) -> Watched:
    seen = Watched()
    enter, make = LayeredModel.enter, Metric.__init__

    def spy_on_enter(self: LayeredModel, index: int) -> Any:
        layer = enter(self, index)
        if method.slot._model is self:  # others write, and read what was written
            seen.layers.update(parameter.dtype for parameter in layer.parameters())
            rotary = [buffer for name, buffer in self.net.named_buffers() if name.endswith("inv_freq")]
            assert all(buffer.dtype == torch.float32 for buffer in rotary)
        return layer

    def spy_on_statistics(self: Metric, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        update = self.update

        def spy_on_update(*args: Any, **options: Any) -> None:
            update(*args, **options)
            seen.states[type(self).__name__].update(getattr(self, name).dtype for name in self._defaults)

        self.update = spy_on_update  # type: ignore[method-assign]

    patch.setattr(LayeredModel, "enter", spy_on_enter)
    patch.setattr(Metric, "__init__", spy_on_statistics)
    return seen


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``shared(system, kind, precision, onload)`` is one run each, and what was seen of it; tests only look at it."""
    root = tmp_path_factory.mktemp("every-method")
    tokens = save_tokens(root / "calibration.npy")
    held_out = save_tokens(root / "held-out.npy", tiny_tokens(6, 16, seed=1))

    @lru_cache(None)
    def watched(system: str, kind: str, precision: str, onload: str) -> tuple[Run, Watched]:
        model = root / kind
        if not model.exists():
            save_model(model, **KINDS[kind])
        method = SYSTEMS[system].make(pretrained=str(model), pruning_ratio=RATIO, onload=onload)
        evaluate_on = [held_out] if system in FAST_SYSTEMS and kind == SYSTEMS[system].kind else []  # half of a run
        with pytest.MonkeyPatch.context() as patch:
            seen = watch(patch, method)
            folder = root / f"runs-{kind}" / precision / onload
            return prune(method, tokens, folder, precision, evaluate_on=evaluate_on), seen

    def run(system: str, kind: str = "", precision: str = "32-true", onload: str = "layer") -> Run:
        return watched(system, kind or SYSTEMS[system].kind, precision, onload)[0]

    run.watched = watched  # type: ignore[attr-defined]
    return run


def dense_of(run: Run) -> PreTrainedModel:
    return lightning_prune.load(run.method.pretrained)


def plan_of(run: Run) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((run.folder / "plan.json").read_text())
    return plan


@pytest.mark.parametrize(
    ("system", "kind"),
    [slow_unless(is_fast(system, kind), system, kind) for kind in KINDS for system in systems_for(kind)],
)
def test_the_ratio_is_met_and_the_checkpoint_is_what_was_decided(shared: Any, system: str, kind: str) -> None:
    """Never more than asked, and short by less than one unit, or one step of experts; whole layers: the nearest
    count."""
    run = shared(system, kind)
    dense, decided = dense_of(run), run.model
    assert torch.equal(logits(lightning_prune.load(run.pruned)), logits(decided))
    assert not torch.equal(logits(decided), logits(dense))
    total, left = count_parameters(dense), count_parameters(decided)
    plan = run.method.plan
    assert (plan.parameters["dense"], plan.parameters["pruned"]) == (total, left)
    if kind in WHOLE_ATTENTION:
        groups = list(range(layer_structures(dense)[0].units(Block.ATTENTION)))
        attention = [(layer.kept[Block.ATTENTION], layer.kept[Block.MLP]) for layer in plan.layers]
        assert all(kept == groups or not (kept or channels) for kept, channels in attention)
    if SYSTEMS[system].removes == "weights":  # masks keep the shapes; their ratio is one of the projections' weights
        assert total == left
        projections = [linear for view in layer_structures(decided) for linear in view.linears.values()]
        zeros = sum(int((linear.weight == 0).sum()) for linear in projections)
        assert plan.achieved_ratio == zeros / sum(linear.weight.numel() for linear in projections)
        assert plan.pruning_ratio - 0.01 < plan.achieved_ratio <= plan.pruning_ratio
        return
    assert plan.achieved_ratio == pytest.approx(1 - left / total, abs=1e-12)
    removed, asked = total - left, RATIO * total
    views = layer_structures(dense)
    if SYSTEMS[system].removes == "experts":
        assert asked - smallest_step(run.method.layers) < removed <= asked
    elif SYSTEMS[system].removes == "groups":
        # The unit that did not fit may have been the last of its block, which takes the block's norms along.
        both = [(view, block) for view in views for block in view.prunable]
        norms = max(view.block_cost(block) - view.units(block) * view.unit_cost(block) for view, block in both)
        largest_unit = max(view.unit_cost(block) for view, block in both) + norms
        assert asked - largest_unit < removed <= asked
    else:
        order = run.method.scores.importance.argsort(kind="stable").tolist()
        with_attention = [layer for layer in order if Block.ATTENTION in views[layer].parts]
        if 0 < len(with_attention) < len(order):  # of a hybrid, one of them stays
            order.append(order.pop(order.index(with_attention[-1])))
        costs = [count_parameters(views[layer].layer) for layer in order[:-1]]
        assert abs(removed - asked) == min(abs(spent - asked) for spent in accumulate(costs))


def smallest_step(layers: list[LayerStructure]) -> int:
    """Parameters of one expert of every layer, or of eight channels of every expert."""
    experts = [view.experts for view in layers if view.experts is not None]
    if Block.EXPERT in layers[0].parts:
        return sum(one.expert_cost for one in experts)
    return sum(8 * one.count * one.channel_cost for one in experts)


@pytest.mark.parametrize(
    ("system", "batch_size"), [*((system, 3) for system in SYSTEMS), *each_pass_with(3, 128)[len(FAST_SYSTEMS) :]]
)
def test_batch_size_and_sample_order_do_not_change_the_result(
    shared: Any, tmp_path: Path, system: str, batch_size: int
) -> None:
    expected = shared(system)  # in batches of 4
    method = SYSTEMS[system].make(pretrained=expected.method.pretrained, pruning_ratio=RATIO)
    shuffled = tiny_tokens(10, 16)[torch.tensor([7, 2, 9, 0, 5, 1, 8, 3, 6, 4])]
    run = prune(method, save_tokens(tmp_path / "c.npy", shuffled), tmp_path, batch_size=batch_size)
    torch.testing.assert_close(run.method.scores.importance, expected.method.scores.importance, rtol=1e-5, atol=0)
    assert (run.method.scores.pruned == expected.method.scores.pruned).all()
    assert run.method.plan.layers == expected.method.plan.layers
    for new, old in zip(run.new_weights, expected.new_weights, strict=True):
        assert new.keys() == old.keys()
        for role, weight in new.items():
            torch.testing.assert_close(weight, old[role], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("system", "precision"),
    each_pass_with("bf16-true", "16-true", "bf16-mixed")
    + [slow_unless(False, system, "bf16-true") for system in MEASURES],
)
def test_half_precision_is_for_the_layers_alone_and_decides_as_single_but_for_rounding(
    shared: Any, system: str, precision: str
) -> None:
    full, half = shared(system), shared(system, precision=precision)
    seen = shared.watched(system, SYSTEMS[system].kind, precision, "layer")[1]
    expected = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)
    assert seen.layers == {expected}
    assert set().union(*seen.states.values()) <= {torch.float32, torch.float64, torch.int64}, seen.states
    assert seen.states.keys() - {"Perplexity"} or not half.method.needs_calibration
    # The checkpoint has the dtype of the dense one, whatever was calculated in.
    assert lightning_prune.load(half.pruned).dtype == torch.float32
    assert torch.equal(logits(lightning_prune.load(half.pruned)), logits(half.model))
    assert half.method.plan.dtype == "float32"
    assert json.loads((half.folder / "environment.json").read_text())["precision"] == precision

    before, after = full.method.scores, half.method.scores
    assert after.importance.dtype == before.importance.dtype
    # A unit can change sides only where rounding moves it past the last one removed: few are so close. Among experts a
    # router also sends a few tokens elsewhere, of the some forty that each of these has.
    routed = SYSTEMS[system].kind == "moe"
    assert float((before.pruned != after.pruned).mean()) <= max((32 if routed else 8) * ROUNDING[precision], 0.01)
    if routed:
        error = np.abs(after.importance - before.importance) / before.importance
        assert float(np.median(error)) <= 32 * ROUNDING[precision]
    elif system not in ("slimgpt", "hgsp_kfac"):  # whose errors depend on which units were removed before
        # Four layers of some ten rounded steps each, most of which average out over a unit's weights; a square has
        # twice the relative error.
        steps = 32 if system == "hgsp_fisher" else 16
        torch.testing.assert_close(after.importance, before.importance, rtol=steps * ROUNDING[precision], atol=0)
    if system in FAST_SYSTEMS:
        values = [run.metrics["perplexity"]["held-out.npy"] for run in (full, half)]
        for which in ("dense", "pruned"):
            assert values[1][which] == pytest.approx(values[0][which], rel=0.05)


@every_system
def test_the_run_folder_is_complete_and_its_files_agree(shared: Any, system: str) -> None:
    run = shared(system)
    names = {path.name for path in run.folder.iterdir()}
    wanted = {"config.yaml", "calibration.json", "environment.json", "scores.csv", "plan.json", "method.json"}
    assert wanted | {"metrics.json", "pruned"} <= names
    assert temporary_files(run.folder) == []
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in run.pruned.iterdir()}
    assert not [path for path in run.folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]

    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert metrics["pruning_ratio"] == {
        "requested": run.method.plan.pruning_ratio,
        "achieved": run.method.plan.achieved_ratio,
    }
    assert metrics["parameters"] == run.method.plan.parameters
    assert metrics["peak_memory_bytes"] > 0
    phases = {"load", "prune", "save", "total"}
    if system in FAST_SYSTEMS:
        assert metrics["perplexity"]["held-out.npy"]["tokens"] == 6 * 15
        phases |= {"evaluate dense", "evaluate pruned"}
    assert phases <= metrics["seconds"].keys()
    assert plan_of(run) == run.method.plan.to_json()
    calibration = json.loads((run.folder / "calibration.json").read_text())
    if run.method.needs_calibration:
        assert calibration["fingerprint"] == plan_of(run)["calibration_fingerprint"] == fingerprint(tiny_tokens(10, 16))
        assert (calibration["num_samples"], calibration["seq_len"]) == (10, 16)
    else:
        assert calibration["dataset"] is None

    with (run.folder / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pruned = {(int(row["layer"]), row["block"], int(row["unit"])) for row in rows if row["pruned"] == "1"}
    assert pruned or SYSTEMS[system].removes == "weights"
    for layer in plan_of(run)["layers"]:
        for row in (row for row in rows if int(row["layer"]) == layer["layer"]):
            here = (int(row["layer"]), row["block"], int(row["unit"]))
            if row["block"] == "layer":
                assert (here in pruned) == (not any(layer["kept"].values()))
            elif SYSTEMS[system].removes == "groups":
                assert (here in pruned) == (here[2] not in layer["kept"][row["block"]])
    assert all(float(row["importance"]) >= 0 for row in rows)


@pytest.mark.parametrize(("system", "precision"), each_pass_with("32-true", "bf16-true", "bf16-mixed"))
def test_where_the_weights_are_does_not_change_a_bit(shared: Any, system: str, precision: str) -> None:
    """One layer at a time on the device, or all of them; so a second run gives the same bytes, too."""
    runs = [shared(system, precision=precision, onload=onload) for onload in ("model", "layer")]
    for name in ("scores.csv", "plan.json", "calibration.json", "pruned/model.safetensors", "pruned/config.json"):
        assert (runs[0].folder / name).read_bytes() == (runs[1].folder / name).read_bytes(), name
    assert runs[0].metrics["perplexity"] == runs[1].metrics["perplexity"]
    for run, onload in zip(runs, ("model", "layer"), strict=True):
        assert json.loads((run.folder / "method.json").read_text())["onload"] == onload


@pytest.mark.parametrize("system", ["flap", "slimgpt"])
def test_checkpoint_has_the_requested_dtype(shared: Any, tmp_path: Path, system: str) -> None:
    base = shared(system).method.pretrained
    method = SYSTEMS[system].make(pretrained=base, pruning_ratio=RATIO, save_dtype="bfloat16")
    run = prune(method, save_tokens(tmp_path / "c.npy"), tmp_path)
    assert run.method.plan.dtype == "bfloat16"
    assert run.method.plan.layers == shared(system).method.plan.layers
    expected = load_file(shared(system).pruned / "model.safetensors")
    found = load_file(run.pruned / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in found.items())
