"""``lightning-prune check``: what a run would take, and whether it fits, without reading a weight."""

import argparse
import json
import re
from dataclasses import asdict

from lightning_prune.cli.lightning_cli import PruneCLI
from lightning_prune.cli.parser import PlainParser
from lightning_prune.methods.base import PruningMethod
from lightning_prune.runs.memory_estimate import Estimate, Memory


def main(argv: list[str]) -> int:
    """Print what every placement takes; 0 where the wished one (or any, for auto) fits, else 1."""
    parser = PlainParser(prog="lightning-prune check", add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", type=_size)
    parser.add_argument("--host-memory", type=_size)
    own, words = parser.parse_known_args(argv)
    cli = PruneCLI(words, PruningMethod, subclasses=True, command="check")
    method, memory = cli.model, Memory.of(cli.trainer, cli.model, cli.datamodule, own.memory, own.host_memory)
    found = [memory.estimate("layer"), memory.estimate("model")]
    if own.json:
        facts = {"method": method.method, "precision": str(cli.trainer.precision)}
        print(json.dumps([facts | asdict(e) | {"fits": e.share <= 1, "disk_bytes": e.disk} for e in found], indent=2))
    else:
        _print(found, memory)
    return 0 if any(one.share <= 1 for one in found if method.slot.onload in ("auto", one.onload)) else 1


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:([KMGT])(I?))?B?", text.upper())
    size = 0.0
    if match is not None:
        size = float(match[1]) * (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2]) if match[2] else 0)
    if size < 1:
        raise argparse.ArgumentTypeError(f"found '{text}'; give a size such as 24GiB, 80GB or 512MiB")
    return int(size)


def _print(found: list[Estimate], memory: Memory) -> None:
    method = memory.method
    text = f"{memory.samples} × {memory.seq_len} tokens" if method.needs_calibration else "no calibration text"
    parameters = f"{method.dense_parameters / 1e9:.2f} B parameters ({len(method.layers)} layers)"
    print(f"{method.label} on {parameters}, {method.trainer.precision}, {text}")
    host = f"{_gb(memory.host)} on the host"
    print(f"free: {host}" if memory.device is None else f"free: {_gb(memory.device)} on the device, {host}")
    print(f"\n{'onload':<8}{'device':>10}{'host':>10}{'disk':>10}{'read':>10}  fits  largest in")
    for one in found:
        device = "–" if one.device_bytes is None else _gb(one.device_bytes)
        sizes = "".join(f"{size:>10}" for size in (device, *map(_gb, (one.host_bytes, one.disk, one.bytes_read))))
        print(f"{one.onload:<8}{sizes}  {'yes' if one.share <= 1 else 'no':<4}  {one.phase}")
    print(
        f"\nwork: {found[0].layer_evaluations:,} forwards of a batch through a layer, {found[0].flops:.2e} operations"
    )
    for one in found:
        if one.share > 1 and method.slot.onload in ("auto", one.onload):
            print(memory.refusal(one))


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
