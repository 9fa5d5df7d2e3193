"""Work between the steps in the precision of the steps, and what overflows in fp16, by name."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

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


def loud(model: PreTrainedModel) -> None:
    """Every weight fits fp16, but what layer 2 outputs does not."""
    model.model.layers[2].mlp.up_proj.weight.mul_(2e3)
    model.model.layers[2].mlp.down_proj.weight.mul_(2e3)


def heavy(model: PreTrainedModel) -> None:
    """A weight of layer 1 does not fit fp16."""
    model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e5


def steep(model: PreTrainedModel) -> None:
    """A tiny stream in front of layer 1 makes its norm multiply gradients by nearly 1000; activations are small."""
    first = model.model.layers[0]
    for module in (model.model.embed_tokens, first.self_attn.o_proj, first.mlp.down_proj):
        module.weight.mul_(1e-3)
    model.lm_head.weight.mul_(300)


@pytest.mark.parametrize(
    ("change", "system", "says"),
    [
        *((loud, name, "layer 2") for name in ("wanda", "flap", "slimgpt", "shortgpt", "hgsp_taylor", "hgsp_kfac")),
        *((heavy, name, "layer 1") for name in ("magnitude", "wanda")),
        (steep, "hgsp_taylor", "layer 1, gradient of its input"),
    ],
)
def test_what_overflows_fp16_names_the_layer(tmp_path: Path, change: Any, system: str, says: str) -> None:
    """In the other precisions all is well."""
    model = make_tiny(tied=change is not steep)
    with torch.no_grad():
        change(model)
    model.save_pretrained(tmp_path / "model")
    tokens = save_tokens(tmp_path / "c.npy")
    options = {"temperature": 0} if change is steep else {}
    make = partial(SYSTEMS[system].make, pretrained=str(tmp_path / "model"), pruning_ratio=RATIO, **options)
    with pytest.raises(FloatingPointError, match=rf"{says}\b.*Use --trainer.precision bf16-true or 32-true") as error:
        prune(make(), tokens, tmp_path / "logs", "16-true")
    assert "layer 3" not in str(error.value)
    assert not list((tmp_path / "logs").rglob("plan.json"))
    if change is loud and system in ("wanda", "slimgpt"):
        prune(make(), tokens, tmp_path / "logs", "bf16-true")
