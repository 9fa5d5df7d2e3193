"""Adapters on layers of uneven widths, merged, and held off zeroed weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.recovery import lora
from lightning_prune.recovery.zeros import check_zeros, hold_zeros, kept_weights, linears_of
from lightning_prune.support.errors import CheckpointError
from tests.tiny import make_tiny, tiny_tokens

TOKENS = tiny_tokens()


def shake(net: nn.Module) -> None:
    """Adapters as training would leave them: B is zero at first."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))


def test_merged_weights_give_the_logits_of_the_adapters_at_uneven_widths(pruned: Path) -> None:
    net: Any = Checkpoint.open(str(pruned)).load(torch.float32)
    assert len({linear.weight.shape for linear in linears_of(net).values()}) > 4
    names, before = [name for name, _ in net.named_parameters()], net(TOKENS).logits.detach()
    adapted = lora.attach(net, rank=3, alpha=6.0)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    torch.testing.assert_close(adapted(input_ids=TOKENS).logits, before, rtol=0, atol=0)
    shake(adapted)
    with_adapters = adapted(input_ids=TOKENS).logits.detach()
    assert float((with_adapters - before).abs().max()) > 0.1
    merged = lora.merge(adapted)
    assert [name for name, _ in merged.named_parameters()] == names
    torch.testing.assert_close(merged(TOKENS).logits, with_adapters, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["phi3", "gemma2", "granite", "olmo2", "qwen2"])
def test_every_linear_of_a_family_is_adapted_and_merged(family: str) -> None:
    net = make_tiny(family)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    adapted = lora.attach(net, 2, 4.0)
    shake(adapted)
    with_adapters = adapted(input_ids=TOKENS).logits.detach()
    merged = lora.merge(adapted)
    torch.testing.assert_close(merged(TOKENS).logits, with_adapters, rtol=1e-3, atol=1e-3)
    changed = {name for name, parameter in merged.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {f"{name}.weight" for name in linears_of(merged)}


def zeroed_model() -> Any:
    net = make_tiny()
    torch.manual_seed(0)
    with torch.no_grad():
        for linear in linears_of(net).values():
            linear.weight.mul_(torch.rand_like(linear.weight) > 0.5)
    return net


def test_adapters_never_reach_zeroed_weights_and_training_knows_it() -> None:
    net = zeroed_model()
    kept = kept_weights(net)
    adapted = lora.attach(net, 3, 6.0, kept)
    shake(adapted)
    with_adapters = adapted(input_ids=TOKENS).logits.detach()
    merged = lora.merge(adapted, kept)
    assert check_zeros(merged, kept) == sum(int((~mask).sum()) for mask in kept.values()) > 0
    torch.testing.assert_close(merged(TOKENS).logits, with_adapters, rtol=1e-4, atol=1e-4)


def test_zeroed_weights_stay_zero_under_an_optimizer_and_the_check_sees_one_that_does_not() -> None:
    net = zeroed_model()
    kept = kept_weights(net)
    hold_zeros(net, kept)
    before = {name: linear.weight.detach().clone() for name, linear in linears_of(net).items()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    check_zeros(net, kept)
    for name, linear in linears_of(net).items():
        assert torch.equal(linear.weight == 0, before[name] == 0)
        assert not torch.equal(linear.weight, before[name])
    name, linear = next(iter(linears_of(net).items()))
    with torch.no_grad():
        linear.weight[tuple((~kept[name]).nonzero()[0])] = 1e-6
    with pytest.raises(CheckpointError, match=f"1 weights of {name}"):
        check_zeros(net, kept)
