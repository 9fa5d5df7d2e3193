"""How much text a run reads, from its options and token arrays, before any text is read."""

from dataclasses import dataclass

from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.data.token_arrays import is_token_array, load_token_array


@dataclass(frozen=True)
class Workload:
    """Calibration windows of one process, and evaluation windows (None: as many as cross the layers together)."""

    samples: int
    seq_len: int
    batch_size: int
    eval_windows: int | None
    eval_seq_len: int
    eval_batch_size: int

    @classmethod
    def of(cls, data: CalibrationDataModule, needs_calibration: bool, processes: int = 1) -> "Workload":
        """What the options of ``data`` ask each of ``processes`` for."""
        samples, seq_len = data.num_samples, data.seq_len
        if data.source and is_token_array(data.source) and needs_calibration:
            samples, seq_len = _array_shape(data.source)
        windows, length = (0, data.eval_seq_len) if data.eval_datasets == [] else (None, data.eval_seq_len)
        arrays = [_array_shape(name) for name in data.eval_datasets or [] if is_token_array(name)]
        if arrays and len(arrays) == len(data.eval_datasets or []):
            windows, length = max(arrays, key=lambda shape: shape[0] * shape[1])
        share = -(-samples // processes)
        return cls(share, seq_len, data.batch_size, windows, length, data.eval_batch_size)


def _array_shape(path: str) -> tuple[int, int]:
    rows, columns = load_token_array(path).shape
    return rows, columns
