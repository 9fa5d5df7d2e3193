"""Text to train on: the corpora, files and token arrays that calibration takes, with a share held out of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_prune.data.calibration import EvaluationSet, fingerprint
from lightning_prune.data.corpora import calibration_split, split_spec
from lightning_prune.data.datamodule import WINDOW_LENGTH
from lightning_prune.data.sampling import aligned_windows
from lightning_prune.data.streams import StreamReader, default_cache_dir
from lightning_prune.data.token_arrays import first_part, is_token_array, load_token_array
from lightning_prune.recovery.overlap import refuse_overlap
from lightning_prune.recovery.stream import ShuffledWindows
from lightning_prune.support.errors import UserError
from lightning_prune.support.regular_files import expanded, from_home

_UNKNOWN = dict.fromkeys(("configuration", "revision", "text_sha256", "tokenizer_sha256"))  # of a token array


class RecoveryDataModule(LightningDataModule):
    """Training windows, and windows of the same text that are held out of training.

    Text is tokenised whole, without special tokens, into one stream that is cut into windows of full length: nothing
    is padded. The held-out share is the end of the text.

    Args:
        dataset: text to train on: demo, wikitext2, ptb, c4, or a local .txt, .jsonl, .json.gz or .parquet file, a
            folder saved by datasets.save_to_disk, or a token array (.npy or .safetensors, int64 [N, L]).
            `name:split` reads another split than train. By default what the pruning run calibrated on.
        num_samples: windows to read, from the beginning of the text. By default all; of c4, which is streamed, those
            of its first 1100 documents.
        seq_len: tokens per window. By default 128; of a token array whole rows.
        batch_size: windows per forward pass. --trainer.accumulate_grad_batches takes several passes into one step.
        held_out: share of the windows that is not trained on; the best state and the end of training are chosen by
            their loss.
        seed: order of the training windows.
        eval_datasets: sets to report perplexity on, before and after: names, files or token arrays, `name:split` for
            another split than test. By default those of the pruning run. None of them may be trained on.
        cache_dir: where tokenised text is kept. By default $XDG_CACHE_HOME/lightning_prune or
            ~/.cache/lightning_prune.
        tokenizer: model folder whose tokenizer is used.

    Raises:
        UserError: an option is out of range, or (from `setup`) the data cannot be had or is too short.
    """

    def __init__(
        self,
        dataset: str | None = None,
        num_samples: int | None = None,
        seq_len: int | None = None,
        batch_size: int = 16,
        held_out: float = 0.05,
        seed: int = 0,
        eval_datasets: list[str] | None = None,
        cache_dir: str | None = None,
        tokenizer: str = "demo",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_samples", num_samples, 2),
            ("seq_len", seq_len, 2),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"--data.{name} is {value}: it must be at least {least}")
        if not 0 < held_out < 1:
            raise UserError(
                f"--data.held_out is {held_out:g}: it is a share of the training text and must lie between 0 and 1, "
                "both excluded (0.05 holds a twentieth out)"
            )
        self.dataset = None if dataset is None else from_home(dataset, "--data.dataset")
        self.num_samples, self.eval_datasets = num_samples, eval_datasets
        self._length_asked_for, self.seq_len = seq_len, WINDOW_LENGTH if seq_len is None else seq_len
        self.batch_size, self.held_out, self.seed = batch_size, held_out, seed
        self.cache_dir = expanded(cache_dir, "--data.cache_dir") if cache_dir else default_cache_dir()
        self.tokenizer = tokenizer
        self._streams = StreamReader(tokenizer, self.cache_dir)
        self._windows: Tensor | None = None
        self._stream: ShuffledWindows | None = None
        self._position = 0
        self.manifest: dict[str, Any] = {}

    def show_progress(self) -> None:
        """Say how far it is while text is tokenised."""
        self._streams.show_progress = True

    def setup(self, stage: str | None = None) -> None:
        """Read and cut the text, once."""
        if self._windows is not None:
            return
        assert self.dataset is not None, "the run fills the default in"
        dataset, split = split_spec(self.dataset)
        if is_token_array(dataset):
            if split is not None:
                raise UserError(f"the token array {dataset} has no splits: leave out :{split}")
            windows = first_part(load_token_array(dataset), dataset, self.num_samples, self._length_asked_for)
            facts: dict[str, Any] = {**_UNKNOWN, "dataset": dataset, "split": "all"}
        else:
            wanted = None if self.num_samples is None else self.num_samples * self.seq_len
            stream = self._streams.read(dataset, split or calibration_split(dataset), wanted)
            windows, facts = aligned_windows(stream.tokens, self.seq_len), stream.provenance
            if self.num_samples is not None and len(windows) < self.num_samples:
                raise UserError(
                    f"--data.num_samples: found {self.num_samples}, but {dataset} has {len(windows)} windows of "
                    f"{self.seq_len} tokens: ask for fewer, or leave it out to take all"
                )
            windows = windows[: self.num_samples]
        held_out = max(1, round(self.held_out * len(windows)))
        if len(windows) - held_out < 1:
            raise UserError(
                f"the training text {dataset} has {len(windows)} windows of {self.seq_len} tokens, of which "
                f"{held_out} would be held out: lower --data.seq_len or --data.held_out, or choose a longer text with "
                "--data.dataset"
            )
        self._windows, self._held_out = windows, held_out
        self.manifest = {
            **facts,
            "seq_len": windows.shape[1],
            "windows": len(windows) - held_out,
            "held_out_windows": held_out,
            "seed": self.seed,
            "fingerprint": fingerprint(windows),
        }

    @property
    def windows(self) -> Tensor:
        """All windows in the order of the text, int64 ``[N, L]``, the held-out ones last; built by `setup`."""
        assert self._windows is not None
        return self._windows

    def train_dataloader(self) -> ShuffledWindows:
        """Batches int64 ``[B, L]``."""
        self._stream = ShuffledWindows(self.windows[: -self._held_out], self.batch_size, self.seed)
        self._stream.position = self._position
        return self._stream

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Batches int64 ``[B, L]`` of the held-out windows."""
        return DataLoader(self.windows[-self._held_out :], batch_size=self.batch_size)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """How far the text was read, for a run that goes on."""
        return {"position": 0 if self._stream is None else self._stream.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._position = int(state_dict["position"])

    def check_against_model(self, vocab_size: int, max_positions: int | None) -> None:
        """Refuse tokens and lengths the model cannot take.

        Raises:
            UserError: a token id outside `0 … vocab_size - 1`, or windows longer than `max_positions`.
        """
        low, high = int(self.windows.min()), int(self.windows.max())
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"the training text {self.dataset} holds the token id {low if low < 0 else high}, but the model's "
                f"vocabulary has {vocab_size} ids (0 to {vocab_size - 1}): check --data.dataset"
            )
        if max_positions is not None and self.windows.shape[1] > max_positions:
            raise UserError(
                f"the training text {self.dataset} has windows of {self.windows.shape[1]} tokens, but the model has "
                f"{max_positions} positions: lower --data.seq_len"
            )

    def refuse_evaluation_text(self, evaluation: list[EvaluationSet]) -> None:
        """Refuse to train on what perplexity is reported on.

        Raises:
            UserError: see `overlap.refuse_overlap`.
        """
        for one in evaluation:
            refuse_overlap(self.manifest, self.windows, one.name, one.manifest, one.tokens)


def default_dataset(calibration: str | None, base_model: str) -> str:
    """What a pruning run calibrated on; for one without calibration what would be its default."""
    if calibration is not None:
        return calibration
    return "demo" if Path(base_model).name == "demo" else "wikitext2"
