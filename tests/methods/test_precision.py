"""Work between the steps in the precision of the steps, and what overflows in fp16, by name."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune.calibration.passes import BlockPass, ForwardPass
from tests.methods.behaviour import SYSTEMS, prune, save_model, save_tokens
from tests.tiny import make_tiny

RATIO = 0.29


@pytest.mark.parametrize(
    ("system", "precision"),
    [*(("slimgpt", one) for one in ("bf16-true", "16-true", "bf16-mixed")), ("wanda_2to4", "bf16-mixed")],
)
def test_work_between_the_steps_runs_in_the_precision_of_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, precision: str
) -> None:
    """What a rewritten layer hands on is computed outside Lightning's training step."""
    found: dict[str, set[tuple[torch.dtype, bool, torch.dtype]]] = {"batch": set(), "advance": set()}
    inside: list[str] = []

    def watch(kind: Any, name: str) -> None:
        original = getattr(kind, name)

        def spy(self: Any, *args: Any) -> None:
            inside.append(name)
            try:
                original(self, *args)
            finally:
                inside.pop()

        monkeypatch.setattr(kind, name, spy)

    for kind in (ForwardPass, BlockPass):
        watch(kind, "batch")
        watch(kind, "advance")
    linear = torch.nn.Linear.forward

    def spy_on_linear(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        y = linear(self, x)
        if inside:
            found[inside[-1]].add((torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), y.dtype))
        return y

    monkeypatch.setattr(torch.nn.Linear, "forward", spy_on_linear)
    method = SYSTEMS[system].make(pretrained=str(save_model(tmp_path / "model")), pruning_ratio=RATIO)
    prune(method, save_tokens(tmp_path / "c.npy"), tmp_path, precision)
    computed = {"16-true": torch.float16}.get(precision, torch.bfloat16)
    default = computed if precision.endswith("true") else torch.float32
    assert found["batch"] == found["advance"] == {(default, precision.endswith("mixed"), computed)}


# Overflow


@pytest.mark.parametrize("system", ["wanda", "flap", "slimgpt", "shortgpt", "hgsp_taylor", "hgsp_kfac"])
def test_overflowing_activations_name_the_layer(tmp_path: Path, system: str) -> None:
    """Every weight fits fp16, but what layer 2 puts out does not; in the other precisions all is well."""
    model = make_tiny()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(2e3)
        model.model.layers[2].mlp.down_proj.weight.mul_(2e3)
    model.save_pretrained(tmp_path / "model")
    tokens = save_tokens(tmp_path / "c.npy")
    method = SYSTEMS[system].make(pretrained=str(tmp_path / "model"), pruning_ratio=RATIO)
    with pytest.raises(FloatingPointError, match=r"layer 2\b.*Use --trainer.precision bf16-true or 32-true") as error:
        prune(method, tokens, tmp_path / "logs", "16-true")
    assert "layer 3" not in str(error.value)
    assert not list((tmp_path / "logs").rglob("plan.json"))
    if system in ("wanda", "slimgpt"):
        method = SYSTEMS[system].make(pretrained=str(tmp_path / "model"), pruning_ratio=RATIO)
        prune(method, tokens, tmp_path / "logs", "bf16-true")


@pytest.mark.parametrize("system", ["magnitude", "wanda"])
def test_weights_beyond_fp16_name_the_layer(tmp_path: Path, system: str) -> None:
    model = make_tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e5
    model.save_pretrained(tmp_path / "model")
    method = SYSTEMS[system].make(pretrained=str(tmp_path / "model"), pruning_ratio=RATIO)
    with pytest.raises(FloatingPointError, match=r"layer 1\b.*Use --trainer.precision bf16-true or 32-true"):
        prune(method, save_tokens(tmp_path / "c.npy"), tmp_path / "logs", "16-true")


def test_an_overflowing_gradient_of_the_residual_stream_names_the_layer_that_made_it(tmp_path: Path) -> None:
    """A tiny stream in front of layer 1 makes its norm multiply gradients by nearly 1000; activations stay small."""
    model = make_tiny(tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e-3)
        for linear in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            linear.weight.mul_(1e-3)
        model.lm_head.weight.mul_(300)
    model.save_pretrained(tmp_path / "model")
    method = SYSTEMS["hgsp_taylor"].make(pretrained=str(tmp_path / "model"), pruning_ratio=RATIO, temperature=0)
    with pytest.raises(FloatingPointError, match="layer 1, gradient of its input"):
        prune(method, save_tokens(tmp_path / "c.npy"), tmp_path / "logs", "16-true")
