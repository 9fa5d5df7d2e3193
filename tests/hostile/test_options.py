"""Options with values that cannot be meant: refused in one sentence, or harmless."""

import os
from pathlib import Path

from tests.hostile.harness import Bench, Case, Change, Says, broken, cases, making

SILLY = ["", "null", "true", "-1", "1.5", ".nan", ".inf", "1e308", "9" * 20, "abc", "[]", "a: b: c", "\udcff"]

CASES: dict[str, Case] = {}


def option(line: str, says: Says = "", status: int = 2, config: str = "wanda") -> None:
    """An option, or several, after the harmless ones."""
    CASES[f"{config} {line}"[:120]] = Case(line, status, says, config=config)


def every(name: str, works: str = "", config: str = "wanda") -> None:
    """A case for every silly value; those in ``works`` (separated by blanks) are fine for this option."""
    for value in SILLY:
        status = 0 if value in works.split() else 2
        CASES[f"{config} {name}={value!a}"] = Case([f"{name}={value}"], status, config=config)


def file(name: str, content: Change | str | bytes, says: Says = "--config") -> None:
    """A configuration file of this content after the shipped one."""
    make = making(content)
    CASES[f"file: {name}"] = Case("--config INPUTS/c.yaml", 2, says, lambda folder: make(folder / "c.yaml"))


# The trainer.
option("--trainer.max_epochs 3", "unknown option --trainer.max_epochs")
option("--trainer.acelerator cpu", "Did you mean --trainer.accelerator?")
option("--trainer.accelerator tpu", "--trainer")
option("--trainer.deterministic maybe", "--trainer.deterministic: found maybe")
option("--trainer.logger nowhere.Logger", "--trainer.logger")
option("--trainer.callbacks+=ModelCheckpoint", "ModelCheckpoint is made for training")
option("--trainer.callbacks+=Timer --trainer.callbacks.duration=00:00:00:01")
option("--trainer.callbacks {}", "Callback is made for training")
option("--trainer.precision 16-mixed", "--trainer.precision: found 16-mixed")
option("--trainer abc", "trainer")
option("--trainer.detect_anomaly true --trainer.deterministic warn --trainer.profiler advanced", status=0)
option("--trainer.profiler pytorch", "--trainer.profiler: found pytorch; allowed: simple, advanced")
option("--trainer.precision 64-true --trainer.callbacks+=TQDMProgressBar --trainer.logger true", status=0)
for devices in ("0", "-1", "1000000", "99999999999999999999", "'[0, 0]'", "abc", "1.5", "null"):
    option(f"--trainer.devices {devices}", "--trainer.devices")
option("--trainer.devices '[0]'", status=0)
option("--trainer.num_nodes 0", "num_nodes")
option("--trainer.num_nodes 2", ("--trainer.num_nodes: found 2", "torchrun"))
option("--trainer.strategy fsdp", "--trainer")
option("--trainer.strategy ddp_spawn --trainer.devices 2", "--trainer.strategy: DDPStrategy")

# Seeds, and the calibration set.
option("--seed_everything 4294967296", "--seed_everything: found 4294967296; it must lie between 0 and 4294967295")
option("--seed_everything 99999999999999999999", "whole numbers go up to")
option("--data.seed 9223372036854775807 --seed_everything 4294967295", status=0)
option("--data.num_samples 7", ("--data.num_samples: found 7", "6 rows of 16 tokens"))
option("--data.seq_len 17", ("--data.seq_len: found 17", "at most 16"))
option("--data.sampling sliding --data.stride 2", "sliding")
option("--data.eval_datasets '[TOKENS, TOKENS]'", "twice")
option("--data.dataset TOKENS:train", "no splits")
option("--data.cache_dir ~nobody-here/x", ("--data.cache_dir", "home folder"))
option(f"--data.dataset /{'a' * 5000}.txt", "neither a named dataset nor a file")
option("--data.tokenizer demo", "--data.tokenizer: it follows --model.pretrained")
option("--data abc", "data")

# Options of every kind of type with every silly value. What works is stated; all else is refused.
every("--model.pruning_ratio")
every("--model.round_to")
every("--model.sequential", works="true")
every("--model.allocation")
every("--model.tau", works="null 1.5 .inf 1e308 " + "9" * 20, config="hgsp_wanda")
every("--model.n_remove_layers", works="null", config="shortgpt")
every("--model.max_tokens", config="slimgpt")
every("--data.batch_size")
every("--data.eval_seq_len", works="null")
every("--data.seed")
for size in ("1000000000", "4611686018427387904"):  # before any arithmetic on them
    option(f"--model.pretrained demo --data.dataset demo --data.seq_len {size}", f"128 windows of {size}")
    option(
        f"--model.pretrained demo --data.eval_datasets [demo] --data.eval_seq_len {size}", f"one window needs {size}"
    )
option(f"--model.steps {10**9}", "--model.steps: found 1000000000; the model has 168 units")
option("--model.save_dtype float8_e4m3fn", "--model.save_dtype: found 'float8_e4m3fn'")
option("--model.save_dtype float64", ("--model.save_dtype: found 'float64'", "float16"))
option("--model.at_most true", "at_most")
option("--resume", ("--resume: no unfinished run", "There is none"))
option("--resume=true", "--resume")
option("--resume --model.label ../x", "--model.label")

# Configurations by name.
option("--config targets/../wanda", "--config")
option("--config ''", "--config")
option("--config", "--config")
option("--config /etc/passwd", "--config")
option("--config compare", "'compare' is an experiment")
option(f"--config {'a' * 300}", "--config")

# Configuration files.
file("not UTF-8", b"data:\n  dataset: donn\xe9es.npy\n", ("--config", "line 2", "not UTF-8"))
file("a pipe", os.mkfifo, ("--config", "named pipe"))
file("a device", lambda path: path.symlink_to("/dev/zero"), ("--config", "device"))
file("a folder", Path.mkdir)
file("nothing", lambda path: None, "cannot read")
file("empty", "", "is not a list of options")
file("a list", "[1, 2]\n", "is not a list of options")
file("deep", "[" * 20_000, "nested too deeply")
file("huge", lambda path: path.write_bytes(b"#" * 11_000_000), "at most")
file("twice the same key", "data:\n  seed: 1\n  seed: 2\n", ("line 3", "'seed' is given twice"))
file("a reference to itself", "data: &x\n  a: *x\n", "through its references")
LAUGHS = "".join(f"{y}: &{y} [{', '.join(['*' + x] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True))
file("a billion laughs", f"a: &a [x, x, x, x, x, x, x, x, x]\n{LAUGHS}", "through its references")
file("Python objects", "data: !!python/object/apply:os.system ['touch pwned']\n", "YAML")
file("NUL in a name", 'data:\n  dataset: "a\\0b.txt"\n', ("--data.dataset", "UTF-8"))
file("half a character", 'data:\n  dataset: "\\ud800.txt"\n', "")
file("a key that is a number", "3: 4\n", "")
file("a key that is a list", "[a, b]: 4\n", "key")
file("a date", "data:\n  seed: 2020-01-01\n", "--data.seed")
file("trainer is a list", "trainer: [1]\n", "'trainer': found a list")
file("model is a number", "model: 3\n", "--model")
file("arguments that are a list", "model: {class_path: lightning_prune.methods.Wanda, init_args: [1]}\n", "")
file("ratio null", "model: {class_path: lightning_prune.methods.Wanda, init_args: {pruning_ratio: null}}\n", "null")
file("other class", "model: {class_path: os.system}\n", "--model")


# Other commands refuse the same.
for line in ("--seed_everything=-1", "--trainer.max_epochs=1", "--data.batch_size=null"):
    CASES[f"test {line}"] = Case(line, says=line.partition("=")[0], command="test")
for size in (10**9, 2**62):  # check compares lengths before it adds bytes up
    line = f"--config wanda --data.dataset demo --data.seq_len {size}"
    CASES[f"check {line}"] = Case(line, 2, "has 128 positions", command="check")
    line = f"--config wanda --data.dataset demo --data.num_samples {size}"
    CASES[f"check {line}"] = Case(line, (0, 1), command="check")

# Paths that cannot be one, for the commands with parsers of their own.
for words in (
    *("apply --plan", "apply --model", "apply --output", "decide --run", "compare --runs", "compare --config"),
    *("compare --root", "compare --output", "evaluate --model", "evaluate --dense", "evaluate --output"),
    *("evaluate --include-path", "export --model", "export --output"),
):
    command, name = words.split()
    for value in ("", " ", "a\0b", "x" * 5000):
        base = name != "--config"  # which excludes --runs
        CASES[f"{words} {value!r:.9}"] = Case([name, value], says=name, command=command, base=base, needs="run pruned")
for path in ("f", "f/x", "l", "l/x"):
    CASES[f"apply --output {path}"] = Case(f"--output {path}", 2, "--output: ", broken, "apply", needs="run")
CASES["apply --plan folder"] = Case("--plan run", 2, "--plan: ", command="apply", needs="run")


@cases(CASES)
def test_option(case: Case, bench: Bench) -> None:
    bench.check(case)
