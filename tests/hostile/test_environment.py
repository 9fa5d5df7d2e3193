"""Environments that nobody would choose: a run ends as it should in all of them, or says what is wrong."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.hostile.harness import Bench, Case
from tests.killing import Forks

REPOSITORY = Path(__file__).parents[2]
NOWHERE = {"HOME": "/nowhere", "XDG_CACHE_HOME": "/nowhere", "TMPDIR": "/nowhere", "HF_HOME": "/proc/x"}
NOWHERE |= {"HF_HUB_CACHE": "/proc/x/hub", "HF_DATASETS_CACHE": "/proc/y", "CUDA_VISIBLE_DEVICES": "abc"}
SLURM = {"SLURM_JOB_NAME": "x", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "1"}
LEFT = {"WORLD_SIZE": "8", "RANK": "3", "LOCAL_RANK": "3"}
ELASTIC = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "x", "RANK": "x", "LOCAL_RANK": "x", "GROUP_RANK": "x"}
# Values (None removes a variable), status, says.
VARIABLES: dict[str, tuple[dict[str, str | None], int | tuple[int, ...], str]] = {
    "no home and no PATH": (dict.fromkeys(("HOME", "XDG_CACHE_HOME", "PATH")), 0, ""),
    "folders are missing or cannot be written": ({**NOWHERE}, 0, ""),
    "garbage for the terminal and the hub": (
        {"COLUMNS": "wide", "TERM": "dumb", "NO_COLOR": "1", "HF_TOKEN": "\u202e", "HF_ENDPOINT": "nowhere"}, 0, ""
    ),
    "garbage for libraries": ({"TF_CPP_MIN_LOG_LEVEL": "x"}, 0, ""),
    "one process of one": (
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "0"}, 0, ""
    ),
    "left over from another job": ({**LEFT}, (0, 2), ""),
    "elastic launcher": ({**ELASTIC}, (0, 2), ""),
    "scheduler, one task": ({**SLURM, "SLURM_NTASKS": "1", "SLURM_NODELIST": "a"}, 0, ""),
    "scheduler, interactive": ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash", "SLURM_PROCID": "0"}, 0, ""),
    "scheduler, more tasks than processes": (
        {**SLURM, "SLURM_NTASKS": "4", "SLURM_NODELIST": "a[1-2]", "SLURM_NTASKS_PER_NODE": "4"}, (0, 2), "SLURM"
    ),
    "scheduler is garbage": ({**dict.fromkeys(SLURM, "x"), "SLURM_NTASKS": "x"}, (0, 2), "SLURM"),
    "launchers of others": ({"OMPI_COMM_WORLD_SIZE": "4", "PMI_SIZE": "4", "LSB_JOBID": "1"}, 0, ""),
}  # fmt: skip
for name in ("LOCAL_RANK", "WORLD_SIZE", "RANK", "GROUP_RANK", "NODE_RANK", "LOCAL_WORLD_SIZE"):
    for value in ("x", ""):
        VARIABLES[f"{name} is {value!r}"] = ({name: value}, (0, 2), name)


@pytest.mark.parametrize("name", VARIABLES)
def test_variables(name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    values, status, says = VARIABLES[name]
    for variable, value in values.items():
        if value is None:
            monkeypatch.delenv(variable, raising=False)
        else:
            monkeypatch.setenv(variable, value)
    monkeypatch.setattr(tempfile, "tempdir", None)
    bench.check(Case("--trainer.logger true" if "HOME" in values else "", status, says))


@pytest.mark.parametrize("name", ["données ü 文", "-x $HOME", "a\nb'\"", "a" * 200, "[x]", "{a: 1}", "~"])
def test_working_folder(name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the folder is called, relative paths below it are what they say."""
    folder = bench.inputs / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    bench.check(Case("--trainer.default_root_dir logs", 0, command="test", writes=True))
    assert (folder / "logs/test/version_0/metrics.json").is_file()
    assert not os.path.lexists(bench.root)


def test_working_folder_that_is_gone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bench.inputs / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    bench.check(Case(status=(0, 2)))


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
def test_closed_stream_and_files_for_the_owner_alone(
    stream: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, stream, None)
    before = os.umask(0o077)
    try:
        bench.check(Case(status=0))
    finally:
        os.umask(before)


GARBAGE = {"OMP_NUM_THREADS": "x", "MKL_NUM_THREADS": "-1", "CUDA_VISIBLE_DEVICES": "abc", "TMPDIR": "/nowhere",
           "HF_HOME": "/proc/x", "COLUMNS": "1", "MPLCONFIGDIR": "/proc/x", "LC_ALL": "nowhere"}  # fmt: skip
SHELL: dict[str, tuple[str, str, int | tuple[int, ...]]] = {
    "all variables are garbage": ("fit", "{}", 0),
    "all streams are closed": ("fit", "{} <&- >&- 2>&-", 0),
    "nobody reads on": ("methods", "{} | head -c 1 > /dev/null; exit ${{PIPESTATUS[0]}}", (0, 1)),
    "output is full": ("methods", "{} > /dev/full", (1, 2)),
    "streams are closed": ("methods", "{} <&- >&-", 0),
}
OUTPUT = "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
SPACE = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40 * 1024, 40 * 1024))"


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", SHELL)
def test_shell(name: str, bench: Bench) -> None:
    command, line, status = SHELL[name]
    argv = (
        bench.argv(Case("--trainer.enable_progress_bar false --trainer.logger true")) if command == "fit" else [command]
    )
    command = " ".join([sys.executable, "-m lightning_prune", *argv])
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
    if argv[0] == "fit":
        assert len(list(bench.root.rglob("metrics.json"))) == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("before", "status"), [(OUTPUT, (1, 2)), (SPACE, (2,))], ids=["output", "disk"])
def test_no_room(before: str, status: tuple[int, ...], bench: Bench, forks: Forks) -> None:
    ended = forks.run(bench.argv(Case("--trainer.enable_progress_bar false")), before=before)
    assert ended.status in status, ended.printed
    assert "Traceback" not in ended.printed
    assert not [path for path in bench.folder.rglob(".*") if "cache" not in path.parts]
