"""Run folders that are damaged, forged or mixed, for every command that reads one: refused, or not believed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning_prune
from lightning_prune.support.errors import UserError
from tests.hostile.harness import Bench, Case, Change, Says, Status, cases, contents, making

TEST = "test"  # reads the checkpoint only
READERS = {
    "metrics.json": ("decide", "compare"),
    "environment.json": ("decide", "compare"),
    "calibration.json": ("decide", "compare"),
    "method.json": ("decide", "compare"),
    "scores.csv": ("decide", "compare"),
    "plan.json": ("decide", "compare", "apply"),
    "config.yaml": ("decide",),
    "pruned/config.json": ("evaluate", TEST, "load"),
    "pruned/model.safetensors": ("evaluate", TEST, "load"),
    "pruned/modeling_pruned.py": ("evaluate", TEST, "load"),
}
# Who stands for all that read a file in the same way, where what is wrong is inside it.
DOORS = READERS | {"metrics.json": ("decide",), "scores.csv": ("decide",), "plan.json": ("decide", "apply")}
DOORS |= dict.fromkeys(("environment.json", "calibration.json", "method.json"), ("compare",))
CASES: dict[str, Case] = {}


def damage(name: str, file: str, change: Change, says: Says = "", inside: bool = False, **status: Status) -> None:
    """A case for every command that reads ``file``: refused, unless ``status`` says otherwise of a command. With
    something wrong ``inside`` it, for one of those that refuse alike."""
    for command in DOORS[file] if inside and not status else READERS[file]:
        words, expected = "--model.pretrained INPUTS/run/pruned" if command == TEST else "", status.get(command, 2)
        prepare = lambda inputs: change(inputs / "run" / file)  # noqa: E731
        CASES[f"{command}: {file} {name}"] = Case(words, expected, says, prepare, command, needs="run other")


def field(file: str, where: str, value: Any, says: Says = "", **status: Status) -> None:
    """One value of a JSON file replaced; ``where`` is its path, such as ``layers.0.layer``."""
    damage(f"{where} = {value!r:.30}", file, lambda path: edit(path, where, value), says, True, **status)


def rows(name: str, change: Callable[[list[str]], list[str]], says: str = "", **status: Status) -> None:
    """The lines of ``scores.csv``, without the header, changed."""

    def run(path: Path) -> None:
        header, *found = path.read_text().splitlines()
        path.write_text("\n".join([header, *change(found)]) + "\n")

    damage(name, "scores.csv", run, says, True, **status)


def cell(column: str, value: Any, says: str = "", row: int = 3, **status: Status) -> None:
    """One value of ``scores.csv`` replaced."""
    at = COLUMNS.index(column)

    def change(found: list[str]) -> list[str]:
        values = found[row].split(",")
        values[at] = str(value)
        return [*found[:row], ",".join(values), *found[row + 1 :]]

    rows(f"{column} = {value!r:.30}", change, says, **status)


def edit(path: Path, where: str, value: Any) -> None:
    content = json.loads(path.read_text())
    *parents, last = [int(part) if part.isdigit() else part for part in where.split("/")]
    inner = content
    for part in parents:
        inner = inner[part]
    inner[last] = value
    path.write_text(json.dumps(content))


def without(path: Path, key: str) -> None:
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))


def layers(name: str, change: Callable[[list[Any]], list[Any]]) -> None:
    """The layers of ``plan.json`` changed."""

    def run(path: Path) -> None:
        edit(path, "layers", change(json.loads(path.read_text())["layers"]))

    damage(name, "plan.json", run, inside=True)


def replaced(old: str, new: str) -> Change:
    return lambda path: path.write_text(path.read_text().replace(old, new))


def instead(make: Change) -> Change:
    return lambda path: (path.unlink(), make(path))


def cut_late(path: Path) -> None:
    """Shortly before its end; a configuration within a key, since its last lines may say what holds anyway."""
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b":")] if path.suffix == ".yaml" else whole[: int(len(whole) * 0.97)])


def twice(path: Path) -> None:
    """Every key given twice, the second time as null."""
    content = path.read_text().rstrip()
    path.write_text(content[:-1] + ", " + ", ".join(f"{json.dumps(key)}: null" for key in json.loads(content)) + "}")


COLUMNS = ("layer", "block", "unit", "importance", "cost", "prior", "score", "pruned")
JSON = tuple(file for file in READERS if file.endswith(".json"))
IGNORED = {"evaluate": 0, TEST: 0, "load": 0}  # the package's own class is used, never the folder's code

for file in READERS:
    code = IGNORED if file.endswith(".py") else {}
    damage("is missing", file, Path.unlink, **code)
    damage("is empty", file, making(""), **code)
    damage("is a folder", file, instead(Path.mkdir), **code)
    damage("is a pipe", file, instead(os.mkfifo), **code)
    damage("links to itself", file, instead(lambda path: path.symlink_to(path)), **code)
    damage("is binary", file, making(bytes(range(256)) * 9), **code)
    damage("is cut late", file, cut_late, **code)
for file in JSON:
    damage("is null", file, making("null"), inside=True)
    damage("is an empty object", file, making("{}"), inside=True)
    damage("gives every key twice", file, twice, inside=True)

damage("names another folder", "config.yaml", replaced("label: a", "label: ../../evil"), "--model.label")

# Fields that this version reads, each with a value of a kind it cannot be.
TYPED = {
    "metrics.json": "perplexity/tokens.npy/dense evaluation/tokens.npy/fingerprint parameters pruning_ratio/achieved "
    "seconds peak_memory_bytes method/base_model_sha256 configuration_sha256",
    "environment.json": "packages/torch cpu/cores gpus device",
    "calibration.json": "dataset sampling seed num_samples fingerprint",
    "method.json": "method label measured_by",
    "plan.json": "format pruning_ratio parameters/dense base_model layers/0 layers/1/kept/mlp weights_updated",
}
for file, names in TYPED.items():
    for name in names.split():
        field(file, name, [[None]])
field("metrics.json", "perplexity/tokens.npy/pruned", -1, "pruned is -1")
for value in (-1, 2, float("nan")):
    field("metrics.json", "pruning_ratio/achieved", value)
    field("plan.json", "achieved_ratio", value)
for value in (-1, 10**400, 1.5, 0):
    field("metrics.json", "parameters/dense", value)
    field("plan.json", "parameters/dense", value)
field("environment.json", "memory_bytes", 10**30, "memory_bytes")
field("calibration.json", "num_samples", "1", "num_samples")
field("metrics.json", "seconds/total", 1e308, "seconds.total")
field("metrics.json", "method/label", "../../evil", compare=0, decide=0)  # only shown; the name is in config.yaml
field("metrics.json", "method/base_model", "<script>\x1b[2J\n|", compare=0, decide=0)
field("metrics.json", "more", {"a": [1]}, compare=0, decide=0)
field("metrics.json", "method/base_model_sha256", "0" * 64, "have changed", compare=0)
field("calibration.json", "sampling", "magic", "sampling is 'magic'")
field("calibration.json", "dataset", None, "is not known")
field("plan.json", "more", 1, "more is not known")
field("plan.json", "format", 3, "has format 3")
field("plan.json", "layers/1/kept", {"attention": [0]})
field("plan.json", "layers/1/kept", {"heads": [0]})
field("plan.json", "weights_updated", True, "changed the weights", compare=0, decide=0)
field("plan.json", "dtype", "float3", "dtype 'float3'", compare=0, decide=0)
field("plan.json", "layers", [])
field("plan.json", "layers/1/layer", 0)
for value in ([0, 0], [1, 0], [-1], [2], [10**9], [10**30], list(range(10**5))):
    field("plan.json", "layers/1/kept/attention", value)
for value in ([0, 0], [5, 4], [40], [0.0], ["0"]):
    field("plan.json", "layers/1/kept/mlp", value)
layers("lists its layers twice", lambda found: found * 2)
layers("lists its layers backwards", lambda found: found[::-1])
layers("lacks a layer", lambda found: found[1:])
layers("keeps nothing", lambda _: [{"layer": n, "kept": {"attention": [], "mlp": []}} for n in range(4)])
for file in ("metrics.json", "scores.csv", "plan.json"):
    damage("is another run's", file, lambda path: shutil.copy(path.parents[1] / "other" / path.name, path), apply=0)
for name in ("evaluation", "parameters", "method", "seconds", "perplexity"):
    damage(f"lacks {name}", "metrics.json", lambda path, name=name: without(path, name), f"{name}")

cell("layer", 10**9, "layer is 1000000000")
cell("layer", 1.5)
cell("block", "head", "block is head")
cell("unit", -1, "unit is -1")
cell("unit", 0)
for column in ("importance", "score"):
    for value in ("nan", "", "x"):
        cell(column, value)
for value in (0, "nan", 10**30):
    cell("cost", value)
cell("pruned", 2)
cell("cost", 1, "cost is 1, the model's is", compare=0)  # which knows no model
rows("has a row less", lambda found: found[:-1])
rows("has no rows", lambda found: [], "no rows")
rows("has a row twice", lambda found: [*found, found[5]])
rows("is in another order", lambda found: found[::-1], decide=0, compare=0)
rows("has a shorter row", lambda found: [*found[:-1], found[-1].rpartition(",")[0]])
rows("has a blank row", lambda found: [*found[:5], "", *found[5:]], decide=0, compare=0)
rows("prunes all", lambda found: [row.rpartition(",")[0] + ",1" for row in found])
rows("lacks a layer", lambda found: [row for row in found if not row.startswith("1,")])
rows("has one layer more", lambda found: [*found, *(f"4{row[1:]}" for row in found if row.startswith("3,"))])
damage("has no header", "scores.csv", lambda path: path.write_text(path.read_text().partition("\n")[2]))
damage("is quoted", "scores.csv", replaced("mlp", '"mlp"'), decide=0, compare=0)
damage("has NUL characters", "scores.csv", lambda path: path.write_text(path.read_text() + "\0" * 99 + "\n"))
damage("has a line of a million", "scores.csv", lambda path: path.write_text(path.read_text() + "9" * 10**6 + "\n"))


@cases(CASES)
def test_run_folder(case: Case, bench: Bench) -> None:
    if case.command != "load":
        bench.check(case)
        return
    assert case.prepare is not None
    case.prepare(bench.inputs)
    before = contents(bench.inputs)
    try:
        lightning_prune.load(bench.inputs / "run/pruned")
        assert case.status == 0
    except UserError:
        assert case.status == 2
    assert contents(bench.inputs) == before
