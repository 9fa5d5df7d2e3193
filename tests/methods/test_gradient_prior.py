"""The loss increase without a piece, from the gradient: against autograd along the piece, and against its removal."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_prune.methods import HGSP
from lightning_prune.support.errors import UserError
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


@pytest.mark.parametrize("family", ["llama", "granite", "gemma4_text"])
@pytest.mark.parametrize("importance", ["taylor", "fisher", "kfac"])
def test_priors_are_the_second_order_estimate_along_each_piece(family: str, importance: str, tmp_path: Path) -> None:
    model = make_tiny(family, layers=3)
    tokens = tiny_tokens(7, 12)
    base = save_base(model, tmp_path / "base")
    method = run_method(
        HGSP(base, 0.2, importance=importance, prior="gradient"), tokens, tmp_path / "run", batch_size=3
    )
    s = slopes(model, tokens)
    expected = (0.5 * s.square() - s).sum(2) / (7 * 11)
    assert method.priors is not None
    torch.testing.assert_close(method.priors, expected, rtol=1e-3, atol=1e-5)


def test_where_pieces_add_little_the_estimate_is_the_removal_prior(tmp_path: Path) -> None:
    model = make_tiny(layers=4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 1e-5
            layer.mlp.down_proj.weight *= 1e-5
    base = save_base(model, tmp_path / "base")
    found = {}
    for prior in ("gradient", "removal"):
        options = {"prior": prior}
        method = run_method(HGSP(base, 0.2, **options), tiny_tokens(16, 12), tmp_path / prior, precision="64-true")
        found[prior] = method.priors
    torch.testing.assert_close(found["gradient"], found["removal"], rtol=0.02, atol=1e-7)


def test_gradient_prior_makes_no_evaluation_of_its_own(tmp_path: Path) -> None:
    base = save_base(make_tiny(layers=3), tmp_path / "base")
    tokens = tiny_tokens(8, 12)
    counts = []
    for temperature in (0, 1):
        method = HGSP(base, 0.2, prior="gradient", temperature=temperature)
        run_method(method, tokens, tmp_path / str(temperature))
        counts.append(method.driver.setting.model.evaluations)
    assert counts[0] == counts[1] > 0


def test_it_comes_from_every_sample() -> None:
    with pytest.raises(UserError, match=r"--model\.prior_num_samples: found 16"):
        HGSP("demo", 0.2, prior="gradient", prior_num_samples=16)


def test_an_importance_without_gradients_has_no_such_prior() -> None:
    with pytest.raises(UserError, match=r"--model\.prior gradient .* --model\.importance taylor"):
        HGSP("demo", 0.2, importance="wanda", prior="gradient")
