"""``benchmarks/peers.py``: what it measures with, and how it changes a peer's code; no checkout is needed."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import lightning_prune as lp
from benchmarks import peers
from lightning_prune.models.vocabulary import Block
from tests.tiny import make_tiny, tiny_tokens


def test_agreement_counts_what_both_removed() -> None:
    def of(ours: dict[str, list[int]], theirs: dict[str, list[int]]) -> Any:
        return peers.agreement(*({name: np.array(row) > 0 for name, row in one.items()} for one in (ours, theirs)))

    assert of({"a": [1, 1, 0, 0], "b": [0, 1]}, {"a": [1, 0, 1, 0], "b": [0, 1]}) == (2 / 4, 2, 6)
    assert of({"a": [1, 0]}, {"a": [0, 1]}) == (0.0, 2, 2)
    assert of({"a": [0, 0]}, {"a": [0, 0]}) == (1.0, 0, 2)  # nothing removed


@pytest.mark.slow  # it evaluates a model
def test_distance_is_kl_from_the_dense_model_and_the_perplexity_of_evaluate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense, pruned = make_tiny("llama"), make_tiny("llama")
    with torch.no_grad():
        for one in pruned.parameters():
            one.add_(0.02 * torch.randn_like(one))
    windows = torch.randint(dense.config.vocab_size, (5, 12))
    truth, guess = (one(input_ids=windows).logits[:, :-1].double().softmax(-1) for one in (dense, pruned))
    expected = (truth * (truth / guess).log()).sum(-1).mean().detach()
    perplexity, divergence = peers.distance(dense, pruned, windows, size=2)
    assert divergence == pytest.approx(float(expected), rel=1e-4)
    assert perplexity == pytest.approx(next(iter(lp.evaluate(pruned, [windows], verbose=False).values())), rel=1e-5)
    assert np.isnan(peers.distance(None, pruned, windows)[1])


@pytest.mark.slow  # a process of its own
def test_ours_says_which_units_its_plan_removed(tmp_path: Path) -> None:
    make_tiny(hidden=32, channels=48).save_pretrained(tmp_path / "model")
    np.save(tmp_path / "calibration.npy", tiny_tokens(8, 16).numpy())
    out, model = str(tmp_path / "out"), str(tmp_path / "model")
    job = peers.Job("ours", out, model, str(tmp_path), 0.3, method="wanda", measure=False)
    result = peers.run(job)
    assert result is not None, (tmp_path / "out/log.txt").read_text()
    plan = lp.prune(model, "wanda", 0.3, tmp_path / "calibration.npy", verbose=False, accelerator="cpu").plan
    assert result["achieved"] == plan.achieved_ratio
    with np.load(tmp_path / "out/removed.npz") as removed:
        for layer in plan.layers:
            kept = np.flatnonzero(~removed[f"{layer.layer}.mlp"]).tolist()
            assert kept == layer.kept[Block.MLP]


def test_zero_columns_stand_for_removed_units_and_cost_what_they_hold() -> None:
    model: Any = make_tiny(hidden=16, channels=24, layers=1)  # 4 query heads of 8, 2 KV heads
    config, total = model.config, sum(one.numel() for one in model.parameters())
    removed = peers.no_units(config)
    removed["0.attention"][1] = removed["0.mlp"][[0, 23]] = True
    outcome = peers.peer_code.without_units(model, removed)
    output, down = model.model.layers[0].self_attn.o_proj.weight, model.model.layers[0].mlp.down_proj.weight
    assert output.any(0).tolist() == [True] * 16 + [False] * 16
    assert down.any(0).tolist() == [False] + [True] * 22 + [False]
    group = 2 * 8 * 16 * 2 + 8 * 16 * 2  # two query heads and their columns of o, a key and a value head
    assert outcome.achieved == (group + 2 * 3 * 16) / total
    share = peers.peer_code.share_of_layers(model, outcome.achieved)
    assert share == pytest.approx((group + 2 * 3 * 16) / (2 * group + 24 * 3 * 16))


def test_a_module_is_imported_with_the_models_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "WIDTH, COST, NAME = 128, 512.0, '128'\ndef first(): return get_loaders()[0][0]\n"
    (tmp_path / "of_a_peer.py").write_text(code)
    monkeypatch.setattr(sys, "path", list(sys.path))
    job = SimpleNamespace(checkout=str(tmp_path), tokens=torch.arange(6).view(2, 3))
    module = peers.peer_code.adapted(job, "of_a_peer", {128: 16, 512.0: 96.0})
    assert (module.WIDTH, module.COST, module.NAME) == (16, 96.0, "128")
    assert module.first()[0].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--peer", "nobody=."], "'nobody' is not known. Choose from wanda"),
        (["--peer", "wanda=missing"], "no folder at 'missing'"),
        (["--text", "missing"], "no file at 'missing/validation.txt'"),
        (["--rounds", "0"], "found 0"),
    ],
)
def test_a_mistake_is_refused_before_anything_runs(
    change: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in ("validation.txt", "test.txt"):
        (tmp_path / name).write_text("text")
    root = tmp_path / "results"
    given = ["--model", "m", "--root", str(root), "--text", str(tmp_path), "--peer", f"wanda={tmp_path}", *change]
    monkeypatch.setattr(sys, "argv", ["peers.py", *given])
    with pytest.raises(SystemExit) as status:
        peers.main()
    assert status.value.code == 2
    assert message in capsys.readouterr().err
    assert not root.exists()
