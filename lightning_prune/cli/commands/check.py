"""``lightning-prune check``: what a run would take, and whether it fits, without reading a weight."""

import json
import re
from typing import Any

from lightning_prune.cli.parser import with_method_help
from lightning_prune.methods.base import PruningMethod
from lightning_prune.preflight.estimate import Estimate, advice, largest_ratio
from lightning_prune.preflight.place import Preflight
from lightning_prune.runs.build import RunBuilder
from lightning_prune.support.errors import UserError

UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
UNITS |= {"TB": 10**12}


def main(argv: list[str]) -> int:
    """Print what every placement takes; 0 where the wished one (or any, for auto) fits, else 1."""
    words, own = _own_options(argv)
    cli = RunBuilder(with_method_help(words), command="check")
    method, trainer = cli.model, cli.trainer
    preflight = Preflight.of(trainer, method, cli.datamodule, own["memory"], own["host_memory"])
    found = [preflight.estimate("layer"), preflight.estimate("model")]
    if own["json"]:
        print(json.dumps([_facts(one, method) for one in found], indent=2))
    else:
        _print(found, preflight)
    wished = [one for one in found if method.onload in ("auto", one.shapes.onload)]
    return 0 if any(one.fits for one in wished) else 1


def _own_options(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """What ``fit`` does not have: --memory, --host-memory, --json."""
    own: dict[str, Any] = {"memory": None, "host_memory": None, "json": False}
    words, waiting = [], list(argv)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        if name == "--json":
            own["json"] = True
        elif name in ("--memory", "--host-memory"):
            if not equals and not waiting:
                raise UserError(f"{name}: a size must follow, such as 24GiB.")
            own[name[2:].replace("-", "_")] = _size(name, value if equals else waiting.pop(0))
        else:
            words.append(word)
    return words, own


def _size(option: str, text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if match is None or match[2].upper() not in UNITS or not float(match[1]) * UNITS[match[2].upper()] >= 1:
        raise UserError(f"{option}: found '{text}'; give a size such as 24GiB, 80GB or 512MiB.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _facts(one: Estimate, method: PruningMethod) -> dict[str, Any]:
    return {
        "method": method.method,
        "precision": str(method.trainer.precision),
        "onload": one.shapes.onload,
        "fits": one.fits,
        "phase": one.phase,
        "device_bytes": one.device if one.shapes.gpu else None,
        "host_bytes": one.host,
        "disk_bytes": one.disk,
        "mapped_bytes": one.mapped,
        "new_weights_bytes": one.new_weights,
        "checkpoint_bytes": one.checkpoint,
        "bytes_read": one.read,
        "widths": {
            "layers": len(method.layers),
            "gqa_groups": method.layers[0].num_kv_heads,
            "queries_per_kv_head": method.layers[0].queries_per_kv_head,
            "mlp_channels": method.layers[0].num_channels,
        },
        "largest_ratio": largest_ratio(method),
        "layer_evaluations": one.evaluations,
        "flops": one.flops,
    }


def _print(found: list[Estimate], preflight: Preflight) -> None:
    method, load, config, first = preflight.method, preflight.load, preflight.config, found[0]
    text = f"{load.samples} × {load.seq_len} tokens" if method.needs_calibration else "no calibration text"
    print(
        f"{method.label} on {method.dense_parameters / 1e9:.2f} B parameters ({config.num_hidden_layers} layers), "
        f"{method.trainer.precision}, {text}"
    )
    place = "the device" if first.shapes.gpu else "the host, where layers run"
    size = first.limits.host if first.limits.device is None else first.limits.device
    print(f"free: {_gb(size)} on {place}" + (f", {_gb(first.limits.host)} on the host" if first.shapes.gpu else ""))
    print(f"\n{'onload':<8}{'device':>10}{'host':>10}{'disk':>10}{'read':>10}  fits  largest in")
    for one in found:
        device = _gb(one.device) if one.shapes.gpu else "–"
        print(
            f"{one.shapes.onload:<8}{device:>10}{_gb(one.host):>10}{_gb(one.disk):>10}{_gb(one.read):>10}"
            f"  {'yes' if one.fits else 'no':<4}  {one.phase}"
        )
    print(f"\nwidths: {_widths(method)}, hidden size {config.hidden_size:,}, vocabulary {config.vocab_size:,}")
    print(f"layer evaluations of a batch: {first.evaluations:,}   operations: {first.flops:.2e}")
    print(f"largest reachable ratio: {largest_ratio(method):.3f}")
    for one, other in ((found[0], found[1]), (found[1], found[0])):
        if not one.fits and method.onload in ("auto", one.shapes.onload):
            print(f"{one.shortage} {advice(one, other, method, load)}")


def _widths(method: PruningMethod) -> str:
    """The units that a layer has to lose."""
    first = method.layers[0]
    return (
        f"{first.num_kv_heads:,} GQA groups of {first.queries_per_kv_head} query heads and {first.num_channels:,} MLP "
        "channels per layer"
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
