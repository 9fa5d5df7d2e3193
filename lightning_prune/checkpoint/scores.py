"""``scores.csv``, one row per prunable unit: importance, score, and whether it is pruned. No torch here."""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import read_file, write_bytes

BLOCKS = tuple(block for block in Block if block is not Block.MIXER)
LIMIT = 2 * 2**30  # bytes; the table of an 8B model has some 40 MB
TYPES = {
    "layer": pa.int64(),
    "block": pa.string(),
    "unit": pa.int64(),
    "importance": pa.float64(),
    "cost": pa.int64(),
    "prior": pa.float64(),
    "score": pa.float64(),
    "pruned": pa.int8(),
}
COLUMNS = tuple(TYPES)
SUPER = "super_expert"  # a column of tables that list experts, or their channels
Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Blocks:
    """The B blocks that have units, ascending: layer and block of each (``keys``), the block 0 … B − 1 of every unit
    (``ids``, int64 ``[U]``), and units per block (``size``, int64 ``[B]``)."""

    keys: list[tuple[int, Block]]
    ids: Integers
    size: Integers

    def sum(self, values: NDArray[Any]) -> NDArray[Any]:
        """Sums per block ``[B]`` of ``values`` ``[U]``; int64 for integers and flags (exact), float64 for floats."""
        total = np.zeros(len(self.keys), np.float64 if values.dtype.kind == "f" else np.int64)
        np.add.at(total, self.ids, values)
        return total

    def rows(self) -> dict[tuple[int, Block], Integers]:
        """Rows of every block, ascending."""
        parts = np.split(self.ids.argsort(kind="stable"), self.size.cumsum()[:-1])
        return dict(zip(self.keys, parts, strict=True))

    def rank(self, order: Integers) -> Integers:
        """Rank of each row of ``order`` (each at most once) within its block: units before it, int64, as long."""
        ids = self.ids[order]
        by_block = ids.argsort(kind="stable")
        counts = np.bincount(ids, minlength=len(self.keys))
        rank = np.empty_like(by_block)
        rank[by_block] = np.arange(len(order)) - (counts.cumsum() - counts)[ids[by_block]]
        return rank


@dataclass(frozen=True)
class Scores:
    """U prunable units, in any order; a table that was read is sorted by layer, block and unit.

    ``code`` is the unit's index in ``BLOCKS``, ``cost`` in parameters. ``base`` is S, the score before any prior; it
    breaks ties and is not in the file, where it is importance / cost. ``super_expert``: it is one, or of one, without
    which the model breaks; None where that was not measured. All are ``[U]``.
    """

    layer: Integers
    code: Integers
    unit: Integers
    importance: Floats
    cost: Integers
    prior: Floats
    score: Floats
    pruned: Flags
    base: Floats
    super_expert: Flags | None = None

    @property
    def block(self) -> NDArray[np.str_]:
        """The names of the blocks, ``[U]``."""
        return np.array(BLOCKS, dtype=np.str_)[self.code]

    @property
    def kept(self) -> Flags:
        """Whether each unit is kept, bool ``[U]``."""
        return ~self.pruned

    @property
    def num_layers(self) -> int:
        """Decoder layers of the dense model, up to the last one with units."""
        return int(self.layer.max()) + 1

    @property
    def whole_layers(self) -> bool:
        """Whether the units are decoder layers (depth pruning)."""
        return bool(self.of_kind(Block.LAYER).any())

    @cached_property
    def blocks(self) -> Blocks:
        """The blocks of the layers, and which units belong to which."""
        blocks, ids, size = np.unique(self.layer * len(BLOCKS) + self.code, return_inverse=True, return_counts=True)
        keys = [(key // len(BLOCKS), BLOCKS[key % len(BLOCKS)]) for key in blocks.tolist()]
        return Blocks(keys, ids.reshape(-1), size)

    def of_kind(self, block: Block) -> Flags:
        """Mask of the rows that belong to one kind of block, bool ``[U]``."""
        return np.equal(self.code, BLOCKS.index(block))

    def of(self, layer: int, block: Block) -> Flags:
        """Mask of the rows that belong to one block of one layer, bool ``[U]``."""
        return self.of_kind(block) & np.equal(self.layer, layer)

    def at(self, rows: Flags | Integers) -> "Scores":
        """A table of the selected rows."""
        columns = {one.name: getattr(self, one.name) for one in fields(self)}
        chosen: dict[str, Any] = {name: None if values is None else values[rows] for name, values in columns.items()}
        return Scores(**chosen)

    def per_layer(self, values: NDArray[Any], block: Block | None = None) -> Floats:
        """Sums of ``values`` ``[U]`` per layer ``[L]``, over one kind of block or all."""
        rows = slice(None) if block is None else self.of_kind(block)
        return np.bincount(self.layer[rows], weights=values[rows], minlength=self.num_layers).astype(np.float64)

    def kept_fraction(self, block: Block) -> Floats:
        """Share of a block's units that are kept, by layer ``[L]``; NaN where a layer has none of them."""
        count, kept = (self.per_layer(values, block) for values in (np.ones(len(self.layer)), self.kept))
        return np.divide(kept, count, out=np.full_like(kept, np.nan), where=count > 0)

    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns of ``scores.csv``, ``[U]`` each."""
        columns = {name: getattr(self, name) for name in COLUMNS}
        return columns if self.super_expert is None else columns | {SUPER: self.super_expert}

    def check_plan(self, plan: PruningPlan) -> None:
        """Raise ValueError unless ``plan`` keeps exactly the units that are not pruned here, and all of the kinds that
        were not ranked, as attention beside experts."""
        if len(plan.layers) < self.num_layers or (self.whole_layers and len(plan.layers) > self.num_layers):
            raise ValueError(f"it lists {self.num_layers} layers, plan.json {len(plan.layers)}")
        kept = {key: self.unit[rows[self.kept[rows]]].tolist() for key, rows in self.blocks.rows().items()}
        ranked = {block for _, block in kept}
        for index, layer in enumerate(plan.layers):
            if self.whole_layers:
                same = bool(kept[index, Block.LAYER]) != layer.removed
            else:
                same = all(
                    units == (kept.get((index, block), []) if block in ranked else list(range(len(units))))
                    for block, units in layer.kept.items()
                )
            if layer.layer != index or not same:
                raise ValueError(f"layer {index} keeps other units than plan.json says")

    def write(self, path: Path) -> None:
        """Write the table, whole or not at all; reading gives back the same bits.

        Raises:
            ValueError: a wrong value, a gap, or a unit that is there twice.
            OSError: the folder cannot be written or the disk is full.
        """
        columns = {name: one.astype(np.int8) if one.dtype == bool else one for name, one in self.columns().items()}
        _check_values(columns)
        self._check_complete()
        sink = pa.BufferOutputStream()
        sink.write((",".join(columns) + "\n").encode())
        options = pa.csv.WriteOptions(include_header=False, quoting_style="none")
        pa.csv.write_csv(pa.table(columns), sink, options)
        write_bytes(path, sink.getvalue())

    @classmethod
    def read(cls, path: Path, option: str) -> "Scores":
        """Read a table, whose rows may be in any order.

        Raises:
            UserError: a missing file, or one that is not a complete score table; names the row.
        """
        data = read_file(path, LIMIT, option)
        try:
            columns = _parse(data)
            _check_values(columns)  # before they are sorted, so that row numbers are the file's
            block = columns.pop("block")
            columns["code"] = np.select([block == name for name in BLOCKS], list(range(len(BLOCKS))))
            columns |= {name: columns[name].astype(bool) for name in ("pruned", SUPER) if name in columns}
            columns["base"] = columns["importance"] / columns["cost"]
            order = np.lexsort((columns["unit"], columns["code"], columns["layer"]))
            scores = cls(**{name: values[order] for name, values in columns.items()})
            scores._check_complete()
        except (ValueError, KeyError, pa.ArrowException) as error:
            raise UserError(
                f"{option}: '{path}' is not a score table with the columns {', '.join(COLUMNS)} "
                f"({' '.join(str(error).split())})."
            ) from None
        return scores

    def _check_complete(self) -> None:
        """Rows are in order, and in every block of every layer units count from 0, one by one. A layer may have none:
        it is a mixer, or without experts where these alone are ranked."""
        key = self.layer * len(BLOCKS) + self.code
        first = np.diff(key, prepend=-1) != 0
        wrong = self.unit != np.where(first, 0, np.roll(self.unit, 1) + 1)
        wrong |= (np.diff(key, prepend=0) < 0) | ((np.diff(self.layer, prepend=-1) > 1) & self.whole_layers)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(
                f"row {row + 1} (layer {self.layer[row]}, {self.block[row]} {self.unit[row]}) is missing what should "
                "come before it, or is there twice: every unit of every layer has one row"
            )
        if self.whole_layers and not self.of_kind(Block.LAYER).all():
            raise ValueError("it mixes whole layers with parts of layers")


def _parse(data: bytes) -> dict[str, NDArray[Any]]:
    if not data.endswith(b"\n"):
        raise ValueError("its last line is cut off" if data else "it is empty")
    marked = data.partition(b"\n")[0].endswith(SUPER.encode())
    types = TYPES | ({SUPER: pa.int8()} if marked else {})
    table = pa.csv.read_csv(
        pa.BufferReader(data),
        read_options=pa.csv.ReadOptions(use_threads=False),
        convert_options=pa.csv.ConvertOptions(column_types=types, include_columns=list(types), null_values=[]),
    )
    if table.column_names != list(types):
        raise ValueError(f"its columns are {', '.join(table.column_names)}")
    columns: dict[str, NDArray[Any]] = {name: table[name].to_numpy() for name in types}
    return columns | {"block": columns["block"].astype(np.str_)}


def _check_values(columns: dict[str, NDArray[Any]]) -> None:
    rows = len(columns["layer"])
    if not rows:
        raise ValueError("it holds no rows")
    checks = [
        *((name, ~np.isfinite(columns[name]), "finite") for name in ("importance", "prior", "score")),
        *((name, columns[name] < 0, "0 or more") for name in ("layer", "unit")),
        ("cost", columns["cost"] < 1, "1 or more"),
        ("block", ~np.isin(columns["block"], BLOCKS), ", ".join(BLOCKS)),
        *((name, ~np.isin(columns[name], (0, 1)), "0 or 1") for name in ("pruned", SUPER) if name in columns),
        # Every layer has a row. Checked before anything is allocated from the number.
        ("layer", columns["layer"] >= rows, f"below the number of rows, {rows:,}"),
    ]
    for name, wrong, allowed in checks:
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(f"row {row + 1}: {name} is {columns[name][row]}, allowed: {allowed}")
