"""Run folders written by hand: what the comparison reads, without pruning anything."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lightning_prune.checkpoint.plan import LayerPlan, PruningPlan
from lightning_prune.comparison.records import Run, load_run
from lightning_prune.models.family import DENSE

TEXT = {"dataset": "demo", "configuration": None, "revision": "r1", "tokenizer_sha256": "b" * 64, "seq_len": 128}
CALIBRATION = TEXT | {"split": "train", "text_sha256": "a" * 64, "fingerprint": "c" * 64, "num_samples": 128}
CALIBRATION |= {"sampling": "random", "stride": None, "seed": 0}
EVALUATION = TEXT | {"split": "test", "text_sha256": "d" * 64, "fingerprint": "e" * 64, "unigram_perplexity": 100.0}
EVALUATION |= {"stride": 128, "bos": "none", "windows": 10, "predicted_tokens": 1270}
ENVIRONMENT: dict[str, Any] = {
    "packages": {"torch": "2.13.0", "transformers": "5.23.0", "lightning-prune": "0.1.0"},
    "cpu": {"name": "a CPU", "cores": 2, "threads": 1},
    "memory_bytes": 2**34,
    "gpus": [],
    "cuda": None,
    "command": ["lightning-prune"],
}
ENVIRONMENT |= {"python": "3.11.7", "platform": "Linux", "device": "cpu", "precision": "32-true"}
LAYERS, HEADS, CHANNELS = 4, 2, 6


def write_run(
    root: Path,
    label: str = "wanda",
    ratio: float | None = 0.2,
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
    distance: dict[str, Any] | None = None,
    seconds: dict[str, float] | None = None,
    method: dict[str, Any] | None = None,
    details: dict[str, Any] | None = None,
    target: dict[str, Any] | None = None,
) -> Path:
    """Write the system's next folder; ``calibration``, ``evaluation``, ``environment``, ``method`` and ``details``
    replace single facts, ``seed`` is of the scores. Without a ``ratio`` there is one ``achieved``."""
    folder = root / label / f"version_{len(list((root / label).glob('version_*')))}"
    folder.mkdir(parents=True)
    achieved = achieved or ratio or 0.0
    metrics = {
        "perplexity": {"demo": {"dense": 10.0, "pruned": perplexity, "tokens": 1270}},
        "evaluation": {"demo": EVALUATION | (evaluation or {})},
        "parameters": {"dense": 1000, "pruned": 1000 if masked else round(1000 * (1 - achieved))},
        "pruning_ratio": {"requested": ratio, "achieved": achieved},
        "seconds": seconds or {"tokenise": 0.5, "calibrate": 2.0, "evaluate pruned": 1.0, "total": 3.5},
        "peak_memory_bytes": 2**29,
        "method": {"name": label, "label": label, "base_model": base_model, "base_model_sha256": weights}
        | (method or {}),
    }
    if target is not None:
        metrics["target"] = target
    if distance is not None:
        long = EVALUATION | {"seq_len": 512, "long_windows_of": "demo"}
        metrics["perplexity"]["demo@512"] = {"dense": 10.0, "pruned": 15.0, "tokens": 1000}  # type: ignore[index]
        metrics["evaluation"]["demo@512"] = long  # type: ignore[index]
        metrics |= {"distance": {"demo": distance, "demo@512": distance | {"kl_divergence": 0.25}}}
    facts = {"dataset": None, "note": "reads no data"} if no_data else CALIBRATION | (calibration or {})
    _json(folder / "calibration.json", facts)
    _json(folder / "environment.json", ENVIRONMENT | (environment or {}))
    details = {"tau": 0.125, "prior": {"delta": {"layer": [1.0]}}} | (details or {})
    _json(folder / "method.json", {"method": label, "label": label} | details)
    kept = _scores(folder / "scores.csv", ratio or achieved, whole_layers, seed)
    parameters: dict[str, int] = metrics["parameters"]  # type: ignore[assignment]
    PruningPlan(label, ratio, achieved, parameters, None, base_model, kept).save(folder / "plan.json")
    (folder / "config.yaml").write_text("model: {}\n", encoding="utf-8")
    _json(folder / "metrics.json", metrics)
    return folder


def make_run(root: Path, *names: Any, **options: Any) -> Run:
    """As ``write_run``, read back."""
    return load_run(write_run(root, *names, **options))


def drawn(seed: int, tokens: str = "") -> dict[str, Any]:
    """The facts of a calibration set that another seed drew."""
    return {"seed": seed, "fingerprint": (tokens or str(seed)) * 64}


def seeded(root: Path, values: dict[str, list[float | None]], ratio: float = 0.2) -> list[Run]:
    """A run per system and seed 0, 1, …, with these perplexities."""
    return [
        make_run(root, label, ratio, perplexity=value, calibration=drawn(seed), seed=seed)
        for label, by_seed in values.items()
        for seed, value in enumerate(by_seed)
    ]


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _scores(path: Path, ratio: float, whole_layers: bool, seed: int) -> list[LayerPlan]:
    units = [("attention", i) for i in range(HEADS)] + [("mlp", i) for i in range(CHANNELS)]
    rows = [(layer, *unit) for layer in range(LAYERS) for unit in ([("layer", 0)] if whole_layers else units)]
    table = pd.DataFrame(rows, columns=["layer", "block", "unit"])
    table["importance"] = np.random.default_rng(seed).random(len(rows))
    table["cost"], table["prior"], table["score"] = 10, 1.0, table["importance"]
    table["pruned"] = (table["score"].rank() <= round(ratio * len(rows))).astype(int)
    table.to_csv(path, index=False)
    kept = {row for row, pruned in zip(rows, table["pruned"], strict=True) if not pruned}
    if whole_layers:
        kept = {(layer, *unit) for layer, _, _ in kept for unit in units}
    return [
        LayerPlan(
            layer,
            {block: [unit for kind, unit in units if kind == block and (layer, kind, unit) in kept] for block in DENSE},
        )
        for layer in range(LAYERS)
    ]
