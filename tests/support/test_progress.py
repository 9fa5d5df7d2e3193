"""Progress of a whole run: it never promises what is not there, draws on terminals only, and can be told by another."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from lightning_prune.support import progress as module
from lightning_prune.support import progress_display as display
from lightning_prune.support.progress import Progress
from lightning_prune.support.progress_display import Lines, Status, clock, ending

ROOT = Path(__file__).parents[2]


class Recorded:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.statuses: list[Status] = []
        self.endings: list[str] = []
        self.closed = 0

    def moved(self, status: Status) -> None:
        self.statuses.append(status)

    def ended(self, phase: str, seconds: float) -> None:
        self.endings.append(phase)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    found = Recorded()
    monkeypatch.setattr(module, "display_for", lambda: found)
    return found


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, as a list of one number."""
    found = [1000.0]
    for one in (module, display):
        monkeypatch.setattr(one.time, "monotonic", lambda: found[0])
    return found


def test_phases_share_one_amount_of_work() -> None:
    progress = Progress()
    progress.expect("calibrating", 300)
    progress.expect("writing", 100)
    progress.advance("calibrating", 100)
    assert progress.fraction == pytest.approx(100 / 400)
    progress.advance("writing", 100)
    assert progress.fraction == pytest.approx(200 / 400)
    progress.close()


def test_a_low_estimate_grows_with_the_work() -> None:
    progress = Progress()
    progress.expect("calibrating", 10)
    progress.expect("writing", 90)
    for _ in range(5):
        progress.advance("calibrating", 10)
    assert progress.fraction == pytest.approx(50 / 140)
    progress.close()


def test_a_finished_phase_counts_whole_however_much_was_said() -> None:
    progress = Progress()
    progress.expect("calibrating", 100)
    progress.advance("calibrating", 1)
    progress.finish("calibrating")
    assert progress.fraction == 1.0
    progress.close()


def test_the_status_names_phase_place_and_what_is_left(recorded: Recorded, now: list[float]) -> None:
    progress = Progress()
    progress.expect("calibrating", 30)
    progress.expect("writing", 10)
    now[0] += 20
    progress.advance("calibrating", 10, "layer 1 of 3")
    assert recorded.statuses == [
        Status("calibrating", "layer 1 of 3", number=1, phases=2, share=1 / 3, fraction=0.25, seconds=20.0, left=60.0)
    ]
    progress.finish("calibrating")
    progress.close()
    assert (recorded.endings, recorded.closed) == (["calibrating"], 1)


def test_nothing_is_shown_where_nothing_is_wanted_or_done(
    capsys: pytest.CaptureFixture[str], recorded: Recorded
) -> None:
    unwanted = Progress(shown=False)
    unwanted.expect("calibrating", 4)
    unwanted.advance("calibrating", 2)
    unwanted.finish("calibrating")
    unwanted.close()
    idle = Progress()
    idle.expect("calibrating", 4)
    idle.finish("calibrating")
    idle.close()
    assert (recorded.statuses, recorded.endings) == ([], [])
    assert capsys.readouterr().err == ""


def test_off_a_terminal_a_phase_is_a_line(capsys: pytest.CaptureFixture[str], now: list[float]) -> None:
    progress = Progress()
    progress.expect("calibrating", 400)
    progress.expect("writing", 1)
    for _ in range(400):
        now[0] += 0.05
        progress.advance("calibrating", 1, "layer 1 of 3")
    progress.finish("calibrating")
    now[0] += 90
    progress.advance("writing", 1)
    progress.finish("writing")
    progress.close()
    shown = capsys.readouterr()
    assert shown.out == ""
    # The second phase's time counts from the first one's end, also before its first piece of work is done.
    assert shown.err.splitlines()[0] == "calibrating: 20.0 s"
    assert shown.err.splitlines()[-1] == "writing: 1:30"
    assert "\r" not in shown.err
    assert "\x1b" not in shown.err


def test_off_a_terminal_a_long_phase_says_now_and_then_how_far_it_is(
    capsys: pytest.CaptureFixture[str], now: list[float]
) -> None:
    progress = Progress()
    progress.expect("calibrating", 1000)
    progress.expect("writing", 1000)
    for _ in range(1000):
        now[0] += 0.1
        progress.advance("calibrating", 1, "layer 2 of 3")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # of 100 s, one every 30
    assert lines[0] == "calibrating (layer 2 of 3): 15% of the run after 0:30, about 2:50 left"


def test_a_part_tells_the_whole_and_takes_nothing_back(recorded: Recorded) -> None:
    whole = Progress()
    whole.expect("wanda 0.2", 1)
    whole.expect("wanda 0.3", 1)
    part = whole.part("wanda 0.2")
    part.expect("calibrating", 10)
    part.advance("calibrating", 5, "layer 1 of 2")
    assert whole.fraction == pytest.approx(0.25)
    assert (recorded.statuses[-1].phase, recorded.statuses[-1].at) == ("wanda 0.2", "calibrating, layer 1 of 2")
    part.expect("writing", 90)
    part.advance("writing", 1)
    assert whole.fraction == pytest.approx(0.25)
    part.close()
    assert recorded.closed == 0
    whole.finish("wanda 0.2")
    assert whole.fraction == pytest.approx(0.5)


def test_a_part_of_what_is_not_shown_is_not_shown() -> None:
    assert not Progress(shown=False).part("wanda 0.2").shown


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (65, "1:05"), (3599.6, "1:00:00"), (7325, "2:02:05")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_endings_are_exact_where_they_are_short() -> None:
    assert ending("writing", 1.25) == "writing: 1.2 s"
    assert ending("writing", 61) == "writing: 1:01"


@pytest.mark.parametrize("term", ["dumb", "unknown", None])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(term: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    if term is None:
        monkeypatch.delenv("TERM", raising=False)
    else:
        monkeypatch.setenv("TERM", term)
    assert isinstance(display.display_for(), Lines)


def in_a_terminal(code: str, columns: int = 80, stdout: int | None = None) -> str:
    """What a program writes to a pseudo-terminal: stderr, and stdout unless it goes elsewhere."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=theirs if stdout is None else stdout, stderr=theirs, env=environment
    )
    os.close(theirs)
    found = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux's end of a terminal that nobody writes to
            break
        if not piece:
            break
        found += piece
    os.close(ours)
    assert process.wait(60) == 0, found.decode()
    return found.decode()


RUN = """
import sys, time, warnings
from contextlib import closing
from lightning_prune.support.progress import Progress
with closing(Progress()) as progress:
    progress.expect("perplexity of the dense model", 4)
    progress.expect("writing the pruned model", 4)
    for phase in ("perplexity of the dense model", "writing the pruned model"):
        for layer in range(4):
            time.sleep(0.12)
            progress.advance(phase, 1, f"importance, layer {layer + 1} of 4")
        print("to stdout", phase)
        progress.finish(phase)
print("the end")
"""


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_on_a_terminal_there_is_one_area_and_then_only_what_stays() -> None:
    drawn = in_a_terminal(RUN)
    text = plain(drawn)
    assert "importance, layer 2 of 4" in text
    assert re.search(r"phase 1 of 2, 0:00 +\S+ +\d+ % about 0:0\d left, [\d,]+ MiB", text)
    assert re.search(r"phase 2 of 2", text)
    rows = [line for line in re.split(r"[\r\n]+", text) if "MiB" in line or "layer" in line]
    assert rows
    assert max(len(row.rstrip()) for row in rows) <= 80
    # What is left when the area is gone: the endings in order, what was printed, and a cursor that is seen.
    stays = [line.strip() for line in text.splitlines() if re.match(r"(perplexity|writing).*: \d\.\d s", line.strip())]
    assert [line.partition(":")[0] for line in stays] == ["perplexity of the dense model", "writing the pruned model"]
    assert "to stdout writing the pruned model" in text
    assert text.rstrip().endswith("the end")
    assert drawn.rfind("\x1b[?25h") > drawn.rfind("\x1b[?25l") >= 0


def test_what_is_printed_to_a_file_does_not_come_to_the_terminal(tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as file:
        text = in_a_terminal(RUN, stdout=file.fileno())
    assert "to stdout" not in text
    assert (tmp_path / "out").read_text().splitlines() == [
        "to stdout perplexity of the dense model",
        "to stdout writing the pruned model",
        "the end",
    ]
