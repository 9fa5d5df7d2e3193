"""Progress of a whole run: it never promises what is not there, draws on terminals only, and can be told by another."""

import io
import re
import sys
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_prune.support import progress as module
from lightning_prune.support.progress import Lines, Progress, Status, clock, display_for


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the display was told."""
    found = SimpleNamespace(statuses=[], endings=[])
    found.moved, found.ended = found.statuses.append, found.endings.append
    monkeypatch.setattr(module, "display_for", lambda: found)
    return found


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, as a list of one number."""
    found = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: found[0])
    return found


def test_the_status_names_phase_place_and_what_is_left(recorded: Any, now: list[float]) -> None:
    progress = Progress()
    progress.expect("calibrating", 30)
    progress.expect("writing", 10)
    now[0] += 20
    progress.advance("calibrating", 10, "layer 1 of 3")
    assert recorded.statuses == [
        Status("calibrating", "layer 1 of 3", number=1, phases=2, share=1 / 3, fraction=0.25, seconds=20.0, left=60.0)
    ]
    progress.advance("calibrating", 30)  # an estimate that was too low grows
    assert recorded.statuses[-1].fraction == pytest.approx(40 / 50)
    progress.finish("calibrating")
    progress.advance("writing", 1)
    progress.finish("writing")  # counts whole, however much was said
    progress.close()
    assert progress.fraction == 1
    assert recorded.endings == ["calibrating: 20.0 s", "writing: 0.0 s"]


def test_the_end_of_a_step_is_not_the_end_of_its_phase(recorded: Any) -> None:
    progress = Progress()
    progress.expect("calibrating", 80)
    progress.expect("writing", 20)
    progress.advance("calibrating", 15)
    progress.finish("calibrating", share=0.25)
    assert progress.fraction == pytest.approx(0.2)
    progress.advance("calibrating", 30)
    assert progress.fraction == pytest.approx(0.5)
    progress.finish("calibrating", share=0.5)  # did more than was said
    assert progress.fraction == pytest.approx(0.5)
    progress.finish("calibrating")
    assert progress.fraction == pytest.approx(0.8)


def test_nothing_is_shown_where_nothing_is_wanted_or_done(recorded: Any) -> None:
    unwanted, idle = Progress(shown=False), Progress()
    for progress in (unwanted, idle):
        progress.expect("calibrating", 4)
    unwanted.advance("calibrating", 2)
    for progress in (unwanted, idle):
        progress.finish("calibrating")
        progress.close()
    assert (recorded.statuses, recorded.endings) == ([], [])
    assert not unwanted.part("wanda 0.2").shown


def test_off_a_terminal_a_phase_is_a_line_and_a_long_one_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], now: list[float]
) -> None:
    progress = Progress()
    progress.expect("calibrating", 1000)
    progress.expect("writing", 1000)
    for _ in range(1000):
        now[0] += 0.1
        progress.advance("calibrating", 1, "layer 2 of 3")
    progress.finish("calibrating")
    now[0] += 20
    progress.advance("writing", 1)
    progress.finish("writing")
    progress.close()
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == ""
    assert lines[0] == "calibrating (layer 2 of 3): 15% of the run after 0:30, about 2:50 left"
    # Of 100 s one every 30. The second phase's time counts from the first one's end.
    assert lines[3:] == ["calibrating: 1:40", "writing: 20.0 s"]
    assert not set(shown.err) & {"\r", "\x1b"}


def test_a_part_tells_the_whole_and_takes_nothing_back(recorded: Any) -> None:
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
    whole.finish("wanda 0.2")
    assert whole.fraction == pytest.approx(0.5)


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0.4, 65, 3599.6, 7325)] == ["0:00", "1:05", "1:00:00", "2:02:05"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("term", ["dumb", "unknown", None])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(term: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.delenv("TERM", raising=False) if term is None else monkeypatch.setenv("TERM", term)
    assert isinstance(display_for(), Lines)


PHASES = ("perplexity of the dense model", "writing the pruned model")


def test_on_a_terminal_there_are_two_rows_and_then_only_what_stays(
    now: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    with closing(Progress()) as progress:
        for phase in PHASES:
            progress.expect(phase, 4)
        for phase in PHASES:
            for layer in range(4):
                now[0] += 0.12
                progress.advance(phase, 1, f"importance, layer {layer + 1} of 4")
            print("to stdout", phase)
            progress.finish(phase)
    drawn = terminal.getvalue()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)
    assert "importance, layer 2 of 4" in text
    assert re.search(r"phase 1 of 2, 0:0\d +\S+ +\d+ % about 0:0\d left, [\d,]+ MiB", text)
    assert "phase 2 of 2" in text
    rows = [line for line in re.split(r"[\r\n]+", text) if "MiB" in line or "layer" in line]
    assert max(len(row.rstrip()) for row in rows) <= 80
    # When the rows are gone: the endings in order, a cursor that is seen, and nothing of what was printed to a file.
    stays = [line.strip() for line in text.splitlines() if re.match(r"(perplexity|writing).*: \d\.\d s", line.strip())]
    assert tuple(line.partition(":")[0] for line in stays) == PHASES
    assert drawn.rfind("\x1b[?25h") > drawn.rfind("\x1b[?25l") >= 0
    assert "to stdout" not in text
    assert capsys.readouterr().out.splitlines() == [f"to stdout {phase}" for phase in PHASES]
