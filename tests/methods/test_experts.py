"""Every method on a mixture of experts: what it measures, what it leaves, and what it refuses."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lightning_prune
from lightning_prune.checkpoint.scores import Scores
from lightning_prune.methods import FLAP, HGSP, REAP, HEAPr, Magnitude, ShortGPT, SlimGPT, Wanda
from lightning_prune.methods.base import PruningMethod
from lightning_prune.models.families import layer_structures
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError
from tests.methods.running import masked_by, mean_token_loss, pruned_by, run_method, save_base
from tests.tiny import make_moe, make_tiny, tiny_tokens

E, M, LAYERS = 8, 32, 3
TOKENS = tiny_tokens(9, 24)
KFAC = partial(HGSP, importance="kfac", temperature=0.0)
SYSTEMS: dict[str, Callable[..., PruningMethod]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "wanda_experts": partial(Wanda, units="expert"),
    "wanda_all": partial(Wanda, units="all"),
    "reap": REAP,
    "heapr": HEAPr,
    "hgsp_taylor": HGSP,
    "hgsp_fisher": partial(HGSP, importance="fisher", prior="gradient"),
    "kfac": KFAC,
    "kfac_refit": partial(KFAC, refit="residual"),
    "reap_refit": partial(REAP, refit="output"),
    "shortgpt": ShortGPT,
}
QUICK = ("wanda_all", "reap_refit", "kfac_refit")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_base(make_moe(width=M, layers=LAYERS), tmp_path_factory.mktemp("moe") / "base")


def systems() -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SYSTEMS]


@pytest.mark.parametrize("system", systems())
def test_the_result_is_stock_and_what_the_masked_model_computes(base: str, tmp_path: Path, system: str) -> None:
    method = run_method(SYSTEMS[system](base, 0.35), TOKENS, tmp_path / "run")
    pruned = pruned_by(method)
    if system != "wanda_all":  # GQA groups differ by layer
        assert type(pruned).__module__.startswith("transformers.models.qwen3_moe")
    with torch.no_grad():
        expected, found = (model(input_ids=TOKENS).logits for model in (masked_by(method), pruned))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert method.plan.parameters["pruned"] == sum(p.numel() for p in pruned.parameters())
    sizes = (pruned.config.num_experts, pruned.config.moe_intermediate_size)
    if system in ("reap", "reap_refit", "wanda_experts"):
        assert sizes in ((5, M), (6, M))
    elif system != "shortgpt":
        assert sizes in ((E, 16), (E, 24))


def test_taylor_of_channels_is_that_of_the_whole_model(base: str, tmp_path: Path) -> None:
    method = run_method(HGSP(base, 0.35, temperature=0.0), TOKENS, tmp_path / "run")
    model: Any = copy.deepcopy(lightning_prune.load(base, torch.float32))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    mean_token_loss(model, TOKENS).backward()
    for layer, block in enumerate(model.model.layers):
        inner, down = block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj
        rows = (inner * inner.grad).abs().sum(2)
        expected = rows[:, :M] + rows[:, M:] + (down * down.grad).abs().sum(1)
        importance = method.scores.importance[method.scores.of(layer, Block.EXPERT_CHANNEL)]
        torch.testing.assert_close(torch.tensor(importance), expected.flatten().double(), rtol=1e-3, atol=1e-9)


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (SlimGPT, "slimgpt does not prune"),
        (FLAP, "flap does not prune"),
        (partial(Wanda, structure="2:4"), "Use --model.structure group"),
        (partial(Wanda, freeze_first_n_layers=1), "all layers keep equally many"),
        (partial(HGSP, steps=2), "one step"),
        (partial(HEAPr, units="all"), "prunes experts alone"),
        (partial(REAP, pruning_ratio=0.9), "largest reachable ratio"),
        (partial(REAP, pruning_ratio=0.01), "smallest step"),
    ],
)
def test_what_cannot_be_is_refused_before_any_text_is_read(base: str, make: Any, message: str) -> None:
    ratio = make.keywords.get("pruning_ratio", 0.3) if isinstance(make, partial) else 0.3
    with pytest.raises(UserError, match=message):
        make(base, pruning_ratio=ratio).check_model()


def test_a_model_without_experts_has_none_to_prune(tmp_path: Path) -> None:
    dense = save_base(make_tiny(), tmp_path / "dense")
    for method in (REAP(dense, 0.2), HEAPr(dense, 0.2), Wanda(dense, 0.2, units="expert")):
        with pytest.raises(UserError, match="has no experts"):
            method.check_model()


def error_of(model: Any, dense: Any, tokens: Tensor) -> float:
    """Of the residual stream after the last layer."""
    with torch.no_grad():
        found, expected = (one.model(input_ids=tokens).last_hidden_state for one in (model, dense))
    return float((found - expected).square().sum())


@pytest.mark.parametrize("system", ["kfac", "reap"])
def test_a_refit_brings_the_stream_nearer_to_the_dense_one(base: str, tmp_path: Path, system: str) -> None:
    dense, errors = lightning_prune.load(base, torch.float32), []
    for refit in ("none", "residual"):
        method = run_method(SYSTEMS[system](base, 0.35, refit=refit), tiny_tokens(64, 32), tmp_path / refit)
        errors.append(error_of(pruned_by(method), dense, tiny_tokens(16, 32, seed=1)))
    assert errors[1] < errors[0]
