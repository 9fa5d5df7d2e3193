"""Experiments that are damaged or malicious, and places for reports that are not ours."""

import os
from pathlib import Path

from lightning_prune.comparison.report import NAMES
from tests.hostile.harness import Bench, Case, Change, Says, broken, cases, making

HARMLESS = (
    "--model MODEL --data.dataset TOKENS --data.eval_datasets [TOKENS] --data.cache_dir INPUTS/../cache "
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


def place(line: str, says: Says, make: Change = lambda inputs: None, status: int = 2) -> None:
    """A case of ``compare --runs``; ``make`` gets ``INPUTS``, which holds a finished ``run`` and a ``report``."""
    runs, root = "" if "--runs" in line else "--runs INPUTS/run", "" if "--root" in line else "--root ROOT"
    name = f"place {len(CASES)}: {line}"[:100]
    arguments, writes = f"{runs} {root} {line}", status == 0
    CASES[name] = Case(arguments, status, says, make, "compare", base=False, needs="run report", writes=writes)


def holding(*names: str) -> Change:
    """What makes ``out`` a folder with these files."""

    def make(inputs: Path) -> None:
        (inputs / "out").mkdir()
        for name in names:
            (inputs / "out" / name).write_text("mine")

    return make


for extra in ("", " --overwrite"):
    for make in (os.mkfifo, lambda out: out.symlink_to("report"), lambda out: out.write_text("thesis")):
        place(f"--output out{extra}", "exists and is not a folder", lambda inputs, make=make: make(inputs / "out"))
    for names in (["notes.txt"], ["report.html"], [*NAMES, "notes.txt"]):
        place(f"--output out{extra}", "exists and is not a report of this command", holding(*names))
    place(f"--output run{extra}", "exists and is not a report of this command")
    place(f"--output report{extra}", "it holds x", lambda inputs: (inputs / "report/x").touch())
    for path in ("f/out", "l/out", "x" * 300, "/proc/x"):
        place(f"--output {path}{extra}", "--output: ", broken)
place("--output report", "holds a report. Give a new folder, or --overwrite")
place("--output / --overwrite", "is not a report")
place("--output report --overwrite", "", status=0)
place("--output out", "", holding(), status=0)
for path in ("f/x", "l", "/proc/x"):
    place(f"--root {path}", "--root", broken)
place("--runs x", "no folder at")
place("--runs f", "no folder at", lambda inputs: os.mkfifo(inputs / "f"))
place("--runs run", "none of these folders is a finished", lambda inputs: (inputs / "run/metrics.json").unlink())
place("--runs run report/../run", "twice")
place("--runs run report .", "", status=0)
for option in ("--model x", "--ratios 0.2", "--seeds 0 1", "--systems a", "--data.seed 1"):
    place(option, f"{option.split()[0]} has no meaning with --runs".replace("--model", "--pretrained"))


@cases(CASES)
def test_experiment(case: Case, bench: Bench) -> None:
    bench.check(case)
    assert not {path.name for path in bench.folder.iterdir()} - {"inputs", "root", "cache"}
