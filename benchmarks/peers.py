"""Against the authors' own code: the same tokens, the same size, one evaluation, in one alternating run.

    git clone https://github.com/locuslab/wanda path/to/wanda          # and so on, see PEERS below
    python benchmarks/peers.py --model path/to/llama --text path/to/wikitext2 path/to/ptb --root /tmp/peers \\
        --peer wanda=path/to/wanda flap=path/to/FLAP --ratio 0.2

Every system runs in a process of its own, theirs and ours in turn (``--rounds``). Both get the calibration tokens of
``lightning-prune``, drawn from ``validation.txt`` of the first ``--text``; ours prunes to the size that theirs reached.

Printed are the share of parameters removed; perplexity on ``test.txt`` of every ``--text``, by
``lightning_prune.evaluate``; in brackets KL(dense ‖ pruned) in nats per token on the first windows; seconds of
processor time from opening the dense model to the pruned one (ours: in a checkpoint that was read back); peak memory of
the process; and how far the two removed the same. What is in ``--root`` is not run again, so a run that was
stopped goes on. Llama checkpoints only, on the CPU in fp32.

What had to be adapted to run each of them is in ``peer_code.py``, beside this file.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import peer_code
from peer_code import Job, Outcome, Removed, no_units


@dataclass(frozen=True)
class Peer:
    """Whose code, which function runs it, and which of our configurations does the same (None: none does)."""

    checkout: str
    run: str
    ours: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    ratio: float | None = None  # where it is not --ratio


UNIFORM = {"temperature": 0.0, "allocation": "uniform", "freeze_first_n_layers": 3, "freeze_last_n_layers": 1}
PEERS = {
    "wanda 2:4": Peer("wanda", "wanda", "wanda", {"structure": "2:4"}, 0.5),
    "wanda 50 %": Peer("wanda", "wanda", "wanda", {"structure": "unstructured"}, 0.5),
    "flap": Peer("flap", "flap", "flap"),
    "llm-pruner": Peer("llm-pruner", "llm_pruner", "hgsp_taylor", UNIFORM),
    "torch-pruning": Peer("torch-pruning", "torch_pruning"),
    "slicegpt": Peer("slicegpt", "slicegpt"),
    "shortgpt": Peer("shortgpt", "shortgpt", "shortgpt"),
    "slimgpt": Peer("slimgpt", "slimgpt", "slimgpt"),
}
WHERE = {
    "wanda": "github.com/locuslab/wanda",
    "flap": "github.com/CASIA-IVA-Lab/FLAP",
    "llm-pruner": "github.com/horseee/LLM-Pruner",
    "torch-pruning": "github.com/VainF/Torch-Pruning",
    "slicegpt": "github.com/microsoft/TransformerCompression",
    "shortgpt": "github.com/icip-cas/ShortGPT",
    "slimgpt": "the folder slimgpt_pub of github.com/aden9460/EdgeVAR, a copy of the authors' release",
}


def agreement(ours: Removed, theirs: Removed) -> tuple[float, int, int]:
    """(share of what either removed that both removed, what one of them removed, all there is); 1.0 where none did."""
    both = sum(int((ours[name] & theirs[name]).sum()) for name in theirs)
    one = sum(int((ours[name] ^ theirs[name]).sum()) for name in theirs)
    return both / (both + one) if both + one else 1.0, one, sum(flags.size for flags in theirs.values())


def distance(dense: Any, pruned: Any, windows: Any, size: int = 4) -> tuple[float, float]:
    """(perplexity of ``pruned``, mean KL(dense ‖ pruned) in nats) over the predicted tokens of ``windows`` ``[N, L]``.

    Both give logits ``[B, L, V]`` as causal LMs of transformers do. KL is NaN where ``dense`` is None.
    """
    import torch

    loss = divergence = 0.0
    with torch.no_grad():
        for batch in windows.split(size):
            guess = pruned(input_ids=batch).logits[:, :-1].float().log_softmax(-1)
            loss -= float(guess.gather(-1, batch[:, 1:, None]).double().sum())
            if dense is not None:
                truth = dense(input_ids=batch).logits[:, :-1].float().log_softmax(-1)
                divergence += float((truth.exp() * (truth - guess)).sum(-1).double().sum())
    tokens = windows[:, 1:].numel()
    return float(np.exp(loss / tokens)), divergence / tokens if dense is not None else float("nan")


def prepare(job: Job) -> Outcome:
    """Calibration tokens and evaluation windows as files; the outcome is the dense model."""
    import lightning_prune as lp
    from lightning_prune.data.sampling import aligned_windows
    from lightning_prune.data.streams import StreamReader, default_cache_dir

    work, texts = Path(job.work), [Path(text) for text in job.texts]
    (work / "sets").mkdir(parents=True, exist_ok=True)
    np.save(work / "calibration.npy", lp.calibration_set(texts[0] / "validation.txt", job.model, **job.options).numpy())
    for text in texts:
        stream, _ = StreamReader(job.model, default_cache_dir()).read(str(text / "test.txt"), "all")
        np.save(work / "sets" / f"{text.name}.npy", aligned_windows(stream[: job.eval_tokens], 128).numpy())
    return Outcome(job.dense(), {}, 0.0)


def ours(job: Job) -> Outcome:
    """One of our configurations, as ``lightning_prune.prune`` runs it: calibrated, cut, written, read back."""
    import lightning_prune as lp
    from lightning_prune.models.vocabulary import Block

    job.start()
    how: dict[str, Any] = {"verbose": False, "precision": "32-true", "accelerator": "cpu"}
    pruned = lp.prune(job.model, job.method, job.ratio, job.tokens, **how, **job.options)
    job.stop()
    dense = job.dense()
    if "structure" in job.options:
        after = pruned.model.state_dict()
        weights = {name: weight for name, weight in dense.state_dict().items() if "_proj" in name}
        removed = {name: ((after[name] == 0) & (weight != 0)).numpy() for name, weight in weights.items()}
    else:
        removed = no_units(dense.config)
        for plan in pruned.plan.layers:
            for block, name in ((Block.ATTENTION, "attention"), (Block.MLP, "mlp")):
                flags = removed[f"{plan.layer}.{name}"]
                flags[:] = True
                flags[plan.kept[block]] = False
    return Outcome(pruned, removed, pruned.plan.achieved_ratio)


def work(job: Job) -> None:
    """Do a job and leave ``result.json`` and what was removed in its folder."""
    job.start()
    outcome = (globals().get(job.run) or getattr(peer_code, job.run))(job)
    if not job.cost[0]:
        job.stop()
    out = Path(job.out)
    np.savez(out / "removed.npz", **outcome.removed)
    result: dict[str, Any] = {"achieved": outcome.achieved, "seconds": job.cost[0], "mib": job.cost[1]}
    if job.measure:
        import torch

        import lightning_prune as lp

        quality, windows = {}, {path.stem: torch.from_numpy(np.load(path)) for path in job.sets}
        if outcome.stock:
            how: dict[str, Any] = {"verbose": False, "accelerator": "cpu"}
            quality = {Path(name).stem: value for name, value in lp.evaluate(outcome.model, job.sets, **how).items()}
        model = outcome.model
        if job.run == "ours":  # fp32 as theirs, whatever the checkpoint stores
            model = lp.load(model.folder / "pruned", torch.float32)
        quality = quality or {name: distance(None, model, rows)[0] for name, rows in windows.items()}
        dense = job.dense().eval()
        far = {name: distance(dense, model, rows[: job.kl_windows])[1] for name, rows in windows.items()}
        result |= {"perplexity": quality, "kl": far}
    (out / "result.json").write_text(json.dumps(result))


def run(job: Job) -> dict[str, Any] | None:
    """The result of a job in a process of its own, at once where it is there already; None where it failed."""
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "result.json").is_file():
        with (out / "log.txt").open("w") as log:
            done = subprocess.run(
                [sys.executable, __file__, "--job", json.dumps(asdict(job))], stdout=log, stderr=subprocess.STDOUT
            )
        if done.returncode:
            lines = (out / "log.txt").read_text().strip().splitlines() or ["it said nothing"]
            print(f"{out.name} failed: {lines[-1]} (see {out / 'log.txt'})", flush=True)
            return None
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def line(name: str, results: list[dict[str, Any]]) -> str:
    """One system: share removed, perplexities, KLs, seconds of all rounds, MiB."""
    first = results[0]
    quality = "  ".join(f"{text} {value:9.2f} ({first['kl'][text]:.4f})" for text, value in first["perplexity"].items())
    seconds = " ".join(f"{one['seconds']:.1f}" for one in results)
    return f"{name:<28} {first['achieved']:.4f}  {quality}  {seconds} s  {max(one['mib'] for one in results):.0f} MiB"


def against(name: str, peer: Peer, base: Job, arguments: argparse.Namespace) -> bool:
    """Run a peer and ours in turn, print their lines and how far they agree; False where one failed."""
    root, label = Path(arguments.root), name.replace(" ", "_").replace(":", "-")
    results: dict[str, list[dict[str, Any]]] = {"theirs": [], "ours": []}
    common = {**asdict(base), "options": peer.options, "ratio": peer.ratio or arguments.ratio}
    theirs = Job(**{**common, "run": peer.run, "checkout": arguments.peer[peer.checkout]})
    mine = Job(**{**common, "run": "ours", "method": peer.ours or ""})
    if name == "slimgpt":  # its solver takes the counts of ours
        theirs.guide = str(root / f"{label}_ours_0" / "removed.npz")
    for number in range(arguments.rounds):
        order = ["theirs", "ours"] if peer.ours else ["theirs"]
        for who in reversed(order) if theirs.guide else order:
            job = theirs if who == "theirs" else mine
            job.out, job.measure = str(root / f"{label}_{who}_{number}"), number == 0
            if who == "ours" and not peer.ratio and results["theirs"]:
                job.ratio = results["theirs"][0]["achieved"]
            result = run(job)
            if result is None:
                return False
            results[who].append(result)
    print(line(name, results["theirs"]))
    if results["ours"]:
        print(line(f"  ours: {peer.ours}", results["ours"]))
        found = [dict(np.load(root / f"{label}_{who}_0" / "removed.npz")) for who in ("ours", "theirs")]
        share, one, of = agreement(*found)
        print(f"  removed by both: {share:.4f} of what either removed; {one} of {of} differ")
    for method in arguments.against if not peer.ratio else []:
        out = str(root / f"{label}_{method}")
        job = Job(**{**common, "run": "ours", "method": method, "options": {}, "out": out, "measure": True})
        job.ratio = results["theirs"][0]["achieved"]
        if (result := run(job)) is None:
            return False
        print(line(f"  ours: {method}", [result]))
    sys.stdout.flush()
    return True


def main() -> int:
    """Run what was asked for and print it."""
    if sys.argv[1:2] == ["--job"]:
        work(Job(**json.loads(sys.argv[2])))
        return 0
    arguments = _arguments()
    root = Path(arguments.root)
    base = Job("prepare", str(root / "dense"), arguments.model, str(root), eval_tokens=arguments.eval_tokens)
    base.texts, base.options = arguments.text, {"seed": arguments.seed}
    base.kl_windows = arguments.kl_windows
    if (dense := run(base)) is None:
        return 1
    print("system, share removed, perplexity (KL) on every text, seconds of every round, peak memory")
    print(line("dense", [dense]), flush=True)
    chosen = {name: peer for name, peer in PEERS.items() if peer.checkout in arguments.peer}
    done = [against(name, peer, base, arguments) for name, peer in chosen.items()]
    return 0 if all(done) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="peers:\n" + "\n".join(f"  {name:<14} {where}" for name, where in WHERE.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder of a Llama checkpoint")
    parser.add_argument("--text", required=True, nargs="+", help="folders with validation.txt and test.txt")
    parser.add_argument("--root", required=True, help="where results go; what is there is not run again")
    parser.add_argument("--peer", required=True, nargs="+", metavar="NAME=PATH", help="checkouts")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of all parameters to remove (default: 0.2)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each, in turn (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of calibration samples (default: 0)")
    parser.add_argument(
        "--against", nargs="*", default=[], metavar="NAME", help="more of our configurations at that size"
    )
    parser.add_argument("--eval_tokens", type=int, default=16384, help="of every test text (default: 16384)")
    parser.add_argument("--kl_windows", type=int, default=16, help="of 128 tokens, for KL (default: 16)")
    arguments = parser.parse_args()
    arguments.peer = dict(one.partition("=")[::2] for one in arguments.peer)
    for name, path in arguments.peer.items():
        if name not in WHERE:
            parser.error(f"--peer: '{name}' is not known. Choose from {', '.join(WHERE)}.")
        if not Path(path).is_dir():
            parser.error(f"--peer {name}: no folder at '{path}'. Give a checkout of {WHERE[name]}.")
    for text in arguments.text:
        for part in ("validation.txt", "test.txt"):
            if not (Path(text) / part).is_file():
                parser.error(f"--text: no file at '{Path(text) / part}'.")
    if arguments.rounds < 1:
        parser.error(f"--rounds: found {arguments.rounds}; it must be 1 or more.")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
