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
        _print(estimates, memory, host_is_here=host is None and device is not None)
    return 0 if _possible(estimates, run.model.slot.onload) else 1


def _possible(estimates: list[Estimate], onload: str) -> bool:
    """Whether the placement that was requested fits; for auto, whether any does."""
    return any(one.share <= 1 for one in estimates if onload in ("auto", one.onload))


def _print(estimates: list[Estimate], memory: Memory, host_is_here: bool) -> None:
    """``host_is_here``: the device is another machine's, the host is this one."""
    method = memory.method
    text = f"{memory.samples} × {memory.seq_len} tokens" if method.needs_calibration else "no calibration text"
    count = method.dense_parameters
    billions = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
    parameters = f"{billions} parameters ({len(method.layers)} layers)"
    wanted = "" if method.requested_ratio is None else f"pruning ratio {method.requested_ratio:.4g}, "
    wanted = wanted if method.target is None else f"{method.target.option}, "
    print(f"{method.label} on {parameters}, {wanted}{method.trainer.precision}, {text}")
    host = f"{both_units(memory.host)} on the host"
    print(f"room: {host}" if memory.device is None else f"room: {both_units(memory.device)} on the device, {host}")
    if host_is_here:
        print("host: of this machine; --host-memory SIZE for another")
    fits = [_fits(one, memory) for one in estimates]
    width = max(map(len, fits)) + 2
    print(f"\n{'onload':<8}{'device':>10}{'host':>10}{'disk':>10}{'read':>10}  {'fits':<{width}}largest in")
    for one, word in zip(estimates, fits, strict=True):
        device = "–" if one.device_bytes is None else size(one.device_bytes)
        sizes = "".join(f"{it:>10}" for it in (device, *map(size, (one.host_need_bytes, one.disk, one.bytes_read))))
        print(f"{one.onload:<8}{sizes}  {word:<{width}}{one.phase}")
    print(f"\n{_streams(estimates[0])}")
    if "tight" in " ".join(fits):
        print(f"tight: an estimate can be {ERROR - 1:.0%} too low")
    if method.slot.onload == "auto":
        chosen = "takes " + ("model" if estimates[1].share <= ROOM else "layer")
        chosen = chosen if _possible(estimates, "auto") else "would refuse: nothing fits"
        print(f"--model.onload auto, the default, {chosen}")
    if method.needs_calibration:
        print(_work(estimates[0], memory))
    if not _possible(estimates, method.slot.onload):
        print(memory.refusal(estimates[method.slot.onload == "model"]))


def _streams(estimate: Estimate) -> str:
    """What the column of the host is, and what files can take in its place."""
    if not estimate.stream_bytes:
        return "host: what the run needs"
    streams = f"Residual streams beside it, up to {size(estimate.stream_bytes)} ({estimate.stream_phase})"
    return f"host: what the run needs. {streams}: in memory as far as they fit, else in files"


def _work(estimate: Estimate, memory: Memory) -> str:
    """Operations, and the two parts that they have: on the calibration text, and in solves, whatever the text."""
    forwards = (estimate.flops - estimate.solve_flops) / memory.forward_flops
    text = f"work: as much as {forwards:.1f} forwards of the calibration text"
    if not estimate.solve_flops:
        return f"{text}, {estimate.flops:.2e} operations"
    part = estimate.solve_flops / estimate.flops
    return f"{text}, and solves: {estimate.flops:.2e} operations in all, {part:.0%} of them in solves"


def _fits(estimate: Estimate, memory: Memory) -> str:
    """Whether an estimate fits, and if not, where: ``tight`` within the error of an estimate."""
    shares = memory.shares(estimate.device_bytes or 0, estimate.host_need_bytes)
    for word, limit in {"no": 1.0, "tight": 1 / ERROR}.items():
        if places := [place for place, share in shares.items() if share > limit]:
            return f"{word} ({', '.join(places)})"
    return "yes"
