"""What pruning saves: parameters, MACs, KV cache, disk, tokens per second, memory."""

import gc
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate  # type: ignore[import-untyped]
from torch import nn
from transformers import PreTrainedModel

from lightning_prune.evaluation.continuations import cache_option
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.families import count_parameters, family_of, layers_of
from lightning_prune.support.devices import free_bytes, peak_bytes, reset_peak, wait
from lightning_prune.support.errors import UserError
from lightning_prune.support.progress import Progress

WARM_UP = 2  # runs before the measured ones: lazy initialisation, autotuning, cold caches


@dataclass(frozen=True)
class Setting:
    """The measurement's lengths in tokens: the median of ``repeats`` runs of a prefill of ``prompt_length`` and
    ``decode_length`` greedy steps. MACs are of one token that attends to ``context_length``."""

    prompt_length: int = 128
    decode_length: int = 32
    context_length: int = 160
    batch_sizes: tuple[int, ...] = (1, 16)
    repeats: int = 5


@dataclass(frozen=True)
class Speed:
    """Tokens per second of a whole batch, how much longer the slowest run took than the fastest (0.1: a tenth), and the
    peak memory of its runs: what torch allocated on an accelerator, weights included, or a CPU process's resident set,
    None where the system cannot reset it (Linux can)."""

    batch_size: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    spread: float
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Efficiency:
    """One model: counts follow from its shapes, speed is measured; the file's dtype may not be the one measured in."""

    parameters: int
    macs_per_token: int
    kv_cache_bytes_per_token: int
    weight_file_bytes: int
    weight_file_dtype: str
    speed: list[Speed]


@dataclass(frozen=True)
class EfficiencyReport:
    """A pruned model, and where requested the dense one, measured in the same process."""

    setting: Setting
    device: str
    dtype: str
    threads: int
    pruned: Efficiency
    dense: Efficiency | None

    def table(self) -> str:
        """Dense, pruned and pruned / dense, one quantity a line."""
        models = {"dense": self.dense, "pruned": self.pruned} if self.dense else {"pruned": self.pruned}
        rows = [_rows(model, self.setting) for model in models.values()]
        lines = [["", *models, *(["pruned / dense"] if self.dense else [])]]
        for name in rows[0]:
            values = [row[name] for row in rows]
            lines.append([name, *map(_number, values)])
            if self.dense:
                dense, pruned = values
                lines[-1].append(f"{pruned / dense:.3f}" if pruned is not None and dense else "-")
        align = ["left", *["right"] * (len(lines[0]) - 1)]
        text = tabulate(lines, tablefmt="plain", disable_numparse=True, colalign=align)
        files = ", ".join(f"{side} {model.weight_file_dtype}" for side, model in models.items())
        spread = max(speed.spread for model in models.values() for speed in model.speed)
        text += f"\nmedians of {self.setting.repeats} runs; the slowest took up to {spread:.0%} longer than the fastest"
        return f"{text}\nmeasured in {self.dtype} on {self.device}; weights on disk: {files}"


def macs_per_token(model: PreTrainedModel, context_length: int) -> int:
    """Multiply-accumulates to process one token that attends to ``context_length`` tokens, itself included: of every
    linear, the head among them, and of query · key and weights · value, as if no window slid."""
    linears = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return int(linears + 2 * sum(width for width, _ in _head_widths(model)) * context_length)


def kv_cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes that one token of one sequence adds to the KV cache, in the model's dtype; 0 for a skipped attention, where
    a dynamic cache keeps one number each for key and value, so that positions stay right."""
    return int(2 * sum(width for _, width in _head_widths(model)) * model.dtype.itemsize)


def _head_widths(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Widths of all query heads and of all KV heads together, in numbers per token, of every attention block."""
    family = family_of(model.config)
    blocks: list[Any] = [getattr(layer, family.attention, None) for layer in layers_of(model)]
    queries = [(getattr(block, family.output).in_features, block) for block in blocks if hasattr(block, family.output)]
    return [(width, width // block.num_key_value_groups) for width, block in queries]


def measure(model: PreTrainedModel, checkpoint: Checkpoint, setting: Setting, name: str = "model") -> Efficiency:
    """Count and time a causal LM, loaded from ``checkpoint``, on its device and in its dtype; ``name`` is shown then.

    Raises:
        UserError: a length or number is below 1, the sequence is longer than the model's positions, or a batch does
            not fit in memory.
    """
    _check_setting(model.config, setting)
    model.eval()
    phase = f"timing {name}"
    with closing(Progress()) as progress:
        progress.expect(phase, len(setting.batch_sizes) * (WARM_UP + setting.repeats))
        speed = [_speed(model, size, setting, lambda: progress.advance(phase, 1)) for size in setting.batch_sizes]
        progress.finish(phase)
    return Efficiency(
        parameters=count_parameters(model),
        macs_per_token=macs_per_token(model, setting.context_length),
        kv_cache_bytes_per_token=kv_cache_bytes_per_token(model),
        weight_file_bytes=sum(file.stat().st_size for file in checkpoint.weight_files),
        weight_file_dtype=str(checkpoint.stored_dtype).removeprefix("torch."),
        speed=speed,
    )


def _speed(model: PreTrainedModel, batch_size: int, setting: Setting, done: Callable[[], None]) -> Speed:
    tokens = setting.prompt_length + setting.decode_length
    refusal = UserError(
        f"--batch-sizes: {batch_size} sequences of {tokens} tokens do not fit in the memory of {model.device}. Choose "
        "smaller --batch-sizes or a shorter --prompt-length."
    )
    # The least there is: input and output of one layer. The CPU would swap, or end the process.
    least = 2 * setting.prompt_length * model.config.hidden_size * model.dtype.itemsize
    if batch_size * least > free_bytes(model.device):
        raise refusal
    shape = (batch_size, setting.prompt_length)
    prompt = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    seconds = []
    try:
        for run in range(WARM_UP + setting.repeats):
            if run == WARM_UP:
                _reset_peak_memory(model.device)
            seconds.append(generate(model, prompt, setting.decode_length))
            done()
    except torch.OutOfMemoryError:
        raise refusal from None
    phases = list(zip(*seconds[WARM_UP:], strict=True))
    prefill, decode = map(statistics.median, phases)
    return Speed(
        batch_size=batch_size,
        prefill_tokens_per_second=prompt.numel() / prefill,
        decode_tokens_per_second=batch_size * setting.decode_length / decode,
        spread=max(max(times) / min(times) for times in phases) - 1,
        peak_memory_bytes=peak_since_reset(model.device),
    )


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: torch.Tensor, decode_length: int) -> tuple[float, float]:
    """Seconds of the prefill of ``prompt`` ``[B, L]`` and of ``decode_length`` greedy steps."""
    net: Any = model
    cache = cache_option(net)
    started = _now(model.device)
    output = net(input_ids=prompt, use_cache=True, logits_to_keep=1)
    filled = _now(model.device)
    for _ in range(decode_length):
        token = output.logits[:, -1:].argmax(-1)
        output = net(input_ids=token, use_cache=True, **{cache: getattr(output, cache)})
    return filled - started, _now(model.device) - filled


def _now(device: torch.device) -> float:
    wait(device)
    return time.perf_counter()


def _reset_peak_memory(device: torch.device) -> None:
    gc.collect()
    if device.type != "cpu":
        reset_peak()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS, see proc(5)


def peak_since_reset(device: torch.device) -> int | None:
    """Most bytes held since ``_reset_peak_memory``: of the device, or of this process; None where nobody says."""
    if device.type != "cpu":
        return peak_bytes() or None
    if sys.platform != "linux":
        return None
    line = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line.group(1)) * 1024 if line else None


def _check_setting(config: Any, setting: Setting) -> None:
    for field, values in asdict(setting).items():
        values = values if isinstance(values, tuple) else (values,)
        if not values or min(values) < 1:
            value = " ".join(map(str, values))
            raise UserError(f"--{field.replace('_', '-')}: found {value}; whole numbers of 1 or more are allowed.")
    longest, positions = setting.prompt_length + setting.decode_length, config.max_position_embeddings
    if longest > positions:
        raise UserError(
            f"--prompt-length {setting.prompt_length} and --decode-length {setting.decode_length} make {longest} "
            f"tokens, but the model has {positions} positions. Choose shorter ones."
        )


def _rows(model: Efficiency, setting: Setting) -> dict[str, float | None]:
    rows: dict[str, float | None] = {
        "parameters": model.parameters,
        f"MACs per token (context {setting.context_length})": model.macs_per_token,
        "KV cache, bytes per token": model.kv_cache_bytes_per_token,
        "weights on disk, bytes": model.weight_file_bytes,
    }
    for speed in model.speed:
        batch = f"batch {speed.batch_size}"
        rows[f"prefill, tokens/s, {batch}"] = speed.prefill_tokens_per_second
        rows[f"decode, tokens/s, {batch}"] = speed.decode_tokens_per_second
        rows[f"peak memory, MiB, {batch}"] = None if (peak := speed.peak_memory_bytes) is None else peak / 2**20
    return rows


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if value < 100 and isinstance(value, float) else f"{value:,.0f}"
