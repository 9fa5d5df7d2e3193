"""Runs that are killed, interrupted, gone on with and run beside one another, on a tiny random model.

    python benchmarks/kills.py                                  # everything, about ten minutes on one core
    python benchmarks/kills.py --kills 10 --resumes 6 --interrupts 0 --together 4
    python benchmarks/kills.py --every-operation wanda          # SIGKILL at every single file operation of one system

*kills*: SIGKILL at a random moment of ``fit`` or ``compare``, by the clock or at one of Python's operations on files.
No checkpoint may load and be wrong, the next run must work, no temporary file may stay. *resumes*: killed once to three
times, then ``fit --resume``: the bytes of an undisturbed run. *interrupts*: SIGINT or SIGTERM to any command; it ends
within seconds, and its message is true. *together*: that many ``fit``, ``test``, ``decide`` and ``compare --runs`` at
once below one root, each with something of its own that must not turn up in another's folder.
"""

import argparse
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_prune.runs.folder import RunFolder
from tests.killing import Ended, Forks, Kill

SYSTEMS: dict[str, list[str]] = {
    "magnitude": ["--config", "magnitude"],
    "wanda": ["--config", "wanda"],
    "shortgpt": ["--config", "shortgpt"],
    "slimgpt": ["--config", "slimgpt"],
    "hgsp_taylor": ["--config", "hgsp_taylor"],
    "hgsp_wanda": ["--config", "hgsp_wanda"],
    "wanda_2to4": ["--config", "wanda", "--model.structure", "2:4", "--model.label", "wanda_2to4"],
}
# Between attention and MLP, in the backward, in the prior's pass, while shards are written, read back and evaluated.
PLACES = [
    ("lightning_prune.calibration.loop:CalibrationLoop.finish", 24),
    ("lightning_prune.calibration.loop:CalibrationLoop.batch", 60),
    ("lightning_prune.calibration.backward:BackwardPass.batch", 24),
    ("lightning_prune.calibration.wavefront:RemovalPass.batch", 12),
    ("lightning_prune.calibration.results:Results.add", 24),
    ("lightning_prune.calibration.driver:CalibrationDriver._take_steps_without_batches", 1),
    ("lightning_prune.runs.folder:RunFolder.write_decision", 1),
    ("lightning_prune.checkpoint.write:_Shards.write", 30),
    ("lightning_prune.checkpoint.write:_check", 1),
    ("lightning_prune.evaluation.perplexity:Evaluation.test_step", 4),
    ("lightning_prune.evaluation.perplexity:Evaluation.on_test_epoch_end", 2),
    ("lightning_prune.runs.folder:RunFolder.append_to_card", 1),
    ("lightning_prune.runs.folder:RunFolder.write_results", 1),
    ("lightning_prune.runs.folder:RunFolder._finish", 1),
]
Bytes = dict[str, bytes]


class Bench:
    """A tiny model, token arrays, the bytes of every system's undisturbed run, and what was found wrong."""

    def __init__(self, folder: Path, seed: int, systems: list[str]) -> None:
        from tests.tiny import make_tiny, tiny_tokens

        self.folder, self.systems, self.random = folder, systems, random.Random(seed)
        make_tiny().save_pretrained(folder / "model")
        np.save(folder / "tokens.npy", tiny_tokens(10, 16).numpy())
        np.save(folder / "held_out.npy", tiny_tokens(6, 16, seed=3).numpy())
        self.forks = Forks()
        self.wrong: list[str] = []
        self.expected: dict[str, Bytes] = {}
        self.seconds: dict[str, float] = {}
        for system in dict.fromkeys([*systems, "magnitude", "wanda"]):  # those two are compared
            self.forks.run(self.fit(system, folder / "undisturbed"))  # the first run of a process is slower
            ended = self.forks.run(self.fit(system, folder / "undisturbed"))
            assert ended.status == 0, ended.printed
            self.seconds[system] = ended.seconds
            self.expected[system] = result_of(self.run_of(system) / "pruned")

    def run_of(self, system: str) -> Path:
        """The undisturbed run."""
        return self.folder / "undisturbed" / system / "version_0"

    def options(self, root: Path) -> list[str]:
        """Of ``fit``, below ``root``."""
        return [
            *("--model.pretrained", f"{self.folder}/model", "--data.dataset", f"{self.folder}/tokens.npy"),
            *("--data.eval_datasets", f"[{self.folder}/held_out.npy]", "--trainer.default_root_dir", str(root)),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        ]

    def fit(self, system: str, root: Path, *more: str) -> list[str]:
        """A command line."""
        onload = self.random.choice(["layer", "model"])
        return ["fit", *SYSTEMS[system], "--model.label", system, *self.options(root), "--model.onload", onload, *more]

    def compare(self, root: Path) -> list[str]:
        """A command line: two systems at two ratios."""
        return [
            *("compare", "--config", "compare", "--root", str(root), "--systems", "magnitude", "wanda", "--ratios"),
            *("0.2", "0.3", "--model", f"{self.folder}/model", "--data.dataset", f"{self.folder}/tokens.npy"),
            *("--data.eval_datasets", f"[{self.folder}/held_out.npy]", "--trainer.accelerator", "cpu"),
        ]

    def moment(self, system: str, root: Path, number: int = signal.SIGKILL) -> Kill:
        """By the clock, at a file operation, or at a named place."""
        kind = self.random.randrange(4)
        if kind == 0:
            return Kill(seconds=self.random.uniform(0.15, self.seconds[system]), signal=number)
        if kind == 1:
            return Kill(operation=self.random.randint(1, 190), below=str(root), signal=number)
        place, most = self.random.choice(PLACES)
        return Kill(call=place, number=self.random.randint(1, most), signal=number)

    def new_root(self, name: str) -> Path:
        """An empty place."""
        root = self.folder / name
        shutil.rmtree(root, ignore_errors=True)
        return root

    def check(self, holds: bool, what: str) -> None:
        """Note what does not hold."""
        if not holds:
            self.wrong.append(what)
            print(f"WRONG: {what}", flush=True)

    # What is done to it

    def kills(self, count: int) -> None:
        """See the module."""
        hit = 0
        commands = [*self.systems, "compare"]
        for trial in range(count):
            command = commands[trial % len(commands)]
            while not self.killed_once(command, f"kill {trial} {command}"):
                pass
            hit += 1
        print(f"kills: {hit}, {len(self.wrong)} wrong so far", flush=True)

    def killed_once(self, command: str, name: str, kill: Kill | None = None) -> bool:
        """Killed once, then run again; False where the run ended before the signal."""
        root = self.new_root("killed")
        if command == "compare":
            self.seconds.setdefault(command, self.forks.run(self.compare(root)).seconds)
            root = self.new_root("killed")
        argv = self.compare(root) if command == "compare" else self.fit(command, root)
        kill = kill or self.moment(command, root)
        ended = self.forks.run(argv, kill)
        name += f" {kill.call or kill.operation or kill.seconds} {kill.number}"
        if ended.status != -signal.SIGKILL:
            self.check(ended.status == 0, f"{name}: exit status {ended.status}\n{ended.printed}")
            return False
        self.check_checkpoints(root, name, command)
        began, was_finished = time.time(), len(list(root.glob("*/version_*/metrics.json")))
        again = self.forks.run(argv)
        self.check(again.status == 0, f"{name}: the next run ends with {again.status}\n{again.printed}")
        self.check_checkpoints(root, name, command)
        for path in root.rglob("*"):
            temporary = path.name.startswith(".") or path.suffix in (".tmp", ".partial")
            self.check(not temporary, f"{name}: {path} stays, {began - path.lstat().st_mtime:.1f} s older")
        finished = list(root.glob("*/version_*/metrics.json"))
        expected = 4 if command == "compare" else 1 + was_finished
        self.check(len(finished) == expected, f"{name}: finished {finished}")
        for one in finished:
            for left in (
                *one.parent.glob("layer_results"),
                *one.parent.glob("started.json"),
                *one.parent.glob("unfinished"),
            ):
                self.check(False, f"{name}: {left} in a finished run")
            _ = RunFolder.open(one.parent, "--run").scores
        return True

    def check_checkpoints(self, root: Path, name: str, command: str) -> None:
        """Whatever stands under its own name is what an undisturbed run writes."""
        for pruned in root.rglob("pruned"):
            if not any(part.startswith(".") for part in pruned.relative_to(root).parts):
                system = pruned.parent.parent.name
                found = result_of(pruned)
                if command == "compare" and RunFolder(pruned.parent).is_finished:
                    RunFolder.open(pruned.parent, "--run")
                    if found["plan.json"].find(b'"pruning_ratio": 0.2,') < 0:
                        continue
                if command != "compare" or RunFolder(pruned.parent).is_finished:
                    different = [
                        file for file in self.expected[system] if found.get(file) != self.expected[system][file]
                    ]
                    if command == "compare":  # other paths in the plan
                        different = [file for file in different if file.endswith(".safetensors")]
                    self.check(not different, f"{name}: {pruned} differs in {different}")

    def resumes(self, count: int) -> None:
        """See the module."""
        resumed = signals = 0
        for trial in range(count):
            system = self.systems[trial % len(self.systems)]
            root, name, more = self.new_root("resumed"), f"resume {trial} {system}", list[str]()
            was_finished = 0  # killed behind its last file: then there is nothing to go on with
            for _ in range(self.random.choice([1, 1, 2, 3])):
                kill = self.moment(system, root)
                name += f", {kill.call or kill.operation or kill.seconds} {kill.number}"
                ended = self.forks.run(self.fit(system, root, *more), kill)
                signals += ended.status == -signal.SIGKILL
                if ended.status == 0:
                    break
                was_finished = len(list((root / system).glob("version_*/metrics.json")))
                more = ["--resume"] if self.can_go_on(root / system) else []
                resumed += bool(more)
            else:
                ended = self.forks.run(self.fit(system, root, *more))
            self.check(ended.status == 0, f"{name}: exit status {ended.status}\n{ended.printed}")
            runs = [path.parent for path in (root / system).glob("version_*/metrics.json")]
            self.check(len(runs) == 1 + was_finished, f"{name}: {runs}")
            for run in runs:
                found = result_of(run / "pruned")
                different = [file for file in self.expected[system] if found.get(file) != self.expected[system][file]]
                self.check(not different, f"{name}: differs in {different}")
                left = [path for path in run.rglob("*") if path.name.startswith(".") or path.name in LEFT]
                self.check(not left, f"{name}: {left}")
        print(
            f"resumes: {count} ({signals} signals, {resumed} runs with --resume), {len(self.wrong)} wrong so far",
            flush=True,
        )

    def can_go_on(self, parent: Path) -> bool:
        """Whether the newest unfinished run says what it was made from."""
        runs = [path for path in parent.glob("*") if not RunFolder(path).is_finished]
        return any((path / "started.json").is_file() and (path / "unfinished").is_file() for path in runs)

    def interrupts(self, count: int) -> None:
        """See the module."""
        slowest, done = 0.0, 0
        commands = [*self.systems, "compare", "decide", "evaluate", "apply"]
        for trial in range(count):
            command, number = commands[trial % len(commands)], self.random.choice([signal.SIGINT, signal.SIGTERM])
            root = self.new_root("interrupted")
            argv = self.command(command, root)
            if command not in self.seconds:
                self.seconds[command] = self.forks.run(argv).seconds
                root = self.new_root("interrupted")
            # By the clock: a signal inside an operation of the garbage collector or a library is part of it.
            kill = Kill(seconds=self.random.uniform(0.05, self.seconds[command]), signal=number)
            if command in SYSTEMS and self.random.random() < 0.5:
                kill = self.moment(command, root, number)
            ended = self.forks.run(argv, kill)
            if ended.status == 0:
                continue
            done += 1
            slowest = max(slowest, ended.after_signal if kill.seconds else 0.0)
            name = f"interrupt {trial} {command} {kill.call or kill.operation or kill.seconds} {kill.number} {number}"
            self.check_message(ended, root, number, name)
            if "--resume" in ended.printed and command in SYSTEMS:
                again = self.forks.run(self.fit(command, root, "--resume"))
                self.check(again.status == 0, f"{name}: --resume ends with {again.status}\n{again.printed}")
                self.check_checkpoints(root, name, command)
        print(f"interrupts: {done}, slowest end {slowest:.1f} s, {len(self.wrong)} wrong so far", flush=True)

    def command(self, command: str, root: Path) -> list[str]:
        """A command line of any command."""
        run = self.run_of(self.systems[0])
        if command == "compare":
            return self.compare(root)
        if command == "decide":
            return [
                "decide",
                "--run",
                str(run),
                "--model.pruning_ratio",
                "0.3",
                "--trainer.default_root_dir",
                str(root),
            ]
        if command == "apply":
            return ["apply", "--plan", f"{run}/plan.json", "--model", f"{self.folder}/model", "--output", str(root)]
        if command == "evaluate":
            options = ["--efficiency", "--prompt-length", "64", "--output", str(root)]  # the model has 128 positions
            return ["evaluate", "--model", f"{run}/pruned", "--dense", f"{self.folder}/model", *options]
        return self.fit(command, root)

    def check_message(self, ended: Ended, root: Path, number: int, name: str) -> None:
        """Status, time, and whether what is said to stay is what stays."""
        last = ended.printed.strip().splitlines()[-1] if ended.printed.strip() else ""
        self.check(ended.status == 128 + number, f"{name}: exit status {ended.status}\n{ended.printed}")
        self.check(ended.after_signal < 8 or ended.seconds < 8, f"{name}: took {ended.after_signal:.1f} s")
        self.check("Traceback" not in ended.printed, f"{name}:\n{ended.printed}")
        self.check(last.startswith(f"interrupted by {signal.Signals(number).name}"), f"{name}: {last}")
        unfinished = [path for path in root.glob("*/version_*") if not RunFolder(path).is_finished]
        hidden = list(root.rglob(".*"))
        self.check(not hidden, f"{name}: {hidden}")
        if "nothing half-written" in last:
            self.check(not unfinished, f"{name}: {unfinished}")
        for path, state, held in re.findall(r"'([^']+)' stays and is (finished|not finished); it holds ([^;]+)", last):
            found = {entry.name for entry in Path(path).iterdir() if not entry.name.startswith(".")}
            self.check(set(held.split(", ")) - found <= {"unfinished", *LEFT}, f"{name}: {held} but {found}")
            self.check((state == "finished") == RunFolder(Path(path)).is_finished, f"{name}: {last}")
        self.check(len(unfinished) == last.count("not finished"), f"{name}: {last} but {unfinished}")

    def together(self, count: int) -> None:
        """See the module."""
        system = "wanda" if "wanda" in self.systems else self.systems[0]
        root = self.new_root("together")
        ratios = [round(0.1 + 0.015 * number, 3) for number in range(count)]
        self.all_end([self.fit(system, root, "--model.pruning_ratio", str(ratio)) for ratio in ratios], "fit")
        self.check_own(root / system, ratios, "fit")
        fitted = sorted((root / system).iterdir())

        decided = self.new_root("decided")
        decide = ["decide", "--run", str(self.run_of(system)), "--trainer.default_root_dir", str(decided)]
        self.all_end([[*decide, "--model.pruning_ratio", str(ratio)] for ratio in ratios], "decide")
        self.check_own(decided / system, ratios, "decide")

        tested = self.new_root("tested")
        argvs = []
        for number, run in enumerate(fitted):
            held_out = self.folder / f"held_out_{number}.npy"
            shutil.copy(self.folder / "held_out.npy", held_out)
            options = ["--data.eval_datasets", f"[{held_out}]", "--trainer.default_root_dir", str(tested)]
            argvs.append(["test", "--model.pretrained", f"{run}/pruned", "--trainer.accelerator", "cpu", *options])
        self.all_end(argvs, "test")
        pairs = set()
        for path in (tested / "test").iterdir():
            config, metrics = (yaml.safe_load((path / file).read_text()) for file in ("config.yaml", "metrics.json"))
            (name,) = metrics["perplexity"]
            self.check(config["data"]["eval_datasets"] == [str(self.folder / name)], f"test: {path} is mixed")
            self.check(config["model"]["pretrained"] == metrics["model"], f"test: {path} is mixed")
            pairs.add((name, metrics["model"]))
        self.check(len(pairs) == count == len(list((tested / "test").iterdir())), f"test: {len(pairs)} of {count}")

        compared = self.new_root("compared")
        self.all_end([["compare", "--runs", str(run), "--root", str(compared)] for run in fitted], "compare --runs")
        reports = list((compared / "comparison").iterdir())
        shares = set()
        for report in reports:
            names = {path.name for path in report.iterdir() if "tfevents" not in path.name}
            self.check(
                {"report.html", "report.md", "results.csv", "results.tex"} <= names, f"compare: {report}: {names}"
            )
            share = (report / "results.csv").read_text().splitlines()[1]
            shares.add(share)
        self.check(len(reports) == len(shares) == count, f"compare: {len(reports)} reports, {len(shares)} different")
        print(f"together: {count} of each, {len(self.wrong)} wrong so far", flush=True)

    def all_end(self, argvs: list[list[str]], name: str) -> None:
        """All at once, all with status 0."""
        for ended in self.forks.together(argvs):
            self.check(ended.status == 0, f"{name} together: exit status {ended.status}\n{ended.printed[-2000:]}")

    def check_own(self, parent: Path, ratios: list[float], name: str) -> None:
        """As many complete folders, and in each the same ratio everywhere."""
        found = []
        for path in parent.iterdir():
            run = RunFolder.open(path, "--run")
            _ = run.scores
            config = yaml.safe_load((path / "config.yaml").read_text())
            ratio = config["model"]["init_args"]["pruning_ratio"]
            found.append(ratio)
            same = ratio == run.plan.pruning_ratio == run.metrics.pruning_ratio.requested
            self.check(same, f"{name}: {path} is mixed: {ratio}, {run.plan.pruning_ratio}")
            counted = parameters_in(path / "pruned")
            self.check(counted == run.plan.parameters["pruned"], f"{name}: {path}: {counted} parameters")
            processes = {file.name.split(".")[5] for file in path.rglob("events*")}
            self.check(len(processes) == 1, f"{name}: {path}: events of {processes}")
            left = [entry for entry in path.rglob("*") if entry.name.startswith(".") or entry.name in LEFT]
            self.check(not left, f"{name}: {left}")
        self.check(sorted(found) == ratios, f"{name}: {sorted(found)} of {ratios}")


LEFT = ("layer_results", "started.json", "unfinished")


def result_of(pruned: Path) -> Bytes:
    """The files that say what a run has come to."""
    return dict(_files_of(pruned))


def _files_of(pruned: Path) -> Iterator[tuple[str, bytes]]:
    for file in (*pruned.glob("*.safetensors"), pruned / "config.json"):
        if file.is_file():
            yield f"pruned/{file.name}", file.read_bytes()
    for name in ("plan.json", "scores.csv"):
        if (pruned.parent / name).is_file():
            yield name, (pruned.parent / name).read_bytes()


def parameters_in(folder: Path) -> int:
    """Numbers in the safetensors file."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        sizes: list[Any] = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - not a dict
    return sum(int(np.prod(size)) for size in sizes)


def main() -> int:
    """Exit status 1 where something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, metavar="N")
    parser.add_argument("--resumes", type=int, default=40, metavar="N")
    parser.add_argument("--interrupts", type=int, default=60, metavar="N")
    parser.add_argument("--together", type=int, default=20, metavar="N")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--every-operation", choices=SYSTEMS, metavar="SYSTEM", help="this alone")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.seed, arguments.systems)
        if arguments.every_operation:
            operation = 1
            kill = Kill(operation=operation, below=str(bench.folder / "killed"))
            while bench.killed_once(arguments.every_operation, "every operation", kill):
                operation += 1
                kill = Kill(operation=operation, below=str(bench.folder / "killed"))
            print(f"killed at {operation - 1} operations, {len(bench.wrong)} wrong")
        else:
            bench.kills(arguments.kills)
            bench.resumes(arguments.resumes)
            bench.interrupts(arguments.interrupts)
            if arguments.together:
                bench.together(arguments.together)
        bench.forks.close()
    print(f"seed {arguments.seed}: {len(bench.wrong)} wrong")
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
