"""Processes with the simulated device, apart from this one, in which torch has no accelerator."""

import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

from tests.killing import Ended, Forks, Kill

On = Callable[..., Ended]


@pytest.fixture(scope="session")
def on_sim() -> Iterator[On]:
    """``on_sim(*argv, kill=None)`` runs ``simulated.main`` in a process of its own."""
    if not is_ninja_available() or shutil.which(get_cxx_compiler()) is None:
        pytest.skip("the simulated accelerator is compiled: needs a C++ compiler and ninja")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("the simulated accelerator is compiled: needs Python's headers")
    forks = Forks("tests.accelerator.simulated")

    def run(*argv: object, kill: Kill | None = None) -> Ended:
        return forks.run([str(word) for word in argv], kill)

    yield run
    forks.close()


@pytest.fixture(scope="session")
def call(on_sim: On) -> Callable[..., None]:
    """``call(function, *strings)`` calls a function of a test module in a process with the device."""

    def run(function: Callable[..., None], *arguments: object) -> None:
        ended = on_sim("call", f"{function.__module__}:{function.__name__}", *arguments)
        assert ended.status == 0, ended.printed

    return run
