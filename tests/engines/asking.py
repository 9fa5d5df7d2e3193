"""The engines' interpreters, the scripts that answer questions in them, and what transformers says to the answers."""

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

HERE = Path(__file__).parent


def interpreter(engine: str) -> str:
    """The Python of an engine's environment: ``$LLAMACPP_PYTHON``, ``$VLLM_PYTHON``."""
    return os.environ.get(f"{engine.upper()}_PYTHON", "")


def needs(engine: str) -> pytest.MarkDecorator:
    """Skips where the engine's environment is absent."""
    reason = f"needs {engine}: tests/engines/run.sh makes its environment and names it in {engine.upper()}_PYTHON"
    return pytest.mark.skipif(not interpreter(engine), reason=reason)


def ask(engine: str, model: Path, questions: dict[str, Any]) -> Any:
    """What ``ask_<engine>.py`` answers about ``model``."""
    command = [interpreter(engine), str(HERE / f"ask_{engine}.py"), str(model)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, input=json.dumps(questions), capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout)


def prompts(lengths: Iterable[int], tokens: int) -> list[list[int]]:
    """Random ones of these lengths from a vocabulary of so many tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, tokens, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def difference(model: PreTrainedModel, asked: list[list[int]], answers: list[dict[str, Any]], length: int) -> float:
    """The largest difference of the log-probabilities of an engine's likeliest tokens from transformers', at ``length``
    greedy steps after each prompt; infinite where greedy tokens differ."""
    differences = []
    for prompt, answer in zip(asked, answers, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False, eos_token_id=None)
        if answer["tokens"] != expected[0, len(prompt) :].tolist():
            return float("inf")
        logs = model(expected).logits[0].double().log_softmax(-1)
        for step, top in enumerate(answer["top"]):
            if top is not None:
                wanted = logs[len(prompt) - 1 + step, [int(token) for token in top]]
                differences.append((torch.tensor(list(top.values()), dtype=torch.float64) - wanted).abs().max())
    return float(torch.stack(differences).max())
