"""Run folders written by hand: what the comparison reads, without pruning anything."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from lightning_prune.checkpoint.plan import LayerPlan, PruningPlan

CALIBRATION = {
    "dataset": "demo",
    "configuration": None,
    "split": "train",
    "revision": "r1",
    "text_sha256": "a" * 64,
    "tokenizer_sha256": "b" * 64,
    "sampling": "random",
    "stride": None,
    "seed": 0,
    "num_samples": 128,
    "seq_len": 128,
    "fingerprint": "c" * 64,
}
EVALUATION = {
    "dataset": "demo",
    "configuration": None,
    "split": "test",
    "revision": "r1",
    "text_sha256": "d" * 64,
    "tokenizer_sha256": "b" * 64,
    "seq_len": 128,
    "stride": 128,
    "bos": "none",
    "windows": 10,
    "predicted_tokens": 1270,
    "fingerprint": "e" * 64,
    "unigram_perplexity": 100.0,
}
ENVIRONMENT = {
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "transformers": "5.23.0", "lightning-prune": "0.1.0"},
    "platform": "Linux",
    "cpu": {"name": "a CPU", "cores": 2, "threads": 1},
    "memory_bytes": 2**34,
    "gpus": [],
    "cuda": None,
    "device": "cpu",
    "precision": "32-true",
    "command": ["lightning-prune"],
}
LAYERS, HEADS, CHANNELS = 4, 2, 6
BLOCKS = ("attention", "mlp")


def write_run(
    root: Path,
    label: str = "wanda",
    ratio: float = 0.2,
    achieved: float | None = None,
    perplexity: float | None = 12.5,
    calibration: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    base_model: str = "demo",
    weights: str | None = "f" * 64,
    no_data: bool = False,
    masked: bool = False,
    whole_layers: bool = False,
    seed: int = 0,
    version: int = 0,
) -> Path:
    """Write one folder; ``calibration``, ``evaluation`` and ``environment`` replace single facts."""
    folder = root / label / f"version_{version}"
    folder.mkdir(parents=True)
    achieved = ratio if achieved is None else achieved
    metrics = {
        "perplexity": {"demo": {"dense": 10.0, "pruned": perplexity, "tokens": 1270}},
        "evaluation": {"demo": EVALUATION | (evaluation or {})},
        "parameters": {"dense": 1000, "pruned": 1000 if masked else round(1000 * (1 - achieved))},
        "pruning_ratio": {"requested": ratio, "achieved": achieved},
        "seconds": {"tokenise": 0.5, "calibrate": 2.0, "evaluate pruned": 1.0, "total": 3.5},
        "peak_memory_bytes": 2**29,
        "method": {"name": label, "label": label, "base_model": base_model, "base_model_sha256": weights},
    }
    facts = {"dataset": None, "note": "reads no data"} if no_data else CALIBRATION | (calibration or {})
    _json(folder / "calibration.json", facts)
    _json(folder / "environment.json", ENVIRONMENT | (environment or {}))
    _json(folder / "method.json", {"method": label, "label": label, "tau": 0.125, "prior": {"delta": {"layer": [1.0]}}})
    kept = _scores(folder / "scores.csv", ratio, whole_layers, seed)
    parameters: dict[str, int] = metrics["parameters"]  # type: ignore[assignment]
    PruningPlan(label, ratio, achieved, parameters, None, base_model, kept).save(folder / "plan.json")
    (folder / "config.yaml").write_text("model: {}\n", encoding="utf-8")
    _json(folder / "metrics.json", metrics)
    return folder


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _scores(path: Path, ratio: float, whole_layers: bool, seed: int) -> list[LayerPlan]:
    units = [("layer", 0)] if whole_layers else [("attention", i) for i in range(HEADS)]
    units += [] if whole_layers else [("mlp", i) for i in range(CHANNELS)]
    rows = [(layer, *unit) for layer in range(LAYERS) for unit in units]
    values = np.random.default_rng(seed).random(len(rows))
    gone = set(np.argsort(values)[: round(ratio * len(rows))].tolist())
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("layer", "block", "unit", "importance", "cost", "prior", "score", "pruned"))
        for index, (layer, block, unit) in enumerate(rows):
            writer.writerow((layer, block, unit, values[index], 10, 1.0, values[index], int(index in gone)))
    kept = [row for index, row in enumerate(rows) if index not in gone]
    if whole_layers:
        whole, layers = (list(range(HEADS)), list(range(CHANNELS))), {layer for layer, _, _ in kept}
        return [LayerPlan(layer, *(whole if layer in layers else ([], []))) for layer in range(LAYERS)]
    return [
        LayerPlan(layer, *([unit for at, kind, unit in kept if (at, kind) == (layer, block)] for block in BLOCKS))
        for layer in range(LAYERS)
    ]
