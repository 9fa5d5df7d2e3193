"""Measured speed of runs, from the ``efficiency.json`` that ``evaluate --efficiency`` leaves in their folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from lightning_prune.comparison.run import Run
from lightning_prune.support.validation import read_json

FILE = "efficiency.json"


class _Setting(BaseModel):
    prompt_length: int
    decode_length: int


class _Speed(BaseModel):
    batch_size: int
    decode_tokens_per_second: float


class _Model(BaseModel):
    speed: list[_Speed]


class _Report(BaseModel):
    setting: _Setting
    device: str
    dtype: str
    threads: int
    engine: str = "transformers"
    pruned: _Model
    dense: _Model | None = None


@dataclass(frozen=True)
class Speeds:
    """Decoded tokens per second by ``id`` of the run, all measured in the same way; ``dense`` where it was measured."""

    how: str
    pruned: dict[int, float]
    dense: float | None


def speeds(runs: Sequence[Run]) -> Speeds | None:
    """The largest set of runs that were measured alike (engine, device, threads, dtype, lengths and batch size); None
    where fewer than two were.

    Raises:
        UserError: an ``efficiency.json`` that is not what ``evaluate`` writes.
    """
    found: dict[str, dict[int, float]] = {}
    dense: dict[str, float] = {}
    for run in runs:
        report = _read(run.folder / FILE)
        if report is None:
            continue
        for index, speed in enumerate(report.pruned.speed):
            how = (
                f"{report.engine}, {report.dtype} on {report.device}, {report.threads} CPU threads, batch "
                f"{speed.batch_size}, {report.setting.decode_length} tokens after {report.setting.prompt_length}"
            )
            found.setdefault(how, {})[id(run)] = speed.decode_tokens_per_second
            if report.dense is not None and index < len(report.dense.speed):
                dense.setdefault(how, report.dense.speed[index].decode_tokens_per_second)
    how = max(found, key=lambda how: len(found[how]), default="")
    return Speeds(how, found[how], dense.get(how)) if how and len(found[how]) > 1 else None


def _read(path: Path) -> _Report | None:
    if not path.exists():
        return None
    hint = "Measure it again with 'lightning-prune evaluate --efficiency', or move the file away."
    return read_json(path, _Report, "--runs", hint)
