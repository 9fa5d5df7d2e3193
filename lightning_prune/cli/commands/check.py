"""``lightning-prune check``: what a run would take, and whether it fits, without reading a weight."""

import json
from dataclasses import asdict
from typing import Any

from lightning_prune.cli.parser import with_method_help
from lightning_prune.runs.build import RunBuilder
from lightning_prune.runs.memory_estimate import ERROR, ROOM, Estimate, Memory
from lightning_prune.runs.verdict import both_units, size
from lightning_prune.support.memory import parse_bytes

DESCRIPTION = (
    "Say what a run of fit with the same options would take: device and host memory, disk, bytes read, work. A folder "
    "with a config.json is enough. Example: lightning-prune check --method wanda --model.pretrained path/to/llama "
    "--memory 24GiB"
)
OPTIONS: dict[str, dict[str, Any]] = {
    "memory": {"type": str, "default": "", "help": "Of a GPU that is not here, such as 24GiB."},
    "host-memory": {"type": str, "default": "", "help": "Of another host, such as 64GiB."},
    "json": {"action": "store_true", "help": "Print facts."},
}


def main(argv: list[str]) -> int:
    """Print what every placement takes; returns 0 where the requested one (or any, for auto) fits, else 1."""
    run = RunBuilder(with_method_help(argv), command="check", description=DESCRIPTION, options=OPTIONS)
    device, host = (
        parse_bytes(text, f"--{name}") if (text := run.option(name)) else None for name in ("memory", "host-memory")
    )
    memory = Memory(run.trainer, run.model, run.datamodule, device, host)
    estimates = [memory.estimate("layer"), memory.estimate("model")]
    if run.option("json"):
        facts = {"method": run.model.method, "precision": str(run.trainer.precision)}
        rows = [facts | asdict(one) | {"fits": one.share <= 1, "disk_bytes": one.disk} for one in estimates]
        print(json.dumps(rows, indent=2))
    else:
        _print(estimates, memory)
    return 0 if _possible(estimates, run.model.slot.onload) else 1


def _possible(estimates: list[Estimate], onload: str) -> bool:
    """Whether the placement that was requested fits; for auto, whether any does."""
    return any(one.share <= 1 for one in estimates if onload in ("auto", one.onload))


def _print(estimates: list[Estimate], memory: Memory) -> None:
    method, work = memory.method, estimates[0]
    text = f"{memory.samples} × {memory.seq_len} tokens" if method.needs_calibration else "no calibration text"
    count = method.dense_parameters
    billions = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
    parameters = f"{billions} parameters ({len(method.layers)} layers)"
    wanted = "" if method.requested_ratio is None else f"pruning ratio {method.requested_ratio:.4g}, "
    wanted = wanted if method.target is None else f"{method.target.option}, "
    print(f"{method.label} on {parameters}, {wanted}{method.trainer.precision}, {text}")
    host = f"{both_units(memory.host)} on the host"
    print(f"room: {host}" if memory.device is None else f"room: {both_units(memory.device)} on the device, {host}")
    print(f"\n{'onload':<8}{'device':>10}{'host':>10}{'disk':>10}{'read':>10}  fits   largest in")
    for one in estimates:
        device = "–" if one.device_bytes is None else size(one.device_bytes)
        sizes = "".join(f"{it:>10}" for it in (device, *map(size, (one.host_bytes, one.disk, one.bytes_read))))
        print(f"{one.onload:<8}{sizes}  {_fits(one):<5}  {one.phase}")
    chosen = "takes " + ("model" if estimates[1].share <= ROOM else "layer")
    chosen = chosen if _possible(estimates, "auto") else "would refuse: nothing fits"
    legend = f"; tight: an estimate can be {ERROR - 1:.0%} too low" if "tight" in map(_fits, estimates) else ""
    print(f"\n--model.onload auto, the default, {chosen}{legend}")
    if method.needs_calibration:
        forwards = work.layer_evaluations / (len(method.layers) * -(-memory.samples // memory.data.batch_size))
        print(f"work: that of {forwards:.1f} forwards of the calibration text, {work.flops:.2e} operations")
    if not _possible(estimates, method.slot.onload):
        print(memory.refusal(estimates[method.slot.onload == "model"]))


def _fits(estimate: Estimate) -> str:
    """Whether an estimate fits, in a word: ``tight`` within the error of an estimate."""
    return "no" if estimate.share > 1 else "tight" if estimate.share * ERROR > 1 else "yes"
