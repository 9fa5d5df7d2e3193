"""What a run takes is told before it begins, from shapes alone."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

from lightning_prune import methods
from lightning_prune.cli import main
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.methods.base import PruningMethod
from lightning_prune.runs import memory_estimate
from lightning_prune.runs.memory_estimate import Memory
from lightning_prune.support.errors import UserError

GB = 10**9
STREAM = 128 * 128 * 2048 * 2  # bytes of one residual stream of the samples
IMPORTED = int(0.414 * GB)  # anonymous memory of the command before the run
TAYLOR: dict[str, Any] = {"importance": "taylor", "temperature": 0.0}
# The table of docs/large_models.md: peaks of whole runs in GB, by `python benchmarks/layer_memory.py`.
MEASURED = [
    (methods.ShortGPT, {}, 16, 0.86, 0.81),
    (methods.Magnitude, {}, 16, 0.94, 0.91),
    (methods.Wanda, {}, 16, 0.93, 0.94),
    (methods.SlimGPT, {}, 16, 1.77, 1.77),
    (methods.HGSP, TAYLOR, 16, 2.13, 2.09),
    (methods.HGSP, {}, 16, 3.80, None),
    (methods.ShortGPT, {}, 32, 0.86, None),
    (methods.Magnitude, {}, 32, 0.99, None),
    (methods.Wanda, {}, 32, 1.01, None),
    (methods.HGSP, TAYLOR, 32, 3.19, None),
]


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Memory]:
    """Of a method on a Llama of which there is the config alone; the numbers of ``benchmarks/layer_memory.py``."""
    monkeypatch.setattr(memory_estimate, "anonymous_bytes", lambda: IMPORTED)

    def make(
        method: Callable[..., PruningMethod],
        options: dict[str, Any] | None = None,
        device: int | None = None,
        host: int = 24 * GB,
        data: dict[str, Any] | None = None,
        precision: Any = "bf16-true",
        kind: Any = LlamaConfig,
        rows: int = 128,
        **shape: Any,
    ) -> Memory:
        sizes = {"vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096}
        config = kind(**(sizes | heads | {"tie_word_embeddings": True} | shape), dtype="bfloat16")
        config.save_pretrained(tmp_path)
        np.save(tmp_path / "tokens.npy", np.zeros((rows, 128), dtype=np.int64))
        text = {"dataset": str(tmp_path / "tokens.npy"), "eval_datasets": [str(tmp_path / "tokens.npy")]}
        trainer = L.Trainer(accelerator="cpu", logger=False, precision=precision, enable_checkpointing=False)
        method_of_run = method(pretrained=str(tmp_path), **options or {})
        return Memory(trainer, method_of_run, CalibrationDataModule(**(text | (data or {}))), device, host)

    return make


@pytest.mark.parametrize(("method", "options", "layers", "by_layer", "whole"), MEASURED)
def test_estimates_are_within_15_percent_of_measured_peaks(
    memory: Callable[..., Memory], method: Any, options: dict[str, Any], layers: int, by_layer: float, whole: float
) -> None:
    found = memory(method, options, num_hidden_layers=layers)
    assert found.estimate("layer").host_bytes / GB == pytest.approx(by_layer, rel=0.15)
    if whole is not None:
        assert found.estimate("model").host_bytes / GB == pytest.approx(whole, rel=0.15)


@pytest.mark.parametrize(("refit", "phase", "gigabytes"), [("none", "importance", 1.47), ("residual", "refit", 2.65)])
def test_solves_are_counted(memory: Callable[..., Memory], refit: str, phase: str, gigabytes: float) -> None:
    """Measured as `python benchmarks/layer_memory.py --layers 2 --samples 8` does."""
    options = {"importance": "kfac", "temperature": 0.0, "gradient_samples": 32, "refit": refit}
    found = memory(methods.HGSP, options, rows=8, num_hidden_layers=2).estimate("layer")
    assert found.phase == phase
    assert found.host_bytes / GB == pytest.approx(gigabytes, rel=0.15)


def test_sums_of_every_expert_are_counted(memory: Callable[..., Memory]) -> None:
    """Measured as `python benchmarks/layer_memory.py` does: a whole run on 16 samples, a layer at a time."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 512, "num_experts": 128, "num_experts_per_tok": 8}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096}
    options = {"importance": "kfac", "temperature": 0.0, "pruning_ratio": 0.3}
    found = memory(methods.HGSP, options, kind=Qwen3MoeConfig, rows=16, head_dim=32, **sizes).estimate("layer")
    assert found.phase == "gradients"
    assert found.host_bytes / GB == pytest.approx(0.99, rel=0.15)
    assert found.host_bytes - IMPORTED > 2 * 128 * 512**2 * 4  # both factors


def test_where_only_experts_are_removed_no_layer_is_written_whole(memory: Callable[..., Memory]) -> None:
    """A layer of Qwen3-30B-A3B; measured as `python benchmarks/layer_memory.py --experts --layers 1` does."""
    sizes = {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 1}
    sizes |= {"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": False}
    found = memory(methods.REAP, kind=Qwen3MoeConfig, rows=8, **sizes).estimate("layer")
    assert found.phase == "writing"
    assert found.host_bytes / GB == pytest.approx(2.12, rel=0.15)


def test_seventy_billion_parameters_are_estimated_at_once(memory: Callable[..., Memory]) -> None:
    heads = {"num_attention_heads": 64, "num_hidden_layers": 80, "tie_word_embeddings": False, "vocab_size": 128_256}
    found = memory(
        methods.SlimGPT, device=80 * 2**30, host=512 * GB, hidden_size=8192, intermediate_size=28_672, **heads
    )
    assert found.method.dense_parameters == pytest.approx(70.6e9, rel=0.01)
    started = time.perf_counter()
    by_layer, whole = found.estimate("layer"), found.estimate("model")
    assert time.perf_counter() - started < 2
    assert by_layer.share < 1 < whole.share
    assert whole.device_bytes is not None
    assert whole.device_bytes > 2 * found.method.dense_parameters


def test_removal_priors_evaluate_and_keep_what_the_wavefront_needs(memory: Callable[..., Memory]) -> None:
    removal = {"importance": "magnitude"}
    for options, batches in ((removal, 128 // 4), (removal | {"prior_num_samples": 50}, 13)):
        found = memory(methods.HGSP, options, num_hidden_layers=4).estimate("layer")
        assert found.layer_evaluations == (2 * 4 + 3 * 4 * 3 // 2) * batches
    deeper = memory(methods.HGSP, removal, num_hidden_layers=24).estimate("layer")
    assert deeper.stream_phase == "prior"
    assert deeper.host_bytes - IMPORTED > (1 + 3 * 23) * STREAM


def test_advice_names_the_options_that_help_and_what_the_run_then_takes(memory: Callable[..., Memory]) -> None:
    sizes = {"num_hidden_layers": 4, "hidden_size": 4096, "intermediate_size": 14_336}
    kfac = {"importance": "kfac", "temperature": 0.0, "refit": "output"}

    def needs(options: dict[str, Any], device: int | None, onload: Any = "layer", **more: Any) -> str:
        made = memory(methods.HGSP, options, device, **sizes, **more)
        estimate = made.estimate(onload)
        return memory_estimate.size(estimate.host_need_bytes if device is None else estimate.device_bytes or 0)

    small = memory(methods.HGSP, kfac, 4 * GB, precision="32-true", **sizes)
    refused = small.refusal(small.estimate("model"))
    assert refused.startswith(
        f"--model.onload model takes {needs(kfac, 4 * GB, 'model', precision='32-true')} of device"
    )
    assert f"--model.onload layer ({needs(kfac, 4 * GB, precision='32-true')})" in refused
    assert f"--trainer.precision bf16-true ({needs(kfac, 4 * GB, 'model')})" in refused
    assert "_size" not in refused  # solves need the most, whatever a batch has
    refits = memory(methods.HGSP, kfac, 4 * GB, **sizes)
    assert f"--model.refit none ({needs(kfac | {'refit': 'none'}, 4 * GB)})" in refits.refusal(refits.estimate("layer"))
    shown = refits.advice()  # wherever memory ran out
    assert [word for word in ("precision", "temperature") if word in shown] == []
    assert "--model.refit none; --data.batch_size 1; --data.eval_batch_size 1;" in shown
    wide = {"data": {"batch_size": 128}}
    batches = memory(methods.Wanda, host=GB, **sizes, **wide)
    assert "--data.batch_size 1 (" in batches.refusal(batches.estimate("layer"))


@pytest.mark.parametrize(
    ("method", "options", "written"),
    [
        (methods.SlimGPT, {}, 2048 * (2048 + 8192)),
        (methods.Wanda, {"refit": "residual"}, 2048 * (2048 + 8192)),
        (methods.Wanda, {"structure": "2:4"}, 2048 * (2 * 2048 + 2 * 512 + 3 * 8192)),
        (methods.Wanda, {}, 0),
    ],
)
def test_rewritten_weights_are_on_disk(memory: Callable[..., Memory], method: Any, options: Any, written: int) -> None:
    assert memory(method, options).estimate("layer").new_weights_bytes == 16 * 2 * written


def test_streams_that_take_too_much_memory_are_files(memory: Callable[..., Memory]) -> None:
    small = memory(methods.HGSP, TAYLOR, host=IMPORTED + 8 * STREAM).estimate("layer")
    assert 10 * STREAM < small.mapped_bytes <= small.disk


def test_what_the_host_needs_is_the_same_on_every_host(memory: Callable[..., Memory]) -> None:
    """Streams fill what there is, or are files: they make no host too small, and ``auto`` no slower."""
    hosts = [IMPORTED + 8 * STREAM, 8 * GB, 64 * GB]
    small, fair, large = (memory(methods.HGSP, TAYLOR, 24 * GB, host).estimate("model") for host in hosts)
    assert small.host_need_bytes == fair.host_need_bytes == large.host_need_bytes
    assert small.stream_bytes == fair.stream_bytes == large.stream_bytes == 18 * STREAM
    assert small.host_bytes < fair.host_bytes == large.host_bytes
    for one in (small, large):
        assert one.host_need_bytes <= one.host_bytes <= one.host_need_bytes + one.stream_bytes
    assert small.share == pytest.approx(small.host_need_bytes / hosts[0])
    assert small.share < memory_estimate.ROOM


def test_operations_are_those_on_tokens_and_those_of_solves(memory: Callable[..., Memory]) -> None:
    for method, least in ((methods.Wanda, 1.0), (methods.SlimGPT, 1.3), (methods.HGSP, 4.0)):
        options = {"importance": "kfac", "temperature": 0.0} if method is methods.HGSP else {}
        found = memory(method, options)
        estimate = found.estimate("layer")
        batches = 128 // 4 * 16
        on_text = estimate.flops - estimate.solve_flops
        assert on_text / found.forward_flops == pytest.approx(estimate.layer_evaluations / batches, rel=0.01)
        assert least <= on_text / found.forward_flops < least + 1
        assert (estimate.solve_flops > 0) == (method is not methods.Wanda)
    solves = 16 * (2048**3 + 8192**3)  # H⁻¹ takes n³
    assert memory(methods.SlimGPT).estimate("layer").solve_flops == pytest.approx(solves)


@pytest.mark.parametrize("importance", ["taylor", "kfac", "magnitude"])
def test_a_gpu_needs_a_layer_and_the_host_what_waits(memory: Callable[..., Memory], importance: str) -> None:
    found = memory(methods.HGSP, {"importance": importance}, device=24 * 2**30, precision="32-true")
    by_layer, whole = found.estimate("layer"), found.estimate("model")
    assert by_layer.device_bytes is not None
    assert whole.device_bytes is not None
    weights = 15 * 4 * 60_821_504  # all layers but one
    assert whole.device_bytes - by_layer.device_bytes == pytest.approx(weights, rel=0.1)
    assert by_layer.host_bytes > whole.host_bytes  # the next layer waits there


def test_check_needs_a_config_alone_and_says_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=99
    ).save_pretrained(tmp_path)
    words = ["check", "--config", "shortgpt", "--model.pretrained", str(tmp_path), "--data.eval_datasets", "[]"]
    words += ["--data.num_samples", "7"]
    assert main([*words, "--memory", "2GiB", "--json"]) == 0
    layer, model = json.loads(capsys.readouterr().out)
    assert (layer["onload"], model["onload"]) == ("layer", "model")
    assert layer["fits"]
    assert 0 < layer["device_bytes"] <= model["device_bytes"] < 2 * GB
    assert layer["layer_evaluations"] == 4 * 2  # 4 layers, batches of 4 and 3
    assert main([*words, "--memory=1.5 MB", "--host-memory", "512GiB"]) == 1
    shown = capsys.readouterr().out
    assert "549.76 GB (512.00 GiB) on the host" in shown
    assert "the default, would refuse: nothing fits" in shown
    assert ("--model.onload layer takes" in shown, "--model.onload model takes" in shown) == (True, False)
    for wrong in (["--memory", "much"], ["--memory"], ["--host-memory", "-3GiB"]):
        assert main([*words, *wrong]) == 2
        assert wrong[0] in capsys.readouterr().err


@pytest.fixture
def shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What ``check`` prints on a small Llama."""
    LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, vocab_size=999
    ).save_pretrained(tmp_path)

    def run(config: str, *words: str) -> str:
        main(["check", "--config", config, "--model.pretrained", str(tmp_path), "--data.eval_datasets", "[]", *words])
        return capsys.readouterr().out

    return run


def test_check_says_what_work_is_made_of(shown: Callable[..., str]) -> None:
    assert re.search(r"^work: as much as 1.0 forwards of the calibration text, \S+ operations$", shown("wanda"), re.M)
    said = re.search(
        r"as much as ([\d.]+) forwards of the calibration text, and solves: (\S+) operations in all, (\d+)% of them",
        shown("slimgpt", "--data.seq_len", "32"),
    )
    assert said is not None
    forwards, flops, part = map(float, said.groups())
    once = 2 * 4 * (4 * 256**2 + 3 * 256 * 512) * 128 * 32
    assert flops * (1 - part / 100) == pytest.approx(forwards * once, rel=0.05)


def test_check_shows_the_same_need_on_every_host(shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_estimate, "anonymous_bytes", lambda: IMPORTED)
    tables = [shown("hgsp_taylor", "--host-memory", host, "--memory", "9GB").splitlines() for host in ("900MB", "9GB")]
    needs = [[line.split()[3:5] for line in lines if line.startswith(("layer", "model"))] for lines in tables]
    assert needs[0] == needs[1] != []
    streams = [next(line for line in lines if line.startswith("host: what the run needs.")) for lines in tables]
    assert streams[0] == streams[1]
    assert "MB (prior): in memory as far as they fit, else in files" in streams[0]


def test_check_says_where_it_is_tight(shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_estimate, "anonymous_bytes", lambda: IMPORTED)
    for device, host, word in (
        ("9GB", "9GB", "yes "),
        ("9GB", "560MB", "tight (host)"),
        ("800MB", "9GB", "tight (device)"),
        ("800MB", "560MB", "tight (device, host)"),
        ("800MB", "400MB", "no (host)"),
        ("80MB", "9GB", "no (device)"),
    ):
        lines = shown("wanda", "--memory", device, "--host-memory", host).splitlines()
        assert f"  {word}" in next(line for line in lines if line.startswith("layer"))
        assert ("tight: an estimate can be 15% too low" in lines) == word.startswith("tight")


def test_check_speaks_of_auto_and_of_this_host_only_where_they_count(shown: Callable[..., str]) -> None:
    auto, here = "--model.onload auto", "host: of this machine; --host-memory SIZE for another"
    elsewhere = shown("wanda", "--memory", "80GiB")
    assert (auto in elsewhere, here in elsewhere) == (True, True)
    both = shown("wanda", "--memory", "80GiB", "--host-memory", "64GiB", "--model.onload", "layer")
    assert (auto in both, here in both, here in shown("wanda")) == (False, False, False)


@pytest.fixture
def fit(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Status and messages of ``fit`` on a tiny model below ``tmp_path/logs``."""

    def run(*words: str) -> tuple[int, str]:
        np.save(tmp_path / "tokens.npy", np.full((8, 16), 5))
        data = ["--data.dataset", str(tmp_path / "tokens.npy"), "--data.eval_datasets", "[]"]
        where = ["--model.pretrained", str(tiny_checkpoint()), "--trainer.default_root_dir", str(tmp_path / "logs")]
        status = main(["fit", "--config", "wanda", *where, *data, "--trainer.logger", "false", *words])
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize(("free", "onload"), [(2**35, "model"), (int(0.6 * 2**30), "layer")])
def test_auto_keeps_the_whole_model_where_it_fits_with_room_to_spare(
    tmp_path: Path, fit: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, free: int, onload: str
) -> None:
    monkeypatch.setattr(memory_estimate, "anonymous_bytes", lambda: 0)
    monkeypatch.setattr(memory_estimate, "free_host_bytes", lambda: free)
    monkeypatch.setattr(memory_estimate, "HOST_OVERHEAD", int(0.55 * 2**30))
    assert fit()[0] == 0
    assert json.loads(next(tmp_path.rglob("method.json")).read_text(encoding="utf-8"))["onload"] == onload


MISSING = ["--model.onload layer takes", "of host memory", "What may help: another method"]
GONE = ["Out of memory", "--model.onload layer", "--data.batch_size 1;"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (None, MISSING),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), GONE),
        (MemoryError(), GONE),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            GONE,
        ),
    ],
)
def test_memory_that_is_missing_or_runs_out_says_what_would_help_and_leaves_nothing(
    tmp_path: Path,
    fit: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
    says: list[str],
) -> None:
    def full(*_: object) -> None:
        raise error or AssertionError("calibrated")

    if error is None:
        monkeypatch.setattr(memory_estimate, "free_host_bytes", lambda: 1000)
    monkeypatch.setattr(methods.Wanda, "training_step", full)
    status, message = fit("--model.onload", "layer" if error is None else "model")
    assert status == 2
    assert [words for words in says if words not in message] == []
    assert "Traceback" not in message
    assert not (tmp_path / "logs").exists()


def test_windows_of_absurd_length_end_in_one_message(memory: Callable[..., Memory]) -> None:
    with pytest.raises(UserError, match=r"--data.seq_len: found windows of 1000000000 tokens.* 4096 positions"):
        memory(methods.Wanda, data={"dataset": "demo", "seq_len": 10**9})
    huge = {"dataset": "demo", "seq_len": 10**9, "eval_seq_len": 10**9, "eval_datasets": None}
    assert memory(methods.HGSP, data=huge, max_position_embeddings=2**31).estimate("layer").share > 1000
