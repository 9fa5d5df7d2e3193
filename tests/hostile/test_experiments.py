"""Experiments that are damaged or malicious, and places for reports that are not ours."""

import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from lightning_prune.cli import main
from tests.hostile.harness import Bench, Case

Change = Callable[[Path], object]
HARMLESS = (
    "--pretrained MODEL --data.dataset TOKENS --data.eval_datasets [TOKENS] --data.cache_dir INPUTS/cache "
    "--trainer.accelerator cpu --trainer.logger false"
)
WANDA = "model: {class_path: lightning_prune.methods.Wanda}\n"
GOOD = "systems: {a: wanda}\nratios: [0.3]\n"
REPORT = ("report.html", "report.md", "results.csv", "results.tex", "calibration_appendix.md")
CASES: dict[str, Case] = {}


def experiment(
    name: str, content: str | bytes | Change, says: str | tuple[str, ...] = "", status: int = 2, line: str = ""
) -> None:
    """A case: ``compare.yaml`` of this content; ``line`` follows the harmless options."""

    def make(folder: Path) -> None:
        path = folder / "compare.yaml"
        if callable(content):
            content(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    arguments = f"--config INPUTS/compare.yaml --root ROOT {HARMLESS} {line}"
    CASES[name] = Case(arguments, status, says, make, command="compare", base=False)


def experiment_line(line: str, says: str | tuple[str, ...] = "", status: int = 2) -> None:
    """A case: a good ``compare.yaml`` and a hostile command line."""
    experiment(line[:100], GOOD, says, status, line)


def system(value: str, says: str | tuple[str, ...] = "", status: int = 2, beside: Change | None = None) -> None:
    """A case: one system called ``a``; ``beside`` makes what it names, ``x.yaml``."""

    def make(path: Path) -> None:
        path.write_text(f"ratios: [0.3]\nsystems: {{a: {value}}}\n")
        if beside is not None:
            beside(path.parent / "x.yaml")

    experiment(f"system {value}{'' if beside is None else f' {len(CASES)}'}"[:100], make, says, status)


def text(content: str | bytes) -> Change:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


# Names: they become folders.
LABELS = (
    "../evil",
    "..",
    ".",
    "''",
    "/abs",
    "a/b",
    "'a b'",
    ".hidden",
    "système",
    '"a\\nb"',
    '"\\0"',
    "'a\\b'",
    "3",
    "null",
)
for label in (*LABELS, "true", "2020-01-01", "1.5", "~", "*a", "'${HOME}'", '"\\u202e"'):
    experiment(f"label {label}", f"ratios: [0.3]\nsystems: {{{label}: wanda}}\n")
experiment("label of 300 characters", f"ratios: [0.3]\nsystems: {{{'a' * 300}: wanda}}\n", "name")
experiment("label comparison", "ratios: [0.3]\nsystems: {comparison: wanda}\n", "comparison")
experiment("label twice", "systems: {a: wanda, a: shortgpt}\n", ("line 1", "'a' is given twice"))
experiment(
    "label of the system's own",
    "ratios: [0.3]\nsystems: {a: {config: wanda, model: {init_args: {label: ../b}}}}\n",
    status=0,
)

# The file itself.
experiment("a pipe", os.mkfifo, ("--config", "named pipe"))
experiment("a device", lambda path: path.symlink_to("/dev/zero"), "device")
experiment("a folder", Path.mkdir, "--config")
experiment("missing", lambda path: None, "--config")
experiment("links to itself", lambda path: path.symlink_to(path), "--config")
experiment("huge", lambda path: (path.touch(), os.truncate(path, 10**11)), "at most 10000000")
experiment("empty", "", "holds no options")
experiment("a list", "[1]", "holds no options")
experiment("a text", "x", "holds no options")
experiment("not UTF-8", b"systems: {a: donn\xe9es}\n", ("line 1", "not UTF-8"))
experiment("half", "systems: {a: ", "not YAML")
experiment("a tab", "systems:\n\ta: wanda\n", "not YAML")
experiment("deep", "[" * 20_000, "nested too deeply")
experiment("Python objects", "systems: !!python/object/apply:os.system ['touch pwned']\n", "not YAML")
experiment("a reference to itself", "systems: &x {a: *x}\n", "through its references")
experiment("two documents", "systems: {a: wanda}\n---\nsystems: {b: wanda}\n", "not YAML")
experiment(
    "a billion laughs",
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{y}: &{y} [{', '.join(['*' + x] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)),
    "through its references",
)
experiment("unknown key", GOOD + "rations: [0.2]\n", "the key 'rations'")
experiment("key that is a number", GOOD + "3: 4\n", "the key '3'")
experiment("key that is null", GOOD + "null: 4\n", "the key")
experiment("no systems", "ratios: [0.3]\n", "lists no systems")
for value in ("[]", "{}", "null", "3", "wanda", "[wanda]"):
    experiment(f"systems {value}", f"systems: {value}\n", "lists no systems")
for value in ("0.3", "x", "[x]", "[null]", "[0]", "[1]", "[-1]", "[.nan]", "[.inf]", "[]", "{a: 1}", "[[0.3]]", "true"):
    experiment(f"ratios {value}", f"systems: {{a: wanda}}\nratios: {value}\n", "--ratios: found")
for key in ("data", "trainer"):
    for value in ("[1]", "3", "x"):
        experiment(f"{key} {value}", GOOD + f"{key}: {value}\n")
    experiment(f"{key} with an unknown option", GOOD + f"{key}: {{colour: red}}\n", "colour")
    experiment(f"{key} with a key that is a number", GOOD + f"{key}: {{3: red}}\n")
for value in ("[1]", "{a: 1}", "3", "true", '"a\\0b"', '"\\ud800"'):
    experiment(f"pretrained {value}", lambda path, value=value: path.write_text(GOOD + f"pretrained: {value}\n"))
    CASES[f"pretrained {value}"] = Case(
        CASES[f"pretrained {value}"].arguments.replace("--pretrained MODEL", ""),  # type: ignore[union-attr]
        prepare=CASES[f"pretrained {value}"].prepare,
        command="compare",
        base=False,
    )
    experiment(f"root {value}", lambda path, value=value: path.write_text(GOOD + f"root: {value}\n"))
    CASES[f"root {value}"] = Case(
        CASES[f"root {value}"].arguments.replace("--root ROOT", ""),  # type: ignore[union-attr]
        prepare=CASES[f"root {value}"].prepare,
        command="compare",
        base=False,
    )

# Systems.
for value in ("3", "null", "[wanda]", "true", "1.5"):
    system(value, "system 'a' is")
system("nowhere", "no shipped configuration 'nowhere'")
system("../nowhere.yaml", "systems.a")
system("/etc/passwd", "systems.a")
system("''", "systems.a")
system("{}", "no model.class_path")
system("{config: null}", "systems.a")
system("{config: [wanda]}", "systems.a")
system("{config: wanda, colour: red}", "colour")
system("{config: wanda, trainer: {default_root_dir: /nowhere}}", status=0)
system("{config: wanda, trainer: {devices: 2}}", "one device")
system("{config: wanda, trainer: [1]}")
system("{config: wanda, data: 3}")
system("{config: wanda, data: {seed: -1}}", ("system 'a'", "--data.seed"))
system("{config: wanda, model: {class_path: os.system}}", "system 'a'")
system("{config: wanda, model: {class_path: [x]}}", "system 'a'")
system("{config: wanda, model: 3}", "model is 3")
system("{config: wanda, model: {init_args: [1]}}")
system("{config: wanda, model: {init_args: {colour: red}}}", "colour")
system("{config: wanda, model: {init_args: {pretrained: /nowhere}}}", status=0)  # the experiment's model wins
system("x.yaml", beside=os.mkfifo, says=("systems.a", "named pipe"))
system("x.yaml", beside=Path.mkdir, says="systems.a")
system("x.yaml", beside=lambda path: path.symlink_to("/dev/zero"), says="device")
system("x.yaml", beside=lambda path: path.symlink_to(path), says="systems.a")
system("x.yaml", beside=text("a: " + "a" * 5000), says="characters")
system("x.yaml", beside=text(b"\xff\xfe"), says="not UTF-8")
system("x.yaml", beside=text("systems: {a: x.yaml}\n"), says="no model.class_path")  # an experiment in an experiment
system("{config: x.yaml}", beside=text("config: x.yaml\n" + WANDA), says="loop")  # names itself
system("x.yaml", beside=text("model: &m {class_path: *m}\n"), says="through its references")

# The command line.
for words in ("0", "1", "-1", "nan", "x", "''", "0.3 x", "1e400"):
    experiment_line(f"--ratios {words}")
experiment_line("--ratios")
experiment_line("--systems b", "no system 'b'")
experiment_line("--systems ../a", "no system '../a'")
experiment_line("--systems ''", "no system ''")
experiment_line("--systems")
experiment_line("--resume", "--resume")
experiment_line("--conf x", "--conf")
experiment_line("--data.seed", "needs a value")
experiment_line("--data.=3")
experiment_line("--data.a.b=3")
experiment_line("--data.seed.x=3")
experiment_line("--data.seed={")
experiment_line("--data.seed=*x")
experiment_line("--data.seed=!!python/object:os.system")
experiment_line("--data.seed=2020-01-01")
experiment_line("--data.seed=-1", "--data.seed")
experiment_line("--trainer.devices=2", "one device")
experiment_line("--trainer.default_root_dir=/nowhere", status=0)
experiment_line("--trainer.precision=8", "--trainer.precision")
experiment_line("--trainer.logger=CSVLogger")
experiment_line("--model.round_to 8", "--model.round_to")
experiment_line("--pretrained /nowhere", "--model.pretrained")
experiment_line("--pretrained ''", "--model.pretrained")
experiment_line("--runs INPUTS", "either --config")
experiment_line("--overwrite", "--overwrite belongs to --output")
experiment_line("positional", "unrecognized")
experiment_line("--strict=3")

PLACES: dict[str, tuple[str, Change, str | tuple[str, ...], int]] = {}  # arguments, preparation, says, status


def place(name: str, arguments: str, make: Change, says: str | tuple[str, ...] = "", status: int = 2) -> None:
    """A case of ``compare --runs``; ``make`` gets ``INPUTS``, which holds a finished ``run`` and a ``report``."""
    PLACES[name] = (arguments, make, says, status)


def nothing(folder: Path) -> None:
    """What there is will do."""


OUT = "--output INPUTS/out"
for extra in ("", " --overwrite"):
    place(f"output is a file{extra}", OUT + extra, lambda folder: (folder / "out").write_text("x"), "is no folder")
    place(f"output is a pipe{extra}", OUT + extra, lambda folder: os.mkfifo(folder / "out"), "is no folder")
    place(f"output is a link{extra}", OUT + extra, lambda folder: (folder / "out").symlink_to("report"), "no folder")
    place(f"output links to itself{extra}", OUT + extra, lambda folder: (folder / "out").symlink_to("out"))
    place(f"output links nowhere{extra}", OUT + extra, lambda folder: (folder / "out").symlink_to("x"), "no folder")
    place(f"output is a run{extra}", "--output INPUTS/run" + extra, nothing, "is no report")
    place(f"output is another's{extra}", "--output INPUTS" + extra, nothing, "is no report")
    place(f"output holds more{extra}", "--output INPUTS/report" + extra, lambda f: (f / "report/x").touch(), "holds x")
    place(
        f"output holds a folder{extra}", "--output INPUTS/report" + extra, lambda f: (f / "report/d").mkdir(), "holds d"
    )
    place(
        f"output lacks a file{extra}",
        "--output INPUTS/report" + extra,
        lambda f: (f / "report/results.csv").unlink(),
        "missing",
    )
    place(
        f"output below a file{extra}",
        "--output INPUTS/f/out" + extra,
        lambda folder: (folder / "f").touch(),
        "--output",
    )
    place(f"output is too long{extra}", f"--output INPUTS/{'a' * 300}" + extra, nothing, "--output")
    place(f"output is nothing{extra}", "--output=" + extra, nothing)
place("output is a report", "--output INPUTS/report", nothing, "or --overwrite")
place("output is the root of all", "--output / --overwrite", nothing, "is no report")
place("output is a report to overwrite", "--output INPUTS/report --overwrite", nothing, status=0)
place("output is an empty folder", OUT, lambda folder: (folder / "out").mkdir(), status=0)
place("root is a file", "--root INPUTS/f", lambda folder: (folder / "f").touch(), "--root")
place("root is a pipe", "--root INPUTS/f", lambda folder: os.mkfifo(folder / "f"), "--root")
place("root is below a file", "--root INPUTS/f/x", lambda folder: (folder / "f").touch(), "--root")
place("root links to itself", "--root INPUTS/l", lambda folder: (folder / "l").symlink_to("l"), "--root")
place("root is too long", f"--root INPUTS/{'a' * 300}", nothing, "--root")
place("root is far too long", f"--root INPUTS{'/aaaaaaa' * 600}", nothing, "--root")
place("root is no folder", "--root /dev/null", nothing, "--root")
place("root is in the kernel", "--root /proc/x", nothing, "--root")
place("no runs", "--runs", nothing)
place("run is nothing", "--runs=", nothing, "none of these")
place("run is missing", "--runs INPUTS/x", nothing, "no folder at")
place("run is a file", "--runs INPUTS/run/plan.json", nothing, "no folder at")
place("run is a pipe", "--runs INPUTS/f", lambda folder: os.mkfifo(folder / "f"), "no folder at")
place("run is foreign", "--runs INPUTS/x", lambda folder: (folder / "x").mkdir(), "finished")
place("run is unfinished", "--runs INPUTS/run", lambda folder: (folder / "run/metrics.json").unlink(), "finished")
place("run is a report", "--runs INPUTS/report", nothing, "finished")
place("run is a checkpoint", "--runs INPUTS/run/pruned", nothing, "finished")
place("run twice", "--runs INPUTS/run INPUTS/run", nothing, "twice")
place("run twice by another path", "--runs INPUTS/run INPUTS/report/../run", nothing, "twice")
place("run beside a foreign folder", "--runs INPUTS/run INPUTS/report INPUTS", nothing, status=0)
for option in ("--pretrained x", "--ratios 0.2", "--systems a", "--data.seed 1"):
    place(f"runs and {option}", option, nothing, "has no meaning with --runs")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, hostile_model: Path, hostile_tokens: Path) -> Path:
    """A finished run, ``run``, and a report on it, ``report``, which no case may change."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "compare.yaml").write_text(GOOD)
    line = f"--config {folder}/compare.yaml --root {folder}/root --output {folder}/report {HARMLESS}"
    for word, path in {"MODEL": hostile_model, "TOKENS": hostile_tokens, "INPUTS": folder}.items():
        line = line.replace(word, str(path))
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        assert main(["compare", *line.split()]) == 0
    (folder / "root/a/version_0").rename(folder / "run")
    return folder


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
