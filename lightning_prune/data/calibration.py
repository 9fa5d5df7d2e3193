"""The calibration set: token ids, where they came from, and a fingerprint that names exactly these tokens."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

RUN = 64  # equal tokens in a row that are not a coincidence; shorter windows are compared whole
SHARE = 0.01  # of windows that two texts may share: licences, boilerplate


def fingerprint(tokens: Tensor) -> str:
    r"""SHA-256 that two runs share exactly when they saw the same tokens (integers of any shape) in the same order: of
    the shape in ASCII decimals (`128,128\n`), then the ids in row-major order as little-endian int64."""
    digest = hashlib.sha256(",".join(str(size) for size in tokens.shape).encode("ascii") + b"\n")
    digest.update(tokens.detach().cpu().contiguous().numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class CalibrationManifest:
    """Everything needed to rebuild a calibration set, and its fingerprint to check the result. What a ready token array
    does not say is None: it has no text and no tokenizer."""

    dataset: str  # corpus name or local path
    configuration: str | None  # of a dataset on the hub, e.g. ``wikitext-2-raw-v1``
    split: str  # ``train``, ``test``, …; ``all`` for a file without splits
    revision: str | None  # commit of a hub dataset, or the fingerprint ``datasets`` keeps with a saved folder
    text_sha256: str | None  # of the UTF-8 text before tokenisation
    tokenizer_sha256: str | None  # see ``tokenization.tokenizer_sha256``
    sampling: str  # ``random``, ``sequential``, ``sliding``; ``given`` for a token array
    stride: int | None = None  # tokens between two window starts (sliding only)
    seed: int | None = None  # of the random choice (random only)
    bos: str = "none"  # or ``every window``: whether windows begin with the beginning-of-sequence token
    rendering: str | None = None  # ``chat template`` where rows were chats
    chat_template_sha256: str | None = None
    parts: list[dict[str, Any]] | None = None  # of a mixture: the entry here, its share and samples, for each
    num_samples: int  # windows
    seq_len: int  # tokens in a window
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """The content of ``calibration.json``."""
        return asdict(self)


@dataclass(frozen=True)
class CalibrationSet:
    """Token ids, int64 ``[num_samples, seq_len]``, every sequence full length, and their manifest."""

    tokens: Tensor
    manifest: CalibrationManifest


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out windows for perplexity.

    Attributes:
        name: key of this set in ``metrics.json``: ``wikitext2``, ``wikitext2:validation``, ``mine.txt``;
            ``wikitext2@1024`` for the same text in long windows.
        tokens: int64 ``[M, seq_len]``, windows that do not overlap; a last partial window is dropped.
        manifest: dataset, configuration, split, revision, rendering, chat_template_sha256, seq_len, stride (seq_len,
            one less with bos), bos (``none`` or ``every window``), windows, predicted_tokens (``M * (seq_len - 1)``),
            text_sha256, tokenizer_sha256, fingerprint; of long windows also long_windows_of, the name of the set, of
            others calibration_overlap, the share of the calibration samples that begin in this text.
    """

    name: str
    tokens: Tensor
    manifest: dict[str, Any]

    @classmethod
    def of(cls, name: str, tokens: Tensor, facts: dict[str, Any], **more: str) -> "EvaluationSet":
        """Windows with the manifest's protocol; ``facts`` and ``more`` are the rest of it."""
        windows, seq_len = tokens.shape
        protocol = {
            "seq_len": seq_len,
            "stride": seq_len if facts["bos"] == "none" else seq_len - 1,
            "windows": windows,
            "predicted_tokens": windows * (seq_len - 1),
            "fingerprint": fingerprint(tokens),
        }
        return cls(name, tokens, facts | protocol | more)

    @property
    def is_long(self) -> bool:
        """Whether this is another set's text in long windows."""
        return "long_windows_of" in self.manifest


def same_text(seen: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two manifests are of one text: by name and split, by its SHA-256, or by the fingerprint of the tokens."""
    if parts := seen.get("parts"):
        return any(same_text({**part, "parts": None}, other) for part in parts)
    # A part comes from a file that nobody has validated: what it lacks is equal to nothing.
    same_split = all(seen.get(key) == other[key] for key in ("dataset", "split"))
    known = seen.get("text_sha256") is not None and seen["text_sha256"] == other["text_sha256"]
    return same_split or known or bool(seen.get("fingerprint") == other["fingerprint"])


def shared_windows(tokens: Tensor, windows: Tensor) -> float:
    """Share of ``windows`` ``[M, W]`` whose first ``RUN`` tokens (or all, if fewer) occur somewhere in the text
    ``tokens`` ``[N, L]``, read as one stream."""
    stream = tokens.flatten().numpy()
    length = min(RUN, windows.shape[1])
    if len(stream) < length:
        return 0.0
    # The set holds the evaluation's windows; one of every run of the training text would take 512 bytes a token.
    beginnings = [row.tobytes() for row in windows[:, :length].contiguous().numpy()]
    wanted = set(beginnings)
    runs = np.lib.stride_tricks.sliding_window_view(stream, length)
    shared = {key for run in runs if (key := run.tobytes()) in wanted}
    return sum(key in shared for key in beginnings) / len(beginnings)
