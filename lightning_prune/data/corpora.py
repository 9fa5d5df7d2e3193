"""Named corpora and where their text comes from; everything else a ``--data.dataset`` can be is a local path."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from lightning_prune.data.local_files import FILE_KINDS, is_local, local_splits, read_local, until
from lightning_prune.data.rows import Chat
from lightning_prune.data.token_arrays import OPTIONS
from lightning_prune.demo import SPLITS, demo_text
from lightning_prune.support.errors import UserError, did_you_mean, first_line
from lightning_prune.support.quiet import quiet_datasets

# English has 3 to 5 characters per token, so with 16 random sampling chooses each window from about four.
CHARACTERS_PER_TOKEN = 16
ENOUGH = 1 << 26  # characters of a local text that calibration reads at least, if there are so many


@dataclass(frozen=True)
class Corpus:
    """The whole text of one split; the other fields are those of the manifest."""

    dataset: str
    configuration: str | None
    split: str
    revision: str | None
    text: str
    rendering: str | None = None  # ``chat template`` where rows were chats
    chat_template_sha256: str | None = None


@dataclass(frozen=True)
class HubCorpus:
    """The place of a named corpus on the Hugging Face hub."""

    path: str
    configuration: str
    column: str
    joiner: str  # of documents, as in the loaders that the pruning papers share: perplexity depends on it
    splits: tuple[str, ...]
    options: dict[str, Any]  # of ``datasets.load_dataset``


HUB = {
    "wikitext2": HubCorpus(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "text", "\n\n", SPLITS, {"name": "wikitext-2-raw-v1"}
    ),
    # The hub's own copy is a loading script, which ``datasets`` no longer runs; its parquet conversion holds the
    # one configuration without naming it.
    "ptb": HubCorpus(
        "ptb-text-only/ptb_text_only", "penn_treebank", "sentence", " ", SPLITS, {"revision": "refs/convert/parquet"}
    ),
    "c4": HubCorpus("allenai/c4", "en", "text", " ", SPLITS[:2], {"name": "en", "streaming": True}),
}
NAMES = ("demo", *HUB)
C4_HELD_OUT_DOCUMENTS = 1100  # the published c4 perplexities read the first 1100 validation documents


def calibration_split(dataset: str) -> str:
    """The split calibration reads by default: ``train``, or ``all`` for a file without splits. UserError for an unknown
    dataset, a missing file, or a folder of splits without ``train``."""
    splits = _splits(dataset)
    if splits and "train" not in splits:
        example = next((split for split in splits if split != "test"), splits[0])  # test is what is evaluated on
        raise UserError(
            f"--data.dataset {dataset} has the splits {', '.join(splits)} but no train. "
            f"Choose one with --data.dataset {dataset}:{example} or --data.split."
        )
    return "train" if splits else "all"


def held_out_split(dataset: str) -> str | None:
    """The split evaluation reads by default: ``test``, else ``validation``, else None (a file without splits)."""
    splits = _splits(dataset)
    return next((split for split in ("test", "validation") if split in splits), None)


def split_spec(spec: str) -> tuple[str, str | None]:
    """``wikitext2:validation`` -> (``wikitext2``, ``validation``); a path that exists is never split."""
    name, colon, split = spec.rpartition(":")
    if not colon or is_local(spec) or "/" in split or "\\" in split:
        return spec, None
    return name, split


def load_corpus(
    dataset: str,
    split: str,
    tokens_wanted: int | None = None,
    column: str | None = None,
    tokenizer: Callable[[], Any] | None = None,
) -> Corpus:
    """Read the text of one split, ``all`` where there are none, of one of ``NAMES`` or a local path.

    Args:
        tokens_wanted: c4 calibration is streamed only until its text has 16 characters for each of these, a local text
            until it also has ``ENOUGH``. None for all.
        column: of a local table; by default the one that is clearly the text or a chat.
        tokenizer: gives the tokenizer whose template chats are rendered with; called when there is one.

    Raises:
        UserError: unknown dataset or split, missing or unreadable file, or a hub dataset that cannot be fetched.
    """
    splits = _splits(dataset)
    if split not in (splits or ("all",)):
        allowed = f"allowed: one of {', '.join(splits)}" if splits else "it has none at all. Leave the split out"
        raise UserError(f"{OPTIONS}: {dataset} has no split {split!r}; {allowed}.")
    if dataset in HUB:
        return _from_hub(dataset, split, tokens_wanted)
    if dataset == "demo":
        return Corpus(dataset, None, split, None, demo_text(split))
    chat = Chat(tokenizer)
    enough = None if tokens_wanted is None else max(ENOUGH, tokens_wanted * CHARACTERS_PER_TOKEN)
    text, revision = read_local(dataset, split, column, chat, enough)
    return Corpus(dataset, None, split, revision, text, "chat template" if chat.sha256 else None, chat.sha256)


def _splits(dataset: str) -> Sequence[str]:
    if dataset in NAMES:
        return SPLITS if dataset == "demo" else HUB[dataset].splits
    if is_local(dataset):
        return local_splits(dataset)
    hint = "" if "/" in dataset or Path(dataset).suffix else did_you_mean(dataset.lower(), NAMES)
    raise UserError(
        f"{dataset!r} is neither a named dataset nor a file or folder that exists; {OPTIONS} take {', '.join(NAMES)}, "
        f"or a local {FILE_KINDS}.{hint}"
    )


def _from_hub(dataset: str, split: str, tokens_wanted: int | None) -> Corpus:
    source = HUB[dataset]
    try:
        with quiet_datasets():
            rows = datasets.load_dataset(source.path, split=split, **source.options)
        if isinstance(rows, datasets.IterableDataset):  # the rest is never downloaded
            enough = tokens_wanted * CHARACTERS_PER_TOKEN if tokens_wanted and split == "train" else None
            texts = (row[source.column] for row in islice(rows, C4_HELD_OUT_DOCUMENTS if enough is None else None))
            documents = list(until(texts, enough))
        else:
            documents = list(rows[source.column])
    except Exception as error:  # offline, moved, gated, rate-limited: the hub's clients raise dozens of types
        reason = f"{type(error).__name__}: {first_line(error)}"
        usual = "; also the default of --data.dataset" if dataset == "wikitext2" else ""
        raise UserError(
            f"could not fetch {dataset} ({source.path}, {split}{usual}) from the hub: {reason}. Check the network and "
            f"HF_HUB_OFFLINE, or give a local {FILE_KINDS} with {OPTIONS}."
        ) from error
    # The commit is in the addresses that the dataset was downloaded from.
    addresses = " ".join(getattr(rows.info, "download_checksums", None) or {})
    commit = re.search(r"@([0-9a-f]{40})/", addresses)
    revision = commit.group(1) if commit else getattr(rows, "_fingerprint", None)
    return Corpus(dataset, source.configuration, split, revision, source.joiner.join(documents))
