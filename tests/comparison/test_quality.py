import json
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.comparison.quality import cost_figure, size_figure, speed_figure
from lightning_prune.comparison.run import Run, load_run
from lightning_prune.comparison.speed import speeds
from lightning_prune.comparison.style import TIP, line_styles
from lightning_prune.support.errors import UserError
from tests.comparison.fake_run import write_run


def measured(folder: Path, tokens_per_second: float, **changes: Any) -> Run:
    """The run in ``folder`` with an ``efficiency.json``."""
    model = {"parameters": 1, "speed": [{"batch_size": 1, "decode_tokens_per_second": tokens_per_second}]}
    dense = {"speed": [{"batch_size": 1, "decode_tokens_per_second": 50.0}]}
    report = {"setting": {"prompt_length": 128, "decode_length": 32, "repeats": 5}, "device": "cpu", "dtype": "float32"}
    report |= {"threads": 1, "engine": "transformers", "pruned": model, "dense": dense}
    (folder / "efficiency.json").write_text(json.dumps(report | changes))
    return load_run(folder)


def marks(axes: Any) -> dict[str, tuple[float, float]]:
    """Where the marks stand, by what they say."""
    lines = [line for line in axes.lines if (line.get_gid() or "").startswith(TIP)]
    return {line.get_gid().removeprefix(TIP): (line.get_xdata()[0], line.get_ydata()[0]) for line in lines}


def ringed(axes: Any) -> list[tuple[float, float]]:
    line = next(line for line in axes.lines if line.get_label() == "Pareto front")
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def styles(runs: list[Run]) -> Any:
    return line_styles([run.label for run in runs])


def test_marks_say_their_numbers_and_the_best_are_ringed(tmp_path: Path) -> None:
    values = {"a": (0.2, 12.0), "b": (0.2, 11.0), "c": (0.3, 20.0), "d": (0.1, 30.0)}
    runs = [load_run(write_run(tmp_path, name, ratio, perplexity=y)) for name, (ratio, y) in values.items()]
    axes = size_figure(runs, "demo", "demo", styles(runs)).axes[0]
    found = marks(axes)
    assert found["b, ratio 0.2: perplexity 11.000, 20.00% removed, near dense"] == (0.2, 11.0)
    assert sorted(found.values()) == sorted(values.values())
    assert ringed(axes) == [(0.3, 20.0), (0.2, 11.0)]  # the more removed the better: d is beaten by b


def test_ratios_of_whole_units_are_the_same_ratio(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path, "a", 0.3, 0.2999, 12.0)),
        load_run(write_run(tmp_path, "b", 0.3, 0.2961, 11.0)),
    ]
    assert ringed(size_figure(runs, "demo", "demo", styles(runs)).axes[0]) == [(0.2961, 11.0)]


def test_unusable_models_stand_on_the_edge_and_beat_nobody(tmp_path: Path) -> None:
    # Dense 10 and unigram 100: unusable from √1000, 31.6.
    far = {"a": 11.0, "b": 1e6, "c": None}
    runs = [load_run(write_run(tmp_path, name, 0.1 * n, perplexity=y)) for n, (name, y) in enumerate(far.items(), 1)]
    axes = size_figure(runs, "demo", "demo", styles(runs)).axes[0]
    found = {text[0]: point for text, point in marks(axes).items()}
    assert found["b"][1] == found["c"][1] == axes.get_ylim()[1] == pytest.approx(2 * 1000**0.5)
    assert ringed(axes) == [(0.1, 11.0)]
    assert any("perplexity 1.00e+06" in text and "unusable" in text for text in marks(axes))


def test_cost_counts_what_another_run_measured_and_nothing_unknown(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, name) for name in ("a", "b", "c")]
    for folder, facts in zip(folders[1:], ({"measured_seconds": {"calibrate": 40.0}}, {}), strict=True):
        metrics = json.loads((folder / "metrics.json").read_text())
        del metrics["seconds"]["calibrate"]
        metrics["method"] |= {"scores_reused": True} | facts
        (folder / "metrics.json").write_text(json.dumps(metrics))
    runs = [load_run(folder) for folder in folders]
    axes = cost_figure(runs, "demo", "demo", styles(runs)).axes[0]
    assert {text[0]: x for text, (x, _) in marks(axes).items()} == {"a": 2.0, "b": 40.0}  # c: nobody knows


def test_speed_is_compared_among_runs_that_were_measured_alike(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, name, perplexity=y) for name, y in (("a", 12.0), ("b", 13.0), ("c", 11.0))]
    runs = [measured(folders[0], 80.0), measured(folders[1], 100.0), measured(folders[2], 900.0, device="cuda:0")]
    runs.append(load_run(write_run(tmp_path, "d")))
    found = speeds(runs)
    assert found is not None
    assert found.how == "transformers, float32 on cpu, 1 CPU threads, batch 1, 32 tokens after 128"
    assert (found.pruned, found.dense) == ({id(runs[0]): 80.0, id(runs[1]): 100.0}, 50.0)
    axes = speed_figure(runs, "demo", "demo", styles(runs), found).axes[0]
    assert sorted(marks(axes).values()) == [(80.0, 12.0), (100.0, 13.0)]
    assert ringed(axes) == [(100.0, 13.0), (80.0, 12.0)]
    assert speeds(runs[1:]) is None  # one on every device


def test_wrong_efficiency_file_is_one_message(tmp_path: Path) -> None:
    run = measured(write_run(tmp_path), 1.0, pruned={"speed": "fast"})
    with pytest.raises(
        UserError, match=r"efficiency.json' is not valid: pruned.speed is 'fast'.*evaluate --efficiency"
    ):
        speeds([run])
