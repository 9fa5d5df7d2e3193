"""Peak memory of whole runs: calibrate, prune, save and evaluate a random 1.1 B Llama, every method, both placements.
With ``--experts`` layers of Qwen3-30B-A3B's shape.

    python benchmarks/layer_memory.py
    python benchmarks/layer_memory.py --systems wanda hgsp_taylor --onload layer --layers 32
    python benchmarks/layer_memory.py --systems wanda --onload layer --layers 2 --processes 2
    python benchmarks/layer_memory.py --systems reap wanda hgsp_kfac_refit --experts --layers 1 --samples 8 --windows 1

What is measured is anonymous memory (``RssAnon``): what a process allocates itself. Weights that are views of the
checkpoint's files do not count; the kernel drops them when memory runs short. Every run is a process of its own, or
several (``--processes``), of which the largest counts. Further options are those of ``fit``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

SYSTEMS: dict[str, list[str]] = {
    "magnitude": ["--config", "magnitude"],
    "wanda": ["--config", "wanda"],
    "shortgpt": ["--config", "shortgpt"],
    "slimgpt": ["--config", "slimgpt"],
    "hgsp_taylor_no_prior": ["--config", "hgsp_taylor", "--model.temperature", "0"],
    "hgsp_taylor": ["--config", "hgsp_taylor"],
    "reap": ["--config", "reap"],
    "heapr": ["--config", "heapr"],
    "hgsp_kfac": ["--config", "hgsp_kfac_refit", "--model.refit", "none"],
    "hgsp_kfac_refit": ["--config", "hgsp_kfac_refit"],
}


def main() -> None:
    """Measure and print one line per run."""
    arguments, further = _parser().parse_known_args()
    folder = arguments.folder
    kind = "mixture" if arguments.experts else "llama"
    model = random_model(folder / f"{kind}-{arguments.layers}-layers", arguments.layers, arguments.experts)
    tokens = random_tokens(folder / "tokens.npy", 0, arguments.samples)
    held_out = random_tokens(folder / "held_out.npy", 1, arguments.windows)
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(
        f"weights {weights / 1e9:.2f} GB, {arguments.layers} layers, {arguments.samples} × 128 tokens, "
        f"{arguments.precision}; peak measured (as check says)"
    )
    for system in arguments.systems:
        for onload in arguments.onload:
            options = [*_config(SYSTEMS[system]), "--model.pretrained", str(model), "--model.onload", onload]
            options += ["--data.dataset", str(tokens), "--data.eval_datasets", f"[{held_out}]"]
            options += ["--trainer.precision", arguments.precision, *further]
            if arguments.processes > 1:
                options += ["--trainer.accelerator", "cpu", "--trainer.devices", str(arguments.processes)]
            said = estimate(options, onload)
            with tempfile.TemporaryDirectory(dir=folder) as root:
                peak, seconds, phases = measured_run(options, Path(root))
            peaks = f"peak {peak / 1e9:5.2f} GB ({said / 1e9:.2f} GB)"
            phases_text = ", ".join(f"{phase} {value:.0f}" for phase, value in phases.items())
            print(f"{system:<22} {onload:<6} {peaks}  {seconds:6.0f} s  ({phases_text})", flush=True)


def estimate(options: list[str], onload: str) -> int:
    """Peak of host memory in bytes, as ``check`` says."""
    command = [sys.executable, "-m", "lightning_prune", "check", *options, "--json"]
    rows = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout)
    return next(row["host_bytes"] for row in rows if row["onload"] == onload)


def measured_run(options: list[str], root: Path) -> tuple[int, float, dict[str, float]]:
    """Peak RssAnon in bytes, wall-clock seconds, and the run's own seconds by phase."""
    command = [sys.executable, "-m", "lightning_prune", "fit", *options]
    command += ["--trainer.default_root_dir", str(root), "--trainer.enable_progress_bar", "false"]
    started, peak = time.perf_counter(), 0
    with (root / "output.txt").open("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, *map(anonymous_bytes, (process.pid, *children(process.pid))))
            time.sleep(0.01)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{output.read()[-3000:]}")
    metrics = json.loads(next(root.rglob("metrics.json")).read_text(encoding="utf-8"))
    return peak, time.perf_counter() - started, metrics["seconds"]


def children(process: int) -> list[int]:
    """The processes that a process started; none when it has ended."""
    try:
        return [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text("ascii").split()]
    except (OSError, ProcessLookupError):
        return []


def anonymous_bytes(process: int) -> int:
    """RssAnon of a process now; 0 when it has ended."""
    try:
        for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (OSError, ProcessLookupError):
        pass
    return 0


def random_model(folder: Path, layers: int, experts: bool) -> Path:
    """A Llama of hidden size 2048, MLP 8192 and 32 heads on 8, vocabulary 32 000, tied; or Qwen3-30B-A3B with fewer
    layers. bf16, in shards, made once."""
    if not (folder / "config.json").is_file():
        shared: dict[str, Any] = {"hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": layers}
        shared |= {"max_position_embeddings": 4096}
        if experts:
            sizes = {"num_experts": 128, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "head_dim": 128}
            config: Any = Qwen3MoeConfig(vocab_size=151_936, num_key_value_heads=4, **sizes, **shared)
        else:
            config = LlamaConfig(
                vocab_size=32_000, intermediate_size=8192, num_key_value_heads=8, tie_word_embeddings=True, **shared
            )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder, max_shard_size="500MB")
    return folder


def random_tokens(path: Path, seed: int, samples: int) -> Path:
    """``samples`` × 128 token ids."""
    tokens = torch.randint(32_000, (samples, 128), generator=torch.Generator().manual_seed(seed))
    np.save(path, tokens.numpy())
    return path


def _config(words: list[str]) -> list[str]:
    configs = Path(__file__).parents[1] / "configs"
    return [str(configs / f"{word}.yaml") if before == "--config" else word
            for before, word in zip(["", *words], words, strict=False)]  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="NAME")
    parser.add_argument("--onload", nargs="+", choices=("layer", "model"), default=["layer", "model"])
    parser.add_argument("--layers", type=int, default=16, help="decoder layers (default: 16, 1.1 B parameters)")
    parser.add_argument("--experts", action="store_true", help="layers of Qwen3-30B-A3B in place of a Llama's")
    parser.add_argument("--samples", type=int, default=128, help="of 128 tokens to calibrate on (default: 128)")
    parser.add_argument("--windows", type=int, default=128, help="of 128 tokens to evaluate on (default: 128)")
    parser.add_argument("--processes", type=int, default=1, help="that share the samples (default: 1)")
    parser.add_argument("--precision", default="bf16-true", help="of the trainer (default: bf16-true)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lightning-prune-benchmark")
    return parser


if __name__ == "__main__":
    main()
