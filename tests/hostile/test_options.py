"""Options with values that cannot be meant: refused in one sentence, or harmless."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile.harness import CONFIGS, Bench, Case

SILLY = ["", "null", "true", "0", "-1", "1.5", ".nan", ".inf", "-.inf", "1e308", "1e-320", "-0.0", "9" * 20, "abc"]
SILLY += ["[]", "{}", "[1, 2]", "{a: 1}", "!!python/object:os.system x", "a: b: c", "\udcff"]

OPTIONS: dict[str, Case] = {}
FILES: dict[str, Case] = {}


def option(
    line: str, status: int | tuple[int, ...] = 2, says: str | tuple[str, ...] = "", config: str = "wanda"
) -> None:
    """One case: an option, or several, behind the harmless ones."""
    OPTIONS[f"{config} {line}"[:120]] = Case(line, status, says, config=config)


def every(name: str, works: str = "", config: str = "wanda", values: list[str] = SILLY) -> None:
    """A case for every silly value; those in ``works`` (separated by blanks) are fine for this option."""
    for value in values:
        case = Case([f"{name}={value}"], 0 if value in works.split() else 2, config=config)
        OPTIONS[f"{config} {name}={value!a}"] = case


def file(
    name: str, content: str | bytes | Callable[[Path], object], says: str | tuple[str, ...], status: int = 2
) -> None:
    """One case: a configuration file of this content behind the shipped one."""

    def make(folder: Path) -> None:
        path = folder / "c.yaml"
        if callable(content):
            content(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    FILES[name] = Case("--config INPUTS/c.yaml", status, says, make)


# What Lightning's trainer takes and a pruning run does not.
option("--trainer.accumulate_grad_batches 4", says=("--trainer.accumulate_grad_batches: found 4", "training step"))
option("--trainer.gradient_clip_val 1", says="--trainer.gradient_clip_val: found 1")
option("--trainer.gradient_clip_val 0", 0)
option("--trainer.gradient_clip_algorithm norm", says="--trainer.gradient_clip_algorithm: found norm")
option("--trainer.gradient_clip_algorithm abc", says="--trainer.gradient_clip_algorithm: found abc")
option("--trainer.val_check_interval 3", says="--trainer.val_check_interval: found 3")
option("--trainer.val_check_interval 0.5", says="--trainer.val_check_interval: found 0.5")
option("--trainer.val_check_interval 00:00:01:00", says="--trainer.val_check_interval")
option("--trainer.val_check_interval '{a: 1}'", says="--trainer.val_check_interval")
option("--trainer.check_val_every_n_epoch 2", says="--trainer.check_val_every_n_epoch: found 2")
option("--trainer.check_val_every_n_epoch -1", says="--trainer.check_val_every_n_epoch: found -1")
option("--trainer.num_sanity_val_steps -1", says="--trainer.num_sanity_val_steps: found -1")
option("--trainer.limit_val_batches 0", says="--trainer.limit_val_batches: found 0")
option("--trainer.limit_predict_batches 3", says="--trainer.limit_predict_batches: found 3")
option("--trainer.limit_train_batches 0.5", says="whole calibration")
option("--trainer.limit_test_batches 0", says="whole calibration")
option("--trainer.overfit_batches 1", says="whole calibration")
option("--trainer.max_epochs 0", says="whole calibration")
option("--trainer.max_epochs -1", says="whole calibration")
option("--trainer.min_epochs 3", says="whole calibration")
option("--trainer.max_steps 0", says="whole calibration")
option("--trainer.min_steps 3", says="whole calibration")
option("--trainer.max_time 00:00:00:01", says="whole calibration")
option("--trainer.fast_dev_run 1", says="whole calibration")
option("--trainer.reload_dataloaders_every_n_epochs 1", says="--trainer.reload_dataloaders_every_n_epochs: found 1")
option("--trainer.use_distributed_sampler false", says="--trainer.use_distributed_sampler: found False")
option("--trainer.sync_batchnorm true", says="--trainer.sync_batchnorm: found True")
option("--trainer.barebones true", says="--trainer.barebones: found True")
option("--trainer.enable_checkpointing true", says="--trainer.enable_checkpointing: found True")
option("--trainer.model_registry x", says="--trainer.model_registry: found x")
option("--trainer.plugins BitsandbytesPrecision", says="--trainer.plugins")
option("--trainer.plugins MixedPrecision", says="--trainer.plugins")
option("--trainer.plugins abc", says="--trainer.plugins: found abc")
option("--trainer.inference_mode false", 0)
option("--trainer.detect_anomaly true", 0)
option("--trainer.deterministic true", 0)
option("--trainer.deterministic warn", 0)
option("--trainer.deterministic maybe", says="--trainer.deterministic: found maybe")
option("--trainer.benchmark true", 0)
option("--trainer.enable_model_summary true", 0)
option("--trainer.enable_progress_bar false", 0)
option("--trainer.log_every_n_steps 0", 0)
option("--trainer.profiler simple", 0)
option("--trainer.profiler abc", says="profiler")
option("--trainer.logger false", 0)
option("--trainer.logger true", 0)
option("--trainer.logger 0", says="--trainer.logger: found 0")
option("--trainer.logger CSVLogger", says=("--trainer.logger", "save_dir"))
option("--trainer.logger nowhere.Logger", says="--trainer.logger")
option("--trainer.callbacks EarlyStopping", says="--trainer.callbacks")
option("--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=x", says="EarlyStopping is made for training")
option("--trainer.callbacks+=ModelCheckpoint", says="ModelCheckpoint is made for training")
option("--trainer.callbacks+=LearningRateMonitor", says="LearningRateMonitor is made for training")
option("--trainer.callbacks+=Timer --trainer.callbacks.duration=00:00:00:01", says="callbacks.Timer")
option("--trainer.callbacks+=GradientAccumulationScheduler --trainer.callbacks.scheduling={0: 2}", says="--trainer")
option("--trainer.callbacks+=DeviceStatsMonitor", (0, 2))
option("--trainer.callbacks+=TQDMProgressBar", 0)
option("--trainer.callbacks {}", says="Callback is made for training")
option("--trainer.callbacks 3", says="--trainer.callbacks: found 3")
option("--trainer.precision 8", says="--trainer.precision: found 8")
option("--trainer.precision int4", says="--trainer.precision: found int4")
option("--trainer.precision transformer-engine", says="--trainer")
option("--trainer.precision bf16-true", 0)
option("--trainer.precision 64-true", 0)
option("--trainer.precision 16-mixed", says="--trainer.precision: found 16-mixed")
option("--trainer.accelerator quantum", says="quantum")
option("--trainer.accelerator gpu", (0, 2))
option("--trainer.accelerator tpu", says="--trainer")
option("--trainer.acelerator cpu", says="Did you mean --trainer.accelerator?")
option("--trainer abc", says="--trainer")
option("--trainer 5", says="--trainer")

# Processes, without starting any.
option("--trainer.devices auto", 0)
option("--trainer.devices 1", 0)
option("--trainer.devices '[0]'", 0)
option("--trainer.devices 0", says=("--trainer.devices: found 0", "number of processes"))
option("--trainer.devices -1", says=("--trainer.devices: found -1", "number of processes"))
option("--trainer.devices -2", says="--trainer.devices: found -2")
option("--trainer.devices 1000000", says="--trainer.devices: found 1000000")
option("--trainer.devices 99999999999999999999", says="--trainer.devices")
option("--trainer.devices '[]'", says="--trainer.devices")
option("--trainer.devices '[0, 0]'", says="--trainer.devices: found [0, 0]")
option("--trainer.devices abc", says="--trainer.devices: found abc")
option("--trainer.devices ','", says="--trainer.devices")
option("--trainer.devices 1.5", says="--trainer.devices")
option("--trainer.devices null", says="--trainer.devices")
option("--trainer.num_nodes 0", says="num_nodes")
option("--trainer.num_nodes -1", says="num_nodes")
option("--trainer.num_nodes 2", says=("--trainer.num_nodes: found 2", "torchrun"))
option("--trainer.num_nodes 2 --trainer.devices 2", says="--trainer.num_nodes: found 2")
option("--trainer.strategy nothing", says="--trainer")
option("--trainer.strategy fsdp", says="--trainer")
option("--trainer.strategy deepspeed", says="--trainer")
option("--trainer.strategy ddp_spawn --trainer.devices 2", says="--trainer.strategy: DDPStrategy")
option("--trainer.strategy ddp_fork --trainer.devices 2", says="--trainer.strategy: DDPStrategy")
option("--trainer.strategy ''", says="--trainer")
option("--trainer.strategy 3", says="--trainer")
option("--trainer.strategy SingleDeviceStrategy", says="--trainer")

# Seeds.
option("--seed_everything -1", says="--seed_everything: found -1; it must lie between 0 and 4294967295")
option("--seed_everything 1099511627776", says="--seed_everything: found 1099511627776")
option("--seed_everything 4294967296", says="--seed_everything")
option("--seed_everything 4294967295", 0)
option("--seed_everything 99999999999999999999", says="whole numbers go up to")
option("--seed_everything abc", says="--seed_everything: found abc")
option("--seed_everything null", says="--seed_everything")
option("--seed_everything true", 0)
option("--seed_everything false", 0)
option("--data.seed -1", says="--data.seed")
option("--data.seed 9223372036854775807", 0)

# The calibration set.
option("--data.num_samples 4", 0)
option("--data.num_samples 7", says=("--data.num_samples: found 7", "6 rows of 16 tokens"))
option("--data.seq_len 8", 0)
option("--data.seq_len 17", says=("--data.seq_len: found 17", "at most 16"))
option("--data.sampling sliding --data.stride 2", says="sliding")
option("--data.sampling sliding", says="--data.stride")
option("--data.eval_datasets abc", says="--data.eval_datasets: found abc")
option("--data.eval_datasets '[[a]]'", says="--data.eval_datasets")
option("--data.eval_datasets '[TOKENS, TOKENS]'", says="twice")
option("--data.dataset TOKENS:train", says="no splits")
option("--data.cache_dir ~nobody-here/x", says=("--data.cache_dir", "home folder"))
option("--data.cache_dir /dev/null/x", 0)
option(f"--data.dataset /{'a' * 5000}.txt", says="neither a named dataset nor a file")
option(f"--data.dataset {'a' * 300}.npy", says="no token array")
option("--data.tokenizer demo", says="--data.tokenizer")
option("--data abc", says="--data")

# Every option of the methods and of the data with every silly value. What works is stated; all else is refused.
every("--model.pruning_ratio", works="1e-320")
every("--model.round_to", works="")
every("--model.freeze_first_n_layers", works="0")
every("--model.freeze_last_n_layers", works="0")
every("--model.min_groups_per_layer", works="0")
every("--model.sequential", works="true")
every("--model.allocation")
every("--model.structure")
every("--model.temperature", works="0 1.5 1e308 1e-320 -0.0 " + "9" * 20, config="hgsp_wanda", values=SILLY[2:])
every("--model.tau", works="null 0 1.5 .inf 1e308 1e-320 -0.0 " + "9" * 20, config="hgsp_wanda")
every("--model.collapse_epsilon", works="0 1e-320 -0.0", config="hgsp_wanda")
every("--model.prior_num_samples", works="null", config="hgsp_wanda")
every("--model.importance", config="hgsp_wanda")
every("--model.prior", config="hgsp_wanda")
every("--model.score_norm", config="hgsp_wanda")
every("--model.n_remove_layers", works="null", config="shortgpt")
every("--model.damping", config="slimgpt", works="0 1e-320 -0.0")
every("--model.max_tokens", config="slimgpt")
every("--model.ffn_group_size", config="slimgpt")
every("--model.head_score", config="slimgpt")
every("--model.first_ratio", config="slimgpt", works="null 0 1e-320 -0.0")
every("--data.num_samples", works="null")
every("--data.seq_len", works="null")
every("--data.batch_size")
every("--data.eval_seq_len")
every("--data.eval_batch_size")
every("--data.stride", works="null")
every("--data.sampling")
every("--data.seed", works="0")
every("--trainer.accumulate_grad_batches")
every("--trainer.gradient_clip_val", works="null 0")
every("--trainer.val_check_interval", works="null")
every("--trainer.log_every_n_steps", works="null 0 -1")

# Configuration files.
file("not UTF-8", b"data:\n  dataset: donn\xe9es.npy\n", ("--config", "line 2", "not UTF-8"))
file("UTF-16", "data: {}\n".encode("utf-16"), ("--config", "not UTF-8"))
file("a pipe", os.mkfifo, ("--config", "named pipe"))
file("a device", lambda path: path.symlink_to("/dev/zero"), ("--config", "device"))
file("a folder", Path.mkdir, "--config")
file("nothing", lambda path: None, "no file at")
file("empty", "", "config")
file("only a comment", "# nothing\n", "config")
file("a list", "[1, 2]\n", "")
file("a number", "3\n", "")
file("a null", "null\n", "")
file("half a list", "data: [\n", "")
file("a tab", "data:\n\tseed: 1\n", "")
file("deep", "[" * 20_000, "nested too deeply")
file("deep blocks", "data: " + "{a: " * 900 + "1" + "}" * 900, "")
file("huge", lambda path: path.write_bytes(b"#" * 11_000_000), "at most 10000000")
file("twice the same key", "data:\n  seed: 1\n  seed: 2\n", ("line 3", "'seed' is given twice"))
file("twice the same group", "data:\n  seed: 1\ndata:\n  batch_size: 2\n", "'data' is given twice")
file("a reference to itself", "data: &x\n  a: *x\n", "through its references")
file(
    "a billion laughs",
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{y}: &{y} [{', '.join(['*' + x] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)),
    "through its references",
)
file("Python objects", "data: !!python/object/apply:os.system ['touch pwned']\n", "")
file("NUL in a name", 'data:\n  dataset: "a\\0b.txt"\n', ("--data.dataset", "UTF-8"))
file("half a character", 'data:\n  dataset: "\\ud800.txt"\n', "")
file("a key that is a number", "3: 4\n", "")
file("a key that is a list", "[a, b]: 4\n", "")
file("a date", "data:\n  seed: 2020-01-01\n", "--data.seed")
file("a number in base 60", "data:\n  seed: 1:30\n", "", status=0)  # YAML's 90
file("a huge number", f"data:\n  seed: {'9' * 5000}\n", "")
file("a null group", "data: null\n", "wikitext2")  # all its defaults
file("trainer is a list", "trainer: [1]\n", ("line 1", "'trainer' holds a list"))
file("model is a number", "model: 3\n", "--model")
file("model without a class", "model: {}\n", "", status=0)
file("model null", "model: null\n", "")
file("class that is a list", "model: {class_path: [a]}\n", "--model")
file("arguments that are a list", "model: {class_path: lightning_prune.methods.Wanda, init_args: [1]}\n", "")
file("ratio null", "model: {class_path: lightning_prune.methods.Wanda, init_args: {pruning_ratio: null}}\n", "null")
file("other class", "model: {class_path: os.system}\n", "--model")


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench.inputs)
    bench.check(OPTIONS[name])


@pytest.mark.parametrize("name", FILES)
def test_configuration_file(name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench.inputs)
    bench.check(FILES[name])
    assert not (bench.inputs / "pwned").exists()


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("name", ["--seed_everything=-1", "--trainer.gradient_clip_val=1", "--data.batch_size=null"])
def test_both_commands_refuse_the_same(command: str, name: str, bench: Bench) -> None:
    bench.check(Case(name, says=name.partition("=")[0], command=command))


def test_shipped_configurations_are_there() -> None:
    assert {"wanda", "hgsp_wanda", "shortgpt", "slimgpt"} <= {path.stem for path in CONFIGS.glob("*.yaml")}
