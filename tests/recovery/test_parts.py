"""The parts of a recovery: losses, order of the text, learning rate, adapters, zeros, overlap."""

import math

import pytest
import torch
from torch import Tensor

from lightning_prune.errors import CheckpointError, UserError
from lightning_prune.recovery import lora
from lightning_prune.recovery.distillation import hidden_distillation, logit_distillation, matching_states
from lightning_prune.recovery.overlap import refuse_overlap, shared_windows
from lightning_prune.recovery.schedule import cosine_with_warmup
from lightning_prune.recovery.stream import ShuffledWindows
from lightning_prune.recovery.zeros import check_zeros, hold_zeros, kept_weights, linears_of
from lightning_prune.runs.recovered import regained
from tests.cutting import cut
from tests.tiny import make_tiny, mixed_plan, tiny_tokens


def logits_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_that_of_the_definition(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    total = 0.0
    for row in range(2):
        for token in range(5):
            q = [math.exp(float(x) / temperature) for x in student[row, token].double()]
            p = [math.exp(float(x) / temperature) for x in teacher[row, token].double()]
            q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = logit_distillation(student, teacher, temperature)
    assert float(found) == pytest.approx(temperature**2 * total / 10, rel=1e-5)
    assert float(logit_distillation(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-6)


def test_states_are_compared_layer_by_layer_with_those_of_the_layers_that_stayed() -> None:
    student = [torch.full((1, 2, 3), float(value)) for value in (9, 1, 2)]
    teacher = [torch.full((1, 2, 3), float(value)) for value in (9, 5, 2, 7, 4)]
    mine, theirs = matching_states(student, teacher, [1, 3])
    assert [float(state[0, 0, 0]) for state in mine] == [1, 2]
    assert [float(state[0, 0, 0]) for state in theirs] == [2, 4]  # behind layer 1, and behind the last
    expected = ((1 - 2) ** 2 / 2**2 + (2 - 4) ** 2 / 4**2) / 2
    assert float(hidden_distillation(mine, theirs)) == pytest.approx(expected)


def test_learning_rate_rises_then_falls_to_nothing() -> None:
    assert [cosine_with_warmup(x, 0.2) for x in (0.0, 0.1, 0.2)] == pytest.approx([0, 0.5, 1])
    assert cosine_with_warmup(0.6, 0.2) == pytest.approx(0.5)
    assert cosine_with_warmup(1.0, 0.2) == pytest.approx(0)
    assert cosine_with_warmup(0.0, 0.0) == 1
    assert cosine_with_warmup(7.0, 0.1) == pytest.approx(0)


def test_every_window_comes_once_before_any_comes_again_and_a_stream_goes_on_where_it_was() -> None:
    tokens = torch.arange(7)[:, None].expand(7, 2)
    stream = iter(ShuffledWindows(tokens, 3, seed=4))
    batches = [next(stream)[:, 0].tolist() for _ in range(6)]
    assert [len(batch) for batch in batches] == [3, 3, 1] * 2
    rounds = [[window for batch in part for window in batch] for part in (batches[:3], batches[3:])]
    assert [sorted(one) for one in rounds] == [list(range(7))] * 2
    assert rounds[0] != rounds[1]
    again = ShuffledWindows(tokens, 3, seed=4)
    again.load_state_dict({"position": 4})
    assert next(iter(again))[:, 0].tolist() == batches[4]
    assert [b[:, 0].tolist() for b, _ in zip(ShuffledWindows(tokens, 3, seed=5), range(3), strict=False)] != batches[:3]


@pytest.mark.parametrize("masked", [False, True])
def test_merged_adapters_give_the_logits_of_the_adapted_model_whatever_the_widths(masked: bool) -> None:
    dense = make_tiny()
    net = make_tiny() if masked else cut(dense, mixed_plan(dense))
    kept = None
    if masked:
        generator = torch.Generator().manual_seed(1)
        for linear in linears_of(net).values():
            linear.weight.data *= torch.rand(linear.weight.shape, generator=generator) > 0.5
        kept = kept_weights(net)
    tokens, before = tiny_tokens(), logits_of(net, tiny_tokens())
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    adapted = lora.attach(net, 4, 8.0, kept)
    assert torch.equal(logits_of(adapted, tokens), before)  # B begins at zero
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    expected = logits_of(adapted, tokens)
    assert not torch.allclose(expected, before)
    merged = lora.merge(adapted, kept)
    assert {name: parameter.shape for name, parameter in merged.named_parameters()} == shapes
    torch.testing.assert_close(logits_of(merged, tokens), expected, rtol=1e-4, atol=1e-4)
    if kept is not None:
        assert check_zeros(merged, kept) == sum(int((~one).sum()) for one in kept.values())


def test_zeroed_weights_take_no_step_and_one_that_moved_is_found() -> None:
    net = make_tiny(layers=2).requires_grad_(True)
    linear = next(iter(linears_of(net).values()))
    linear.weight.data[0] = 0
    kept = kept_weights(net)
    hold_zeros(net, kept)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(input_ids=tiny_tokens(), use_cache=False).logits.square().mean().backward()
        optimizer.step()
    assert int((linear.weight[0] != 0).sum()) == 0
    assert check_zeros(net, kept) == linear.weight.shape[1]
    linear.weight.data[0, 3] = 1
    with pytest.raises(CheckpointError, match="1 weights of"):
        check_zeros(net, kept)


def test_windows_that_occur_somewhere_in_the_text_are_counted() -> None:
    text = tiny_tokens(50, 100, seed=1)
    stream = text.flatten()
    inside = torch.stack([stream[start : start + 80] for start in (3, 777, 4000)])
    outside = tiny_tokens(9, 80, seed=2)
    assert shared_windows(text, inside) == 1
    assert shared_windows(text, outside) == 0
    assert shared_windows(text, torch.cat([inside, outside])) == pytest.approx(0.25)


@pytest.mark.parametrize("equal", ["split", "text_sha256", "fingerprint", "tokens"])
def test_training_on_an_evaluation_text_is_refused_by_whatever_tells(equal: str) -> None:
    training = {"dataset": "a", "split": "train", "text_sha256": "1", "fingerprint": "x"}
    evaluation = {"dataset": "a", "split": "test", "text_sha256": "2", "fingerprint": "y"}
    tokens = tiny_tokens(20, 80, seed=1)
    windows = tokens[3:5].clone() if equal == "tokens" else tiny_tokens(2, 80, seed=2)
    refuse_overlap(training, tokens, "test", evaluation, tiny_tokens(2, 80, seed=2))
    with pytest.raises(UserError, match=r"--data\.dataset: the training text 'a' .* the evaluation set 'test'"):
        refuse_overlap(
            training, tokens, "test", evaluation | {k: training[k] for k in (equal,) if k in training}, windows
        )


def test_share_of_the_lost_log_perplexity() -> None:
    assert regained(10, 40, 20) == pytest.approx(0.5)
    assert regained(10, 40, 10) == pytest.approx(1)
    assert regained(10, 40, 80) == pytest.approx(-0.5)
    assert regained(10, 10, 9) is None
    assert regained(10, math.inf, 9) is None
