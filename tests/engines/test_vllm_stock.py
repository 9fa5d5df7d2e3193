"""Folders in which every layer is cut alike run in vLLM's own model of the family, with no code beside them."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_prune.checkpoint.plan import LayerPlan, PruningPlan
from lightning_prune.checkpoint.write import write_pruned
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.families import LayerStructure, family_of, layer_structures
from lightning_prune.models.vocabulary import Block
from tests.engines.asking import ask, difference, needs, prompts
from tests.tiny import EXPERTS, HYBRIDS, SIDE_BY_SIDE, make_moe, make_tiny, tiny_plan

pytestmark = [pytest.mark.engines, needs("vllm")]

LENGTH = 4
PROMPTS = prompts(range(1, 90, 12), 96)  # which the engine batches as they come
SIZES: dict[str, Any] = {"hidden": 128, "channels": 64, "head_dim": 32, "initializer_range": 0.1}  # as its kernels need
OWN: dict[str, dict[str, Any]] = {
    "olmoe": {"clip_qkv": None, "tied": False},  # both of which its own model does not read
    "glm4_moe": {"tied": False},
    "gpt_oss": {"tied": False},
    # The rest as published configs say.
    "deepseek_v3": {"topk_method": "noaux_tc", "kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64}
    | dict.fromkeys(("q_lora_rank", "qk_nope_head_dim", "v_head_dim"), 32),
    "lfm2": {"conv_dim": 128, "block_dim": 128},
    "lfm2_moe": {"conv_dim": 128},
    "gemma4_text": {"global_head_dim": 64},
    "gemma4_unified_text": {"global_head_dim": 64},
    "phi": {"kv_heads": 4},
}
# Its own models take the head's size from hidden_size, so that heads cannot be fewer.
HEADS_STAY = ("qwen2_moe", "granitemoe", "lfm2", "lfm2_moe", "granitemoehybrid")


def kept_of(view: LayerStructure, block: Block, heads_stay: bool, one_width: bool) -> list[int]:
    """Equally many in every layer, others in each: all groups but one, half of the channels (none where they have
    ``one_width`` with experts), three of four experts."""
    units = range(view.units(block))
    if block is Block.MLP:
        return list(units if one_width else units[view.index % 2 :: 2])
    if block is Block.EXPERT:
        return [unit for unit in units if unit % 4 != view.index % 4]
    stay = block is Block.MIXER or view.whole_attention or len(units) == 1 or heads_stay
    return [unit for unit in units if stay or unit != view.index % len(units)]


def cut_alike(model: PreTrainedModel) -> PruningPlan:
    """A plan of a stock folder."""
    heads_stay, family = model.config.model_type in HEADS_STAY, family_of(model.config)
    layers = [view.with_experts_as(Block.EXPERT) for view in layer_structures(model)]
    one_width = family.experts is not None and family.experts.width == family.width
    one_width &= any(view.experts is not None for view in layers)
    kept = [
        LayerPlan(view.index, {block: kept_of(view, block, heads_stay, one_width) for block in view.blocks})
        for view in layers
    ]
    return tiny_plan(model, [], layers=kept)


def models_of(family: str, experts: bool, folder: Path) -> dict[str, PreTrainedModel]:
    """Saves a dense model and what is left of it."""
    options = SIZES | OWN.get(family, {})
    model = make_moe(family, width=32, **options) if experts else make_tiny(family, **options)
    names = {part: f"{family}-{part}" for part in ("dense", "cut")}
    model.save_pretrained(folder / names["dense"])
    dense = Checkpoint.open(str(folder / names["dense"]))
    write_pruned(dense, cut_alike(model), lambda layer: {}, folder / names["cut"])
    return {name: AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in names.values()}


@pytest.mark.parametrize(
    ("family", "experts"),
    [
        *((family, True) for family in EXPERTS),
        *((family, False) for family in (*HYBRIDS, *SIDE_BY_SIDE, "gemma4_text", "gemma4_unified_text")),
    ],
)
def test_log_probabilities_and_greedy_tokens_are_those_of_transformers(
    tmp_path: Path, family: str, experts: bool
) -> None:
    models = models_of(family, experts, tmp_path)
    answers = ask("vllm", tmp_path, {"models": list(models), "prompts": PROMPTS, "length": LENGTH})
    dense, cut = (answers[name] for name in models)
    if isinstance(dense, str):
        pytest.skip(f"{family}: vLLM refuses the dense model too: {dense}")
    of_dense = difference(models[f"{family}-dense"], PROMPTS, dense, LENGTH)
    if not of_dense < 1e-4:
        pytest.skip(f"{family}: vLLM computes the dense model otherwise than transformers, by {of_dense}")
    assert not isinstance(cut, str), cut  # the words of a refusal
    assert difference(models[f"{family}-cut"], PROMPTS, cut, LENGTH) < 1e-4
