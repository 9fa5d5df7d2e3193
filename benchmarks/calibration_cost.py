"""What calibration costs: time of a method's calibration pass over the time of plain forwards of the same batches.

    python benchmarks/calibration_cost.py
    python benchmarks/calibration_cost.py --model path/to/llama --methods wanda hgsp_taylor --repeats 5

Seconds are processor time, so that other work on the machine counts little.

Each repeat times the forwards and then every method, and the median ratio is printed: a busy machine then slows both
sides of a ratio. Where a method needs the loss, the plain forward has the head too, elsewhere it is
the decoder alone. Hooks cost a fixed time per call, so a tiny model shows their overhead, not the method's.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_prune.calibration.passes import Pass
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.methods import HGSP, ShortGPT, SlimGPT, Wanda
from lightning_prune.methods.base import PruningMethod
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.layered import LayeredModel
from lightning_prune.runs.build import quiet

# T = 0 leaves the importance alone: removal priors are a pass of their own, with a cost that grows with L².
METHODS: dict[str, tuple[Callable[..., PruningMethod], float | None]] = {
    "wanda": (Wanda, 1.1),
    "shortgpt": (ShortGPT, 1.05),
    "hgsp_taylor": (partial(HGSP, importance="taylor", temperature=0.0), 4.3),
    "hgsp_wanda": (partial(HGSP, importance="wanda", temperature=0.0), 1.1),
    "slimgpt": (SlimGPT, 2.3),
    "hgsp_kfac_refit": (partial(HGSP, importance="kfac", temperature=0.0, refit="residual"), 4.2),
    "hgsp_removal": (partial(HGSP, importance="wanda", prior="removal"), None),
}
WITH_HEAD = ("hgsp_taylor", "hgsp_removal", "hgsp_kfac_refit")  # they need the loss


def main() -> None:
    """Measure and print one line per method."""
    arguments = _parser().parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = arguments.model or str(_random_model(folder / "model"))
        tokens = _tokens(folder / "tokens.npy", model, arguments)
        layers = Checkpoint.open(model).config.num_hidden_layers * -(
            -len(tokens) // arguments.batch_size
        )  # of one forward
        plain, seconds = [], {name: [] for name in arguments.methods}  # type: ignore[var-annotated]
        heads = []
        pruning, work = {}, {}
        for _ in range(arguments.repeats):
            net = Checkpoint.open(model).load(torch.float32)
            plain.append(_forward_seconds(net.base_model, tokens, arguments.batch_size))
            heads.append(_forward_seconds(net, tokens, arguments.batch_size))
            del net
            for name in arguments.methods:
                # As configs/hgsp_kfac_refit.yaml has it: a quarter of the samples is differentiated.
                share = {"gradient_samples": max(1, arguments.samples // 4)} if "kfac" in name else {}
                method = METHODS[name][0](pretrained=model, onload=arguments.onload, **share)
                walking, pruning[name], work[name] = _calibration_seconds(method, folder, arguments.batch_size)
                seconds[name].append(walking)
    print(f"{arguments.samples} × {arguments.seq_len} tokens, {arguments.batch_size} windows per batch")
    print(f"{torch.get_num_threads()} threads, fp32, CPU")
    print(f"{'plain forward':<16} {statistics.median(plain):8.2f} s   {statistics.median(heads):.2f} s with the head")
    for name, values in seconds.items():
        forwards = heads if name in WITH_HEAD else plain
        ratios = [mine / forward for mine, forward in zip(values, forwards, strict=True)]
        target = METHODS[name][1]
        goal = "" if target is None else f"target ≤ {target}"
        per_evaluation = ""
        if "removal" in name:  # a pass of many evaluations: what one costs, and a head, is known from the forwards
            each = [
                mine / (work[name][0] * decoder / layers + work[name][1] * (whole - decoder) / len(tokens))
                for mine, decoder, whole in zip(values, plain, heads, strict=True)
            ]
            per_evaluation = (
                f", {work[name][0]} evaluations, {statistics.median(each):.2f} × so many layers and heads of a forward"
            )
        print(
            f"{name:<16} {statistics.median(values):8.2f} s   {statistics.median(ratios):5.2f} × forward "
            f"({min(ratios):.2f} to {max(ratios):.2f})   {goal}"
            + per_evaluation
            + (f", finished layers {pruning[name]:.2f} s on top" if pruning[name] >= 0.01 else "")
        )


def _forward_seconds(model: torch.nn.Module, tokens: torch.Tensor, batch_size: int) -> float:
    batches = tokens.split(batch_size)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        model(input_ids=batches[0], use_cache=False)
        started = time.process_time()
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    return time.process_time() - started


def _calibration_seconds(method: PruningMethod, folder: Path, batch_size: int) -> tuple[float, float, tuple[int, int]]:
    """The steps of a real ``trainer.fit``, bringing the layers in included; apart from that, the seconds in which
    finished layers were turned into results and decided on (factorisations and other solves); and how many layer
    evaluations and sequences through the head there were. Writing is in neither."""
    walking = concluding = 0.0
    heads = 0

    def timed(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal walking
            started = time.process_time()
            try:
                return real(*args)
            finally:
                walking += time.process_time() - started

        return call

    def apart(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal walking, concluding
            started = time.process_time()
            try:
                return real(*args)
            finally:
                spent = time.process_time() - started
                walking, concluding = walking - spent, concluding + spent

        return call

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(hidden: torch.Tensor, tokens: torch.Tensor) -> Any:
            nonlocal heads
            heads += len(tokens)
            return real(hidden, tokens)

        return call

    evaluated: list[LayeredModel] = []
    start, refits = method.on_fit_start, method.refit_passes

    def solves_apart(passes: list[Pass]) -> list[Pass]:
        for one in passes:
            one.finish = apart(one.finish)  # type: ignore[method-assign]
        return passes

    def start_watched() -> None:
        start()
        solves_apart(method.driver.loop.passes)  # type: ignore[arg-type]
        method.model.losses = counted(method.model.losses)  # type: ignore[method-assign]
        evaluated.append(method.model)

    method.on_fit_start = start_watched  # type: ignore[method-assign]
    for name in ("on_train_epoch_start", "training_step", "on_train_batch_end"):
        setattr(method, name, timed(getattr(method, name)))
    method.decide = apart(method.decide)  # type: ignore[method-assign]
    method.refit_passes = lambda *args: solves_apart(refits(*args))  # type: ignore[method-assign]
    method.details = dict  # type: ignore[method-assign]
    method.on_fit_end = lambda: None  # type: ignore[method-assign]
    data = CalibrationDataModule(
        dataset=str(folder / "tokens.npy"), batch_size=batch_size, eval_datasets=[], tokenizer=method.pretrained
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    trainer.fit(method, data)
    return walking, concluding, (evaluated[0].evaluations, heads)


def _random_model(folder: Path) -> Path:
    """Llama with random weights: 6 layers, hidden size 512, 8 query heads on 4 KV heads, 1408 channels."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _tokens(path: Path, model: str, arguments: argparse.Namespace) -> torch.Tensor:
    size = (arguments.samples, arguments.seq_len)
    tokens = torch.randint(Checkpoint.open(model).config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    np.save(path, tokens.numpy())
    return tokens


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder or hub id (default: random Llama, hidden size 512, 6 layers)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3, help="runs of everything; the median is printed (default: 3)")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows (default: 32)")
    parser.add_argument("--seq_len", type=int, default=128, help="tokens per window (default: 128)")
    parser.add_argument("--onload", choices=("model", "layer"), default="layer", help="default: layer")
    parser.add_argument("--batch_size", type=int, default=4, help="windows per forward (default: 4)")
    return parser


if __name__ == "__main__":
    main()
