"""One bar for a whole run: it never goes back, and ends at its end."""

import pytest

from lightning_prune.progress import Progress


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


def test_the_bar_shows_the_phase_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.expect("calibrating", 4)
    progress.advance("calibrating", 4)
    progress.close()
    shown = capsys.readouterr().err
    assert "calibrating" in shown
    assert "100%" in shown
    assert "left" in shown


def test_nothing_is_shown_where_no_bar_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(shown=False)
    progress.expect("calibrating", 4)
    progress.advance("calibrating", 2)
    progress.close()
    assert capsys.readouterr().err == ""
