"""On a GPU: the same decisions as on the CPU, the same bits in both placements, and large shapes within 24 GB.

Skipped where there is none. The large shapes have random weights and are slow: ``pytest -m gpu tests/gpu``.
"""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.methods.base import PruningMethod
from lightning_prune.runs.build import quiet
from lightning_prune.runs.run import prune_and_record
from tests.methods.behaviour import MODELS, SYSTEMS, Run, config_of, prune, save_model, save_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU_BYTES = 24 * 10**9
every_system = pytest.mark.parametrize("system", SYSTEMS)


def on_gpu(method: PruningMethod, tokens: Path, root: Path, precision: str = "32-true") -> Run:
    """As ``behaviour.prune``, on one GPU."""
    quiet()
    trainer = L.Trainer(
        accelerator="gpu",
        devices=1,
        max_epochs=1,
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        default_root_dir=root,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    data = CalibrationDataModule(dataset=str(tokens), eval_datasets=[], tokenizer=method.pretrained)
    folder, metrics = prune_and_record(trainer, method, data, config_of(method))
    return Run(folder, metrics, method, [])


@every_system
def test_decisions_are_those_of_the_cpu(tmp_path: Path, system: str) -> None:
    model, tokens = str(save_model(tmp_path / "model", **MODELS[SYSTEMS[system].kind])), save_tokens(tmp_path / "c.npy")
    make = SYSTEMS[system].make
    expected = prune(make(pretrained=model, pruning_ratio=0.29), tokens, tmp_path / "cpu")
    found = on_gpu(make(pretrained=model, pruning_ratio=0.29), tokens, tmp_path / "gpu")
    torch.testing.assert_close(found.method.scores.importance, expected.method.scores.importance, rtol=1e-3, atol=1e-9)
    assert found.method.plan.layers == expected.method.plan.layers


@every_system
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"])
def test_both_placements_give_the_same_bits(tmp_path: Path, system: str, precision: str) -> None:
    model, tokens = str(save_model(tmp_path / "model", **MODELS[SYSTEMS[system].kind])), save_tokens(tmp_path / "c.npy")
    runs = [
        on_gpu(
            SYSTEMS[system].make(pretrained=model, pruning_ratio=0.29, onload=onload),
            tokens,
            tmp_path / onload,
            precision,
        )
        for onload in ("model", "layer")
    ]
    for name in ("scores.csv", "plan.json", "pruned/model.safetensors"):
        assert (runs[0].folder / name).read_bytes() == (runs[1].folder / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("system", [name for name, system in SYSTEMS.items() if system.kind == "gqa-tied"])
@pytest.mark.parametrize("shape", ["1b", "8b"])
def test_large_shapes_are_pruned_within_24_gb(large: Any, tmp_path: Path, system: str, shape: str) -> None:
    torch.cuda.set_per_process_memory_fraction(GPU_BYTES / torch.cuda.get_device_properties(0).total_memory)
    torch.cuda.reset_peak_memory_stats()
    try:
        model, tokens = large(shape)
        method = SYSTEMS[system].make(pretrained=str(model), pruning_ratio=0.2, onload="layer")
        on_gpu(method, tokens, tmp_path, "bf16-true")
        assert torch.cuda.max_memory_allocated() <= GPU_BYTES
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``large("1b")`` is (model folder, token array); random bf16 weights, made once."""
    shapes = {
        "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    }

    def make(shape: str) -> tuple[Path, Path]:
        folder = Path(tmp_path_factory.getbasetemp()) / shape
        tokens = folder / "tokens.npy"
        if not folder.exists():
            config = LlamaConfig(vocab_size=32_000, num_attention_heads=32, num_key_value_heads=8, **shapes[shape])
            with torch.device("cuda"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(folder)
            del model
            torch.cuda.empty_cache()
            np.save(tokens, torch.randint(32_000, (128, 128), generator=torch.Generator().manual_seed(0)).numpy())
        return folder, tokens

    return make
