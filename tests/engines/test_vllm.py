"""vLLM as it is released serves per-layer checkpoints with nothing but ``trust_remote_code``."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.engines.asking import ask, needs
from tests.export.checkpoints import TOKENS, Plan, gone, save
from tests.tiny import EVERY_FAMILY, WHOLE_ATTENTION, mixed_plan

pytestmark = [pytest.mark.engines, needs("vllm")]

LENGTH = 16
# The CPU backend has no attention for heads of 8, which the other tests use.
PLANS: dict[str, Plan] = {"mixed": mixed_plan}
PLANS |= {f"{what}-{where}": gone(what, where) for what in ("attention", "mlp") for where in (0, 2, 3)}


def prompts() -> list[list[int]]:
    """16 of different length, which the engine batches as they come."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(2, TOKENS, (length,), generator=generator).tolist() for length in range(1, 96, 6)]


@pytest.fixture(scope="module", params=EVERY_FAMILY)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of one family, every plan's model and what the engine answers; one process, since its import takes longest."""
    folder = tmp_path_factory.mktemp(request.param)
    # These derive shapes from the hidden size. Weights as much smaller: rounding grows as it does in the others.
    wide: dict[str, Any] = {"hidden": 128, "initializer_range": 0.1} if request.param in WHOLE_ATTENTION else {}
    models = {name: save(folder / name, request.param, plan, head_dim=32, **wide) for name, plan in PLANS.items()}
    answers = ask("vllm", folder, {"models": list(models), "prompts": prompts(), "length": LENGTH})
    return {name: (model, answers[name]) for name, model in models.items()}


@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_log_probabilities_and_greedy_tokens_are_those_of_transformers(served: dict[str, Any], name: str) -> None:
    model: PreTrainedModel
    model, answers = served[name]
    assert not isinstance(answers, str), answers  # the words of a refusal
    assert len(answers) == 16
    for prompt, answer in zip(prompts(), answers, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=LENGTH, do_sample=False, eos_token_id=None)
        assert answer["tokens"] == expected[0, len(prompt) :].tolist()
        logs = model(expected).logits[0].log_softmax(-1)
        for step, found in enumerate(answer["top"]):
            tokens = torch.tensor([int(token) for token in found])
            values = torch.tensor(list(found.values()))
            torch.testing.assert_close(values, logs[len(prompt) - 1 + step, tokens], rtol=0, atol=1e-4)
