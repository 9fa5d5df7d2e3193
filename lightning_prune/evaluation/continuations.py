"""Greedy continuations of the same prompts by a dense and a pruned model, and how they differ."""

import inspect
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.layered import LayeredModel

PROMPT_TOKENS = NEW_TOKENS = 64  # fewer where windows or positions are
READ_BYTES = 64 * 2**30  # of weights that are read at most where layers are brought in for every token
NGRAM, EXAMPLES = 4, 3


@dataclass(frozen=True)
class Continuations:
    """Continuations by one model: ``prompts`` int64 ``[N, P]``, and for each the new tokens up to ``new_tokens`` or to
    the one that ends a text, itself included."""

    prompts: Tensor = field(compare=False)
    new_tokens: int
    texts: list[list[int]]
    ends: frozenset[int]

    def first(self, count: int) -> "Continuations":
        """The first ``count`` of the new tokens: another model may have had positions for fewer."""
        return replace(self, new_tokens=count, texts=[text[:count] for text in self.texts])

    @property
    def ended(self) -> float:
        """Share of the texts that came to their end."""
        return sum(text[-1] in self.ends for text in self.texts) / len(self.texts)

    @property
    def repeated(self) -> float | None:
        """Share of all runs of four tokens that were in the same text before; None where no text has four."""
        runs = [[tuple(text[i : i + NGRAM]) for i in range(len(text) - NGRAM + 1)] for text in self.texts]
        total = sum(map(len, runs))
        return 1 - sum(len(set(one)) for one in runs) / total if total else None


def common_beginning(left: Continuations, right: Continuations) -> float:
    """Mean number of tokens before two models' texts part."""
    pairs = zip(left.texts, right.texts, strict=True)
    common = [len(list(takewhile(lambda two: two[0] == two[1], zip(*pair, strict=False)))) for pair in pairs]
    return sum(common) / len(common)


def examples(dense: Continuations, pruned: Continuations, tokenizer: Any | None) -> list[dict[str, str]]:
    """Up to three prompts with both continuations, as text; none without a tokenizer."""
    if tokenizer is None:
        return []
    rows = range(0, len(dense.texts), -(-len(dense.texts) // EXAMPLES))
    return [
        {
            "prompt": tokenizer.decode(dense.prompts[row].tolist()),
            "dense": tokenizer.decode(dense.texts[row]),
            "pruned": tokenizer.decode(pruned.texts[row]),
        }
        for row in rows
    ]


@torch.no_grad()
def continuations(model: LayeredModel, checkpoint: Checkpoint, prompts: Tensor) -> Continuations | None:
    """Continue ``prompts`` ``[N, P]`` greedily, all in one batch, so that a layer is brought in once per token; None
    where that would take too long, or where the model has no positions left for a new token."""
    if model.onload == "layer" and NEW_TOKENS * model.layer_bytes > READ_BYTES:
        rank_zero_warn(
            f"No continuations: the weights of '{checkpoint.pretrained}' are loaded layer by layer, and reading all of "
            "them for every token would take long. Set --data.continuations 0 if none are wanted."
        )
        return None
    new_tokens = int(min(NEW_TOKENS, (checkpoint.limits[1] or torch.inf) - prompts.shape[1]))
    if new_tokens < 1:
        return None
    end = getattr(checkpoint.generation_config, "eos_token_id", None) or checkpoint.config.eos_token_id
    ends = frozenset(() if end is None else [end] if isinstance(end, int) else end)
    with model.whole() as net:
        written = greedy(net, prompts.to(model.device), new_tokens, ends).tolist()
    lengths = [next((at for at, token in enumerate(row, 1) if token in ends), len(row)) for row in written]
    texts = [row[:length] for row, length in zip(written, lengths, strict=True)]
    return Continuations(prompts, new_tokens, texts, ends)


def greedy(net: Any, prompts: Tensor, new_tokens: int, ends: frozenset[int] = frozenset()) -> Tensor:
    """The most probable tokens after ``prompts`` ``[N, P]``, one after the other through the KV cache: ``[N, T]``,
    T = ``new_tokens``, or fewer where every row has one of ``ends``."""
    cache, head = cache_option(net), net.get_output_embeddings()
    # The last positions of the prompts are a strided view. For that a CPU copies the head once per prompt in bf16.
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        output = net(input_ids=prompts, use_cache=True, logits_to_keep=1)
    finally:
        hook.remove()
    written = [output.logits[:, -1].argmax(-1)]
    stop = torch.tensor(sorted(ends), dtype=torch.int64, device=prompts.device)
    ended = torch.isin(written[0], stop)
    while len(written) < new_tokens and not bool(ended.all()):
        output = net(input_ids=written[-1][:, None], use_cache=True, **{cache: getattr(output, cache)})
        written.append(output.logits[:, -1].argmax(-1))
        ended |= torch.isin(written[-1], stop)
    return torch.stack(written, dim=1)


def cache_option(net: Any) -> str:
    """Name of the cache argument: transformers 5.24 renamed it and the output's field; the old name warns there."""
    return "cache" if "cache" in inspect.signature(type(net).forward).parameters else "past_key_values"
