"""Sizes that are wanted: never above, exact against the saved files, groups weighed by their part of the KV cache."""

from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lightning_prune.checkpoint.cut import unpruned
from lightning_prune.checkpoint.expert_plans import parameter_counts
from lightning_prune.evaluation.efficiency import kv_cache_bytes_per_token, macs_per_token
from lightning_prune.methods import Magnitude, ShortGPT, SlimGPT, Wanda
from lightning_prune.methods.flap import FLAP
from lightning_prune.methods.scores import group_scores
from lightning_prune.methods.target import Target, cache_numbers, footprint, memory_bytes, parse_count
from lightning_prune.models.families import layer_structures
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError
from lightning_prune.support.memory import parse_bytes
from tests.methods.behaviour import prune
from tests.methods.running import run_method, save_base
from tests.models.test_text_part import several
from tests.tiny import EVERY_FAMILY, EXPERTS, make_moe, make_tiny, tiny_tokens

CONTEXT = 4096


def saved_numbers(method: Any) -> int:
    """Numbers in the files that were written."""
    return sum(
        tensor.numel() for path in method.pruned_folder.glob("*.safetensors") for tensor in load_file(path).values()
    )


@pytest.mark.parametrize("make", [Wanda, FLAP, SlimGPT, ShortGPT])
def test_parameters_are_never_above_the_target_and_near_it(make: Any, tmp_path: Path) -> None:
    model = make_tiny(layers=4)
    base, dense = save_base(model, tmp_path / "base"), sum(one.numel() for one in model.parameters())
    target = dense * 3 // 4
    method = run_method(make(base, target_parameters=target), tiny_tokens(8, 12), tmp_path / "run")
    left = saved_numbers(method)
    assert left == method.plan.parameters["pruned"]
    layer = max(view.cost for view in method.layers)
    unit = layer if make is ShortGPT else max(view.unit_cost(block) for view in method.layers for block in view.blocks)
    assert target - unit < left <= target
    assert method.plan.pruning_ratio == pytest.approx(0.25, abs=1e-4)


def test_a_target_that_one_layer_meets_removes_one(tmp_path: Path) -> None:
    model = make_tiny(layers=4)
    base, dense = save_base(model, tmp_path / "base"), sum(one.numel() for one in model.parameters())
    method = run_method(ShortGPT(base, target_parameters=dense - 1), tiny_tokens(8, 12), tmp_path / "run")
    assert len(method.plan.removed_layers) == 1


@pytest.mark.parametrize("make", [Magnitude, SlimGPT, ShortGPT])
def test_memory_is_weights_and_cache_as_the_saved_model_has_them(make: Any, tmp_path: Path) -> None:
    model = make_tiny(layers=4)
    model.config.max_position_embeddings = CONTEXT
    base, config = save_base(model, tmp_path / "base"), model.config
    each = 2 * config.head_dim * CONTEXT * 2  # keys and values of a KV head, two sequences
    dense = sum(one.numel() for one in model.parameters()) + 4 * config.num_key_value_heads * each
    options = {"target_memory": f"{dense * 4 * 7 // 10}", "context": 2 * CONTEXT, "batch": 2}
    with pytest.warns(
        UserWarning, match=f"the model has {CONTEXT:,} positions, so its KV cache is counted with as many"
    ):
        method = run_method(make(base, **options), tiny_tokens(8, 12), tmp_path / "run")
    groups = sum(len(layer.kept["attention"]) for layer in method.plan.layers)  # type: ignore[index]
    assert 4 * (saved_numbers(method) + groups * each) <= dense * 4 * 7 // 10
    assert method.plan.pruning_ratio is None
    assert method.pruning_ratio == float(method.ratio) != 0.2  # what loggers are told


@pytest.mark.parametrize(
    ("kind", "near"), [("parameters", 8 * 8 * 3 * 3 * 32), ("active_parameters", 8 * 2 * 3 * 3 * 32)]
)
def test_sizes_of_a_mixture_count_all_experts_or_those_of_one_token(tmp_path: Path, kind: str, near: int) -> None:
    """Near is one step: eight channels of each of eight experts, or of two, in three layers."""
    model: Any = make_moe(width=64, layers=3)
    base, own = save_base(model, tmp_path / "base"), 3 * 32 * 64  # of one expert
    dense = {"parameters": sum(one.numel() for one in model.parameters())}
    dense["active_parameters"] = dense["parameters"] - 3 * (8 - 2) * own
    target = dense[kind] * 3 // 4
    method = run_method(Wanda(base, **{f"target_{kind}": target}), tiny_tokens(8, 12), tmp_path / "run")
    sizes = method.plan.parameters
    width = len(method.plan.layers[0].kept[Block.EXPERT_CHANNEL]) // 8
    left = {"parameters": saved_numbers(method)}
    left["active_parameters"] = left["parameters"] - 3 * (8 - 2) * 3 * 32 * width
    assert target - near < left[kind] <= target
    assert [sizes["pruned"], sizes["pruned_active"]] == list(left.values())
    assert [sizes["dense"], sizes["dense_active"]] == list(dense.values())


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "qwen2_moe"])
def test_shared_experts_are_active_for_every_token(family: str) -> None:
    model = make_moe(family)
    layers, dense = layer_structures(model), sum(one.numel() for one in model.parameters())
    views = [view.experts for view in layers if view.experts is not None]
    idle = sum((one.count - one.top_k) * 3 * one.hidden * one.width for one in views)
    assert views
    assert parameter_counts(layers, dense, unpruned(layers), dense)["pruned_active"] == dense - idle


def test_the_longer_the_context_the_more_groups_are_removed() -> None:
    model, kept = make_tiny(), []
    layers = layer_structures(model)
    for context in (1, 100_000):
        target = Magnitude("demo", target_memory="1KB", context=context).target
        assert target is not None
        weighed = target.weighed(group_scores(layers), model.config, layers)
        attention = weighed.of_kind(Block.ATTENTION)
        kept.append(float(np.mean(weighed.score[attention]) / np.mean(weighed.score[~attention])))
    assert kept[1] < kept[0] / 10


@pytest.mark.parametrize("family", [*EVERY_FAMILY, *EXPERTS])
@torch.no_grad()
def test_the_cache_counts_what_transformers_keeps(family: str) -> None:
    """Of attention beside an MLP, beside a state space and of latent attention too; in less than a sliding window."""
    model: Any = (make_moe if family in EXPERTS else make_tiny)(family)
    tokens, layers = tiny_tokens()[:, :4], layer_structures(model)
    cached = model(input_ids=tokens, use_cache=True).past_key_values.layers
    found = [getattr(layer, name, None) for layer in cached for name in ("keys", "values")]
    expected = sum(tensor.numel() for tensor in found if isinstance(tensor, torch.Tensor))
    assert memory_bytes(7, layers, unpruned(layers), model.config, 4, len(tokens), 2) == 2 * (7 + expected)
    assert expected


@pytest.mark.parametrize("keep", ["text", "whole"])
def test_memory_is_that_of_all_that_is_written(tmp_path: Path, keep: Literal["text", "whole"]) -> None:
    several("gemma3", tmp_path / "dense")
    np.save(tmp_path / "tokens.npy", tiny_tokens(8, 12).numpy())
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    limit = sum(tensor.nbytes for tensor in dense.values()) * 3 // 5
    options: dict[str, Any] = {"allocation": "uniform", "keep": keep, "context": 16}
    method: Any = Wanda(str(tmp_path / "dense"), target_memory=str(limit), **options)
    metrics = prune(method, tmp_path / "tokens.npy", tmp_path / "runs").metrics

    def cache(context: int) -> int:
        each = cache_numbers(method.checkpoint.config, method.layers, context, 1)
        return 4 * sum(len(one.kept[Block.ATTENTION]) * each[one.layer] for one in method.plan.layers)

    reached, written = metrics["target"]["reached"], 4 * saved_numbers(method)
    assert limit * 9 // 10 < written + cache(16) == reached <= limit
    assert list(metrics["footprint"]["pruned"]["memory_bytes"].values()) == [written + cache(128)]
    if keep == "whole":
        beside = sum(tensor.nbytes for name, tensor in dense.items() if "language_model" not in name)
        with pytest.raises(UserError, match=f"beside the text model.* take {beside:,} bytes.*--model.keep text"):
            Wanda(str(tmp_path / "dense"), target_memory=str(beside), **options).check_model()


def test_layers_that_look_back_a_window_keep_no_more_than_that() -> None:
    model = make_tiny("gemma2", layers=4)
    model.config.sliding_window = 16
    numbers = cache_numbers(model.config, layer_structures(model), 100, 3)
    kinds = model.config.layer_types
    expected = [2 * model.config.head_dim * (16 if kind == "sliding_attention" else 100) * 3 for kind in kinds]
    assert numbers == expected
    assert len(set(numbers)) == 2


@pytest.mark.parametrize(
    ("make", "options"), [(make_tiny, {"tied": True}), (make_tiny, {"tied": False}), (make_moe, {"layers": 2})]
)
def test_the_footprint_is_the_memory_and_work_of_the_model(make: Any, options: dict[str, Any]) -> None:
    model = make(**options)
    layers, total = layer_structures(model), sum(one.numel() for one in model.parameters())
    sizes = parameter_counts(layers, total, unpruned(layers), total)
    active = sizes.get("pruned_active", total)
    found = footprint(layers, model.config, unpruned(layers), (total, active), 4)
    assert found["memory_bytes"] == {128: 4 * total + 128 * kv_cache_bytes_per_token(model)}  # it has 128 positions
    weights = macs_per_token(model, 0)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            weights += layer.mlp.gate.weight.numel() + 2 * sum(one[0].numel() for one in layer.mlp.experts.parameters())
    vectors = sum(one.numel() for one in model.parameters() if one.dim() == 1)
    assert found["flops_per_token"] == 2 * (weights + vectors)


def test_the_smallest_share_that_is_enough_is_found() -> None:
    target = Target("parameters", 700, 1, 1)
    assert target.reach(lambda ratio: 1000 - int(ratio * 1000) // 7 * 7, 1000) == Fraction(301, 1000)
    with pytest.raises(UserError, match="not above that"):
        target.reach(lambda ratio: 700, 1000)

    def size_at(ratio: Fraction) -> int:
        if ratio > Fraction(1, 5):
            raise UserError("no more than a fifth")
        return int(1000 * (1 - ratio))

    with pytest.raises(UserError, match="smallest size is 800"):
        target.reach(size_at, 1000)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4.5B", 4_500_000_000), ("800m", 800_000_000), ("6GiB", 6 * 2**30), ("1.5 KB", 1500), ("77", 77)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    parse = parse_bytes if text.endswith("B") and text != "4.5B" else parse_count
    assert parse(text, "--model.target_parameters") == size
