"""The tokenizer of a Hugging Face folder in the words of the GGUF format."""

import json
from dataclasses import dataclass, field
from typing import Any

from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.support.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# How text is split before merging → (llama.cpp's name for it, whether a whole word of the vocabulary needs no merges).
SPLITS = {
    CONTRACTIONS + r"\p{N}{1,3}" + REST: ("llama-bpe", True),
    CONTRACTIONS + r"\p{N}" + REST: ("qwen2", False),
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+"
    r"[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": ("tekken", True),
}
SPECIAL = ("bos", "eos", "unk", "sep", "pad")


@dataclass
class Vocabulary:
    """What the file says about text.

    Attributes:
        model: ``gpt2`` (bytes, merges in order) or ``llama`` (SentencePiece: scores).
        pre: how text is split before merging.
        tokens, types: one per row of the embedding.
        merges: of ``gpt2``. scores: of ``llama``, the higher the earlier.
        special: ``bos`` … ``pad``, and ``eot``, → token.
        add_bos, add_eos: what the tokenizer puts around a text. add_space: whether it begins with a space.
        chat_template: one, or several by name.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_space: bool = False
    chat_template: str | list[dict[str, str]] | None = None


def read_vocabulary(checkpoint: Checkpoint, rows: int, ends: list[int]) -> Vocabulary:
    """The vocabulary of the tokenizer that stands beside a model.

    Args:
        checkpoint: the model.
        rows: of the embedding; rows without a token are named ``[PAD…]``.
        ends: tokens at which generation ends, as the generation config says; one that is not ``eos`` becomes ``eot``.

    Raises:
        UserError: no ``tokenizer.json``, or one that llama.cpp would read otherwise.
    """
    file = next((path for path in checkpoint.tokenizer_files if path.name == "tokenizer.json"), None)
    tokenizer: Any = checkpoint.tokenizer
    if file is None or tokenizer is None:
        raise UserError(
            f"--model: '{checkpoint.pretrained}' holds no tokenizer.json, and a GGUF file carries its tokenizer. "
            "Copy the tokenizer files of the dense model there."
        )
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE":
        raise _refusal(f"is a {model.get('type')} tokenizer; known are byte-level BPE and SentencePiece's BPE")
    if not tokenizer.is_fast:
        raise _refusal("is used through Python code")
    _check_size(content, rows)
    found = _byte_pieces(content) if _is_sentencepiece(content) else _byte_level(content)
    _fill(found, content, rows)
    found.special = {
        name: token for name in SPECIAL if isinstance(token := getattr(tokenizer, f"{name}_token_id", None), int)
    }
    later = [token for token in ends if token != found.special.get("eos") and 0 <= token < rows]
    if later:
        found.special["eot"] = later[0]
        found.special.setdefault("eos", later[0])
    found.add_bos, found.add_eos = _around(tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    found.chat_template = template if isinstance(template, (str, list)) else None
    return found


def _is_sentencepiece(content: dict[str, Any]) -> bool:
    return bool(content["model"].get("byte_fallback"))


def _byte_level(content: dict[str, Any]) -> Vocabulary:
    """GPT-2's kind: text is split, every piece is bytes, neighbours merge in the order of a list."""
    pre, whole_words = _split(content)
    model = content["model"]
    if bool(model.get("ignore_merges")) != whole_words:
        raise _refusal(f"splits text as '{pre}' does, but its ignore_merges is {bool(model.get('ignore_merges'))}")
    if (content.get("normalizer") or {}).get("type", "NFC") != "NFC":
        raise _refusal(f"has the normalizer {content['normalizer']['type']}, and byte-level BPE has none there")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return Vocabulary("gpt2", pre, [], [], merges=merges)


def _split(content: dict[str, Any]) -> tuple[str, bool]:
    """(llama.cpp's name, ignore_merges) of the pre-tokenizer."""
    stated = content.get("pre_tokenizer") or {}
    steps = stated["pretokenizers"] if stated.get("type") == "Sequence" else [stated]
    *before, last = steps
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        splits_itself = last.get("use_regex", True)
        if splits_itself and not before:
            return "gpt-2", False
        if splits_itself and before == [{"type": "Digits", "individual_digits": True}]:
            return "smollm", False
        if not splits_itself and len(before) == 1 and before[0].get("type") == "Split":
            pattern = before[0].get("pattern", {}).get("Regex")
            if pattern in SPLITS and before[0].get("behavior") == "Isolated" and not before[0].get("invert"):
                return SPLITS[pattern]
    known = ", ".join(["gpt-2", "smollm", *(name for name, _ in SPLITS.values())])
    raise _refusal(f"splits text in a way that has no name here; known are {known}")


def _byte_pieces(content: dict[str, Any]) -> Vocabulary:
    """SentencePiece's BPE: the pair whose union has the highest score merges first, so the order becomes scores."""
    vocabulary = content["model"]["vocab"]
    rank: dict[str, int] = {}
    for index, pair in enumerate(content["model"]["merges"]):
        first, second = pair.split(" ") if isinstance(pair, str) else pair
        rank.setdefault(first + second, index)
    scores = [float(-len(rank) - 1)] * (max(vocabulary.values()) + 1)
    for piece, token in vocabulary.items():
        if piece in rank:
            scores[token] = float(-rank[piece])
    return Vocabulary("llama", "default", [], [], scores=scores, add_space=_adds_space(content))


def _adds_space(content: dict[str, Any]) -> bool:
    """Whether the first word is treated as if a space stood before it."""
    normalizer, pre = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer] if normalizer else []
    kinds = [step.get("type") for step in steps]
    if kinds in (["Prepend", "Replace"], ["Replace"]) and not pre:
        return bool(kinds[0] == "Prepend")
    if not kinds and pre.get("type") == "Metaspace" and pre.get("replacement") == "▁" and not pre.get("split", True):
        return bool(pre.get("prepend_scheme", "always") != "never")
    raise _refusal("prepares text in a way that SentencePiece's BPE does not have in GGUF")


def _check_size(content: dict[str, Any], rows: int) -> None:
    """A token without a row is another model's; and nothing of a size is built that the file alone claims."""
    largest = max([*content["model"]["vocab"].values(), *(token["id"] for token in content.get("added_tokens") or [])])
    if largest >= rows:
        raise UserError(
            f"--model: the tokenizer has a token {largest}, but the model's vocabulary has {rows}. "
            "Give the tokenizer that belongs to the model."
        )


def _fill(found: Vocabulary, content: dict[str, Any], rows: int) -> None:
    """Tokens and their types, one per row."""
    vocabulary, unknown = content["model"]["vocab"], content["model"].get("unk_token")
    added = {token["id"]: token for token in content.get("added_tokens") or []}
    found.tokens, found.types = [f"[PAD{index}]" for index in range(rows)], [UNUSED] * rows
    for piece, token in vocabulary.items():
        found.tokens[token], found.types[token] = piece, NORMAL
        if found.model == "llama" and len(piece) == 6 and piece.startswith("<0x"):
            found.types[token] = BYTE
    for token, entry in added.items():
        found.tokens[token] = entry["content"]
        found.types[token] = CONTROL if entry["special"] else USER_DEFINED
        if found.model == "llama" and entry["content"] == unknown:
            found.types[token] = UNKNOWN
    if found.scores:
        found.scores += [found.scores[0]] * (rows - len(found.scores))


def _around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a text gets a ``bos`` in front and an ``eos`` behind."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for bos in ([], [tokenizer.bos_token_id]):
        for eos in ([], [tokenizer.eos_token_id]):
            if whole == [*bos, *plain, *eos]:
                return bool(bos), bool(eos)
    raise _refusal("puts other tokens around a text than one at its beginning and one at its end")


def _refusal(what: str) -> UserError:
    return UserError(f"--format gguf cannot hold this model's tokenizer: it {what}. Serve the folder itself.")
