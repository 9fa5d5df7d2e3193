"""Tokens per second of a checkpoint in a serving engine that is installed beside this package."""

import copy
import importlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from lightning_prune.evaluation.efficiency import WARM_UP, Efficiency, Setting, Speed, check_setting, count, timing
from lightning_prune.export.gguf_file import gguf_package, write_gguf
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.support.errors import UserError

EngineName = Literal["vllm", "llamacpp"]
MODULES = {"vllm": "vllm", "llamacpp": "xllamacpp"}
GGUF_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


class Engine(Protocol):
    """A loaded model that generates greedily for a batch at once."""

    def generate(self, prompts: list[list[int]], tokens: int) -> None:
        """``tokens`` new tokens for every prompt; returns when all are there."""
        ...


def engine_version(name: EngineName) -> str:
    """Name and version of an installed engine, as tables show it.

    Raises:
        UserError: it is not installed.
    """
    module = MODULES[name]
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"--engine {name} needs the package '{module}' in this environment. Install it there, or choose "
            "--engine transformers."
        )
    distribution = next((found for found in (module, f"{module}-cpu") if _installed(found)), None)
    return f"{distribution} {version(distribution)}" if distribution else module


def measure_in_engine(
    engine: EngineName,
    checkpoint: Checkpoint,
    setting: Setting,
    dtype: torch.dtype,
    device: torch.device,
    name: str = "model",
) -> Efficiency:
    """Count one model, and time it in an engine.

    Prefill is the time to the first token of every sequence of the batch; decoding is what ``decode_length`` more take.
    Memory is not measured: engines reserve what they may need.

    Args:
        engine: which.
        checkpoint: a dense or pruned model.
        setting: lengths, batch sizes and repeats.
        dtype: to run in.
        device: GPU or CPU.
        name: shown while it is timed.

    Raises:
        UserError: the engine is not installed or refuses the model, or a length does not fit.
    """
    engine_version(engine)
    config: Any = checkpoint.config
    check_setting(config, setting)
    model = copy.deepcopy(checkpoint.meta).to(dtype)
    opened = _vllm if engine == "vllm" else _llamacpp
    speed = []
    with timing(name, setting) as done, opened(checkpoint.path, setting, dtype, device) as running:
        for batch_size in setting.batch_sizes:
            speed.append(_speed(running, config.vocab_size, batch_size, setting, done))
    return count(model, checkpoint, setting, speed)


def _speed(engine: Engine, vocabulary: int, batch_size: int, setting: Setting, done: Callable[[], None]) -> Speed:
    generator = torch.Generator().manual_seed(0)
    prefill, decode = [], []
    for run in range(WARM_UP + setting.repeats):
        # New prompts for every call, or an engine would answer from what it kept of the last ones.
        seconds = []
        for tokens in (1, 1 + setting.decode_length):
            shape = (batch_size, setting.prompt_length)
            prompts = torch.randint(vocabulary, shape, generator=generator).tolist()
            started = time.perf_counter()
            engine.generate(prompts, tokens)
            seconds.append(time.perf_counter() - started)
        if run >= WARM_UP:
            prefill.append(seconds[0])
            decode.append(max(seconds[1] - seconds[0], sys.float_info.min))
        done()
    return Speed(
        batch_size=batch_size,
        prefill_tokens_per_second=batch_size * setting.prompt_length / statistics.median(prefill),
        decode_tokens_per_second=batch_size * setting.decode_length / statistics.median(decode),
        peak_memory_bytes=None,
    )


@contextmanager
def _vllm(folder: str, setting: Setting, dtype: torch.dtype, device: torch.device) -> Iterator[Engine]:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if device.type == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; half of the machine otherwise
    vllm = importlib.import_module("vllm")
    sampling = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    with _refusals("vllm", folder):
        engine = vllm.LLM(
            folder,
            trust_remote_code=True,
            dtype=str(dtype).removeprefix("torch."),
            skip_tokenizer_init=True,
            max_model_len=setting.prompt_length + setting.decode_length + 1,
            max_num_seqs=max(setting.batch_sizes),
            enable_prefix_caching=False,
            enforce_eager=device.type == "cpu",
        )

    class Running:
        def generate(self, prompts: list[list[int]], tokens: int) -> None:
            asked = [{"prompt_token_ids": prompt} for prompt in prompts]
            engine.generate(asked, vllm.SamplingParams(max_tokens=tokens, **sampling), use_tqdm=False)

    try:
        yield Running()
    finally:
        engine.llm_engine.engine_core.shutdown()


@contextmanager
def _llamacpp(folder: str, setting: Setting, dtype: torch.dtype, device: torch.device) -> Iterator[Engine]:
    xllamacpp = importlib.import_module("xllamacpp")
    gguf_package()
    batch_size = max(setting.batch_sizes)
    with tempfile.TemporaryDirectory(prefix="lightning-prune-") as place, ThreadPoolExecutor(batch_size) as threads:
        file = Path(place) / "model.gguf"
        write_gguf(Checkpoint.open(folder), file, GGUF_DTYPES[dtype])
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_parallel = batch_size
        params.n_ctx = batch_size * (setting.prompt_length + setting.decode_length + 1)
        params.n_batch = max(params.n_batch, batch_size * setting.prompt_length)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        if device.type == "cpu":
            params.n_gpu_layers = 0
        with _refusals("llamacpp", folder), _silent():
            servers = [xllamacpp.Server(params)]

        def ask(prompt: list[int], tokens: int) -> None:
            question = {"prompt": prompt, "n_predict": tokens, "ignore_eos": True, "cache_prompt": False}
            headers = {"Content-Type": "application/json"}
            body = json.dumps(question | {"temperature": 0}).encode()
            request = urllib.request.Request(f"{servers[0].listening_address}/completion", body, headers)
            found = json.load(urllib.request.urlopen(request))
            if found["tokens_predicted"] != tokens:
                raise UserError(f"--engine llamacpp: it gave {found['tokens_predicted']} tokens in place of {tokens}.")

        class Running:
            def generate(self, prompts: list[list[int]], tokens: int) -> None:
                list(threads.map(lambda prompt: ask(prompt, tokens), prompts))

        with _silent():
            yield Running()
            servers.clear()  # it says goodbye


@contextmanager
def _refusals(engine: str, folder: str) -> Iterator[None]:
    """What an engine raises when it does not take a model has no common base."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
        raise UserError(f"--engine {engine} does not take '{folder}' ({reason}).") from error


@contextmanager
def _silent() -> Iterator[None]:
    """The engine writes its log to the file descriptors, past Python."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for handle in (*kept, nothing):
            os.close(handle)


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
