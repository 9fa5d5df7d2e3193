from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralForCausalLM

from lightning_prune.checkpoint.cut import layout_of
from lightning_prune.cli import main
from tests.formats.checkpoints import FULL, Plan, gone, save, watch_reads
from tests.tiny import EVERY_FAMILY, mixed_plan, tiny_plan, tiny_tokens

# The mixed plan has no attention in the first layer and nothing in the last; here it is the other way round.
GONE: list[Plan] = [gone("attention", 3), gone("mlp", 0), gone("both", 0)]
BIASES = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"attention_bias": True}}
CASES = [
    *((family, mixed_plan, {}) for family in EVERY_FAMILY),
    *((family, mixed_plan, options) for family, options in BIASES.items()),
    *((family, plan, {}) for family in ("llama", "phi3") for plan in GONE),
]


def export(folder: Path) -> Any:
    assert main(["export", "--model", str(folder), "--format", "stock", "--output", str(folder.parent / "out")]) == 0
    return AutoModelForCausalLM.from_pretrained(folder.parent / "out", trust_remote_code=False)


@pytest.mark.parametrize(("family", "plan", "options"), CASES)
@torch.no_grad()
def test_padded_model_is_stock_and_gives_the_same_logits(
    family: str, plan: Plan, options: dict[str, Any], tmp_path: Path
) -> None:
    pruned = save(tmp_path / "model", family, plan, **options)
    padded = export(tmp_path / "model")
    assert layout_of(padded.config) == "stock"
    assert not (tmp_path / "out" / "modeling_pruned.py").exists()
    expected = pruned.double()(tiny_tokens()).logits
    torch.testing.assert_close(padded.double()(tiny_tokens()).logits, expected, rtol=1e-9, atol=1e-9)


def test_layers_are_as_wide_as_the_widest_one_is_in_memory_at_a_time_and_the_loss_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four heads in four KV groups of size 8, hidden 32, three groups and 30 of 40 channels are the widest."""
    reads = watch_reads(monkeypatch)
    pruned = save(
        tmp_path / "model",
        "mistral",
        lambda model: tiny_plan(model, [([0, 1, 2], FULL[:10]), ([1], FULL[:30]), ([], FULL[:30]), ([0], FULL[:5])]),
        kv_heads=4,
    )
    padded = export(tmp_path / "model")
    for names in reads:
        assert len({name.split("layers.")[-1].split(".")[0] for name in names if "layers." in name}) <= 1
    config = padded.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (3, 3, 30)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (pruned, padded)]
    dense = 1024 * 32 + 32 + 4 * (4 * 32 * 32 + 3 * 32 * 40 + 2 * 32)
    back, saved = counts[1] - counts[0], dense - counts[0]
    said = capsys.readouterr().out
    assert f"{counts[0]:,} parameters became {counts[1]:,}: {back:,} zeros" in said
    assert f"{100 * back / saved:.0f} % of what pruning took out of these layers ({saved:,})" in said


def test_head_counts_that_llama_refuses_are_said_in_the_words_of_mistral(tmp_path: Path) -> None:
    def plan(model: Any) -> Any:
        return tiny_plan(model, [([0, 1, 2], FULL[:10]), ([1], FULL), ([0], FULL), ([0], FULL)])

    save(tmp_path / "model", "llama", plan, kv_heads=4)  # 3 heads do not divide 32
    assert isinstance(export(tmp_path / "model"), MistralForCausalLM)
    # With biases, which Mistral lacks, the next number that divides is taken.
    save(tmp_path / "biased" / "model", "llama", plan, kv_heads=4, attention_bias=True)
    assert export(tmp_path / "biased" / "model").config.num_attention_heads == 4
