"""Removal priors: the same numbers as whole forwards, for about half the layer evaluations."""

import torch
from lightning_prune.statistics.removal_prior import RemovalPrior, SimilarityPrior

from lightning_prune.surgery.anatomy import anatomy
from tests.methods.test_hgsp import reference_priors
from tests.tiny import make_tiny, tiny_tokens


def test_reusing_the_prefix_changes_nothing_and_saves_nearly_half() -> None:
    model = make_tiny(layers=8)
    tokens = tiny_tokens(3, 10)
    prior = RemovalPrior(8)
    with torch.no_grad():
        prior.update(model, anatomy(model), tokens[:2])
        prior.update(model, anatomy(model), tokens[2:])
    torch.testing.assert_close(prior.compute(), reference_priors(model, tokens), rtol=1e-3, atol=2e-6)
    naive = (3 * 8 + 1) * 8 * 2  # whole forwards, two batches
    assert prior.layer_evaluations <= 0.55 * naive


def test_restarting_behind_a_piece_is_bit_identical_to_a_whole_forward() -> None:
    model = make_tiny(layers=3)
    tokens = tiny_tokens(2, 10)
    prior = RemovalPrior(3)
    with torch.no_grad():
        prior.update(model, anatomy(model), tokens)

        def loss() -> float:
            logits = model(input_ids=tokens, use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
            )
            return float(losses.double().sum())

        assert float(prior.dense) == loss()
        for index, layer in enumerate(model.model.layers):
            layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
            assert float(prior.removed[0, index]) == loss()
            del layer.forward
            layer.self_attn.forward = lambda hidden_states, **kwargs: (torch.zeros_like(hidden_states), None)
            assert float(prior.removed[1, index]) == loss()
            del layer.self_attn.forward
            layer.mlp.forward = torch.zeros_like
            assert float(prior.removed[2, index]) == loss()
            del layer.mlp.forward


def test_similarity_prior_is_one_minus_the_mean_cosine_of_each_step() -> None:
    model = make_tiny(layers=3)
    tokens = tiny_tokens(3, 9)
    states: dict[str, torch.Tensor] = {}
    hooks = []
    for index, layer in enumerate(model.model.layers):

        def keep(module, args, kwargs, output, index=index) -> None:
            states[f"in{index}"] = (args[0] if args else kwargs["hidden_states"]).double()
            states[f"out{index}"] = (output[0] if isinstance(output, tuple) else output).double()

        def keep_attention(module, args, kwargs, output, index=index) -> None:
            states[f"step{index}"] = output[0].double()

        hooks.append(layer.register_forward_hook(keep, with_kwargs=True))
        hooks.append(layer.self_attn.register_forward_hook(keep_attention, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()

    def distance(before: torch.Tensor, after: torch.Tensor) -> float:
        total = 0.0
        for a, b in zip(before.reshape(-1, 32), after.reshape(-1, 32), strict=True):
            total += 1 - float((a * b).sum() / (a.norm() * b.norm()))
        return total / before[..., 0].numel()

    expected = torch.zeros(3, 3, dtype=torch.float64)
    for index in range(3):
        before, after = states[f"in{index}"], states[f"out{index}"]
        middle = before + states[f"step{index}"]
        expected[:, index] = torch.tensor([distance(before, after), distance(before, middle), distance(middle, after)])
    prior = SimilarityPrior(3)
    with torch.no_grad():
        prior.update(model, anatomy(model), tokens[:1])
        prior.update(model, anatomy(model), tokens[1:])
    torch.testing.assert_close(prior.compute(), expected, rtol=1e-4, atol=1e-7)
