"""Tiny checkpoints with a tokenizer, as an export reads them."""

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.demo import demo_model_path
from lightning_prune.models.sources import CheckpointSource
from tests.cutting import cut
from tests.tiny import WHOLE_ATTENTION, make_tiny, tiny_plan

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # that GGUF holds, and that were seen in the engines
TOKENS = 1024  # of the demo model's tokenizer, which these checkpoints carry
FULL = list(range(40))
Plan = Callable[[PreTrainedModel], PruningPlan]


def save(
    folder: Path, family: str = "llama", plan: Plan | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> PreTrainedModel:
    """Save a random model, pruned by ``plan``, and the demo model's tokenizer; the weights are those of ``dtype``.

    Returns:
        The model as it was saved, in fp32.
    """
    model = make_tiny(family, vocab_size=TOKENS, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    model = model if plan is None else cut(model, plan(model))
    copy.deepcopy(model).to(dtype).save_pretrained(folder)  # a copy: the rotary tables would be rounded too
    for file in demo_model_path().glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return model


def gone(what: str, where: int) -> Plan:
    """A plan that takes attention, the MLP or both from one of four layers, and narrows the next one."""

    def plan(model: PreTrainedModel) -> PruningPlan:
        heads = list(range(model.config.num_key_value_heads))
        fewer = heads if model.config.model_type in WHOLE_ATTENTION else heads[1:]
        kept = [(heads, FULL)] * 4
        kept[(where + 1) % 4] = (fewer, FULL[::2])
        kept[where] = ([] if what != "mlp" else heads, [] if what != "attention" else FULL)
        return tiny_plan(model, kept)

    return plan


def watch_reads(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A list that gets the names of parameters that are read at once."""
    reads: list[list[str]] = []
    read = CheckpointSource.read

    def noted(self: CheckpointSource, names: Sequence[str], *rest: Any) -> dict[str, torch.Tensor]:
        reads.append(list(names))
        return read(self, names, *rest)

    monkeypatch.setattr(CheckpointSource, "read", noted)
    return reads
