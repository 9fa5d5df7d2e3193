"""The one way text reaches a pruning method: a LightningDataModule whose defaults are the common setting."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_prune.data import mixtures
from lightning_prune.data.calibration import (
    SHARE,
    CalibrationManifest,
    CalibrationSet,
    EvaluationSet,
    fingerprint,
    same_text,
    shared_windows,
)
from lightning_prune.data.corpora import calibration_split, held_out_split, split_spec
from lightning_prune.data.rows import NoSuchColumn
from lightning_prune.data.sampling import aligned_windows, draw_windows
from lightning_prune.data.streams import StreamReader, default_cache_dir
from lightning_prune.data.token_arrays import first_part, is_token_array
from lightning_prune.demo import demo_model_path
from lightning_prune.support.errors import UserError
from lightning_prune.support.regular_files import expanded, from_home

Batch = tuple[Tensor, Tensor, Tensor]
WINDOWS, WINDOW_LENGTH = 128, 128  # the setting that pruning papers share
LONG_WINDOW_LENGTH = 1024
PROMPT_LENGTH = 64
LEAST = dict.fromkeys(("num_samples", "batch_size", "eval_batch_size", "stride"), 1)
LEAST |= {"seq_len": 2, "eval_seq_len": 2, "seed": 0, "eval_long_seq_len": 0, "continuations": 0}


class CalibrationDataModule(LightningDataModule):
    """Calibration tokens and held-out evaluation sets.

    Every method calibrates on what this class hands out, so two methods run with the same ``--data`` options see
    the same tokens; ``calibration.json`` in the run folder holds the fingerprint that proves it. Text is tokenised
    whole, without special tokens, into one stream that is cut into windows of full length: nothing is padded. Rows of
    chats (messages, conversations, prompt and completion, instruction and output) are written with the tokenizer's
    chat template, one row one document.

    Args:
        dataset: calibration corpus: demo, wikitext2, ptb, c4, or a local text, .jsonl, .json, .csv, .tsv, .parquet
            or .arrow file, compressed or not, a folder or glob of such files, a folder saved by
            datasets.save_to_disk, or a token array (.npy or .safetensors, int64 [N, L], used as it is). ``name:split``
            reads another split than train. A mixture is a list with shares of the samples:
            '[a.jsonl:0.7, b.txt:0.3]'. By default demo for the demo model, else wikitext2.
        num_samples: calibration windows. More of them make the importance estimate steadier and the run longer. By
            default 128; of a token array all rows, or the first num_samples.
        seq_len: tokens per calibration window. By default 128; of a token array whole rows, or their first seq_len
            tokens.
        batch_size: calibration windows per forward pass and process. Changes speed and memory, not the result.
        sampling: random draws windows that do not overlap by seed, sequential takes the first ones of the text,
            sliding starts one every stride tokens.
        stride: tokens between the starts of two windows; for sampling sliding only, where it must be given.
        seed: picks the windows of sampling random.
        eval_datasets: sets to report perplexity on, before and after pruning: names, files or token arrays as for
            dataset, ``name:split`` for another split than test (c4: validation). By default the held-out split of
            the calibration corpus; [] skips evaluation.
        eval_seq_len: tokens per evaluation window. Perplexity depends on it: papers use 128 or 2048, never mix them.
            By default 128; of a token array whole rows, or their first eval_seq_len tokens.
        eval_batch_size: evaluation windows of eval_seq_len tokens per forward pass, of longer ones as many as have
            these tokens. Changes speed and memory, not the result.
        cache_dir: where tokenised text is kept. By default $XDG_CACHE_HOME/lightning_prune or
            ~/.cache/lightning_prune.
        tokenizer: model folder or hub id whose tokenizer is used; demo is the demo model's.
        bos: whether windows of text begin with the beginning-of-sequence token, in calibration and evaluation, inside
            seq_len. auto where the tokenizer puts it before a text by itself.
        split: split of dataset; the same as ``name:split``.
        column: column of tables that is the text or the chat. By default the one that clearly is.
        eval_long_seq_len: tokens of the second kind of evaluation windows, over the same texts: what attention to far
            tokens is worth shows only there. Fewer where the model or the text has fewer; none where they would not
            be twice eval_seq_len, and of token arrays. 0 omits them.
        continuations: prompts (64 tokens of the first evaluation set each) that the dense and the pruned model
            continue by 64 greedy tokens. 0 writes nothing.

    Raises:
        UserError: an option is out of range, or (from ``setup``) the data cannot be had or is too short.
    """

    def __init__(
        self,
        dataset: list[str] | str | None = None,
        num_samples: int | None = None,
        seq_len: int | None = None,
        batch_size: int = 4,
        sampling: Literal["random", "sequential", "sliding"] = "random",
        stride: int | None = None,
        seed: int = 0,
        eval_datasets: list[str] | None = None,
        eval_seq_len: int | None = None,
        eval_batch_size: int = 16,
        cache_dir: str | None = None,
        tokenizer: str = "demo",
        bos: Literal["auto", "never", "always"] = "auto",
        split: str | None = None,
        column: str | None = None,
        eval_long_seq_len: int = LONG_WINDOW_LENGTH,
        continuations: int = 16,
    ) -> None:
        super().__init__()
        # Of a token array only what was requested is cut off, so the defaults must not look like a wish.
        self._requested, self._requested_eval_length = (num_samples, seq_len), eval_seq_len
        self.dataset: str | None = None
        self.parts: list[mixtures.Part] = []  # of a mixture
        self.choose(dataset)
        self.split, self.column = split, column
        self.eval_datasets = eval_datasets
        self.num_samples = WINDOWS if num_samples is None else num_samples
        self.seq_len = WINDOW_LENGTH if seq_len is None else seq_len
        self.eval_seq_len = WINDOW_LENGTH if eval_seq_len is None else eval_seq_len
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.eval_long_seq_len, self.continuations = eval_long_seq_len, continuations
        self.longest_window = 0  # without ``take_model`` there are no long windows
        self.sampling, self.stride, self.seed = sampling, stride, seed
        self.tokenizer = tokenizer
        self.needs_calibration = True  # False before ``setup``: the calibration corpus is never opened
        self.cuts_eval_arrays = True  # False before ``setup``: their rows are whole, whatever ``eval_seq_len`` is
        self.eval_batches_per_step = 1  # more where a model is brought in layer by layer for every step
        self._calibration: CalibrationSet | None = None
        self._evaluation: list[EvaluationSet] | None = None
        self._check_ranges()
        self.cache_dir = expanded(cache_dir, "--data.cache_dir") if cache_dir else default_cache_dir()
        self._streams = StreamReader(tokenizer, self.cache_dir, bos)

    def _check_ranges(self) -> None:
        for name, least in LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"--data.{name}: found {value}; it must be {least} or more.")
        if self.sampling not in ("random", "sequential", "sliding"):  # which the parser refuses, and Python does not
            raise UserError(f"--data.sampling: found {self.sampling!r}; allowed: random, sequential, sliding.")
        if self.sampling == "sliding" and self.stride is None:
            raise UserError("--data.sampling sliding needs --data.stride, the tokens between two window starts.")
        if self.sampling != "sliding" and self.stride is not None:
            raise UserError(
                f"--data.stride {self.stride} has no meaning with --data.sampling {self.sampling}. "
                "Leave it out or choose --data.sampling sliding."
            )

    def choose(self, dataset: list[str] | str | None) -> None:
        """Take a text, or a list of them with shares, as the calibration dataset; errors as in ``mixtures.parse``."""
        specs = dataset if isinstance(dataset, list) else [] if dataset is None else [dataset]
        specs = [from_home(spec, "--data.dataset") for spec in specs]
        self.parts = [] if isinstance(dataset, str | None) else mixtures.parse(specs)
        self.dataset = f"[{', '.join(map(str, self.parts))}]" if self.parts else next(iter(specs), None)

    @property
    def source(self) -> str:
        """The calibration dataset after the default is filled in."""
        if self.dataset is not None:
            return self.dataset
        is_demo = self.tokenizer == "demo" or os.path.realpath(self.tokenizer) == str(demo_model_path())
        return "demo" if is_demo else "wikitext2"

    @property
    def calibration(self) -> CalibrationSet:
        """The calibration set of ``setup("fit")`` (``needs_calibration`` is True); before that a RuntimeError."""
        if self._calibration is None:
            raise RuntimeError('There is no calibration set. Call setup("fit") first, with needs_calibration True.')
        return self._calibration

    @property
    def evaluation(self) -> list[EvaluationSet]:
        """The evaluation sets, built by ``setup``; empty when there is nothing to evaluate on."""
        return self._evaluation or []

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the evaluation sets' tokens, without long windows, which are the same texts again."""
        return {one.name: one.manifest["fingerprint"] for one in self.evaluation if not one.is_long}

    @property
    def prompts(self) -> Tensor | None:
        """The beginnings of windows that lie evenly in the first evaluation set, int64 ``[n, 64]`` (less where windows
        are shorter); None where nothing is to be continued."""
        if not (self.evaluation and self.continuations):
            return None
        windows = self.evaluation[0].tokens
        number = min(self.continuations, len(windows))
        return windows[torch.arange(number) * len(windows) // number, :PROMPT_LENGTH]

    def eval_batch(self, held_out: EvaluationSet) -> int:
        """Windows of this set per forward pass."""
        if not held_out.is_long:
            return self.eval_batch_size
        return max(1, self.eval_batch_size * self.eval_seq_len // held_out.tokens.shape[1])

    def take_model(self, max_positions: int | None) -> None:
        """Say before ``setup`` how long a sequence the model takes, None for no limit: long windows are cut for it."""
        self.longest_window = min(self.eval_long_seq_len, max_positions or self.eval_long_seq_len)

    def show_progress(self) -> None:
        """Show progress while text is tokenised."""
        self._streams.show_progress = True

    def prepare_data(self) -> None:
        """Download and tokenise on one process, so that the others find the result in the caches."""
        self.setup(None if self.trainer is None else self.trainer.state.fn)

    def setup(self, stage: str | None = None) -> None:
        """Build what the stage needs, once: calibration for ``fit`` or None, evaluation sets for every stage."""
        if self._calibration is None and self.needs_calibration and stage in (None, "fit"):
            tokens, facts = self._calibration_windows(self.num_samples)
            facts |= {"num_samples": len(tokens), "seq_len": tokens.shape[1], "fingerprint": fingerprint(tokens)}
            self._calibration = CalibrationSet(tokens, CalibrationManifest(**facts))
        if self._evaluation is None:
            self._evaluation = self._build_evaluation()
            for held_out in self._evaluation:
                if not held_out.is_long:
                    self.check_seen(held_out)

    def train_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Calibration batches ``(ids [B, seq_len] int64, weight [B] float32, index [B] int64)``: weight 0 for samples
        that only give every process equally many, index in the calibration set. Lightning skips the epochs of none."""
        return self._loader(self.calibration.tokens, self.batch_size) if self.needs_calibration else []

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader per evaluation set, in the order of ``evaluation``, with the same items as calibration."""
        steps = self.eval_batches_per_step
        return [self._loader(held_out.tokens, self.eval_batch(held_out) * steps) for held_out in self.evaluation]

    def check_against_model(self, vocab_size: int, max_positions: int | None) -> None:
        """Raise UserError for a token id outside ``0 … vocab_size - 1``, and windows longer than ``max_positions``, the
        longest sequence that the model was made for (None for no limit)."""
        checks = [
            (f"The evaluation set {one.name}", one.tokens, "eval_seq_len", "eval_datasets") for one in self.evaluation
        ]
        if self._calibration is not None:
            checks.insert(0, (f"The text {self.source}", self._calibration.tokens, "seq_len", "dataset"))
        for name, tokens, length_option, dataset_option in checks:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= vocab_size:
                raise UserError(
                    f"{name} holds the token id {low if low < 0 else high}, but the model's vocabulary has "
                    f"{vocab_size} ids (0 to {vocab_size - 1}). Check --data.tokenizer or --data.{dataset_option}."
                )
            if max_positions is not None and tokens.shape[1] > max_positions:
                raise UserError(
                    f"{name} has windows of {tokens.shape[1]} tokens (--data.{length_option}), but the model has "
                    f"{max_positions} positions. Lower --data.{length_option}."
                )

    def _calibration_windows(self, num_samples: int | None) -> tuple[Tensor, dict[str, Any]]:
        """Windows ``[N, L]``, None for all of a text, and what the manifest says of where they came from."""
        if self.parts:
            return self._mixture(num_samples)
        return self._windows(self.source, num_samples, *self._requested)

    def _mixture(self, num_samples: int | None) -> tuple[Tensor, dict[str, Any]]:
        """Windows and facts of a mixture, whose parts are drawn as each would be alone, one after the other."""
        if num_samples is None:  # as many as the shares allow
            all_of = [len(self._windows(part.spec, None, None, self.seq_len)[0]) / part.share for part in self.parts]
            num_samples = int(min(all_of))
        tokens, parts = [], []
        for part, number in zip(self.parts, mixtures.counts(self.parts, num_samples), strict=True):
            windows, facts = self._windows(part.spec, number, number, self.seq_len)
            facts |= {"share": part.share, "num_samples": number, "fingerprint": fingerprint(windows)}
            tokens.append(windows)
            parts.append({key: value for key, value in facts.items() if key not in self._draw})
        same: dict[str, Any] = {}
        for key in ("tokenizer_sha256", "bos", "rendering", "chat_template_sha256"):
            values = list(dict.fromkeys(str(one[key]) for one in parts if one.get(key) is not None))
            same[key] = ", ".join(values) if values else None
        own = {"dataset": self.source, "split": "mixture", "parts": parts}
        return torch.cat(tokens), dict.fromkeys(("configuration", "revision", "text_sha256")) | same | self._draw | own

    @property
    def _draw(self) -> dict[str, Any]:
        """Facts for the manifest on how windows are drawn."""
        seed = self.seed if self.sampling == "random" else None
        return {"sampling": self.sampling, "stride": self.stride, "seed": seed}

    def _windows(
        self, spec: str, num_samples: int | None, rows: int | None, length: int | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Windows of one text, or the first ``rows`` of a token array and their first ``length`` tokens."""
        dataset, split = split_spec(spec)
        if self.split is not None and split not in (None, self.split):
            raise UserError(f"--data.split is {self.split}, but --data.dataset {spec} names {split}. Leave one out.")
        split = split or self.split
        if is_token_array(dataset):
            if self.sampling == "sliding":
                raise UserError(
                    f"--data.sampling sliding has no meaning for the token array {dataset}, whose rows are the "
                    "windows. Leave it and --data.stride out."
                )
            tokens, facts = first_part(dataset, split, rows, length)
            return tokens, facts | {"sampling": "given"}
        wanted = None if num_samples is None else (num_samples - 1) * (self.stride or self.seq_len) + self.seq_len
        stream, facts = self._streams.read(dataset, split or calibration_split(dataset), wanted, self.column)
        draw = self._draw
        tokens = draw_windows(stream, num_samples, self.seq_len, self.stride, draw["seed"], self._streams.start)
        return tokens, facts | draw

    def _build_evaluation(self) -> list[EvaluationSet]:
        if self.eval_datasets is not None:
            specs = [from_home(spec, "--data.eval_datasets") for spec in self.eval_datasets]
        else:
            sources = [split_spec(part.spec)[0] for part in self.parts] or [split_spec(self.source)[0]]
            specs = [name for name in dict.fromkeys(sources) if not is_token_array(name) and held_out_split(name)]
            if not specs:
                rank_zero_warn(
                    f"No evaluation: {', '.join(sources)} has no held-out split. Name evaluation sets with "
                    "--data.eval_datasets."
                )
                return []
        repeated = [spec for spec in specs if specs.count(spec) > 1]
        if repeated:
            raise UserError(f"--data.eval_datasets lists {repeated[0]} twice. Name it once.")
        named = zip(specs, set_names(specs), strict=True)
        return [one for spec, name in named for one in self._evaluation_sets(spec, name)]

    def _evaluation_sets(self, spec: str, name: str) -> Iterator[EvaluationSet]:
        """Yield the evaluation set, and the same text in long windows if it is long enough."""
        dataset, split = split_spec(spec)
        if is_token_array(dataset):
            cut = self._requested_eval_length if self.cuts_eval_arrays else None
            yield EvaluationSet.of(name, *first_part(dataset, split, None, cut, "eval_seq_len"))
            return
        split = split or held_out_split(dataset) or "all"
        try:
            stream, facts = self._streams.read(dataset, split, column=self.column)
        except NoSuchColumn:  # it is calibration's; an evaluation set may have its own
            stream, facts = self._streams.read(dataset, split)
        start = self._streams.start
        tokens = aligned_windows(stream, self.eval_seq_len, start)
        if len(tokens) == 0:
            raise UserError(
                f"The evaluation set {spec} has {len(stream)} tokens, but one window needs {self.eval_seq_len}. "
                "Lower --data.eval_seq_len or choose a longer text with --data.eval_datasets."
            )
        yield EvaluationSet.of(name, tokens, facts)
        length = min(self.longest_window, len(stream) + (start is not None))
        if length >= 2 * self.eval_seq_len and len(long := aligned_windows(stream, length, start)):
            yield EvaluationSet.of(f"{name}@{length}", long, facts, long_windows_of=name)

    def check_seen(self, held_out: EvaluationSet) -> None:
        """Note in the manifest which share of the calibration samples is from the text of an evaluation set, and warn
        where it is more than chance."""
        if self._calibration is None:
            return
        same = same_text(self._calibration.manifest.to_json(), held_out.manifest)
        samples = self._calibration.tokens[:, self._calibration.manifest.bos != "none" :]
        share = 1.0 if same else shared_windows(held_out.tokens[:, held_out.manifest["bos"] != "none" :], samples)
        held_out.manifest["calibration_overlap"] = share
        if share > SHARE:
            reason = "is the text the model was calibrated on" if same else f"holds {share:.0%} of the calibration set"
            rank_zero_warn(
                f"The evaluation set {held_out.name} {reason}, so its perplexity is not held out. Choose another with "
                "--data.eval_datasets."
            )

    def _loader(self, tokens: Tensor, batch_size: int) -> DataLoader[Batch]:
        """Every process gets equally many batches: unequal counts hang Lightning, repeated samples bias the sums."""
        processes, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        missing = -len(tokens) % processes  # a batch may be smaller, for every process alike
        weight = torch.cat([torch.ones(len(tokens)), torch.zeros(missing)])
        padded = torch.cat([tokens, tokens[:1].expand(missing, -1)])
        dataset = TensorDataset(padded, weight, torch.arange(len(padded)))
        # Given here because the sampler that Lightning would add shuffles anew in every epoch.
        sampler: Any = DistributedSampler(dataset, processes, rank, shuffle=False)
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler)  # type: ignore[arg-type]


def set_names(specs: list[str]) -> list[str]:
    """Keys of evaluation sets in ``metrics.json``: the name of corpus or file, and a split that is not the default.
    Files of the same name in different folders get their folder's name too, or the whole path if need be."""
    names, longer, paths = [], [], []
    for dataset, split in map(split_spec, specs):
        path = Path(dataset)
        is_default = split is None or is_token_array(dataset) or split == (held_out_split(dataset) or "all")
        names.append(path.name if is_default else f"{path.name}:{split}")
        longer.append(f"{path.absolute().parent.name}/{names[-1]}")
        paths.append(str(path))
    return [
        name if names.count(name) == 1 else long if longer.count(long) == 1 else path
        for name, long, path in zip(names, longer, paths, strict=True)
    ]
