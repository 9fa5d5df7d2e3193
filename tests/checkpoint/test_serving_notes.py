"""What a pruned model's card and summary say of other runtimes."""

from pathlib import Path
from typing import Any

import pytest

from lightning_prune.checkpoint.cut import pruned_config
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.checkpoint.serving_notes import pattern_note, tensor_parallel_sizes
from lightning_prune.checkpoint.write import write_pruned
from lightning_prune.methods import ShortGPT, Wanda
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.families import layer_structures
from lightning_prune.models.vocabulary import Block
from lightning_prune.runs.verdict import summary_table
from tests.methods.behaviour import prune, save_tokens
from tests.methods.running import save_base
from tests.tiny import make_tiny, tiny_plan

# What llama.cpp computes from a layer's place: every second, sixth or fourth layer is of the other kind.
PATTERNS: dict[str, tuple[int, dict[str, Any]]] = {
    "gemma2": (2, {"layer_types": ["sliding_attention", "full_attention"] * 6}),
    "gemma3_text": (6, {"layer_types": [*["sliding_attention"] * 5, "full_attention"] * 2}),
    "gpt_oss": (2, {"layer_types": ["sliding_attention", "full_attention"] * 6}),
    "cohere2": (4, {"layer_types": [*["sliding_attention"] * 3, "full_attention"] * 3}),
    "smollm3": (4, {"no_rope_layers": [1, 1, 1, 0] * 3}),
    "llama": (12, {}),
}


@pytest.mark.parametrize("family", PATTERNS)
def test_a_pattern_that_runtimes_take_from_the_place_of_a_layer(family: str, tmp_path: Path) -> None:
    period, options = PATTERNS[family]
    model = make_tiny(family, layers=12, **options)
    model.save_pretrained(tmp_path / "dense")
    dense = Checkpoint.open(str(tmp_path / "dense"))
    for start, length in ((0, 0), (0, 1), (period, period), (1, 2)):
        gone = range(start, start + length)
        kept = [
            LayerPlan(view.index, {block: [] for block in view.blocks} if view.index in gone else view.all_units)
            for view in layer_structures(model)
        ]
        plan = tiny_plan(model, [], layers=kept)
        broken = family != "llama" and length % period != 0
        assert bool(pattern_note(pruned_config(dense.config, plan))) == broken, (start, length)
        if (start, length) == (0, 1):
            write_pruned(dense, plan, lambda layer: {}, tmp_path / "pruned")
            assert ("llama.cpp lets all layers" in (tmp_path / "pruned" / "README.md").read_text()) == broken


@pytest.mark.parametrize(
    ("family", "kept", "sizes"),
    [
        ("llama", [(4, 40), (4, 24)], [1, 2, 4]),
        ("llama", [(4, 40), (2, 24)], [1, 2]),
        ("llama", [(4, 40), (2, 23)], [1]),
        ("llama", [(4, 40), (0, 0)], [1, 2, 4]),  # a removed layer, a layer without an MLP
        ("llama", [(4, 0), (4, 38)], [1, 2]),
        ("falcon_h1", [(4, 40), (4, 24)], [1, 2]),  # its attention is part of a mixer, whose state space has 2 heads
        ("phi", [(4, 40), (4, 20)], [1, 2, 4]),
        ("bamba", [(4, 40), (2, 24)], [1, 2]),  # the state space of the first layer has no KV heads
    ],
)
def test_devices_divide_every_layers_heads_and_widths(
    family: str, kept: list[tuple[int, int]], sizes: list[int]
) -> None:
    model = make_tiny(family, layers=2, kv_heads=4)
    plan = tiny_plan(model, [(list(range(groups)), list(range(channels))) for groups, channels in kept])
    assert tensor_parallel_sizes(pruned_config(model.config, plan), plan) == sizes


def test_experts_are_split_by_their_width() -> None:
    layers = [LayerPlan(0, {Block.ATTENTION: [0, 1, 2, 3], Block.EXPERT: [0, 2, 5]})]
    model = make_tiny("qwen3_moe", layers=1, kv_heads=4, num_experts=8, moe_intermediate_size=6)
    assert tensor_parallel_sizes(model.config, tiny_plan(model, [], layers=layers)) == [1, 2]


@pytest.mark.parametrize(
    ("family", "options", "sizes"),
    [
        ("qwen2_moe", {"shared_expert_intermediate_size": 18}, [1, 2]),
        ("qwen3_5_text", {"linear_num_key_heads": 2, "linear_num_value_heads": 4}, [1, 2]),
    ],
)
def test_what_stays_whole_is_split_too(family: str, options: dict[str, Any], sizes: list[int]) -> None:
    model = make_tiny(family, layers=2, kv_heads=4, heads=8, **options)
    plan = tiny_plan(model, [(list(range(4)), list(range(40)))] * 2)
    assert tensor_parallel_sizes(model.config, plan) == sizes


def test_the_summary_says_both(tmp_path: Path) -> None:
    model = make_tiny("gemma2", layers=6, layer_types=["sliding_attention", "full_attention"] * 3)
    base, tokens = save_base(model, tmp_path / "base"), save_tokens(tmp_path / "tokens.npy")
    for method in (ShortGPT(base, n_remove_layers=2), Wanda(base, 0.1, allocation="uniform")):
        metrics = prune(method, tokens, tmp_path / "logs").metrics
        kept = [layer for layer in range(6) if layer not in method.plan.removed_layers]
        table, words = summary_table("label", metrics), any(at % 2 != layer % 2 for at, layer in enumerate(kept))
        sizes = metrics["serving"]["tensor_parallel"]
        assert ("on 1, 2 devices" if sizes == [1, 2] else "on 1 device alone: heads and widths") in table, sizes
        assert ("computes another model" in table) == words
