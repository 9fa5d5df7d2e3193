"""The tokenizer of a Hugging Face folder in the words of the GGUF format."""

import json
import logging
from typing import Any

import gguf

from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.support.errors import UserError

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


def add_vocabulary(writer: Any, checkpoint: Checkpoint, rows: int) -> None:
    """Describe the tokenizer beside a model to a ``GGUFWriter``: tokens, how they merge, what is put around a text, the
    chat template. The embedding has ``rows``; those without a token are named ``[PAD…]``.

    Raises:
        UserError: no ``tokenizer.json``, or one that llama.cpp would read otherwise.
    """
    file = checkpoint.side_files.get("tokenizer.json")
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
    pieces = bool(model.get("byte_fallback"))  # SentencePiece's kind, not GPT-2's
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else _split(content))
    tokens, types = _tokens(content, rows, pieces)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if pieces:
        writer.add_token_scores(_scores(model, rows))
        writer.add_add_space_prefix(_adds_space(content))
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in SPECIAL}
    ids = {name: token for name, token in ids.items() if isinstance(token, int)}
    ends = getattr(checkpoint.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    # At which generation ends, too.
    if later := [token for token in ends if token != ids.get("eos") and 0 <= token < rows]:
        ids = {"eos": later[0], **ids, "eot": later[0]}
    logging.getLogger("gguf").setLevel(logging.ERROR)  # it warns of templates for pairs of texts
    special = gguf.SpecialVocab(file.parent, load_merges=not pieces, special_token_types=())
    special.special_token_ids, special.add_special_token = ids, _around(tokenizer)
    special.add_to_gguf(writer, quiet=True)


def _tokens(content: dict[str, Any], rows: int, pieces: bool) -> tuple[list[str], list[int]]:
    """Tokens and their types, one per row of the embedding."""
    vocabulary, added, kinds = content["model"]["vocab"], content.get("added_tokens") or [], gguf.TokenType
    largest = max([*vocabulary.values(), *(token["id"] for token in added)])
    if largest >= rows:  # before anything is built of a size that the file alone claims
        raise UserError(
            f"--model: the tokenizer has a token {largest}, but the model's vocabulary has {rows}. "
            "Give the tokenizer that belongs to the model."
        )
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [kinds.UNUSED] * rows
    for piece, token in vocabulary.items():
        is_byte = pieces and len(piece) == 6 and piece.startswith("<0x")
        tokens[token], types[token] = piece, kinds.BYTE if is_byte else kinds.NORMAL
    for entry in added:
        is_unknown = pieces and entry["content"] == content["model"].get("unk_token")
        kind = kinds.UNKNOWN if is_unknown else kinds.CONTROL if entry["special"] else kinds.USER_DEFINED
        tokens[entry["id"]], types[entry["id"]] = entry["content"], kind
    return tokens, types


def _split(content: dict[str, Any]) -> str:
    """llama.cpp's name for how GPT-2's kind splits a text into pieces, whose bytes merge in the order of a list."""
    stated, split = content.get("pre_tokenizer") or {}, None
    *before, last = stated["pretokenizers"] if stated.get("type") == "Sequence" else [stated]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if last.get("use_regex", True):
            digits = {"type": "Digits", "individual_digits": True}
            split = ("gpt-2", False) if not before else ("smollm", False) if before == [digits] else None
        elif len(before) == 1 and before[0].get("behavior") == "Isolated" and not before[0].get("invert"):
            split = SPLITS.get(before[0].get("pattern", {}).get("Regex"))
    if split is None:
        known = ", ".join(["gpt-2", "smollm", *(name for name, _ in SPLITS.values())])
        raise _refusal(f"splits text in a way that has no name here; known are {known}")
    pre, whole_words = split
    if bool(content["model"].get("ignore_merges")) != whole_words:
        raise _refusal(f"splits text as '{pre}' does, but its ignore_merges is {not whole_words}")
    normalizer = (content.get("normalizer") or {}).get("type", "NFC")
    if normalizer != "NFC":
        raise _refusal(f"has the normalizer {normalizer}, and byte-level BPE has none there")
    return pre


def _scores(model: dict[str, Any], rows: int) -> list[float]:
    """SentencePiece's BPE: the pair whose union has the highest score merges first, so the order becomes scores."""
    rank: dict[str, int] = {}
    for index, pair in enumerate(model["merges"]):
        rank.setdefault(pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair), index)
    scores = [float(-len(rank) - 1)] * rows
    for piece in rank.keys() & model["vocab"].keys():
        scores[model["vocab"][piece]] = float(-rank[piece])
    return scores


def _adds_space(content: dict[str, Any]) -> bool:
    """Whether SentencePiece's kind treats the first word as if a space were before it."""
    normalizer, pre = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    kinds = [step.get("type") for step in normalizer.get("normalizers", [normalizer] if normalizer else [])]
    if not pre and kinds in (["Prepend", "Replace"], ["Replace"]):
        return bool(kinds[0] == "Prepend")
    if not kinds and pre.get("type") == "Metaspace" and pre.get("replacement") == "▁" and not pre.get("split", True):
        return bool(pre.get("prepend_scheme", "always") != "never")
    raise _refusal("prepares text in a way that SentencePiece's BPE does not have in GGUF")


def _around(tokenizer: Any) -> dict[str, bool]:
    """Whether a text gets a ``bos`` in front and an ``eos`` at its end."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for bos in ([], [tokenizer.bos_token_id]):
        for eos in ([], [tokenizer.eos_token_id]):
            if whole == [*bos, *plain, *eos]:
                return {"bos": bool(bos), "eos": bool(eos)}
    raise _refusal("puts other tokens around a text than one at its beginning and one at its end")


def _refusal(what: str) -> UserError:
    return UserError(f"--format gguf cannot hold this model's tokenizer: it {what}. Serve the folder itself.")
