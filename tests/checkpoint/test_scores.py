"""The score table: its file to the bit, what is refused, and its units by block against a loop over them."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_prune.checkpoint.plan import LayerPlan, PruningPlan
from lightning_prune.checkpoint.scores import BLOCKS, COLUMNS, Scores
from lightning_prune.models.family import DENSE
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError

HEADER = "layer,block,unit,importance,cost,prior,score,pruned"


def table(layers: int = 3, heads: int = 2, channels: int = 4, whole_layers: bool = False) -> Scores:
    units = [(Block.LAYER, 0)] if whole_layers else [(Block.ATTENTION, i) for i in range(heads)]
    units += [] if whole_layers else [(Block.MLP, i) for i in range(channels)]
    layer, block, unit = zip(*[(layer, *unit) for layer in range(layers) for unit in units], strict=True)
    bits = np.random.default_rng(0).integers(0, 2**63, (3, len(layer)), dtype=np.int64).view(np.float64)
    values = np.where(np.isfinite(bits), bits, 0.1)
    values[:, :3] = [[1.0, 5e-324, -0.0]] * 3
    cost = np.arange(1, len(layer) + 1)
    code, pruned = np.array([BLOCKS.index(one) for one in block]), np.arange(len(layer)) % 3 == 0
    rows = (np.array(layer), code, np.array(unit), values[0], cost, values[1], values[2], pruned, values[0] / cost)
    return Scores(*rows)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "scores.csv"


def edited(path: Path, edit: Callable[[list[str]], object]) -> None:
    table().write(path)
    text = path.read_text().splitlines()
    edit(text)
    path.write_text("\n".join(text) + "\n")


@pytest.mark.parametrize("whole_layers", [False, True])
def test_file_gives_back_the_same_bits_in_any_order_of_rows(path: Path, whole_layers: bool) -> None:
    before = table(whole_layers=whole_layers)
    before.write(path)
    header, *rows = path.read_text().splitlines()
    assert header == HEADER
    for text in (rows, random.Random(0).sample(rows, len(rows))):
        path.write_text("\n".join([header, *text]) + "\n")
        after = Scores.read(path, "--run")
        for name in (*COLUMNS, "code", "base"):
            one, other = getattr(before, name), getattr(after, name)
            assert one.dtype == other.dtype, name
            assert one.tobytes() == other.tobytes(), name


@pytest.mark.slow
def test_table_of_an_8b_model_is_written_and_read_in_seconds(path: Path) -> None:
    big = table(layers=32, heads=8, channels=14336)
    assert len(big.unit) == 459_008
    started = time.process_time()
    big.write(path)
    Scores.read(path, "--run")
    assert time.process_time() - started < 4


def test_file_that_is_no_score_table_or_cut_in_the_middle_of_a_row_is_refused(path: Path) -> None:
    with pytest.raises(UserError, match=r"^--run: .*cannot read"):
        Scores.read(path, "--run")
    table().write(path)
    whole = path.read_text()
    others = ["", "layer,block\n0,mlp\n", "layer,block,unit\n0,embedding,0\n", "\x00\x01", f"{HEADER}\n", "\n\n"]
    for content in (*others, *(whole[:-cut] for cut in range(1, 12))):
        path.write_text(content)
        with pytest.raises(UserError, match=r"^--run: .*is not a score table"):
            Scores.read(path, "--run")


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
        ("block", "embedding", "row 4: block is embedding, allowed: attention, mlp, layer"),
        ("block", "layer", "row 4"),
        ("pruned", "2", "row 4: pruned is 2, allowed: 0 or 1"),
        ("pruned", "yes", "yes"),
    ],
)
def test_wrong_value_names_its_row(path: Path, column: str, value: str, message: str) -> None:
    def edit(text: list[str]) -> None:
        fields = text[ROW + 1].split(",")
        fields[COLUMNS.index(column)] = value
        text[ROW + 1] = ",".join(fields)

    edited(path, edit)
    with pytest.raises(UserError, match=message):
        Scores.read(path, "--run")


def test_rows_that_are_missing_or_there_twice_and_layers_among_blocks_are_noticed(path: Path) -> None:
    def says(words: str, edit: Callable[[list[str]], object]) -> None:
        edited(path, edit)
        with pytest.raises(UserError, match=words):
            Scores.read(path, "--run")

    for drop in (0, 2, 6):
        says("every unit of every layer has one row", lambda text, drop=drop: text.pop(drop + 1))
    says("is there twice", lambda text: text.insert(6, text[5]))
    says("mixes whole layers", lambda text: text.append("2,layer,0,1.0,1,1.0,1.0,0"))
    # The last unit of a block leaves no gap: only the plan, or the model, knows that it was there.
    for drop in (1, 5, 11):
        edited(path, lambda text, drop=drop: text.pop(drop + 1))
        assert len(Scores.read(path, "--run").unit) == 17


def plan(kept: list[dict[Block, list[int]]]) -> PruningPlan:
    layers = [LayerPlan(index, units) for index, units in enumerate(kept)]
    return PruningPlan("m", 0.2, 0.2, {"dense": 10, "pruned": 8}, None, "base", layers)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_without_units_has_no_rows(path: Path, layer: int) -> None:
    """It is a mixer alone, wherever it is; only the plan can tell it from one whose rows are lost."""
    whole = table()
    whole.at(whole.layer != layer).write(path)
    found = Scores.read(path, "--run")
    kept = [{block: found.unit[found.of(i, block) & found.kept].tolist() for block in DENSE} for i in range(3)]
    kept[layer] = {Block.MIXER: [0]}
    found.check_plan(plan(kept))
    kept[layer] = {Block.MLP: [0]}
    with pytest.raises(ValueError, match=f"layer {layer} keeps other units"):
        found.check_plan(plan(kept))


@pytest.mark.parametrize("whole_layers", [False, True])
def test_plan_must_keep_the_same_units(whole_layers: bool) -> None:
    found = table(whole_layers=whole_layers)
    stay = found.kept.reshape(3, -1).repeat(6 if whole_layers else 1, axis=1)  # of two groups and four channels
    kept = [{Block.ATTENTION: row[:2].nonzero()[0].tolist(), Block.MLP: row[2:].nonzero()[0].tolist()} for row in stay]
    found.check_plan(plan(kept))
    with pytest.raises(ValueError, match=r"it lists 3 layers, plan.json 2"):
        found.check_plan(plan(kept[:-1]))
    with pytest.raises(ValueError, match="layer 2 keeps other units"):
        found.check_plan(plan([*kept[:2], {Block.ATTENTION: [], Block.MLP: []}]))


@pytest.mark.parametrize("seed", range(5))
def test_units_by_block_are_those_of_a_loop(seed: int) -> None:
    """Layers 0, 2 and 5, rows in random order, some blocks missing."""
    draw = random.Random(seed)
    rows = [(layer, block) for layer in (0, 2, 5) for block in BLOCKS for _ in range(draw.randrange(5))]
    draw.shuffle(rows)
    layer, block = zip(*rows, strict=True)
    values = np.random.default_rng(seed).random(len(rows))
    ones = np.ones(len(rows), dtype=np.int64)
    code = np.array([BLOCKS.index(one) for one in block])
    scores = Scores(np.array(layer), code, ones, values, ones, values, values, values > 0.5, values)

    names = sorted(set(rows), key=lambda key: (key[0], BLOCKS.index(key[1])))
    expected = {name: [row for row, other in enumerate(rows) if other == name] for name in names}
    blocks = scores.blocks
    assert {key: found.tolist() for key, found in blocks.rows().items()} == expected
    assert blocks.keys == names
    assert [names[number] for number in blocks.ids] == rows
    assert blocks.size.tolist() == [len(inside) for inside in expected.values()]
    assert blocks.sum(scores.pruned).tolist() == [sum(values[inside] > 0.5) for inside in expected.values()]
    assert blocks.sum(values).tolist() == pytest.approx([sum(values[inside]) for inside in expected.values()])
    large = np.full(len(rows), 2**53 + 1)
    assert blocks.sum(large).tolist() == [size * (2**53 + 1) for size in blocks.size.tolist()]

    order = draw.sample(range(len(rows)), k=len(rows) * 2 // 3)
    earlier = [sum(rows[other] == rows[row] for other in order[:place]) for place, row in enumerate(order)]
    assert blocks.rank(np.array(order, dtype=np.int64)).tolist() == earlier

    for one in BLOCKS:
        for number, share in enumerate(scores.kept_fraction(one)):
            inside = expected.get((number, one))
            assert np.isnan(share) if inside is None else share == pytest.approx(np.mean(values[inside] <= 0.5))
