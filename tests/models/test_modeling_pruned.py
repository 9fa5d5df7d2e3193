"""Behaviour of per-layer models beyond one forward: caches, fine-tuning, tools of others."""

import copy
import inspect
import json
import logging
import pickle
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel, StaticCache, pipeline
from transformers.cache_utils import QuantizedLayer

from lightning_prune.models.families import kv_heads_of
from lightning_prune.models.modeling_pruned import SkippedMixer
from tests.cutting import cut
from tests.tiny import (
    EVERY_FAMILY,
    FAMILIES,
    HYBRIDS,
    ONE_BLOCK,
    make_tiny,
    mixed_plan,
    tiny_plan,
    tiny_tokenizer,
    tiny_tokens,
)

FULL = list(range(40))
WITHOUT_CLASSIFIER = ("granite", "ernie4_5", "gemma4_text", "gemma4_unified_text", *HYBRIDS[2:], "cohere", "cohere2")


def last_attention_gone(model: PreTrainedModel) -> Any:
    heads = list(range(kv_heads_of(model.config)))
    return tiny_plan(model, [(heads, FULL[:7]), ([], FULL[3:]), (heads, []), ([], FULL)])


def all_attention_gone(model: PreTrainedModel) -> Any:
    return tiny_plan(model, [([], FULL)] * 4)


def gone(model: PreTrainedModel, what: str, where: int) -> Any:
    """A plan that takes attention, the MLP or both from one of four layers, and narrows another."""
    heads = list(range(kv_heads_of(model.config)))
    kept = [(heads, FULL)] * 4
    kept[(where + 1) % 4] = (heads[1:], FULL[::2])
    kept[where] = ([] if what != "mlp" else heads, [] if what != "attention" else FULL)
    return tiny_plan(model, kept)


MAIN = [mixed_plan, last_attention_gone, all_attention_gone]
PLANS = [*MAIN, *(partial(gone, what=what, where=at) for what in ("attention", "mlp", "both") for at in (0, 2, 3))]
WINDOWS = ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1})
OTHERS = [family for family in EVERY_FAMILY if family not in (*FAMILIES, *ONE_BLOCK)]
KINDS = [*((family, {}) for family in EVERY_FAMILY), ("mistral", {"sliding_window": 6}), WINDOWS]
CASES: list[tuple[str, dict[str, Any], Any]] = [
    *((*kind, mixed_plan) for kind in KINDS),
    *((*kind, plan) for kind in (KINDS[0], WINDOWS) for plan in PLANS[1:]),
    *((family, {}, MAIN[1 + turn % 2]) for turn, family in enumerate(OTHERS)),
    *((family, {}, last_attention_gone) for family in ONE_BLOCK),  # which refuses to lose all attention
]


def pruned_model(family: str, plan: Any = mixed_plan, **options: Any) -> PreTrainedModel:
    dense = make_tiny(family, **options)
    return cut(dense, plan(dense))


def by_steps(model: PreTrainedModel, tokens: torch.Tensor, cache: Cache, lengths: Sequence[int]) -> torch.Tensor:
    """Logits of ``tokens``, some of them at a time."""
    steps, start = [], 0
    for length in lengths:
        steps.append(model(tokens[:, start : start + length], past_key_values=cache, use_cache=True).logits)
        start += length
        assert int(cache.get_seq_length()) == start
    return torch.cat(steps, 1)


@pytest.mark.parametrize(("family", "extra", "plan"), CASES)
@torch.no_grad()
def test_generation_with_a_cache_equals_generation_without(family: str, extra: dict[str, Any], plan: Any) -> None:
    model = pruned_model(family, plan, **extra)
    tokens = tiny_tokens(batch=3, length=8)
    mask = torch.ones_like(tokens)
    mask[0, :5] = mask[1, :2] = 0  # left padding
    common = {"attention_mask": mask, "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, use_cache=False, **common)
    options_of_caches: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}]
    for options in options_of_caches[: 2 if family == "jamba" else 3]:  # whose scan forgets its state between chunks
        assert torch.equal(model.generate(tokens, **options, **common), expected)


@pytest.mark.parametrize(("family", "extra", "plan"), [case for case in CASES if case[0] in FAMILIES])
@torch.no_grad()
def test_manual_loops_over_a_cache_give_the_logits_of_one_pass(
    family: str, extra: dict[str, Any], plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", NoStream)
    model = pruned_model(family, plan, **extra)
    tokens = tiny_tokens(length=14)
    expected = model(tokens).logits
    layers = model.config.per_layer_config
    shapes = [layer.num_key_value_heads for layer in layers], [layer.head_dim for layer in layers]
    allocated = StaticCache(config=model.config, max_cache_len=20)  # as export and compilation want it
    allocated.early_initialization(2, *shapes, dtype=model.dtype, device=model.device)
    offloading = {"offloading": True, "offload_only_non_sliding": False}
    for cache in (
        DynamicCache(config=model.config),
        *([] if extra else [DynamicCache()]),  # a cache made without the config knows no windows
        StaticCache(config=model.config, max_cache_len=20),
        allocated,
        DynamicCache(config=model.config, **offloading),
        StaticCache(config=model.config, max_cache_len=20, **offloading),
    ):
        # Prefill in chunks, single steps, a chunk again.
        torch.testing.assert_close(by_steps(model, tokens, cache, (5, 4, 1, 1, 3)), expected, rtol=1e-4, atol=1e-4)


class NoStream:
    """Stands in for a CUDA stream, which offloading caches wait for."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...


class GroupedLayer(QuantizedLayer):
    """Quantises without loss, and like the real ones only where groups of 8 numbers fit into a head."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        assert tensor.shape[-1] % 8 == 0
        return tensor.clone()

    def _dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_quantising_caches_give_the_logits_of_one_pass(plan: Any) -> None:
    model = pruned_model("llama", plan)
    tokens = tiny_tokens(length=14)
    cache = Cache(layers=[GroupedLayer(residual_length=3) for _ in range(model.config.num_hidden_layers)])
    torch.testing.assert_close(by_steps(model, tokens, cache, [2] * 7), model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_skipped_mixer_finds_the_cache_under_any_name_and_nothing_else() -> None:
    mixer, hidden = SkippedMixer(0, head_dim=8), torch.ones(2, 3, 32)
    rest = {"position_embeddings": (torch.ones(2, 3, 8),) * 2, "attention_mask": torch.ones(2, 1, 3, 3), "other": {}}
    for call in (
        lambda cache: mixer(hidden, cache=cache, **rest),
        lambda cache: mixer(hidden, past_key_values=cache, **rest),
        lambda cache: mixer(x=hidden, what_comes_next=cache, **rest),
        lambda cache: mixer(hidden, rest["attention_mask"], cache),
    ):
        cache = DynamicCache()
        added, weights = call(cache)
        assert weights is None
        assert torch.equal(added, torch.zeros_like(hidden))
        assert int(cache.get_seq_length()) == 3
        assert torch.equal(call(None)[0], torch.zeros_like(hidden))


def test_every_layer_shows_engines_an_attention_of_its_own() -> None:
    """vLLM gives a layer a cache where it finds one call of an attention function in the source of a module's
    ``forward``, and reads ``layer_idx`` and the implementation's name beside it."""
    model = pruned_model("llama", last_attention_gone)
    model.set_attn_implementation("eager")
    for index, layer in enumerate(model.model.layers):
        source = inspect.getsource(type(layer.self_attn).forward)
        (looked_up,) = re.findall(r"(\w+)(?:: Callable.*)? = ALL_ATTENTION_FUNCTIONS\b", source)
        assert len(re.findall(rf"\b{looked_up}\(", source)) == 1
        assert layer.self_attn.layer_idx == index
        assert layer.self_attn.config._attn_implementation == "eager"


@pytest.mark.parametrize("plan", MAIN)
@pytest.mark.parametrize(("family", "extra"), [("llama", {}), WINDOWS])
@torch.no_grad()
def test_beams_reorder_and_assisted_decoding_crops_the_cache(family: str, extra: dict[str, Any], plan: Any) -> None:
    model = pruned_model(family, plan, **extra)
    common = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    tokens = tiny_tokens(length=5)
    beams = common | {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6}
    assert torch.equal(model.generate(tokens, **beams), model.generate(tokens, use_cache=False, **beams))
    tokens = tiny_tokens(batch=1, length=4).repeat(1, 3)
    expected = model.generate(tokens, use_cache=False, **common)
    assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=3, **common), expected)
    assistant = pruned_model(family, seed=1, **extra)
    assert torch.equal(model.generate(tokens, assistant_model=assistant, **common), expected)


@pytest.mark.parametrize("family", EVERY_FAMILY)
@torch.no_grad()
def test_the_decoder_and_every_head_of_the_family_are_models_of_their_own(family: str, tmp_path: Path) -> None:
    model = pruned_model(family)
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "decoder")
    expected = model.base_model(tiny_tokens()).last_hidden_state
    classes = json.loads((tmp_path / "whole" / "config.json").read_text())["auto_map"]
    assert ("AutoModelForSequenceClassification" in classes) == (family not in WITHOUT_CLASSIFIER)
    saved = [*(("whole", *pair) for pair in classes.items()), ("decoder", "AutoModel", classes["AutoModel"])]
    for folder, auto, name in saved:
        loaded = getattr(transformers, auto).from_pretrained(tmp_path / folder, trust_remote_code=True)
        assert type(loaded).__name__ == name.rpartition(".")[2]
        assert torch.equal(loaded.base_model(tiny_tokens()).last_hidden_state, expected), auto


@torch.no_grad()
def test_hidden_states_attentions_and_the_implementation_of_attention_are_those_of_the_layers() -> None:
    model = pruned_model("llama")
    expected = model.base_model(tiny_tokens()).last_hidden_state
    for net, kind in ((model, "sdpa"), (model.base_model, "eager")):
        net.set_attn_implementation(kind)
        configs = [module.config for module in model.base_model.layers.modules() if hasattr(module, "config")]
        assert {config._attn_implementation for config in configs} == {kind}
    out = model(tiny_tokens(), output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(out.hidden_states[-1], expected, rtol=1e-4, atol=1e-4)
    assert len(out.attentions) == 2  # the layers that have attention


def test_checkpoints_say_a_class_that_no_engine_takes_for_its_own(tmp_path: Path) -> None:
    pruned_model("qwen2").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"per-layer attribute|ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again).__name__ == "Qwen2ForCausalLM"
    again.save_pretrained(tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):
        config = json.loads((folder / "config.json").read_text())
        assert "trust_remote_code=True" in config["how_to_load"]
        assert config["architectures"] == ["PrunedQwen2ForCausalLM"]
        assert config["auto_map"] == {
            "AutoModel": "modeling_pruned.Qwen2Model",
            "AutoModelForCausalLM": "modeling_pruned.Qwen2ForCausalLM",
            "AutoModelForSequenceClassification": "modeling_pruned.Qwen2ForSequenceClassification",
            "AutoModelForTokenClassification": "modeling_pruned.Qwen2ForTokenClassification",
        }


def test_copies_and_pickles() -> None:
    model = pruned_model("llama")
    expected = model(tiny_tokens()).logits
    assert torch.equal(copy.deepcopy(model)(tiny_tokens()).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(tiny_tokens()).logits, expected)


@pytest.mark.parametrize("source", ["object", "folder"])
def test_pipeline_takes_the_model_without_a_word(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model: Any = pruned_model("llama")
    model.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    generate = pipeline(
        "text-generation",
        model=model if source == "object" else str(tmp_path),
        tokenizer=tokenizer,
        trust_remote_code=True,
    )
    assert "not supported" not in caplog.text
    text = generate("w5 w6 w7", max_new_tokens=5, min_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("w5 w6 w7")
    assert text.count("w") == 8
