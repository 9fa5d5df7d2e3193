import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from lightning_prune.evaluation import efficiency
from lightning_prune.evaluation.efficiency import Efficiency, EfficiencyReport, Setting, Speed, measure
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.support.errors import UserError
from tests.cutting import cut
from tests.tiny import make_tiny, mixed_plan, tiny_tokens, uniform_plan

# Pruned with skipped attention, a skipped MLP and a removed layer, or with one width.
PLANS = {"mixed": mixed_plan, "uniform": uniform_plan}


def make(kind: str, family: str = "llama") -> PreTrainedModel:
    model = make_tiny(family)
    return model if kind == "dense" else cut(model, PLANS[kind](model))


@pytest.mark.parametrize("kind", ["dense", *PLANS])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "olmo2"])  # plain, with biases, fused, whole attention
def test_counts_are_those_of_torch_and_of_a_filled_cache(family: str, kind: str) -> None:
    """Half the flops of one decoded token are its MACs."""
    model = make(kind, family)
    model.set_attn_implementation("eager")  # plain matmuls, which the counter sees
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=tiny_tokens(1, 19), past_key_values=cache, use_cache=True)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=tiny_tokens(1, 1), past_key_values=cache, use_cache=True)
    assert 2 * efficiency.macs_per_token(model, 20) == counter.get_total_flops()
    slots = [(layer.keys, layer.values) for layer in cache.layers]
    stored = [pair for pair in slots if pair[0].shape[1:] != (1, 20, 1)]  # the bookkeeping of skipped attention
    assert len(slots) - len(stored) == (1 if kind == "mixed" else 0)
    held = sum(tensor.nbytes for pair in stored for tensor in pair)
    assert efficiency.kv_cache_bytes_per_token(model) * 20 == held
    assert efficiency.kv_cache_bytes_per_token(model.to(torch.bfloat16)) * 20 * 2 == held


@pytest.mark.parametrize("kind", ["dense", "mixed"])
def test_timed_decoding_is_greedy_generation_through_the_cache(kind: str) -> None:
    model, prompt = make(kind), tiny_tokens(2, 9)
    seen: list[torch.Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["input_ids"]), with_kwargs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # the cache has the name that the installed transformers gives it
        efficiency.generate(model, prompt, 5)
    handle.remove()
    model.generation_config.eos_token_id = None
    wanted = model.generate(prompt, max_new_tokens=5, do_sample=False)
    assert [tokens.shape[1] for tokens in seen] == [9, 1, 1, 1, 1, 1]
    assert torch.equal(torch.cat(seen, 1), wanted)


def test_speed_is_tokens_of_the_batch_over_the_median_without_the_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    seconds = iter([(90.0, 90.0)] * efficiency.WARM_UP + [(4.0, 8.0), (1.0, 2.0), (2.0, 64.0)])
    monkeypatch.setattr(efficiency, "generate", lambda *_: next(seconds))
    setting = Setting(prompt_length=10, decode_length=6, context_length=16, batch_sizes=(3,), repeats=3)
    found = measure(model, Checkpoint.open(str(tmp_path)), setting)
    assert found.speed[0].prefill_tokens_per_second == 3 * 10 / 2
    assert found.speed[0].decode_tokens_per_second == 3 * 6 / 8
    assert found.speed[0].spread == 64 / 2 - 1
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.weight_file_dtype == "float32"
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert found.weight_file_bytes == sum(len(file.read_bytes()) for file in shards)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak of a process")
def test_peak_memory_forgets_what_was_freed_before(tmp_path: Path) -> None:
    device = torch.device("cpu")
    torch.ones(50 * 2**20)  # 200 MiB, gone at once
    before = efficiency.peak_since_reset(device)
    make_tiny().save_pretrained(tmp_path)
    found = measure(make_tiny(), Checkpoint.open(str(tmp_path)), Setting(8, 2, 10, batch_sizes=(1,), repeats=1))
    assert found.speed[0].peak_memory_bytes is not None
    assert before - found.speed[0].peak_memory_bytes > 100 * 2**20  # type: ignore[operator]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Setting(prompt_length=120, decode_length=9), "--prompt-length 120 and --decode-length 9 make 129 .* has 128"),
        (Setting(16, 16, 32, batch_sizes=(4, 0)), "--batch-sizes: found 4 0"),
        (Setting(16, 16, 32, batch_sizes=()), "--batch-sizes"),
        (Setting(16, 16, 32, repeats=0), "--repeats: found 0"),
        (Setting(16, 16, 32, batch_sizes=(10**10,)), "--batch-sizes: 10000000000 sequences of 32 tokens do not fit"),
        (Setting(16, 16, 32, batch_sizes=(2**63 - 1,)), "--batch-sizes: 9223372036854775807 sequences"),
    ],
)
def test_setting_that_cannot_be_measured_is_refused(setting: Setting, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(make_tiny(), Checkpoint.open("demo"), setting)


def test_batch_that_does_not_fit_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficiency, "generate", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(UserError, match="--batch-sizes: 16 sequences of 32 tokens do not fit"):
        measure(make_tiny(), Checkpoint.open("demo"), Setting(16, 16, 32, batch_sizes=(16,)))


def test_table_shows_dense_pruned_and_their_ratio() -> None:
    dense = Efficiency(2000, 4000, 64, 8000, "bfloat16", [Speed(1, 100.0, 10.0, 0.25, None)])
    pruned = Efficiency(1500, 3000, 48, 12000, "float32", [Speed(1, 150.0, 12.0, 0.5, None)])
    report = EfficiencyReport(Setting(), "cpu", "float32", 1, pruned, dense)
    lines = {line.split("  ")[0]: line.split() for line in report.table().splitlines()}
    assert lines["parameters"][-3:] == ["2,000", "1,500", "0.750"]
    assert lines["prefill, tokens/s, batch 1"][-3:] == ["100", "150", "1.500"]
    assert lines["peak memory, MiB, batch 1"][-3:] == ["-", "-", "-"]
    assert "weights on disk: dense bfloat16, pruned float32" in report.table()
    assert "medians of 5 runs; the slowest took up to 50% longer than the fastest" in report.table()
    alone = EfficiencyReport(Setting(), "cpu", "float32", 1, pruned, None)
    assert "dense" not in alone.table()


def test_only_layers_with_attention_have_a_kv_cache() -> None:
    """Of a hybrid of four layers two: keys and values of 2 heads of 8 numbers, in fp32."""
    assert efficiency.kv_cache_bytes_per_token(make_tiny("lfm2")) == 2 * 2 * (2 * 8) * 4
