"""SlimGPT as a whole run, against a float64 re-derivation with explicit inverses and whole forwards."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune.methods import SlimGPT
from lightning_prune.models.vocabulary import Block
from tests.methods.running import inputs_of, projections, pruned_by
from tests.methods.test_slimgpt_math import naive_channel_errors, naive_greedy, naive_head_errors, naive_hessian
from tests.tiny import make_tiny, tiny_tokens


def reference(model: Any, tokens: Tensor, counts: list[tuple[int, int]]) -> tuple[list[Any], Any]:
    """The units kept of every layer and the model, layer by layer; channels leave three at a time."""
    model, config, kept = copy.deepcopy(model).double(), model.config, []
    width = config.head_dim * config.num_attention_heads // config.num_key_value_heads
    for layer, (groups, channels) in enumerate(counts):
        threes = [3] * (channels // 3) + [channels % 3] * (channels % 3 > 0)
        kept.append([])
        for name, columns, rounds, errors in (
            ("o_proj", width, [1] * groups, naive_head_errors(width, "slimgpt")),
            ("down_proj", 1, threes, naive_channel_errors),
        ):
            linear = projections(model, layer)[name]
            hessian = naive_hessian(inputs_of(model, linear, tokens), len(tokens), 0.01)
            weight = linear.weight.data
            units, new, _ = naive_greedy(weight.numpy(), hessian, columns, rounds, errors)
            linear.weight.data = torch.zeros_like(weight)
            linear.weight.data[:, [unit * columns + j for unit in units for j in range(columns)]] = torch.from_numpy(
                new
            )
            kept[-1].append(units)
    return kept, model


@pytest.mark.parametrize(
    ("precision", "shape"),
    [
        ("32-true", {"family": "qwen2", "heads": 4, "kv_heads": 2}),  # with biases
        ("64-true", {"family": "llama", "heads": 4, "kv_heads": 4}),
    ],
)
def test_whole_run_equals_a_float64_reference(precision: str, shape: dict[str, Any], run: Any) -> None:
    model = make_tiny(layers=3, **shape)
    tokens = tiny_tokens(12, 16)
    method: Any = run(model, SlimGPT, 0.4, tokens, precision=precision, ffn_group_size=3)
    assert method.ratios == sorted(method.ratios)
    assert method.ratios[0] < method.ratios[-1]  # later layers lose more
    assert any(groups for groups, _ in method.counts), "the case must remove heads too"

    kept, expected = reference(model, tokens, method.counts)
    assert [[plan.kept[Block.ATTENTION], plan.kept[Block.MLP]] for plan in method.plan.layers] == kept
    with torch.no_grad():
        got = pruned_by(method)(input_ids=tokens, use_cache=False).logits.double()
        want = expected(input_ids=tokens, use_cache=False).logits
    assert float((got - want).norm() / want.norm()) < 1e-4
    assert sum(p.numel() for p in pruned_by(method).parameters()) == method.plan.parameters["pruned"]


def test_max_tokens_takes_the_first_tokens(run: Any) -> None:
    model, tokens = make_tiny(layers=2), tiny_tokens(12, 16)
    whole = run(model, SlimGPT, 0.3, tokens[:6])
    capped = run(model, SlimGPT, 0.3, tokens, batch_size=5, max_tokens=96)
    assert capped.plan.layers == whole.plan.layers
    torch.testing.assert_close(capped.scores.importance, whole.scores.importance, rtol=1e-3, atol=1e-9)


def test_damping_that_had_to_be_raised_is_reported(run: Any) -> None:
    method = run(make_tiny(layers=2), SlimGPT, 0.2, tiny_tokens(2, 8), damping=0.0)  # 16 tokens, 40 channels
    assert all(used > 0 for used in method._details["damping_used"]["down"])


def test_every_block_runs_once_however_deep_the_model_is(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for its Hessian; then the pruned projection alone, for what it now puts out: never the model per layer."""
    calls = dict.fromkeys(("query", "output", "gate", "down"), 0)

    def count(self) -> None:
        for layer in self.layers:
            for role in calls:
                layer.linears[role].module.register_forward_hook(
                    lambda *_, role=role: calls.__setitem__(role, calls[role] + 1)
                )

    start = SlimGPT.on_fit_start
    monkeypatch.setattr(SlimGPT, "on_fit_start", lambda self: (start(self), count(self))[0])
    run(make_tiny(layers=5), SlimGPT, 0.3, tiny_tokens(12, 16), batch_size=4)
    batches, layers = 3, 5
    once, again = layers * batches, (layers - 1) * batches  # nothing follows the last layer
    assert calls == {"query": once, "output": 2 * once, "gate": once, "down": once + again}
