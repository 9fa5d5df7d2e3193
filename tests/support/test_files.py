import json
from pathlib import Path

import pytest

from lightning_prune.support import files
from lightning_prune.support.files import Lock, new_folder, sweep, write_bytes, write_json, write_text


def test_text_is_replaced_whole_or_not_at_all_and_no_temporary_file_is_left(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    write_text(target, "first")
    write_text(target, "zweite ✓")
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "\ud800")
    with pytest.raises(TypeError):
        write_bytes(target, "no bytes, found out when the file is open")
    assert target.read_text(encoding="utf-8") == "zweite ✓"
    assert [file.name for file in target.parent.iterdir()] == ["a.txt"]


def test_json_has_null_where_a_number_is_not_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [float("nan"), (float("inf"), 1.5)], "y": "é"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, [None, 1.5]], "y": "é"}


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_is_replaced_whole_or_stays(tmp_path: Path, exception: type[BaseException]) -> None:
    def write_half() -> None:
        with new_folder(tmp_path / "run") as folder:
            (folder / "half").write_text("x")
            raise exception

    with pytest.raises(exception):
        write_half()
    assert list(tmp_path.iterdir()) == []
    for name in ("old", "new"):
        with new_folder(tmp_path / "run") as folder:
            (folder / name).write_text("x")
            assert not (tmp_path / "run" / name).exists()
    with pytest.raises(exception):
        write_half()
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "run", replace=False) as folder:
        (folder / "newer").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["run", "run/new"]


def test_old_folder_comes_back_when_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("x")
    rename = files.os.replace

    def failing(source: Path, target: Path) -> None:
        if (Path(source) / "new").exists():
            raise OSError("no rename today")
        rename(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(OSError, match="no rename today"), new_folder(tmp_path / "run") as folder:
        (folder / "new").write_text("y")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["run", "run/old"]


def test_sweep_takes_what_nobody_holds_and_leaves_what_lives(tmp_path: Path) -> None:
    dead = [tmp_path / ".a.txt.12ab.tmp", tmp_path / ".run.12ab.tmp"]
    dead[0].touch()
    (dead[1] / "inside").mkdir(parents=True)
    others = [tmp_path / name for name in (".gitignore", "a.tmp", ".cache")]
    for other in others:
        other.touch()
    with new_folder(tmp_path / "alive") as folder:
        (folder / "x").touch()
        sweep(tmp_path)
        assert (folder / "x").exists()
        assert not any(path.exists() for path in dead)
    assert set(tmp_path.iterdir()) == {*others, tmp_path / "alive"}
    for name in (".a.txt.12ab.tmp", ".b.txt.12ab.tmp"):
        (tmp_path / name).touch()
    write_text(tmp_path / "a.txt", "x")  # the next write of a file sweeps what is its own
    assert set(tmp_path.iterdir()) == {*others, *(tmp_path / one for one in ("alive", "a.txt", ".b.txt.12ab.tmp"))}


def test_lock_is_exclusive_until_it_is_let_go(tmp_path: Path) -> None:
    lock = Lock.take(tmp_path / "lock", create=True)
    assert lock is not None
    assert Lock.take(tmp_path / "lock") is None
    lock.release()
    again = Lock.take(tmp_path / "lock")
    assert again is not None
    again.remove()
    assert not (tmp_path / "lock").exists()
    assert Lock.take(tmp_path / "lock") is None
