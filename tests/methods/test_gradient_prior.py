"""The loss increase without a piece, from the gradient: against autograd along the piece, and against its removal."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_prune.methods import HGSP
from tests.methods.running import run_method, save_base
from tests.tiny import make_tiny, tiny_tokens

ADDS = {"gemma4_text": ("post_attention_layernorm", "post_feedforward_layernorm")}  # what comes last in a block


def slopes(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """d(summed loss of a sample) / d(factor of what a piece adds) ``[3, L, N]``: factors 1 that take gradients."""
    model = copy.deepcopy(model).double()
    layers = model.model.layers
    factors = torch.ones(3, len(layers), len(tokens), 1, 1, dtype=torch.float64, requires_grad=True)

    def scale(piece: int, index: int, module: torch.nn.Module) -> None:
        def hook(_, args, output):
            first, *rest = output if isinstance(output, tuple) else (output,)
            begin = args[0] if piece == 0 else 0.0
            first = begin + factors[piece, index] * (first - begin)
            return (first, *rest) if isinstance(output, tuple) else first

        module.register_forward_hook(hook)

    for index, layer in enumerate(layers):
        adds = ADDS.get(model.config.model_type, ("self_attn", "mlp"))
        for piece, module in enumerate((layer, *(getattr(layer, name) for name in adds))):
            scale(piece, index, module)
    logits = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    losses = -logits[:, :-1].gather(2, tokens[:, 1:, None]).sum((1, 2))
    return torch.autograd.grad(losses.sum(), factors)[0][..., 0, 0]


@pytest.mark.parametrize(
    ("family", "importance"),
    [("llama", "taylor"), ("granite", "taylor"), ("gemma4_text", "taylor"), ("llama", "fisher"), ("llama", "kfac")],
)
def test_priors_are_the_second_order_estimate_along_each_piece(family: str, importance: str, run: Any) -> None:
    model = make_tiny(family, layers=3)
    tokens = tiny_tokens(7, 12)
    method = run(model, HGSP, 0.2, tokens, batch_size=3, importance=importance, prior="gradient")
    s = slopes(model, tokens)
    expected = (0.5 * s.square() - s).sum(2) / (7 * 11)
    assert method.priors is not None
    torch.testing.assert_close(method.priors, expected, rtol=1e-3, atol=1e-5)


def test_gradient_prior_makes_no_evaluation_of_its_own(tmp_path: Path) -> None:
    base = save_base(make_tiny(layers=3), tmp_path / "base")
    tokens = tiny_tokens(8, 12)
    counts = []
    for temperature in (0, 1):
        method = HGSP(base, 0.2, prior="gradient", temperature=temperature)
        run_method(method, tokens, tmp_path / str(temperature))
        counts.append(method.driver.setting.model.evaluations)
    assert counts[0] == counts[1] > 0
