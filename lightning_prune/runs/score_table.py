"""``scores.csv``: one row per prunable unit, read and written as columns. No torch: the comparison reads it too."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import read_file, write_bytes

BLOCKS = ("attention", "mlp", "layer")
LIMIT = 2 * 2**30  # bytes; the table of an 8B model has some 40 MB
TYPES = {
    "layer": pa.int64(),
    "block": pa.dictionary(pa.int32(), pa.string()),
    "unit": pa.int64(),
    "importance": pa.float64(),
    "cost": pa.int64(),
    "prior": pa.float64(),
    "score": pa.float64(),
    "pruned": pa.int8(),
}
COLUMNS = tuple(TYPES)
Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ScoreTable:
    """U prunable units, sorted by layer, block and unit, every one once and without gaps.

    Shapes ``[U]``: layer, unit, cost (in parameters) int64; block ``attention``, ``mlp`` or ``layer``; importance,
    prior, score float64; pruned bool.

    Raises:
        ValueError: a row that cannot be, twice the same unit, or a gap.
    """

    layer: Integers
    block: NDArray[np.str_]
    unit: Integers
    importance: Floats
    cost: Integers
    prior: Floats
    score: Floats
    pruned: NDArray[np.bool_]

    def __post_init__(self) -> None:
        _check_rows(self.columns())
        self._check_complete()

    def _check_complete(self) -> None:
        """In every block of every layer units count from 0, one by one."""
        code = self.codes
        same = (self.layer[1:] == self.layer[:-1]) & (code[1:] == code[:-1])
        expected = np.where(same, self.unit[:-1] + 1, 0)
        later = (self.layer[1:] > self.layer[:-1]) | ((self.layer[1:] == self.layer[:-1]) & (code[1:] >= code[:-1]))
        step = np.diff(self.layer)
        wrong = np.concatenate(
            ([self.layer[0] != 0 or self.unit[0] != 0], ~later | (self.unit[1:] != expected) | (step > 1))
        )
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(
                f"row {row + 1} (layer {self.layer[row]}, {self.block[row]} {self.unit[row]}) is missing what should "
                "stand before it, or stands there twice: every unit of every layer has one row"
            )
        if self.whole_layers and not bool((code == BLOCKS.index("layer")).all()):
            raise ValueError("it mixes whole layers with parts of layers")

    def columns(self) -> dict[str, NDArray[Any]]:
        """All columns by name."""
        return {name: getattr(self, name) for name in COLUMNS}

    @property
    def codes(self) -> Integers:
        """The block of every row as its index in ``BLOCKS``, ``[U]``."""
        return _codes(self.block)

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Which units stay, ``[U]``."""
        return ~self.pruned

    @property
    def num_layers(self) -> int:
        """Decoder layers of the dense model."""
        return int(self.layer[-1]) + 1

    @property
    def whole_layers(self) -> bool:
        """Whether the units are decoder layers (depth pruning)."""
        return bool((self.block == "layer").any())

    def per_layer(self, values: NDArray[Any], block: str | None = None) -> Floats:
        """Sums of ``values`` ``[U]`` per layer ``[L]``, of one block or of all."""
        rows = slice(None) if block is None else self.block == block
        return np.bincount(self.layer[rows], weights=values[rows], minlength=self.num_layers).astype(np.float64)

    def check_plan(self, plan: PruningPlan) -> None:
        """Raise ValueError unless ``plan`` keeps exactly the units that are not pruned here."""
        if len(plan.layers) != self.num_layers:
            raise ValueError(f"it lists {self.num_layers} layers, plan.json {len(plan.layers)}")
        code, kept = self.codes, self.kept
        starts = np.searchsorted(self.layer, np.arange(self.num_layers + 1))
        for index, layer in enumerate(plan.layers):
            rows = slice(starts[index], starts[index + 1])
            if self.whole_layers:
                same = bool(kept[rows][0]) == bool(layer.kept_kv_heads or layer.kept_channels)
            else:
                same = all(
                    self.unit[rows][kept[rows] & (code[rows] == block)].tolist() == planned
                    for block, planned in enumerate((layer.kept_kv_heads, layer.kept_channels))
                )
            if layer.layer != index or not same:
                raise ValueError(f"layer {index} keeps other units than plan.json says")

    def save(self, path: Path) -> None:
        """Write the table, whole or not at all; floats are written so that reading gives back the same bits.

        Raises:
            OSError: the folder cannot be written or the disk is full.
        """
        columns = self.columns() | {"pruned": self.pruned.astype(np.int8)}
        sink = pa.BufferOutputStream()
        sink.write((",".join(COLUMNS) + "\n").encode())
        options = pa.csv.WriteOptions(include_header=False, quoting_style="none")
        pa.csv.write_csv(pa.table(columns), sink, options)
        write_bytes(path, sink.getvalue())

    @classmethod
    def load(cls, path: Path, option: str) -> "ScoreTable":
        """Read a table, whose rows may stand in any order.

        Raises:
            UserError: a missing file, or one that is no complete score table; names the row.
        """
        data = read_file(path, LIMIT, option)
        try:
            return _parse(data)
        except (ValueError, KeyError, pa.ArrowException) as error:
            raise UserError(
                f"{option}: '{path}' is not a score table with the columns {', '.join(COLUMNS)} "
                f"({' '.join(str(error).split())})."
            ) from None


def _parse(data: bytes) -> ScoreTable:
    if not data.endswith(b"\n"):
        raise ValueError("its last line is cut off" if data else "it is empty")
    found = pa.csv.read_csv(
        pa.BufferReader(data),
        read_options=pa.csv.ReadOptions(use_threads=False),
        convert_options=pa.csv.ConvertOptions(column_types=TYPES, include_columns=COLUMNS, null_values=[]),
    )
    if found.column_names != list(COLUMNS):
        raise ValueError(f"its columns are {', '.join(found.column_names)}")
    columns = {name: found[name].combine_chunks() for name in COLUMNS if name != "block"}
    arrays: dict[str, Any] = {name: column.to_numpy(zero_copy_only=False) for name, column in columns.items()}
    wrong = (arrays["pruned"] < 0) | (arrays["pruned"] > 1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"row {row + 1}: pruned is {arrays['pruned'][row]}, allowed: 0 or 1")
    arrays["pruned"] = arrays["pruned"].astype(bool)
    block = found["block"].unify_dictionaries().combine_chunks()
    names = np.array(block.dictionary.to_pylist() or [""], dtype=np.str_)
    arrays["block"] = names[block.indices.to_numpy(zero_copy_only=False)]
    _check_rows(arrays)  # before they are sorted, so that row numbers are the file's
    order = np.lexsort((arrays["unit"], _codes(arrays["block"]), arrays["layer"]))
    return ScoreTable(**{name: arrays[name][order] for name in COLUMNS})


def _check_rows(columns: dict[str, NDArray[Any]]) -> None:
    rows = len(columns["layer"])
    if not rows:
        raise ValueError("it holds no rows")
    checks = [(name, ~np.isfinite(columns[name]), "finite") for name in ("importance", "prior", "score")]
    checks += [(name, columns[name] < 0, "0 or more") for name in ("layer", "unit")]
    checks.append(("cost", columns["cost"] < 1, "1 or more"))
    checks.append(("block", ~np.isin(columns["block"], BLOCKS), "attention, mlp or layer"))
    # Every layer has a row, so a larger number than there are rows cannot be; nothing is allocated from it.
    checks.append(("layer", columns["layer"] >= rows, f"below the number of rows, {rows:,}"))
    for name, wrong, allowed in checks:
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(f"row {row + 1}: {name} is {columns[name][row]}, allowed: {allowed}")


def _codes(block: NDArray[np.str_]) -> Integers:
    """Names of blocks as their index in ``BLOCKS``, ``[U]``; unknown names come last."""
    return np.select([block == name for name in BLOCKS], list(range(len(BLOCKS))), len(BLOCKS)).astype(np.int64)
