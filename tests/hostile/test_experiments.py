"""Experiments that are damaged or malicious, and places for reports that are not ours."""

import os
import shutil
from pathlib import Path

import pytest

from tests.hostile.harness import Bench, Case, Change, Says, making

HARMLESS = (
    "--model MODEL --data.dataset TOKENS --data.eval_datasets [TOKENS] --data.cache_dir INPUTS/cache "
    "--trainer.accelerator cpu --trainer.logger false"
)
GOOD = "systems: {a: wanda}\nratios: [0.3]\n"
CASES: dict[str, Case] = {}


def experiment(name: str, content: str | bytes | Change, says: Says = "", status: int = 2, line: str = "") -> None:
    """A case: ``compare.yaml`` of this content; ``line`` follows the harmless options."""
    make = making(content)
    arguments = f"--config INPUTS/compare.yaml --root ROOT {HARMLESS} {line}"
    CASES[name] = Case(
        arguments, status, says, lambda folder: make(folder / "compare.yaml"), command="compare", base=False
    )


def experiment_line(line: str, says: Says = "", status: int = 2) -> None:
    """A case: a good ``compare.yaml`` and a hostile command line."""
    experiment(line[:100], GOOD, says, status, line)


def system(value: str, says: Says = "", status: int = 2, beside: Change | None = None) -> None:
    """A case: one system called ``a``; ``beside`` makes what it names, ``x.yaml``."""

    def make(path: Path) -> None:
        path.write_text(f"ratios: [0.3]\nsystems: {{a: {value}}}\n")
        if beside is not None:
            beside(path.parent / "x.yaml")

    experiment(f"system {value}{'' if beside is None else f' {len(CASES)}'}"[:100], make, says, status)


# Names: they become folders.
for label in ("../evil", "..", "''", "/abs", "a/b", "'a b'", ".hidden", '"\\0"', "*a", "2020-01-01"):
    experiment(f"label {label}", f"ratios: [0.3]\nsystems: {{{label}: wanda}}\n")
experiment("label comparison", "ratios: [0.3]\nsystems: {comparison: wanda}\n", "comparison")
experiment("label twice", "systems: {a: wanda, a: shortgpt}\n", ("line 1", "'a' is given twice"))

# The file itself; what fit's configurations share with it is in test_options.py.
experiment("a pipe", os.mkfifo, ("--config", "named pipe"))
experiment("missing", lambda path: None, "--config")
experiment("empty", "", "is not a list of options")
experiment("two documents", "systems: {a: wanda}\n---\nsystems: {b: wanda}\n", "YAML")
experiment("unknown key", GOOD + "rations: [0.2]\n", "rations is not known")
experiment("no systems", "ratios: [0.3]\n", "systems is missing")
for value in ("[]", "{}", "null", "3"):
    experiment(f"systems {value}", f"systems: {value}\n", "systems is")
for value in ("0.3", "[x]", "[0]", "[1]", "[.nan]", "[.inf]", "[]", "true"):
    experiment(f"ratios {value}", f"systems: {{a: wanda}}\nratios: {value}\n", "ratios")
for key in ("data", "trainer"):
    experiment(f"{key} is a list", GOOD + f"{key}: [1]\n")
    experiment(f"{key} is a number", GOOD + f"{key}: 3\n", f"{key} is 3")
    experiment(f"{key} with an unknown option", GOOD + f"{key}: {{colour: red}}\n", "colour")

# Systems.
for value in ("3", "null", "[wanda]"):
    system(value, "systems.a")
system("nowhere", "no shipped configuration 'nowhere'")
system("{config: null}", "systems.a")
system("{config: wanda, colour: red}", "colour")
system("{config: wanda, trainer: {default_root_dir: /nowhere}}", status=0)
system("{config: wanda, trainer: {devices: 2}}", "one device")
system("{config: wanda, data: 3}", "data is 3")
system("{config: wanda, data: {seed: -1}}", ("system 'a'", "--data.seed"))
system("{config: wanda, model: {class_path: os.system}}", "system 'a'")
system("{config: wanda, model: {init_args: {colour: red}}}", "colour")
system("x.yaml", beside=os.mkfifo, says=("systems.a", "named pipe"))
system("x.yaml", beside=lambda path: path.symlink_to(path), says="systems.a")
system("x.yaml", beside=making(b"\xff\xfe"), says="not UTF-8")
system("x.yaml", beside=making("systems: {a: x.yaml}\n"), says="model is missing")  # an experiment in an experiment

# The command line.
for words in ("0", "nan", "x", "''", "1e400"):
    experiment_line(f"--ratios {words}")
experiment_line("--systems ../a", "no system '../a'")
experiment_line("--data.seed", "needs a value")
experiment_line("--data.=3")
experiment_line("--data.seed.x=3")
experiment_line("--data.seed=2020-01-01")
experiment_line("--trainer.devices=2", "one device")
experiment_line("--trainer.precision=8", "--trainer.precision")
experiment_line("--model.round_to 8", "--model.round_to")
experiment_line("--model /nowhere", "--model.pretrained")
experiment_line("--runs INPUTS", "either --config")
experiment_line("--overwrite", "--overwrite belongs to --output")

PLACES: dict[str, tuple[str, Change, Says, int]] = {}  # arguments, preparation, says, status


def place(name: str, arguments: str, make: Change, says: Says = "", status: int = 2) -> None:
    """A case of ``compare --runs``; ``make`` gets ``INPUTS``, which holds a finished ``run`` and a ``report``."""
    PLACES[name] = (arguments, make, says, status)


def nothing(folder: Path) -> None:
    """What there is will do."""


OUT = "--output INPUTS/out"
for extra in ("", " --overwrite"):
    place(f"output is a pipe{extra}", OUT + extra, lambda folder: os.mkfifo(folder / "out"), "--output")
    place(f"output is a link{extra}", OUT + extra, lambda folder: (folder / "out").symlink_to("report"), "--output")
    place(f"output is a run{extra}", "--output INPUTS/run" + extra, nothing, "--output")
    place(f"output holds more{extra}", "--output INPUTS/report" + extra, lambda f: (f / "report/x").touch(), "holds x")
    place(f"output below a file{extra}", "--output INPUTS/f/out" + extra, lambda f: (f / "f").touch(), "--output")
place("output is a report", "--output INPUTS/report", nothing, "or --overwrite")
place("output is the root of all", "--output / --overwrite", nothing, "is not a report")
place("output is a report to overwrite", "--output INPUTS/report --overwrite", nothing, status=0)
place("output is an empty folder", OUT, lambda folder: (folder / "out").mkdir(), status=0)
place("root is below a file", "--root INPUTS/f/x", lambda folder: (folder / "f").touch(), "--root")
place("root links to itself", "--root INPUTS/l", lambda folder: (folder / "l").symlink_to("l"), "--root")
place("root is in the kernel", "--root /proc/x", nothing, "--root")
place("run is missing", "--runs INPUTS/x", nothing, "no folder at")
place("run is a pipe", "--runs INPUTS/f", lambda folder: os.mkfifo(folder / "f"), "no folder at")
place("run is unfinished", "--runs INPUTS/run", lambda folder: (folder / "run/metrics.json").unlink(), "finished")
place("run twice by another path", "--runs INPUTS/run INPUTS/report/../run", nothing, "twice")
place("run beside a foreign folder", "--runs INPUTS/run INPUTS/report INPUTS", nothing, status=0)
for option in ("--model x", "--ratios 0.2", "--systems a", "--data.seed 1"):
    place(f"runs and {option}", option, nothing, "has no meaning with --runs")


@pytest.mark.parametrize("name", CASES)
def test_experiment(name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench.inputs)
    bench.check(CASES[name])
    assert not {path.name for path in bench.inputs.iterdir()} - {"compare.yaml", "x.yaml", "cache"}
    assert not {path.name for path in bench.folder.iterdir()} - {"inputs", "root", "cache"}


@pytest.mark.parametrize("name", PLACES)
def test_place(name: str, bench: Bench, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, make, says, status = PLACES[name]
    for part in ("run", "report"):
        shutil.copytree(finished / part, bench.inputs / part)
    make(bench.inputs)
    monkeypatch.chdir(bench.inputs)
    before = sorted(bench.inputs.rglob("*"))
    runs = "" if "--runs" in arguments else "--runs INPUTS/run"
    root = "" if "--root" in arguments else "--root ROOT"
    bench.check(Case(f"{runs} {root} {arguments}", status, says, command="compare", base=False))
    if status == 2:
        assert sorted(bench.inputs.rglob("*")) == before
