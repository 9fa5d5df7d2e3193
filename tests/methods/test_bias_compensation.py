"""What leaves o_proj and down_proj is taken over by biases where the family has them, and said where it has not."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lightning_prune
from lightning_prune.checkpoint.cut import check_plan
from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.cli import main
from lightning_prune.comparison.audit import audit
from lightning_prune.comparison.records import load_run
from lightning_prune.export.stock import write_stock
from lightning_prune.methods import FLAP
from lightning_prune.methods.bias_compensation import MeanBiases
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.families import layer_structures
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError
from lightning_prune.support.progress import Progress
from tests.methods.behaviour import Run, logits, prune, save_model, save_tokens
from tests.methods.running import inputs_of, projections
from tests.tiny import EVERY_FAMILY, make_tiny, tiny_config, tiny_plan, tiny_tokens

TOKENS = tiny_tokens(7, 16, seed=3)
SILENT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")


def flap(tmp_path: Path, ratio: float = 0.29, model: dict[str, Any] | None = None, **options: Any) -> Run:
    folder = tmp_path / "model"
    if not folder.exists():
        save_model(folder, **(model or {}))
    return prune(FLAP(str(folder), ratio, **options), save_tokens(tmp_path / "c.npy", TOKENS), tmp_path / "logs")


@pytest.mark.parametrize(("kv_heads", "dense_biases"), [(1, False), (2, True)])
def test_the_mean_output_of_what_is_kept_is_the_dense_one(tmp_path: Path, kv_heads: int, dense_biases: bool) -> None:
    switches = {"attention_bias": dense_biases, "mlp_bias": dense_biases}
    run = flap(tmp_path, model={"kv_heads": kv_heads, **switches})
    exact = copy.deepcopy(make_tiny(kv_heads=kv_heads, **switches)).double()
    pruned = load_file(run.pruned / "model.safetensors")
    lost, position = 0, 0
    for layer in run.method.plan.layers:
        for name, path, kept, units in (
            ("o_proj", "self_attn.o_proj", layer.kept[Block.ATTENTION], kv_heads),
            ("down_proj", "mlp.down_proj", layer.kept[Block.MLP], 40),
        ):
            linear = projections(exact, layer.layer)[name]
            x = inputs_of(exact, linear, TOKENS)
            columns = torch.arange(x.shape[1]).reshape(units, -1)[kept].flatten()
            if not kept:
                assert f"model.layers.{position}.{path}.bias" not in pruned
                continue
            mean = (x[:, columns] @ linear.weight[:, columns].T).mean(0) + pruned[
                f"model.layers.{position}.{path}.bias"
            ]
            expected = linear(x).mean(0)
            torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
            lost += x.shape[1] - len(columns)
        position += bool(layer.kept[Block.ATTENTION] or layer.kept[Block.MLP])
    assert lost
    assert run.method.plan.biases == ([] if dense_biases else ["attention_bias", "mlp_bias"])


def test_other_biases_are_zero_and_stock_transformers_loads_the_folder_as_it_is_and_padded(tmp_path: Path) -> None:
    run = flap(tmp_path)
    config = json.loads((run.pruned / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (True, True)
    pruned = load_file(run.pruned / "model.safetensors")
    zero = [name for name in pruned if name.endswith(".bias") and name.split(".", 3)[3].removesuffix(".bias") in SILENT]
    assert zero
    assert not any(bool(pruned[name].any()) for name in zero)
    stock = AutoModelForCausalLM.from_pretrained(run.pruned, trust_remote_code=True)
    assert torch.equal(logits(stock), logits(lightning_prune.load(run.pruned)))
    assert sum(parameter.numel() for parameter in stock.parameters()) == run.method.plan.parameters["pruned"]
    details = json.loads((run.folder / "method.json").read_text())["bias_compensation"]
    keys = ["attention_bias", "mlp_bias"]
    assert details == {"projections": ["output", "down"], "config_keys": keys, "why_not": None}
    write_stock(Checkpoint.open(str(run.pruned)), tmp_path / "padded", "", Progress(shown=False))
    padded = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    torch.testing.assert_close(logits(padded), logits(stock), rtol=1e-4, atol=1e-4)


def test_a_family_without_such_biases_has_the_selection_alone_and_says_so(tmp_path: Path) -> None:
    run = flap(tmp_path, model={"family": "mistral"})
    assert not any(name.endswith(".bias") for name in load_file(run.pruned / "model.safetensors"))
    details = json.loads((run.folder / "method.json").read_text())["bias_compensation"]
    assert details["projections"] == []
    assert details["why_not"] == "family 'mistral' has no bias for o_proj and down_proj"
    assert details["why_not"] in (run.pruned / "README.md").read_text()
    (said,) = [note for note in audit([load_run(run.folder)]).notes if note.startswith("flap: ")]
    assert details["why_not"] in said
    plan = run.folder / "plan.json"
    assert not PruningPlan.load(plan).weights_updated
    words = ["apply", "--plan", str(plan), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "again")]
    assert main(words) == 0  # nothing but the plan is needed
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (run.pruned / weights).read_bytes()


def test_who_can_carry_what() -> None:
    found = {family: MeanBiases.of(tiny_config(family)).roles for family in EVERY_FAMILY}
    both = {"llama", "granite", "smollm3", "ernie4_5", "seed_oss", "bamba"}
    assert {family for family, roles in found.items() if roles == ["output", "down"]} == both
    assert {family for family, roles in found.items() if roles == ["output"]} >= {"qwen3", "gemma", "olmo"}
    assert found["helium"] == ["down"]  # its attention stays whole
    assert MeanBiases.of(tiny_config("helium")).without == []
    assert MeanBiases.of(tiny_config("qwen3")).without == ["down"]


def test_a_refit_takes_its_place_and_it_can_be_switched_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    off = flap(tmp_path, bias_compensation=False)
    assert (off.method.label, off.method.plan.weights_updated, off.method.plan.biases) == ("flap_selection", False, [])
    refit = flap(tmp_path, refit="residual")
    assert (refit.method.label, refit.method.plan.biases) == ("flap_refit", [])
    for run, why in ((off, "switched off"), (refit, "what is kept is refitted")):
        assert not any(name.endswith(".bias") for name in load_file(run.pruned / "model.safetensors"))
        assert json.loads((run.folder / "method.json").read_text())["bias_compensation"]["why_not"] == why


def test_the_second_of_two_steps_measures_with_the_biases_of_the_first(tmp_path: Path) -> None:
    method: Any = flap(tmp_path, steps=2).method
    first = lightning_prune.load(next((tmp_path / "logs").rglob("steps/*/pruned"))).double()
    plan = PruningPlan.load(next((tmp_path / "logs").rglob("steps/*/plan.json")))
    assert plan.weights_updated
    for position, kept in enumerate(
        layer for layer in plan.layers if layer.kept[Block.ATTENTION] or layer.kept[Block.MLP]
    ):
        if kept.kept[Block.MLP]:
            down = projections(first, position)["down_proj"]
            metric = inputs_of(first, down, TOKENS).var(0) * down.weight.square().sum(0)
            found = torch.from_numpy(
                method.scores.importance[method.scores.of(kept.layer, "mlp")][kept.kept[Block.MLP]]
            )
            # All channels of the step share one divisor.
            torch.testing.assert_close(found / found.sum(), (metric / metric.sum()).detach(), rtol=1e-3, atol=1e-6)


def test_a_plan_cannot_switch_on_what_gives_no_bias() -> None:
    model = make_tiny()
    plan = tiny_plan(model, [([0], [0])] * 4, biases=["tie_word_embeddings"])
    with pytest.raises(UserError, match="tie_word_embeddings"):
        check_plan(layer_structures(model), plan, model.config)
