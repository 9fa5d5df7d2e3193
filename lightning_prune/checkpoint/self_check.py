"""Read a written checkpoint back as a user would, and compare it with the model that was meant to be written."""

import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, dynamic_module_utils

from lightning_prune.support.errors import CheckpointError, first_line
from lightning_prune.support.quiet import quiet_transformers

LENGTH, PADDING, GREEDY_TOKENS = 12, 5, 8


def probe_tokens(vocab_size: int) -> Tensor:
    """Two fixed token sequences, int64 ``[2, 12]``, spread over the vocabulary."""
    return (torch.arange(2 * LENGTH).view(2, LENGTH) * 7919 + 11) % vocab_size


@torch.no_grad()
def probe_logits(model: PreTrainedModel) -> Tensor:
    """Logits ``[2, 12, V]`` of ``probe_tokens``, in the model's dtype and on its device."""
    tokens = probe_tokens(model.config.vocab_size).to(model.device)
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def check_checkpoint(folder: Path, expected: Tensor) -> dict[str, Any]:
    """Load the whole model in ``folder`` through ``AutoModelForCausalLM``, with the folder's own code, and compare.

    The logits of ``probe_tokens`` must be ``expected`` ``[2, 12, V]``, those of the model in memory in the dtype in
    which it was written and on the device on which to compare. What was compared is returned, for ``metrics.json``.

    Raises:
        CheckpointError: the folder cannot be loaded, or it is another model, or it decodes wrongly with a cache.
        FloatingPointError: ``expected`` is not finite.
    """
    with quiet_transformers(), warnings.catch_warnings(), _own_module_cache():
        warnings.simplefilter("ignore")
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
        except Exception as error:  # whatever the code in the folder, transformers and safetensors may raise
            raise CheckpointError(
                f"the checkpoint cannot be loaded back ({type(error).__name__}: {first_line(error)})"
            ) from error
        if hasattr(model.config, "output_router_logits"):
            model.config.output_router_logits = False  # with the routers' loss transformers cannot decode a mask
        model.to(expected.device)
        return compare_logits(probe_logits(model), expected) | _compare_decoding(model)


def compare_logits(actual: Tensor, expected: Tensor) -> dict[str, Any]:
    """Compare logits of a checkpoint read back, bit for bit: weights, config and code are complete."""
    if not expected.isfinite().all():
        raise FloatingPointError(
            "the pruned model outputs NaN or infinite logits, so no checkpoint of it was kept. Prune in another "
            "precision, or remove less."
        )
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise CheckpointError(
            f"the checkpoint read back gives logits {tuple(actual.shape)} in {actual.dtype}, the model in memory "
            f"{tuple(expected.shape)} in {expected.dtype}"
        )
    if torch.equal(actual, expected):
        return {"logits": "equal", "tokens": expected.shape[:2].numel(), "dtype": str(actual.dtype).partition(".")[2]}
    apart = (actual.double() - expected.double()).abs().amax(-1)
    sequence, position = divmod(int(apart.argmax()), expected.shape[1])
    raise CheckpointError(
        f"the checkpoint read back is another model than the one in memory: the logits of {int((apart != 0).sum())} of "
        f"{apart.numel()} tokens differ, by {float(apart.max()):.3g} at most (sequence {sequence}, token {position})"
    )


@torch.no_grad()
def _compare_decoding(model: PreTrainedModel) -> dict[str, Any]:
    """Greedy decoding of a batch, one sequence of it left-padded, chooses the same tokens with a KV cache as without.

    Rounding may rightly decide a tie, in half precision above all. So at every step at which both have read the same
    tokens their logits are compared, within √eps of the dtype times the largest logit; tokens may differ where two
    logits are that close, and that sequence is followed no further. A layer that forgets to fill its cache slot moves
    logits by the size of the logits themselves.
    """
    tokens = probe_tokens(model.config.vocab_size).to(model.device)
    mask = torch.ones_like(tokens)
    mask[0, :PADDING] = 0
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": GREEDY_TOKENS, "min_new_tokens": GREEDY_TOKENS}
    options |= {"pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    cached, plain = (
        model.generate(tokens, attention_mask=mask, use_cache=use_cache, **options) for use_cache in (True, False)
    )
    for sequence in range(len(tokens)):
        for step in range(GREEDY_TOKENS):
            first, second = (out.logits[step][sequence].double() for out in (cached, plain))
            bound = torch.finfo(model.dtype).eps ** 0.5 * float(second.abs().max())
            apart = float((first - second).abs().max())
            chosen = [int(out.sequences[sequence, LENGTH + step]) for out in (cached, plain)]
            tie = float(second[chosen].max() - second[chosen].min())
            if not (apart <= bound and tie <= 2 * bound):
                raise CheckpointError(
                    f"the checkpoint read back decodes differently with a KV cache: at token {step} of "
                    f"{'a left-padded' if sequence == 0 else 'an unpadded'} sequence logits differ by {apart:.3g}, "
                    f"tokens are {chosen[0]} and {chosen[1]}"
                )
            if chosen[0] != chosen[1]:
                break
    return {
        "greedy": "equal" if torch.equal(cached.sequences, plain.sequences) else "equal up to a tie",
        "greedy_tokens": GREEDY_TOKENS * len(tokens),
    }


@contextmanager
def _own_module_cache() -> Iterator[None]:
    """A place of its own for the code that transformers copies out of a folder before running it: the usual place is
    shared by all processes and keyed by the folder's name, so that a copy of another run's could be executed."""
    usual, path, modules = dynamic_module_utils.HF_MODULES_CACHE, list(sys.path), set(sys.modules)
    with tempfile.TemporaryDirectory(prefix="lightning-prune-") as folder:
        dynamic_module_utils.HF_MODULES_CACHE = folder
        try:
            yield
        finally:
            dynamic_module_utils.HF_MODULES_CACHE = usual
            sys.path[:] = path
            for name in set(sys.modules) - modules:
                if name.partition(".")[0] == dynamic_module_utils.TRANSFORMERS_DYNAMIC_MODULE_NAME:
                    del sys.modules[name]
