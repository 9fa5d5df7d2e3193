"""What families of another layout decide is what the same arithmetic decides in the layout of Llama."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import lightning_prune
from lightning_prune.calibration.passes import BlockPass
from lightning_prune.checkpoint import family_check as proof
from lightning_prune.methods import HGSP, SlimGPT, Wanda
from lightning_prune.methods.base import PruningMethod
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError
from tests.methods.behaviour import SYSTEMS, logits, prune, save_tokens
from tests.methods.running import pruned_by, run_method, save_base
from tests.tiny import HYBRIDS, SIDE_BY_SIDE, make_tiny, tiny_tokens


def fused(plain: PreTrainedModel) -> PreTrainedModel:
    """A Mistral in the words of Phi-3: the same numbers, q, k and v in one matrix, gate and up in another."""
    model = make_tiny("phi3", partial_rotary_factor=1.0, tied=False, rms_norm_eps=plain.config.rms_norm_eps)
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    for layer in range(plain.config.num_hidden_layers):
        for block, names, one in (
            ("self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
            ("mlp", ("gate_proj", "up_proj"), "gate_up_proj"),
        ):
            prefix = f"model.layers.{layer}.{block}."
            parts = [state.pop(f"{prefix}{name}.weight") for name in names]
            state[f"{prefix}{one}.weight"] = torch.cat(parts)
    model.load_state_dict(state)
    return model


# Those that read all seven matrices, single weights of them, or rewrite two.
@pytest.mark.parametrize("system", ["wanda", "wanda_2to4", "hgsp_taylor_refit", "slimgpt"])
def test_a_fused_model_is_pruned_as_the_same_model_in_parts(tmp_path: Path, system: str) -> None:
    plain = make_tiny("mistral", tied=False)
    tokens, runs = save_tokens(tmp_path / "tokens.npy"), []
    for name, model in (("plain", plain), ("fused", fused(plain))):
        base = save_base(model, tmp_path / name)
        runs.append(prune(SYSTEMS[system].make(pretrained=base, pruning_ratio=0.3), tokens, tmp_path / f"{name}-runs"))
    first, second = runs
    assert second.method.plan.layers == first.method.plan.layers
    assert second.method.plan.parameters == first.method.plan.parameters
    torch.testing.assert_close(
        second.method.scores.importance, first.method.scores.importance, rtol=1e-4, atol=0, check_dtype=False
    )
    found, expected = (logits(lightning_prune.load(run.pruned)) for run in (second, first))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def folded(model: PreTrainedModel) -> PreTrainedModel:
    """A Granite in the words of Llama, its multipliers in the weights."""
    config: Any = model.config
    plain = make_tiny("llama", tied=False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if name.endswith("embed_tokens.weight"):
            tensor *= config.embedding_multiplier
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor *= config.residual_multiplier
        elif name.endswith("q_proj.weight"):
            tensor *= config.attention_multiplier * config.head_dim**0.5
        elif name.startswith("lm_head"):
            tensor /= config.logits_scaling
    plain.load_state_dict(state)
    return plain


def test_multipliers_are_in_priors_losses_and_gradients(run: Any) -> None:
    """The priors of a Granite are those of the Llama that its multipliers make, and so is Taylor's |w·g| of a group, in
    which a weight's scale cancels out."""
    granite = make_tiny("granite", tied=False)
    mine, theirs = (run(model, HGSP, 0.2, tiny_tokens(6, 12)) for model in (granite, folded(granite)))
    torch.testing.assert_close(mine.priors, theirs.priors, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(mine.scores.importance, theirs.scores.importance, rtol=2e-3, atol=1e-6)


MLP_ENTRY = {
    "gemma2": "pre_feedforward_layernorm",
    "gemma3_text": "pre_feedforward_layernorm",
    "gemma4_text": "pre_feedforward_layernorm",
    "olmo2": "mlp",
}


@pytest.mark.usefixtures("trusted_families")
@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gemma3_text", "gemma4_text", "phi3", "granite", "olmo2", "qwen3_5_text", "phi"]
)
def test_every_block_is_refitted_on_what_the_pruned_part_before_it_outputs(
    run: Any, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    seen, catch = {}, BlockPass.catch

    def spy(self: BlockPass, step: Any, batch: Any) -> None:
        if not self.is_first(step):  # whose input is the embedding
            seen[step.layer, step.phase] = self.stream.get(batch.rows, torch.device("cpu")).clone()
        catch(self, step, batch)

    monkeypatch.setattr(BlockPass, "catch", spy)
    tokens = tiny_tokens(12, 16)
    pruned: Any = pruned_by(run(make_tiny(family), SlimGPT, 0.25, tokens, batch_size=12))
    expected: dict[tuple[int, str], Tensor] = {}
    for index, layer in enumerate(pruned.model.layers):
        for phase, module in (
            ("mixer" if hasattr(layer, "linear_attn") else "attention", layer),
            ("mlp", getattr(layer, MLP_ENTRY.get(family, "post_attention_layernorm"), layer)),
        )[family in SIDE_BY_SIDE :]:
            module.register_forward_pre_hook(lambda _, args, at=(index, phase): expected.update({at: args[0]}))
    with torch.no_grad():
        pruned(tokens, use_cache=False)
    del expected[next(iter(expected))]
    assert seen.keys() == expected.keys()
    for place, hidden in seen.items():
        torch.testing.assert_close(hidden, expected[place], rtol=1e-3, atol=1e-3, msg=str(place))


@pytest.mark.usefixtures("trusted_families")
@pytest.mark.parametrize("family", ["llama", "olmo2", *HYBRIDS, *SIDE_BY_SIDE])
def test_uniform_widths_are_stock(run: Any, family: str) -> None:
    method = run(make_tiny(family), Wanda, 0.2, tiny_tokens(4, 12), allocation="uniform")
    assert not lightning_prune.load(str(method.pruned_folder)).config.is_heterogeneous
    assert not (method.pruned_folder / "modeling_pruned.py").exists()
    assert 0.185 < method.plan.achieved_ratio <= 0.2  # a channel of every layer is 1.2 %
    if family == "olmo2":
        assert {len(layer.kept[Block.ATTENTION]) for layer in method.plan.layers} == {2}
    assert all(layer.kept.get(Block.MIXER, [0]) == [0] for layer in method.plan.layers)


def test_a_hybrid_keeps_a_group_of_attention_whatever_its_score(run: Any) -> None:
    method = run(make_tiny("nemotron_h"), HGSP, 0.4, tiny_tokens(4, 12), importance="magnitude", temperature=0)
    (attention,) = [layer.kept[Block.ATTENTION] for layer in method.plan.layers if Block.ATTENTION in layer.kept]
    assert len(attention) == 1
    written = json.loads((method.pruned_folder / "config.json").read_text())
    kinds = {"linear_attention": "M", "full_attention": "*", "mlp": "-"}  # of the runtimes that read a string
    assert written["hybrid_override_pattern"] == "".join(kinds[kind] for kind in written["layers_block_type"])
    assert written["num_hidden_layers"] == len(written["layers_block_type"])
    assert lightning_prune.load(str(method.pruned_folder)).generate(tiny_tokens(1, 4), max_new_tokens=2).shape[1] > 4


def test_a_family_that_fails_its_trial_is_refused_before_any_text_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "_tried", lambda family, values: "the head differs")
    base = save_base(make_tiny(), tmp_path / "base")
    for check in (PruningMethod.check_model, lambda method: run_method(method, tiny_tokens(4, 12), tmp_path / "run")):
        with pytest.raises(UserError, match=r"family 'llama' .* do not behave as .* says: the head differs"):
            check(Wanda(base, 0.2))
    assert not (tmp_path / "run" / "pruned").exists()
