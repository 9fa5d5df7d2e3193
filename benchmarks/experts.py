"""Whole experts or channels inside them: perplexity of every criterion at the same share of the experts' parameters.

    python benchmarks/experts.py --model path/to/moe --text validation.txt --test wiki/test.txt ptb/test.txt

A share of an integer number of experts and of channels is reached by all systems alike where both divide: 3 of 16
experts are 24 of 128 channels. Only the last digits depend on the number of threads.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from transformers import AutoTokenizer

import lightning_prune
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.methods import HGSP, REAP, HEAPr, Wanda
from lightning_prune.methods.base import PruningMethod
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.families import count_parameters, layer_structures
from lightning_prune.models.vocabulary import EXPERTS
from lightning_prune.runs.build import quiet
from lightning_prune.runs.folder import RunFolder

KFAC = partial(HGSP, importance="kfac", temperature=0.0)
SYSTEMS: dict[str, Callable[..., PruningMethod]] = {
    "frequency": partial(REAP, criterion="frequency"),
    "reap": REAP,
    "reap + refit": partial(REAP, refit="residual"),
    "wanda": Wanda,
    "heapr": HEAPr,
    "kfac": KFAC,
    "heapr + refit": partial(HEAPr, refit="residual"),
    "kfac + refit": partial(KFAC, refit="residual"),
}


def main() -> None:
    """Measure, and print one line of JSON per system, share and seed."""
    arguments = _parser().parse_args()
    quiet()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tests = {Path(path).parent.name: _windows(tokenizer, path, arguments) for path in arguments.test}
    meta = Checkpoint.open(arguments.model).meta
    inside = sum(view.block_cost(block) for view in layer_structures(meta) for block in EXPERTS)
    dense = {name: perplexity(lightning_prune.load(arguments.model), windows) for name, windows in tests.items()}
    print(
        json.dumps({"system": "dense", "parameters": count_parameters(meta), "in experts": inside, **dense}), flush=True
    )
    for seed in arguments.seeds:
        for share in arguments.shares:
            for name in arguments.systems:
                ratio = round(share * inside / count_parameters(meta), 4)
                method = SYSTEMS[name](arguments.model, ratio, save_dtype="float32")
                with tempfile.TemporaryDirectory() as folder:
                    _fit(method, arguments, seed, Path(folder))
                    model = lightning_prune.load(str(method.pruned_folder))
                    found = {test: perplexity(model, windows) for test, windows in tests.items()}
                reached = (1 - count_parameters(model) / count_parameters(meta)) * count_parameters(meta) / inside
                line = {"system": name, "share": share, "reached": round(reached, 4), "seed": seed, **found}
                print(json.dumps(line), flush=True)


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean token loss over windows ``[N, L]``."""
    total = 0.0
    for batch in windows.split(32):
        losses = model(input_ids=batch).logits[:, :-1].float().log_softmax(-1)
        total -= float(losses.gather(2, batch[:, 1:, None]).sum(dtype=torch.float64))
    return round(float(np.exp(total / (len(windows) * (windows.shape[1] - 1)))), 3)


def _windows(tokenizer: Any, path: str, arguments: argparse.Namespace) -> torch.Tensor:
    tokens = tokenizer(Path(path).read_text("utf-8"), add_special_tokens=False)["input_ids"]
    count = len(tokens) // arguments.seq_len
    windows = torch.tensor(tokens[: count * arguments.seq_len]).view(count, -1)
    return windows[:: max(1, count // arguments.windows)][: arguments.windows]


def _fit(method: PruningMethod, arguments: argparse.Namespace, seed: int, folder: Path) -> None:
    data = CalibrationDataModule(
        arguments.text,
        num_samples=arguments.num_samples,
        seq_len=arguments.seq_len,
        seed=seed,
        batch_size=32,
        eval_datasets=[],
        tokenizer=arguments.model,
        cache_dir=str(folder / "cache"),
    )
    method.run_folder = RunFolder(folder)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(method, data)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or hub id, a mixture of experts")
    parser.add_argument("--text", required=True, help="calibration text")
    parser.add_argument("--test", nargs="+", required=True, help="test texts, named by their folder")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.2, 0.4], help="of the experts' parameters")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--num_samples", type=int, default=128)
    parser.add_argument("--seq_len", type=int, default=128, help="of calibration and evaluation")
    parser.add_argument("--windows", type=int, default=128, help="windows of every test text, evenly spaced")
    return parser


if __name__ == "__main__":
    main()
