"""Text to train on: the corpora, files and token arrays that calibration takes, with a share held out of training."""

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_prune.data.calibration import SHARE, EvaluationSet, same_text, shared_windows
from lightning_prune.data.corpora import split_spec
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.support.errors import UserError


class RecoveryDataModule(CalibrationDataModule):
    """Training windows, in full length, and the end of the same text, held out of training.

    Args:
        dataset: text to train on: demo, wikitext2, ptb, c4, or a local text, .jsonl, .json, .csv, .tsv, .parquet or
            .arrow file, compressed or not, a folder or glob of such files, a folder saved by datasets.save_to_disk, or
            a token array (.npy or .safetensors, int64 [N, L]). ``name:split`` reads another split than train. A mixture
            is a list with shares of the windows: '[a.jsonl:0.7, b.txt:0.3]'. By default what the pruning run
            calibrated on.
        num_samples: windows to read, from the beginning of the text. By default all; of c4, which is streamed, those
            of its first 1100 documents.
        seq_len: tokens per window. By default 128; of a token array whole rows.
        batch_size: windows per forward pass. --trainer.accumulate_grad_batches takes several passes into one step.
        held_out: share of the windows that is not trained on; the best state and the end of training are chosen by
            their loss.
        seed: order of the training windows.
        eval_datasets: sets to report perplexity on, before and after: names, files or token arrays, ``name:split`` for
            another split than test. By default those of the pruning run. None of them may be trained on.
        bos: whether windows of text begin with the beginning-of-sequence token, inside seq_len. auto where the
            tokenizer puts it before a text by itself. By default as in the pruning run.
        eval_long_seq_len: tokens of the second kind of evaluation windows; 0 for none. By default as in the pruning
            run.
        continuations: prompts that the models continue for comparison; 0 for none. By default as in the pruning run.

    Raises:
        UserError: an option is out of range, or (from ``setup``) the data cannot be had, is too short, or holds what
            perplexity is reported on.
    """

    def __init__(
        self,
        dataset: list[str] | str | None = None,
        num_samples: int | None = None,
        seq_len: int | None = None,
        batch_size: int = 16,
        held_out: float = 0.05,
        seed: int = 0,
        eval_datasets: list[str] | None = None,
        bos: Literal["auto", "never", "always"] | None = None,
        eval_long_seq_len: int | None = None,
        continuations: int | None = None,
        **kwargs: Any,
    ) -> None:
        asked = {"eval_long_seq_len": eval_long_seq_len, "continuations": continuations}
        kwargs |= {name: value for name, value in asked.items() if value is not None}
        super().__init__(
            dataset, num_samples, seq_len, batch_size, "sequential", None, seed, eval_datasets, None, **kwargs
        )
        self._left_open = [name for name, value in asked.items() if value is None]
        if not 0 < held_out < 1:
            raise UserError(
                f"--data.held_out: found {held_out:g}; it is a share of the training text and must lie between 0 and "
                "1, both excluded (0.05 holds a twentieth out)."
            )
        self._bos = bos
        self.held_out, self.num_held_out = held_out, 0
        self.position = 0  # batches handed out before
        self.batches: ShuffledWindows | None = None

    def follow(
        self,
        dataset: list[str] | str,
        column: str | None,
        eval_datasets: list[str],
        eval_seq_len: int | None,
        bos: str,
        measured: Mapping[str, int],
    ) -> None:
        """Take the protocol of the pruning run: its window length, and its text, sets, beginning of windows and what it
        ``measured`` beside perplexity where nothing else is given."""
        for name in self._left_open:
            setattr(self, name, measured.get(name, getattr(self, name)))
        if self.dataset is None:
            self.choose(dataset)
            self.column = column if self.column is None else self.column
        self._streams.bos = self._bos or bos
        self.eval_datasets = eval_datasets if self.eval_datasets is None else self.eval_datasets
        if eval_seq_len is not None:
            self.eval_seq_len = self._requested_eval_length = eval_seq_len

    def _calibration_windows(self, num_samples: int | None) -> tuple[Tensor, dict[str, Any]]:
        """All windows in the order of the text, the held-out ones last."""
        windows, facts = super()._calibration_windows(self._requested[0])
        sizes = [part["num_samples"] for part in facts.get("parts") or ()] or [len(windows)]
        held_out = [max(1, round(self.held_out * size)) for size in sizes]  # of every text of a mixture
        self.num_held_out = sum(held_out)
        if any(size <= number for size, number in zip(sizes, held_out, strict=True)):
            raise UserError(
                f"The training text {split_spec(self.source)[0]} has {len(windows)} windows, of which "
                f"{self.num_held_out} would be held out. Lower --data.seq_len or --data.held_out, or choose a longer "
                "text with --data.dataset."
            )
        texts = list(zip(windows.split(sizes), held_out, strict=True))
        parts = [text[:-number] for text, number in texts] + [text[-number:] for text, number in texts]
        return torch.cat(parts), facts

    @property
    def manifest(self) -> dict[str, Any]:
        """Facts of the training text for ``recovery.json``."""
        facts = self.calibration.manifest.to_json()
        del facts["sampling"], facts["stride"]
        training = facts.pop("num_samples") - self.num_held_out
        return facts | {"windows": training, "held_out_windows": self.num_held_out, "seed": self.seed}

    def check_seen(self, held_out: EvaluationSet) -> None:
        """Refuse to train on what perplexity is reported on.

        Raises:
            UserError: the same text or tokens, or a text that holds more than ``SHARE`` of the windows.
        """
        if self._calibration is None:
            return
        seen = self.calibration.manifest
        same = same_text(seen.to_json(), held_out.manifest)
        # Without the token that is put before every window, so that the windows of a text are one stream again.
        text, sought = self.calibration.tokens[:, seen.bos != "none" :], held_out.tokens
        share = 1.0 if same else shared_windows(text, sought[:, held_out.manifest["bos"] != "none" :])
        if share > SHARE:
            reason = "is the text of" if same else f"holds {share:.0%} of the windows of"
            raise UserError(
                f"--data.dataset: the training text '{self.source}' {reason} the evaluation set '{held_out.name}', on "
                "which perplexity is reported. Train on another text (the split train, another file), or report on "
                "another one with --data.eval_datasets."
            )

    def train_dataloader(self) -> "ShuffledWindows":  # type: ignore[override]
        """Training batches, token ids int64 ``[B, L]``."""
        windows = self.calibration.tokens[: -self.num_held_out]
        self.batches = ShuffledWindows(windows, self.batch_size, self.seed, self.position)
        return self.batches

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Batches int64 ``[B, L]`` of the held-out windows."""
        windows: Any = self.calibration.tokens[-self.num_held_out :]
        return DataLoader(windows, batch_size=self.batch_size)

    def state_dict(self) -> dict[str, int]:
        """The position in the text, which Lightning does not take from the loader where an epoch is complete."""
        return {} if self.batches is None else self.batches.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue at the position that ``state_dict`` saved."""
        self.position = state_dict["position"]


class ShuffledWindows:
    """An endless stream of batches of ``tokens`` int64 ``[N, L]``, every window once before any comes again; the last
    batch of every round may be smaller.

    Lightning takes ``len`` batches as an epoch. The order is a function of the seed and the position (batches handed
    out before) alone, so the position is all that an interrupted run needs.
    """

    def __init__(self, tokens: Tensor, batch_size: int, seed: int, position: int = 0) -> None:
        self.tokens, self.batch_size, self.seed, self.position = tokens, batch_size, seed, position

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        first, skipped = divmod(self.position, len(self))
        for number in count(first):
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
            order = torch.randperm(len(self.tokens), generator=generator)
            for rows in order.split(self.batch_size)[skipped:]:
                self.position += 1
                yield self.tokens[rows]
            skipped = 0

    def state_dict(self) -> dict[str, int]:
        """The position in the stream."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a saved position in the stream."""
        self.position = state["position"]
