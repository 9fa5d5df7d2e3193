"""Random kills, interrupts and runs side by side, a few of each; ``benchmarks/kills.py`` takes any number."""

import subprocess
import sys

import pytest

from tests.killing import REPOSITORY


@pytest.mark.slow
def test_whatever_is_killed_nothing_is_lost_mixed_or_believed() -> None:
    counts = ["--kills", "3", "--resumes", "1", "--interrupts", "3", "--together", "3", "--systems", "wanda"]
    command = [sys.executable, "benchmarks/kills.py", *counts]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
