"""Every family of experts, pruned by each kind of unit: the folder, its routers, and what is not touched."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lightning_prune
from lightning_prune.checkpoint.scores import Scores
from lightning_prune.methods import HGSP, REAP, Wanda
from lightning_prune.models.families import count_parameters
from lightning_prune.models.records import FAMILIES
from lightning_prune.models.vocabulary import Block
from tests.methods.running import masked_by, mean_token_loss, pruned_by, run_method, save_base
from tests.tiny import EXPERTS, make_moe, tiny_tokens

E, M, RATIO = 8, 32, 0.3
TOKENS = tiny_tokens(9, 24)
pytestmark = pytest.mark.usefixtures("trusted_families")
UNITS: dict[str, Any] = {"expert_channel": Wanda, "expert": REAP, "all": partial(Wanda, units="all")}


def without_numbers(names: Any) -> set[str]:
    return {re.sub(r"\.\d+\.", ".*.", name) for name in names}


@pytest.fixture
def base(tmp_path: Path, family: str) -> str:
    return save_base(make_moe(family, width=M, layers=3), tmp_path / "base")


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("family", EXPERTS)
def test_the_folder_is_what_the_masked_model_computes(base: str, tmp_path: Path, family: str, units: str) -> None:
    method = run_method(UNITS[units](base, RATIO), TOKENS, tmp_path / "run")
    pruned, kept, names = pruned_by(method), method.plan.layers, FAMILIES[family].experts
    assert names is not None
    with torch.no_grad():
        expected, found = (model(input_ids=TOKENS).logits for model in (masked_by(method), pruned))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert method.plan.parameters["pruned"] == count_parameters(pruned)
    if FAMILIES[family].per_layer(pruned.config):
        assert units == "all" or (family, units) == ("jamba", "expert_channel")  # where one key says both widths
        return
    stock = AutoModelForCausalLM.from_pretrained(method.pruned_folder)  # without the folder's code
    assert type(stock).__module__.startswith("transformers.models.")
    with torch.no_grad():
        assert torch.equal(stock(input_ids=TOKENS).logits, found)
    before, after = (load_file(Path(str(folder)) / "model.safetensors") for folder in (base, method.pruned_folder))
    assert without_numbers(after) == without_numbers(before)
    dense = lightning_prune.load(base).config
    sizes = (getattr(pruned.config, names.count), getattr(pruned.config, names.width))
    if units == "expert":
        assert 2 < sizes[0] < E
        assert sizes[1] == M
    else:
        assert sizes[0] == E
        assert sizes[1] in ((8, 16, 24) if units == "expert_channel" else (8, 16, 24, M))
    for name in ("num_experts_per_tok", "norm_topk_prob", "n_group", "topk_group", "shared_expert_intermediate_size"):
        assert getattr(pruned.config, name, None) == getattr(dense, name, None)
    for layer in kept if family in ("glm4_moe", "deepseek_v3") and units == "expert" else ():
        numbers = layer.kept.get(Block.EXPERT, range(E))
        assert sum(number < E // 2 for number in numbers) == len(numbers) / 2  # of two groups of the router
    run = Scores.read(tmp_path / "run" / "scores.csv", "--scores")
    run.check_plan(method.plan)


def products_of(model: Any, family: str) -> list[torch.Tensor]:
    """Σ |w·g| of every channel of a layer's experts, then of its shared ones, from gradients of the whole model."""
    found = []
    for layer in model.model.layers:
        block = next((part for part in layer.children() if hasattr(part, "experts")), None)
        if block is None:
            continue
        inner, down = ((part * part.grad).abs() for part in (block.experts.gate_up_proj, block.experts.down_proj))
        if family == "gpt_oss":  # [E, D, 2m], gate and up in turn, and [E, m, D]
            rows, columns = inner.sum(1).unflatten(1, (M, 2)).sum(2), down.sum(2)
        else:
            rows, columns = inner.sum(2).unflatten(1, (2, M)).sum(1), down.sum(1)
        sums = [(rows + columns).flatten()]
        if hasattr(block, "shared_experts"):
            gate, up, out = (
                (linear.weight * linear.weight.grad).abs()
                for linear in (getattr(block.shared_experts, f"{name}_proj") for name in ("gate", "up", "down"))
            )
            sums.append(gate.sum(1) + up.sum(1) + out.sum(0))
        found.append(torch.cat(sums))
    return found


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "ernie4_5_moe", "gpt_oss"])
def test_taylor_of_channels_is_that_of_the_whole_model_without_the_loss_of_routers(
    base: str, tmp_path: Path, family: str
) -> None:
    config = Path(base) / "config.json"
    config.write_text(config.read_text().replace('"output_router_logits": false', '"output_router_logits": true'))
    method = run_method(HGSP(base, RATIO, temperature=0.0), TOKENS, tmp_path / "run")
    model: Any = lightning_prune.load(base, torch.float32)
    assert model.config.output_router_logits
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    mean_token_loss(model, TOKENS).backward()
    rows = method.scores.of_kind(Block.EXPERT_CHANNEL)
    expected = torch.cat(products_of(model, family)).double()
    torch.testing.assert_close(torch.tensor(method.scores.importance[rows]), expected, rtol=1e-3, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["glm4_moe", "ernie4_5_moe", "gpt_oss", "nemotron_h", "granitemoehybrid"])
def test_a_refit_brings_the_stream_nearer_to_the_dense_one(base: str, tmp_path: Path, family: str) -> None:
    dense, errors, fresh = lightning_prune.load(base, torch.float32), [], tiny_tokens(16, 32, seed=1)
    for refit in ("none", "residual"):
        method = HGSP(base, 0.3, importance="kfac", temperature=0.0, refit=refit)  # type: ignore[arg-type]
        run_method(method, tiny_tokens(64, 32), tmp_path / refit, batch_size=32)
        with torch.no_grad():
            streams = [one.model(input_ids=fresh).last_hidden_state for one in (dense, pruned_by(method))]
        errors.append(float((streams[0] - streams[1]).square().sum()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("family", ["glm4_moe", "ernie4_5_moe", "lfm2_moe"])
@torch.no_grad()
def test_biases_of_routers_keep_their_precision_in_half_precision(base: str, tmp_path: Path, family: str) -> None:
    """They decide between experts whose scores are close; rounding them would change the choice."""
    method = run_method(REAP(base, RATIO, save_dtype="bfloat16"), TOKENS, tmp_path / "run", precision="bf16-true")
    files = load_file(Path(str(method.pruned_folder)) / "model.safetensors")
    dense = load_file(Path(base) / "model.safetensors")
    biases = {name: tensor for name, tensor in files.items() if name.endswith(("correction_bias", "expert_bias"))}
    assert biases
    for name, tensor in biases.items():
        layer = int(re.findall(r"layers\.(\d+)", name)[0])
        expected = dense[name].flatten()[method.plan.layers[layer].kept[Block.EXPERT]]
        assert torch.equal(tensor.flatten(), expected)
    assert {tensor.dtype for name, tensor in files.items() if "experts" in name} == {torch.bfloat16}
