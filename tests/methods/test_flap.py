"""FLAP: standard scores, and biases that take over the mean of what is removed where the family has them."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lightning_prune
from lightning_prune.calibration.statistics.channel_sums import InputMoments
from lightning_prune.checkpoint.cut import check_plan
from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.cli import main
from lightning_prune.comparison.audit import audit
from lightning_prune.comparison.records import load_run
from lightning_prune.formats.stock import write_stock
from lightning_prune.methods import FLAP
from lightning_prune.methods.bias_compensation import MeanBiases
from lightning_prune.methods.flap import in_deviations
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.families import layer_structures
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError
from lightning_prune.support.progress import Progress
from tests.methods.behaviour import Run, logits, prune, save_model, save_tokens
from tests.methods.running import inputs_of, projections
from tests.tiny import EVERY_FAMILY, make_tiny, tiny_config, tiny_plan, tiny_tokens

TOKENS = tiny_tokens(7, 16, seed=3)
KEYS = ["attention_bias", "mlp_bias"]
SILENT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")


def flap(tmp_path: Path, model: dict[str, Any] | None = None, **options: Any) -> Run:
    folder = tmp_path / "model"
    if not folder.exists():
        save_model(folder, **(model or {}))
    return prune(FLAP(str(folder), 0.29, **options), save_tokens(tmp_path / "c.npy", TOKENS), tmp_path / "logs")


def compensation(run: Run) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run.folder / "method.json").read_text())["bias_compensation"]
    return facts


def biases(run: Run) -> dict[str, torch.Tensor]:
    weights = load_file(run.pruned / "model.safetensors")
    return {name: tensor for name, tensor in weights.items() if name.endswith(".bias")}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_scores_equal_a_float64_reference_and_the_lowest_are_removed(kv_heads: int, tmp_path: Path) -> None:
    run = flap(tmp_path, {"kv_heads": kv_heads})
    exact = make_tiny(kv_heads=kv_heads).double()
    scores = run.method.scores
    for layer in range(4):
        for name, block, units in (("o_proj", "attention", kv_heads), ("down_proj", "mlp", 40)):
            linear = projections(exact, layer)[name]
            x, weight = inputs_of(exact, linear, TOKENS).numpy(), linear.weight.detach().numpy()
            metric = [x[:, j].var(ddof=1) * sum(w * w for w in weight[:, j]) for j in range(weight.shape[1])]
            z = (np.array(metric) - np.mean(metric)) / np.std(metric, ddof=1)
            expected = [z[j * len(z) // units : (j + 1) * len(z) // units].mean() for j in range(units)]
            found = torch.from_numpy(scores.score[scores.of(layer, block)])
            torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=1e-4)
    # Everything below the first unit that no longer fitted is removed.
    assert float(scores.score[scores.pruned].max()) <= float(scores.score[~scores.pruned].min())


def test_a_variance_beside_a_large_mean_is_not_lost_and_samples_that_fill_up_a_batch_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, 50, 3, generator=generator, dtype=torch.float64)
    x = (noise * torch.tensor([1.0, 1e-1, 1e-2]) + torch.tensor([0.0, 100.0, 100.0])).float()
    moments = InputMoments(3)
    moments.update(x[:2])
    moments.update(torch.cat([x[2:5], 9 * x[:1], x[5:]]), torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]))
    mean, variance = moments.reduced()
    exact = x.double().reshape(-1, 3)
    torch.testing.assert_close(mean, exact.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance, exact.var(0), rtol=2e-3, atol=0)
    assert int(moments.tokens) == 300


def test_channels_that_all_agree_have_the_score_zero() -> None:
    assert torch.equal(in_deviations(torch.full((4,), 3.0), 2), torch.zeros(2))


# Biases


@pytest.mark.parametrize(("kv_heads", "dense_biases"), [(1, False), (2, True)])
def test_the_mean_output_of_what_is_kept_is_the_dense_one(tmp_path: Path, kv_heads: int, dense_biases: bool) -> None:
    model = {"kv_heads": kv_heads, **dict.fromkeys(KEYS, dense_biases)}
    run = flap(tmp_path, model)
    exact, found = copy.deepcopy(make_tiny(**model)).double(), biases(run)
    lost, position = 0, 0
    for layer in run.method.plan.layers:
        for path, kept, units in (
            ("self_attn.o_proj", layer.kept[Block.ATTENTION], kv_heads),
            ("mlp.down_proj", layer.kept[Block.MLP], 40),
        ):
            bias = found.get(f"model.layers.{position}.{path}.bias")
            if not kept:
                assert bias is None
                continue
            linear = projections(exact, layer.layer)[path.split(".")[1]]
            x = inputs_of(exact, linear, TOKENS)
            columns = torch.arange(x.shape[1]).reshape(units, -1)[kept].flatten()
            mean = (x[:, columns] @ linear.weight[:, columns].T).mean(0) + bias
            torch.testing.assert_close(mean, linear(x).mean(0), rtol=1e-4, atol=1e-5)
            lost += x.shape[1] - len(columns)
        position += not layer.removed
    assert lost
    assert run.method.plan.biases == ([] if dense_biases else KEYS)


def test_other_biases_are_zero_and_stock_transformers_loads_the_folder_as_it_is_and_padded(tmp_path: Path) -> None:
    run = flap(tmp_path)
    config = json.loads((run.pruned / "config.json").read_text())
    assert [config[key] for key in KEYS] == [True, True]
    zero = {name: bias for name, bias in biases(run).items() if name.split(".", 3)[3].removesuffix(".bias") in SILENT}
    assert zero
    assert not any(bool(bias.any()) for bias in zero.values())
    stock = AutoModelForCausalLM.from_pretrained(run.pruned, trust_remote_code=True)
    assert torch.equal(logits(stock), logits(lightning_prune.load(run.pruned)))
    assert sum(parameter.numel() for parameter in stock.parameters()) == run.method.plan.parameters["pruned"]
    assert compensation(run) == {"projections": ["output", "down"], "config_keys": KEYS, "why_not": None}
    write_stock(Checkpoint.open(str(run.pruned)), tmp_path / "padded", "", Progress(shown=False))
    padded = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    torch.testing.assert_close(logits(padded), logits(stock), rtol=1e-4, atol=1e-4)


def test_a_family_without_such_biases_has_the_selection_alone_and_says_so(tmp_path: Path) -> None:
    run = flap(tmp_path, {"family": "mistral"})
    why = "family 'mistral' has no bias for o_proj and down_proj"
    assert not biases(run)
    assert compensation(run) == {"projections": [], "config_keys": [], "why_not": why}
    assert why in (run.pruned / "README.md").read_text()
    (said,) = [note for note in audit([load_run(run.folder)]).notes if note.startswith("flap: ")]
    assert why in said
    plan = run.folder / "plan.json"
    assert not PruningPlan.load(plan).weights_updated
    words = ["apply", "--plan", str(plan), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "again")]
    assert main(words) == 0  # nothing but the plan is needed
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (run.pruned / weights).read_bytes()


def test_which_family_has_which_biases() -> None:
    roles = {family: MeanBiases.of(tiny_config(family)).roles for family in EVERY_FAMILY}
    both = {"llama", "granite", "smollm3", "ernie4_5", "seed_oss", "bamba"}
    assert {family for family, found in roles.items() if found == ["output", "down"]} == both
    assert {family for family, found in roles.items() if found == ["output"]} >= {"qwen3", "gemma", "olmo"}
    assert roles["helium"] == ["down"]  # its attention is kept whole
    assert MeanBiases.of(tiny_config("helium")).without == []
    assert MeanBiases.of(tiny_config("qwen3")).without == ["down"]


@pytest.mark.parametrize(
    ("options", "label", "why"),
    [
        ({"bias_compensation": False}, "flap_selection", "switched off"),
        ({"refit": "residual"}, "flap_refit", "what is kept is refitted"),
    ],
)
def test_it_can_be_switched_off_and_a_refit_takes_its_place(
    tmp_path: Path, options: dict[str, Any], label: str, why: str
) -> None:
    run = flap(tmp_path, **options)
    plan = run.method.plan
    assert (run.method.label, plan.weights_updated, plan.biases) == (label, "refit" in options, [])
    assert not biases(run)
    assert compensation(run)["why_not"] == why


def test_the_second_of_two_steps_measures_with_the_biases_of_the_first(tmp_path: Path) -> None:
    method: Any = flap(tmp_path, steps=2).method
    (step,) = (tmp_path / "logs").rglob("steps/*")
    first = lightning_prune.load(step / "pruned").double()
    plan = PruningPlan.load(step / "plan.json")
    assert plan.weights_updated
    for position, layer in enumerate(layer for layer in plan.layers if not layer.removed):
        if kept := layer.kept[Block.MLP]:
            down = projections(first, position)["down_proj"]
            metric = inputs_of(first, down, TOKENS).var(0) * down.weight.square().sum(0)
            found = torch.from_numpy(method.scores.importance[method.scores.of(layer.layer, "mlp")][kept])
            # All channels of the step share one divisor.
            torch.testing.assert_close(found / found.sum(), (metric / metric.sum()).detach(), rtol=1e-3, atol=1e-6)


def test_a_plan_cannot_switch_on_what_gives_no_bias() -> None:
    model = make_tiny()
    plan = tiny_plan(model, [([0], [0])] * 4, biases=["tie_word_embeddings"])
    with pytest.raises(UserError, match="tie_word_embeddings"):
        check_plan(layer_structures(model), plan, model.config)
