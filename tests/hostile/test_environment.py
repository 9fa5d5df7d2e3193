"""Environments that nobody would choose: a run ends as it should in all of them, or says what is wrong."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.hostile.harness import Bench, Case

REPOSITORY = Path(__file__).parents[2]
VARIABLES: dict[str, tuple[dict[str, str | None], int | tuple[int, ...], str]] = {}  # None removes one; status, says


def variables(name: str, status: int | tuple[int, ...] = 0, says: str = "", **values: str | None) -> None:
    """One case: ``fit`` with these environment variables, in this process."""
    VARIABLES[name] = (values, status, says)


variables("no home", HOME=None, XDG_CACHE_HOME=None)
variables("home is missing", HOME="/nowhere", XDG_CACHE_HOME=None)
variables("no PATH", PATH=None)
variables("width is text", COLUMNS="wide")
variables("dumb terminal", TERM="dumb", NO_COLOR="1")
variables("temporary folder is missing", TMPDIR="/nowhere")
variables("hub's cache cannot be written", HF_HOME="/proc/x", HF_HUB_CACHE="/proc/x/hub", HF_DATASETS_CACHE="/proc/y")
variables("hub's token is garbage", HF_TOKEN="\u202e", HF_ENDPOINT="nowhere")
variables("TensorFlow's logs", TF_CPP_MIN_LOG_LEVEL="x")
variables("no GPU of that name", CUDA_VISIBLE_DEVICES="abc")
variables("one process of one", WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="x", MASTER_PORT="0")
for name in ("LOCAL_RANK", "WORLD_SIZE", "RANK", "GROUP_RANK", "NODE_RANK", "LOCAL_WORLD_SIZE"):
    variables(f"{name} is text", (0, 2), name, **{name: "x"})
    variables(f"{name} is nothing", (0, 2), name, **{name: ""})
    variables(f"{name} is negative", (0, 2), name, **{name: "-1"})
variables("left over from another job", (0, 2), "", WORLD_SIZE="8", RANK="3", LOCAL_RANK="3")
variables(
    "elastic launcher", (0, 2), "", TORCHELASTIC_RUN_ID="x", WORLD_SIZE="x", RANK="x", LOCAL_RANK="x", GROUP_RANK="x"
)
variables("scheduler, one task", SLURM_NTASKS="1", SLURM_JOB_NAME="x", SLURM_PROCID="0", SLURM_LOCALID="0",
          SLURM_NODEID="0", SLURM_JOB_ID="1", SLURM_NODELIST="a")  # fmt: skip
variables("scheduler, interactive", SLURM_NTASKS="4", SLURM_JOB_NAME="bash", SLURM_PROCID="0")
variables("scheduler, more tasks than processes", (0, 2), "SLURM", SLURM_NTASKS="4", SLURM_JOB_NAME="x",
          SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0", SLURM_JOB_ID="1", SLURM_NODELIST="a[1-2]",
          SLURM_NTASKS_PER_NODE="4")  # fmt: skip
variables("scheduler is garbage", (0, 2), "SLURM", SLURM_NTASKS="x", SLURM_JOB_NAME="x", SLURM_PROCID="x",
          SLURM_LOCALID="x", SLURM_NODEID="x")  # fmt: skip
variables("launchers of others", OMPI_COMM_WORLD_SIZE="4", PMI_SIZE="4", LSB_JOBID="1", JSM_NAMESPACE_RANK=None)


@pytest.mark.parametrize("name", VARIABLES)
def test_variables(name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    values, status, says = VARIABLES[name]
    for variable, value in values.items():
        if value is None:
            monkeypatch.delenv(variable, raising=False)
        else:
            monkeypatch.setenv(variable, value)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.chdir(bench.inputs)
    bench.check(Case(status=status, says=says))


@pytest.mark.parametrize("name", ["données ü 文", "a b", "-x", "$HOME", "a\nb", "'\"", "a" * 200, "[x]", "{a: 1}", "~"])
def test_working_folder(name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the folder is called, relative paths below it are what they say."""
    folder = bench.inputs / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    bench.check(Case("--trainer.default_root_dir logs", 0, command="test"))
    assert (folder / "logs/test/version_0/metrics.json").is_file()
    assert not os.path.lexists(bench.root)


def test_working_folder_that_is_gone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bench.inputs / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    bench.check(Case(status=(0, 2)))


def test_nothing_but_the_owner_may_read(bench: Bench) -> None:
    before = os.umask(0o077)
    try:
        bench.check(Case(status=0))
    finally:
        os.umask(before)


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
def test_closed_stream(stream: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, stream, None)
    bench.check(Case(status=0))


GARBAGE = {"OMP_NUM_THREADS": "x", "MKL_NUM_THREADS": "-1", "CUDA_VISIBLE_DEVICES": "abc", "TMPDIR": "/nowhere",
           "HF_HOME": "/proc/x", "COLUMNS": "1", "MPLCONFIGDIR": "/proc/x", "LC_ALL": "nowhere"}  # fmt: skip
SHELL: dict[str, tuple[str, int | tuple[int, ...]]] = {
    "all variables are garbage": ("{}", 0),
    "nobody reads on": ("{} | head -c 1 > /dev/null; exit ${{PIPESTATUS[0]}}", (0, 1)),
    "output is full": ("{} > /dev/full", (1, 2)),
    "streams are closed": ("{} <&- >&-", 0),
    "all streams are closed": ("{} <&- >&- 2>&-", 0),
    "little space": ("ulimit -f 40; {}", 2),
}


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", SHELL)
def test_shell(name: str, bench: Bench) -> None:
    line, status = SHELL[name]
    command = " ".join([sys.executable, "-m lightning_prune", *bench.argv(Case("--trainer.enable_progress_bar false"))])
    done = subprocess.run(
        ["bash", "-c", line.format(command)],
        env=os.environ | (GARBAGE if "variables" in name else {}) | {"PYTHONPATH": str(REPOSITORY)},
        cwd=bench.inputs,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode in (status if isinstance(status, tuple) else (status,)), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert not [path for path in bench.folder.rglob(".*") if "cache" not in path.parts]
    if done.returncode == 0:
        assert len(list(bench.root.rglob("metrics.json"))) == 1
