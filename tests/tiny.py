"""Tiny random models: small enough that a test may build a dozen."""

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lightning_prune.surgery.plan import LayerPlan, PruningPlan

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def tiny_config(
    family: str = "llama",
    heads: int = 4,
    kv_heads: int = 2,
    tied: bool = True,
    layers: int = 4,
    hidden: int = 32,
    channels: int = 40,
    head_dim: int = 8,
    **extra: Any,
) -> PretrainedConfig:
    """A config with 96 tokens and 128 positions; ``extra`` goes to the family's config class as it is."""
    return AutoConfig.for_model(
        family,
        vocab_size=96,
        hidden_size=hidden,
        intermediate_size=channels,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        **extra,
    )


def make_tiny(family: str = "llama", seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random fp32 model in eval mode. Norm weights and biases are random too, so that losing one shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **options), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """int64 ``[batch, length]``, special tokens left out."""
    return torch.randint(2, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def tiny_plan(model: PreTrainedModel, kept: list[tuple[list[int], list[int]]], **fields: Any) -> PruningPlan:
    """A plan that keeps (KV heads, channels) ``kept[i]`` of layer i; ``fields`` replace the plan's own."""
    dense = sum(parameter.numel() for parameter in model.parameters())
    defaults: dict[str, Any] = {
        "method": "by-hand",
        "pruning_ratio": 0.2,
        "achieved_ratio": 0.19,
        "parameters": {"dense": dense, "pruned": 0},
        "calibration_fingerprint": None,
        "base_model": "tiny",
        "layers": [LayerPlan(index, *lists) for index, lists in enumerate(kept)],
    }
    return PruningPlan(**(defaults | fields))


def mixed_plan(model: PreTrainedModel, **fields: Any) -> PruningPlan:
    """For four layers of 40 channels: no attention, narrower, no MLP, nothing left."""
    heads = list(range(model.config.num_key_value_heads))
    kept = [([], list(range(40))), (heads[1:] or heads, list(range(1, 40, 2))), (heads, []), ([], [])]
    return tiny_plan(model, kept, **fields)


def uniform_plan(model: PreTrainedModel, **fields: Any) -> PruningPlan:
    """For four layers of 40 channels: one less, and the others equally narrower, by other indices in each."""
    heads = list(range(model.config.num_key_value_heads))
    kept = [(heads[1:] or heads, list(range(24))), ([], []), (heads[:-1] or heads, list(range(16, 40)))]
    return tiny_plan(model, [*kept, (heads[1:] or heads, list(range(8, 32)))], **fields)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words ``w0`` … ``w95``, one token each; ``w0`` starts and ``w1`` ends a text."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w2"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w0", eos_token="w1", unk_token="w2", pad_token="w1", padding_side="left"
    )
