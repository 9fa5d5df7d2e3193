import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_prune.methods import HGSP
from tests.methods.running import projections
from tests.tiny import make_tiny, tiny_tokens


def reference(model: PreTrainedModel, tokens: Tensor) -> list[list[Tensor]]:
    """Of every layer: I of groups and of channels, from masks per sample, token and unit that take gradients."""
    model = copy.deepcopy(model).double()
    masks: list[list[Tensor]] = []

    def hook(linear: torch.nn.Linear, units: int) -> Tensor:
        mask = torch.ones(*tokens.shape, units, dtype=torch.float64, requires_grad=True)
        width = linear.in_features // units
        linear.register_forward_pre_hook(lambda _, args: (args[0] * mask.repeat_interleave(width, -1),))
        return mask

    for layer in range(model.config.num_hidden_layers):
        found = projections(model, layer)
        heads, channels = model.config.num_key_value_heads, model.config.intermediate_size
        masks.append([hook(found["o_proj"], heads), hook(found["down_proj"], channels)])
    logits = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    (-logits[:, :-1].gather(2, tokens[:, 1:, None]).sum()).backward()
    return [[mask.grad.square().mean((0, 1)) for mask in pair] for pair in masks]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_importance_is_the_mean_square_of_the_masks_slopes(family: str, run: Any) -> None:
    model = make_tiny(family, layers=3)
    tokens = tiny_tokens(7, 12)
    method = run(model, HGSP, 0.2, tokens, batch_size=3, importance="fisher", temperature=0)
    for layer, pair in enumerate(reference(model, tokens)):
        for block, expected in zip(("attention", "mlp"), pair, strict=True):
            found = torch.from_numpy(method.scores.importance[method.scores.of(layer, block)])
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)
