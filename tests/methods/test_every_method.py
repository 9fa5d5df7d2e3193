"""The promises every pruning method keeps. A new method is one line in ``behaviour.SYSTEMS``."""

import csv
import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchmetrics import Metric
from transformers import PreTrainedModel

import lightning_prune
from lightning_prune.checkpoint import write
from lightning_prune.data.calibration import fingerprint
from lightning_prune.methods.base import PruningMethod
from lightning_prune.models.families import LayerStructure, count_parameters, family_of, layer_structures
from lightning_prune.models.layered import LayeredModel
from lightning_prune.models.vocabulary import Block
from tests.methods.behaviour import (
    DENSE_SYSTEMS,
    FAST_SYSTEMS,
    MODELS,
    SYSTEMS,
    Run,
    logits,
    prune,
    save_model,
    save_tokens,
    temporary_files,
)
from tests.tiny import EVERY_FAMILY, FAMILIES, WHOLE_ATTENTION, tiny_tokens

RATIO = 0.29
KINDS = MODELS | {  # of attention, by KV heads for 4 query heads
    "gqa-untied": {"kv_heads": 2, "tied": False},
    "mha-tied": {"kv_heads": 4},
    "mqa-untied": {"kv_heads": 1, "tied": False},
}
KINDS |= {family: {"family": family} for family in EVERY_FAMILY if family not in FAMILIES}
every_system = pytest.mark.parametrize("system", SYSTEMS)
# A family changes what calibration runs, not what a method makes of it: those that are not plain Llamas meet one system
# of each kind of pass.
OTHER_FAMILIES = EVERY_FAMILY[len(FAMILIES) :]
# Fused projections, and groups that stay, meet every system; of the others each meets two kinds of pass, in turn.
UNLIKE = ("gqa-tied", "phi3", "olmo2")
# One of each layout; the others are slow.
FAST_KINDS = ("mqa-untied", "phi3", "gemma3_text", "olmo2")


FAST_DENSE = tuple(name for name in FAST_SYSTEMS if name in DENSE_SYSTEMS)


def slow_unless(fast: bool, *values: str) -> Any:
    return pytest.param(*values, marks=() if fast else pytest.mark.slow)


def is_fast(system: str, kind: str) -> bool:
    return kind == SYSTEMS[system].kind or (kind in FAST_KINDS and system in FAST_SYSTEMS)


def systems_for(kind: str) -> tuple[str, ...]:
    if kind == "moe":
        return (*(name for name in SYSTEMS if SYSTEMS[name].kind == kind), "shortgpt")
    if kind in UNLIKE:
        return DENSE_SYSTEMS
    return FAST_DENSE if kind in FAST_KINDS else FAST_DENSE[list(KINDS).index(kind) % 2 :: 2]


every_system_and_kind = pytest.mark.parametrize(
    ("system", "kind"),
    [slow_unless(is_fast(system, kind), system, kind) for kind in KINDS for system in systems_for(kind)],
)


def every_system_with(fast: Any, *slow: Any) -> list[Any]:
    """``fast`` for every system; ``slow`` where slow tests run, for one system of each kind of pass."""
    found = [(system, fast) for system in SYSTEMS]
    return found + [pytest.param(system, value, marks=pytest.mark.slow) for value in slow for system in FAST_SYSTEMS]


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
        evaluate_on = [held_out] if kind == SYSTEMS[system].kind else []
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


def scores_table(run: Run) -> list[dict[str, str]]:
    with (run.folder / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def plan_of(run: Run) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((run.folder / "plan.json").read_text())
    return plan


@every_system_and_kind
def test_ratio_is_met(shared: Any, system: str, kind: str) -> None:
    """Never more than asked, and short by less than one unit, or one step of experts; whole layers: the nearest
    count."""
    run = shared(system, kind)
    dense = dense_of(run)
    total, left = count_parameters(dense), count_parameters(run.model)
    plan = run.method.plan
    assert (plan.parameters["dense"], plan.parameters["pruned"]) == (total, left)
    if SYSTEMS[system].removes == "weights":  # masks keep the shapes; their ratio is one of the projections' weights
        assert total == left
        projections = [linear for view in layer_structures(run.model) for linear in view.linears.values()]
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


@every_system_and_kind
def test_shapes_and_weights_are_those_of_the_plan(shared: Any, system: str, kind: str) -> None:
    run = shared(system, kind)
    plan, dense = plan_of(run), dense_of(run)
    began = {new: old for old, new in family_of(dense.config).renamed.items()}  # names of files are the published ones
    stored = load_file(run.pruned / "model.safetensors")
    pruned = {
        next((new + name.removeprefix(old) for new, old in began.items() if name.startswith(old)), name): tensor
        for name, tensor in stored.items()
    }
    layers = [layer for layer in plan["layers"] if any(layer["kept"].values())]
    assert lightning_prune.load(run.pruned).config.num_hidden_layers == len(layers)
    for position, kept in enumerate(layers):
        view = layer_structures(dense)[kept["layer"]]
        heads, channels = (kept["kept"].get(block, []) for block in ("attention", "mlp"))
        parts: dict[str, list[torch.Tensor]] = {}  # what is left of each projection, roles that share one in a row
        paths = {role: NAMES.get(dense.config.model_type, {}).get(role, PLAIN[role]) for role in view.linears}
        for role, linear in view.linears.items():
            path = paths[role]
            if role in ("gate", "up", "down") and channels:
                part = linear.weight[:, channels] if role == "down" else linear.weight[channels]
            elif role not in ("gate", "up", "down") and heads:
                part = rows(view, linear.weight.T, heads).T if role == "output" else rows(view, linear.weight, heads)
            else:
                continue
            parts.setdefault(path, []).append(part)
        expected = {path: torch.cat(found) for path, found in parts.items()}
        layer = f"{family_of(dense.config).layers}.{position}"
        names = {f"{layer}.{path}.weight" for path in paths.values()} & pruned.keys()
        assert names == {f"{layer}.{name}.weight" for name in expected}
        for name, weight in expected.items():
            found = pruned[f"{layer}.{name}.weight"]
            assert found.shape == weight.shape
            assert plan["weights_updated"] or torch.equal(found, weight), name


PLAIN = dict(
    zip(
        ("query", "key", "value", "output", "gate", "up", "down"),
        (*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))),
        strict=True,
    )
)
FEED_FORWARD = {role: f"feed_forward.{role}_proj" for role in ("gate", "up", "down")}
NAMES = {
    "lfm2": {
        "output": "self_attn.out_proj",
        "gate": "feed_forward.w1",
        "up": "feed_forward.w3",
        "down": "feed_forward.w2",
    },
    "granitemoehybrid": dict.fromkeys(("gate", "up"), "shared_mlp.input_linear") | {"down": "shared_mlp.output_linear"},
    "falcon_h1": FEED_FORWARD,
    "bamba": FEED_FORWARD,
    "jamba": FEED_FORWARD,
    "nemotron_h": {"up": "mixer.up_proj", "down": "mixer.down_proj"}
    | {role: f"mixer.{role[0]}_proj" for role in ("query", "key", "value", "output")},
    "phi": {"up": "mlp.fc1", "down": "mlp.fc2"},
    "gpt_neox": {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
    "phi3": dict.fromkeys(("query", "key", "value"), "self_attn.qkv_proj")
    | dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
}


def rows(view: LayerStructure, weight: torch.Tensor, heads: list[int]) -> torch.Tensor:
    """The rows that belong to some KV heads."""
    return weight.unflatten(0, (view.units(Block.ATTENTION), -1))[heads].flatten(0, 1)


@every_system_and_kind
def test_checkpoint_gives_back_the_same_logits(shared: Any, system: str, kind: str) -> None:
    run = shared(system, kind)
    assert torch.equal(logits(lightning_prune.load(run.pruned)), logits(run.model))
    assert not torch.equal(logits(run.model), logits(dense_of(run)))


@pytest.mark.parametrize(
    ("system", "kind"),
    [
        slow_unless(is_fast(system, kind), system, kind)
        for kind in OTHER_FAMILIES
        for system in systems_for(kind)
        if system in FAST_SYSTEMS
    ],
)
@torch.no_grad()
def test_every_family_decodes_with_a_cache_as_without(shared: Any, system: str, kind: str) -> None:
    run = shared(system, kind)
    pruned = lightning_prune.load(run.pruned)
    tokens = tiny_tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    common = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(pruned.generate(tokens, **common), pruned.generate(tokens, use_cache=False, **common))
    if kind in WHOLE_ATTENTION:
        groups = list(range(layer_structures(dense_of(run))[0].units(Block.ATTENTION)))
        assert all(layer["kept"]["attention"] in (groups, []) for layer in plan_of(run)["layers"])
        assert all(layer["kept"]["attention"] or not layer["kept"]["mlp"] for layer in plan_of(run)["layers"])


LOAD_ALL = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lightning_prune":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import pathlib, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for line in sys.stdin.read().splitlines():
    folder, known = line.split("\\t")
    known = load_file(known)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    print(folder, bool(torch.equal(model(input_ids=known["tokens"]).logits, known["logits"])))
"""


@pytest.mark.slow
def test_a_process_without_this_package_loads_every_checkpoint(shared: Any, tmp_path: Path) -> None:
    lines = []
    for system in SYSTEMS:
        run, known = shared(system), tmp_path / f"{system}.safetensors"
        save_file({"tokens": tiny_tokens(2, 20, seed=9), "logits": logits(run.model)}, known)
        lines.append(f"{run.pruned}\t{known}")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD_ALL]
    done = subprocess.run(
        command, input="\n".join(lines), text=True, capture_output=True, timeout=120, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{line.split(chr(9))[0]} True" for line in lines]


@pytest.mark.parametrize(("system", "batch_size"), every_system_with(3, 1, 128))
def test_batch_size_and_sample_order_do_not_change_the_result(
    shared: Any, tmp_path: Path, system: str, batch_size: int
) -> None:
    expected = shared(system)  # in batches of 4
    method = SYSTEMS[system].make(pretrained=expected.method.pretrained, pruning_ratio=RATIO)
    shuffled = tiny_tokens(10, 16)[torch.tensor([7, 2, 9, 0, 5, 1, 8, 3, 6, 4])]
    run = prune(method, save_tokens(tmp_path / "c.npy", shuffled), tmp_path, batch_size=batch_size)
    assert_same_decision(run, expected)
    for new, old in zip(run.new_weights, expected.new_weights, strict=True):
        assert new.keys() == old.keys()
        for role, weight in new.items():
            torch.testing.assert_close(weight, old[role], rtol=1e-3, atol=1e-4)


def assert_same_decision(run: Run, expected: Run) -> None:
    torch.testing.assert_close(run.method.scores.importance, expected.method.scores.importance, rtol=1e-5, atol=0)
    assert (run.method.scores.pruned == expected.method.scores.pruned).all()
    assert run.method.plan.layers == expected.method.plan.layers


@pytest.mark.parametrize(("system", "precision"), every_system_with("bf16-true", "16-true", "bf16-mixed"))
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
    values = [run.metrics["perplexity"]["held-out.npy"] for run in (full, half)]
    for which in ("dense", "pruned"):
        assert values[1][which] == pytest.approx(values[0][which], rel=0.05)


@every_system
def test_run_folder_is_complete(shared: Any, system: str) -> None:
    run = shared(system)
    names = {path.name for path in run.folder.iterdir()}
    events = [path.parent.name for path in run.folder.rglob("events.out.tfevents.*")]
    asked = json.loads((run.folder / "plan.json").read_text())["pruning_ratio"]
    assert set(events) == {f"{asked * 100:g}%"}  # TensorBoard shows the path
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
    assert metrics["perplexity"]["held-out.npy"]["tokens"] == 6 * 15
    assert metrics["peak_memory_bytes"] > 0
    assert {"load", "prune", "save", "evaluate dense", "evaluate pruned", "total"} <= metrics["seconds"].keys()
    assert plan_of(run) == run.method.plan.to_json()
    calibration = json.loads((run.folder / "calibration.json").read_text())
    if run.method.needs_calibration:
        assert calibration["fingerprint"] == plan_of(run)["calibration_fingerprint"] == fingerprint(tiny_tokens(10, 16))
        assert (calibration["num_samples"], calibration["seq_len"]) == (10, 16)
    else:
        assert calibration["dataset"] is None


@every_system
def test_scores_file_and_plan_say_the_same(shared: Any, system: str) -> None:
    run = shared(system)
    rows = scores_table(run)
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


@pytest.mark.parametrize("system", ["wanda", "flap", "hgsp_taylor_refit"])
def test_uniform_allocation_loads_as_a_stock_model(shared: Any, tmp_path: Path, system: str) -> None:
    make = SYSTEMS[system].make
    method = make(pretrained=shared(system).method.pretrained, pruning_ratio=RATIO, allocation="uniform", round_to=8)
    run = prune(method, save_tokens(tmp_path / "c.npy"), tmp_path)
    assert not (run.pruned / "modeling_pruned.py").exists()
    config = json.loads((run.pruned / "config.json").read_text())
    assert "auto_map" not in config
    assert "per_layer_config" not in config
    assert config["intermediate_size"] % 8 == 0
    assert len({tuple(map(len, layer.kept.values())) for layer in run.method.plan.layers}) == 1


class Interrupted(BaseException):
    """Stands for what a signal handler raises."""


@every_system
def test_an_interrupted_calibration_leaves_nothing(
    shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    method = SYSTEMS[system].make(pretrained=shared(system).method.pretrained, pruning_ratio=RATIO)
    where = "training_step" if method.needs_calibration else "decide"
    calls, real = [], getattr(type(method), where)

    def interrupted(self: PruningMethod, *args: Any) -> None:
        calls.append(args)
        if where == "decide" or len(calls) == 2:
            raise Interrupted
        real(self, *args)

    monkeypatch.setattr(type(method), where, interrupted)
    with pytest.raises(Interrupted):
        prune(method, save_tokens(tmp_path / "c.npy"), tmp_path / "logs")
    assert_no_output(tmp_path / "logs", findings=where == "decide")


@pytest.mark.parametrize(
    ("system", "place"), [("wanda", "shard"), ("slimgpt", "card"), ("shortgpt", "shard"), ("wanda_2to4", "card")]
)
def test_an_interrupt_while_saving_leaves_no_checkpoint(
    shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, place: str
) -> None:
    method = SYSTEMS[system].make(pretrained=shared(system).method.pretrained, pruning_ratio=RATIO)
    real, calls = write._Shards.write, []

    def interrupted_shard(self: Any, name: str, tensor: torch.Tensor) -> None:
        real(self, name, tensor)
        calls.append(name)
        if len(calls) == 8:
            raise Interrupted

    def interrupted_card(path: Path, text: str) -> None:
        assert (path.parent / "model.safetensors").stat().st_size > 0
        raise Interrupted

    if place == "shard":
        monkeypatch.setattr(write._Shards, "write", interrupted_shard)
    else:
        monkeypatch.setattr(write, "write_text", interrupted_card)
    with pytest.raises(Interrupted):
        prune(method, save_tokens(tmp_path / "c.npy"), tmp_path / "logs")
    assert_no_output(tmp_path / "logs", findings=True)


@pytest.mark.parametrize(("system", "precision"), every_system_with("32-true", *ROUNDING))
def test_where_the_weights_are_does_not_change_a_bit(shared: Any, system: str, precision: str) -> None:
    """One layer at a time on the device, or all of them; so a second run gives the same bytes, too."""
    runs = [shared(system, precision=precision, onload=onload) for onload in ("model", "layer")]
    for name in ("scores.csv", "plan.json", "calibration.json", "pruned/model.safetensors", "pruned/config.json"):
        assert (runs[0].folder / name).read_bytes() == (runs[1].folder / name).read_bytes(), name
    assert runs[0].metrics["perplexity"] == runs[1].metrics["perplexity"]
    for run, onload in zip(runs, ("model", "layer"), strict=True):
        assert json.loads((run.folder / "method.json").read_text())["onload"] == onload


@pytest.mark.parametrize("system", ["wanda", "flap", "slimgpt", "shortgpt", "wanda_2to4"])
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


def assert_no_output(root: Path, findings: bool = False) -> None:
    """No checkpoint, no temporary files and nothing that says a run was finished.

    With ``findings`` a layer was finished: the folder says that it is unfinished, and keeps what it would go on from.
    """
    files = [path for path in root.rglob("*") if path.is_file() and "findings" not in path.parts]
    names = {path.name for path in files if not path.name.startswith("events.out.tfevents.")} - {"hparams.yaml"}
    if findings:
        assert "unfinished" in names
        names -= {"scores.csv", "plan.json", "method.json", "unfinished", "config.yaml", "started.json"}
    assert names == set()
    assert all(path.name.startswith(("step_", "stage_")) for path in root.rglob("findings/**/*"))
    assert not list(root.rglob("pruned"))
    assert temporary_files(root) == []
