"""Every method on a mixture of experts: what it measures, what it leaves, and what it refuses."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lightning_prune
from lightning_prune.calibration.layer_result import LayerResult
from lightning_prune.checkpoint.scores import Scores
from lightning_prune.methods import HGSP, REAP, HEAPr, Magnitude, Wanda
from lightning_prune.methods.experts import expert_details
from lightning_prune.models.families import layer_structures
from lightning_prune.models.vocabulary import Block
from tests.methods.running import masked_by, mean_token_loss, pruned_by, run_method, save_base
from tests.tiny import make_moe, tiny_tokens

E, M, LAYERS = 8, 32, 3
TOKENS = tiny_tokens(9, 24)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_base(make_moe(width=M, layers=LAYERS), tmp_path_factory.mktemp("moe") / "base")


@pytest.mark.parametrize(
    "make", [partial(HGSP, importance="kfac", temperature=0.0, refit="residual"), partial(REAP, refit="output")]
)
def test_a_refitted_result_is_stock_and_what_the_masked_model_computes(base: str, tmp_path: Path, make: Any) -> None:
    """Of channels, and of whole experts; ``test_expert_families.py`` has every unit without a refit."""
    method = run_method(make(base, 0.35), TOKENS, tmp_path / "run")
    pruned = pruned_by(method)
    assert type(pruned).__module__.startswith("transformers.models.qwen3_moe")
    with torch.no_grad():
        torch.testing.assert_close(pruned(TOKENS).logits, masked_by(method)(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_heapr_of_channels_is_the_loss_of_the_whole_model_to_second_order(base: str, tmp_path: Path) -> None:
    method = run_method(HEAPr(base, 0.35), TOKENS, tmp_path / "run")
    model: Any = lightning_prune.load(base, torch.float32)
    seen: list[Any] = []

    def keep(_: Any, args: Any, out: Tensor) -> None:
        out.retain_grad()
        seen.append((args, out))

    for block in model.model.layers:
        block.mlp.experts.register_forward_hook(keep)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    (mean_token_loss(model, TOKENS) * TOKENS[:, 1:].numel()).backward()
    for layer, ((x, index, weights), out) in enumerate(seen):
        experts = layer_structures(model)[layer].experts
        assert experts is not None
        expected = torch.zeros(E, M, dtype=torch.float64)
        for e in range(E):
            rows, place = (index == e).nonzero(as_tuple=True)
            a = experts.inner(e, x[rows]).detach().double()
            slope = (
                weights[rows, place, None].detach().double()
                * (out.grad[rows] @ experts.part("down", e)).detach().double()
            )
            if len(rows):
                expected[e] = a.square().mean(0) * slope.square().mean(0) * len(rows) / len(x)
        found = torch.tensor(method.scores.importance[method.scores.of(layer, Block.EXPERT_CHANNEL)])
        torch.testing.assert_close(found, expected.flatten(), rtol=1e-3, atol=1e-12)


def test_an_expert_is_worth_the_sum_of_its_channels(base: str, tmp_path: Path) -> None:
    channels, whole = (
        run_method(Magnitude(base, 0.35, units=units), TOKENS, tmp_path / units).scores  # type: ignore[arg-type]
        for units in ("expert_channel", "expert")
    )
    sums = torch.tensor(channels.importance).view(LAYERS * E, M).sum(1)
    torch.testing.assert_close(torch.tensor(whole.importance), sums)


def test_record_names_tokens_per_expert_and_warns_where_they_are_few(base: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"experts see fewer tokens than their 32 channels.*--data\.num_samples \d+"):
        method = run_method(Wanda(base, 0.35), TOKENS[:2], tmp_path / "run")
    tokens = method.details()["experts"]["tokens"]
    assert {layer: sum(counts) for layer, counts in tokens.items()} == dict.fromkeys(range(LAYERS), 2 * 24 * 2)


def test_no_number_of_samples_is_said_to_help_experts_that_are_hardly_ever_chosen(base: str) -> None:
    views = layer_structures(lightning_prune.load(base))[:2]
    results = [
        LayerResult(facts={"experts": {"tokens": [fewest, *[1000] * (E - 1)], "peaks": [1.0] * E}})
        for fewest in (3, 1000)
    ]
    with pytest.warns(UserWarning, match=f"^1 of {2 * E} .*fewest 3. The others see enough") as said:
        expert_details(views, results, samples=9)
    assert "num_samples" not in str(said[0].message)


@pytest.mark.parametrize("fewest", [0, 3])
def test_whole_experts_need_no_token_per_channel(base: str, fewest: int, recwarn: pytest.WarningsRecorder) -> None:
    views = layer_structures(lightning_prune.load(base))[:1]
    results = [LayerResult(facts={"experts": {"tokens": [fewest] * E, "peaks": [1.0] * E}})]
    expert_details(views, results, samples=9, channels=False)
    said = [str(one.message) for one in recwarn]
    expected = f"{E} of {E} experts see no token of the calibration set, so they are scored as worth nothing. More text"
    assert [one.startswith(expected) for one in said] == [True] * (fewest == 0)


def test_an_expert_whose_output_peaks_is_kept_unless_asked(tmp_path: Path) -> None:
    model: Any = make_moe(width=32, layers=2)
    with torch.no_grad():  # so large that its peak stands out, so seldom that every score of a whole expert is lowest
        model.model.layers[1].mlp.experts.down_proj[3].mul_(50)
    base, found = save_base(model, tmp_path / "base"), {}
    for choice in ("keep", "remove"):
        method = run_method(
            REAP(base, 0.4, criterion="frequency", super_experts=choice),  # type: ignore[arg-type]
            TOKENS,
            tmp_path / choice,
        )
        assert method.details()["experts"]["super_experts"] == [[1, 3]]
        marked = method.scores.super_expert
        assert marked is not None
        assert (marked == (method.scores.of(1, Block.EXPERT) & (method.scores.unit == 3))).all()
        method.scores.importance[method.scores.of(1, Block.EXPERT)][3] = 0
        found[choice] = method
    table = run_method(Wanda(base, 0.3), TOKENS, tmp_path / "channels").scores
    assert np.flatnonzero(table.super_expert).tolist() == list(range((E + 3) * 32, (E + 4) * 32))
    table.write(tmp_path / "scores.csv")
    assert (Scores.read(tmp_path / "scores.csv", "--run").super_expert == table.super_expert).all()
    counts = torch.tensor(found["keep"].details()["experts"]["tokens"][1])
    lowest = counts.argsort(stable=True)[: E - len(found["remove"].plan.layers[1].kept[Block.EXPERT])]
    assert set(range(E)) - set(found["remove"].plan.layers[1].kept[Block.EXPERT]) == set(lowest.tolist())
    assert 3 in found["keep"].plan.layers[1].kept[Block.EXPERT]
