"""The engines' interpreters, and the scripts that answer questions in them."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

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
