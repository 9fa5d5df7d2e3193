import time
from pathlib import Path

import numpy as np
import pytest

from lightning_prune.checkpoint.plan import LayerPlan, PruningPlan
from lightning_prune.runs.score_table import COLUMNS, ScoreTable
from lightning_prune.support.errors import UserError

HEADER = "layer,block,unit,importance,cost,prior,score,pruned"


def table(layers: int = 3, heads: int = 2, channels: int = 4, whole_layers: bool = False) -> ScoreTable:
    units = [("layer", 0)] if whole_layers else [("attention", i) for i in range(heads)]
    units += [] if whole_layers else [("mlp", i) for i in range(channels)]
    rows = [(layer, *unit) for layer in range(layers) for unit in units]
    layer, block, unit = zip(*rows, strict=True)
    bits = np.random.default_rng(0).integers(0, 2**63, (3, len(rows)), dtype=np.int64).view(np.float64)
    values = np.where(np.isfinite(bits), bits, 0.1)
    values[:, :3] = [[1.0, 5e-324, -0.0]] * 3
    return ScoreTable(
        layer=np.array(layer),
        block=np.array(block),
        unit=np.array(unit),
        importance=values[0],
        cost=np.arange(1, len(rows) + 1),
        prior=values[1],
        score=values[2],
        pruned=np.arange(len(rows)) % 3 == 0,
    )


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.parametrize("whole_layers", [False, True])
def test_file_gives_back_the_same_bits(tmp_path: Path, whole_layers: bool) -> None:
    before = table(whole_layers=whole_layers)
    before.save(tmp_path / "scores.csv")
    assert lines(tmp_path / "scores.csv")[0] == HEADER
    after = ScoreTable.load(tmp_path / "scores.csv", "--run")
    for name in COLUMNS:
        one, other = getattr(before, name), getattr(after, name)
        assert one.dtype.kind == other.dtype.kind, name
        assert one.tobytes() == other.tobytes() or (name == "block" and (one == other).all()), name


def test_table_of_an_8b_model_is_written_and_read_in_seconds(tmp_path: Path) -> None:
    big = table(layers=32, heads=8, channels=14336)
    assert len(big.unit) == 459_008
    started = time.process_time()
    big.save(tmp_path / "scores.csv")
    ScoreTable.load(tmp_path / "scores.csv", "--run")
    assert time.process_time() - started < 4


@pytest.mark.parametrize(
    "content",
    [None, "", "layer,block\n0,mlp\n", "layer,block,unit\n0,embedding,0\n", "\x00\x01", f"{HEADER}\n", "\n\n"],
)
def test_file_that_is_no_score_table_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "scores.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"^--run: .*(is not a score table|no file at)"):
        ScoreTable.load(path, "--run")


ROW = 3  # of the table: layer 0, mlp 1


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("importance", "nan", "row 4: importance is nan, allowed: finite"),
        ("score", "inf", "row 4: score is inf, allowed: finite"),
        ("prior", "-inf", "row 4: prior is -inf, allowed: finite"),
        ("importance", "", "importance|column"),
        ("importance", "much", "much"),
        ("cost", "-5", "row 4: cost is -5, allowed: 1 or more"),
        ("cost", "0", "row 4: cost is 0, allowed: 1 or more"),
        ("cost", "1e3", "1e3"),
        ("cost", "99999999999999999999", "99999999999999999999"),
        ("layer", "1000000000", "row 4: layer is 1000000000, allowed: below the number of rows"),
        ("layer", "-1", "row 4: layer is -1, allowed: 0 or more"),
        ("unit", "-1", "row 4: unit is -1, allowed: 0 or more"),
        ("unit", "7", "row 4 .* every unit of every layer has one row"),
        ("unit", "0", "row 4 .* every unit of every layer has one row"),
        ("block", "embedding", "row 4: block is embedding, allowed: attention, mlp or layer"),
        ("block", "layer", "row 4"),
        ("pruned", "2", "row 4: pruned is 2, allowed: 0 or 1"),
        ("pruned", "yes", "yes"),
    ],
)
def test_wrong_value_names_its_row(tmp_path: Path, column: str, value: str, message: str) -> None:
    path = tmp_path / "scores.csv"
    table().save(path)
    text = lines(path)
    fields = text[ROW + 1].split(",")
    fields[COLUMNS.index(column)] = value
    text[ROW + 1] = ",".join(fields)
    path.write_text("\n".join(text) + "\n")
    with pytest.raises(UserError, match=message):
        ScoreTable.load(path, "--run")


@pytest.mark.parametrize("drop", [0, 1, 2, 5, 6, 11])
def test_missing_row_is_noticed(tmp_path: Path, drop: int) -> None:
    path = tmp_path / "scores.csv"
    table().save(path)
    text = lines(path)
    del text[drop + 1]
    path.write_text("\n".join(text) + "\n")
    # The last unit of a block leaves no gap: only the plan, or the model, knows that it was there.
    if drop in (1, 5, 11):
        assert len(ScoreTable.load(path, "--run").unit) == 17
    else:
        with pytest.raises(UserError, match="every unit of every layer has one row"):
            ScoreTable.load(path, "--run")


def test_row_that_stands_twice_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    table().save(path)
    text = lines(path)
    path.write_text("\n".join([*text[:6], text[5], *text[6:]]) + "\n")
    with pytest.raises(UserError, match="stands there twice"):
        ScoreTable.load(path, "--run")


@pytest.mark.parametrize("cut", range(1, 12))
def test_table_cut_in_the_middle_of_a_row_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "scores.csv"
    table().save(path)
    path.write_text(path.read_text()[:-cut])
    with pytest.raises(UserError, match="is not a score table"):
        ScoreTable.load(path, "--run")


@pytest.mark.parametrize("whole_layers", [False, True])
def test_plan_must_keep_the_same_units(whole_layers: bool) -> None:
    found = table(whole_layers=whole_layers)
    if whole_layers:
        layers = [LayerPlan(0, [], []), LayerPlan(1, [0, 1], [0, 1, 2, 3]), LayerPlan(2, [0, 1], [0, 1, 2, 3])]
    else:
        rows = list(zip(found.layer.tolist(), found.block.tolist(), found.unit.tolist(), found.pruned, strict=True))
        layers = [
            LayerPlan(
                layer,
                [unit for at, block, unit, gone in rows if (at, block) == (layer, "attention") and not gone],
                [unit for at, block, unit, gone in rows if (at, block) == (layer, "mlp") and not gone],
            )
            for layer in range(3)
        ]
    found.check_plan(plan(layers))
    with pytest.raises(ValueError, match=r"it lists 3 layers, plan.json 2"):
        found.check_plan(plan(layers[:-1]))
    layers[2] = LayerPlan(2, [], [])
    with pytest.raises(ValueError, match="layer 2 keeps other units"):
        found.check_plan(plan(layers))


def plan(layers: list[LayerPlan]) -> PruningPlan:
    return PruningPlan("m", 0.2, 0.2, {"dense": 10, "pruned": 8}, None, "base", layers)
