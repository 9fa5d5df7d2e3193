"""The tables of docs/families.md, supported families from their records and the refused ones with their reasons.

    python tools/families_table.py

writes them anew; a test compares the page with the records.
"""

from collections.abc import Iterator
from pathlib import Path

from lightning_prune.formats.architectures import ARCHITECTURES
from lightning_prune.models.family import DENSE, Family
from lightning_prune.models.records import FAMILIES, TEXT_PARTS
from lightning_prune.models.refusals import ENCODER_DECODER, FAMILIES_BY_REASON, SEVERAL_MODELS
from lightning_prune.models.vocabulary import Block

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
HEADER = "| `model_type`: models | what can be removed, besides layers | also run in |\n|---|---|---|\n"
REFUSED_HEADER = "| Reason | `model_type` |\n|---|---|\n"
MODELS = {
    "llama": "Llama 2 and 3, SmolLM2, Yi, Falcon 3, DeepSeek distillations",
    "mistral": "Mistral",
    "qwen2": "Qwen2, Qwen2.5, DeepSeek distillations",
    "qwen3": "Qwen3 (dense)",
    "ministral": "Ministral",
    "ministral3": "Ministral 3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "gemma4_text": "Gemma 4 (31B, 26B-A4B, text; E2B and E4B share keys and values between layers and are refused)",
    "gemma4_unified_text": "Gemma 4 (12B, text)",
    "phi3": "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    "granite": "Granite 3 (dense)",
    "smollm3": "SmolLM3",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "ernie4_5": "ERNIE 4.5 (dense)",
    "seed_oss": "Seed-OSS",
    "helium": "Helium",
    "stablelm": "StableLM 2 and 3B (sequential blocks)",
    "qwen3_moe": "Qwen3-30B-A3B, Qwen3-Coder",
    "olmoe": "OLMoE",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "granitemoe": "Granite 3 MoE (1B-A400M, 3B-A800M)",
    "glm4_moe": "GLM-4.5, GLM-4.6",
    "ernie4_5_moe": "ERNIE 4.5 (21B-A3B, 300B-A47B)",
    "gpt_oss": "gpt-oss (16-bit weights)",
    "deepseek_v3": "Moonlight, DeepSeek-V3 (16-bit weights)",
    "qwen3_5_moe_text": "Qwen3.5 (35B-A3B and larger, text)",
    "qwen3_next": "Qwen3-Next, Qwen3-Coder-Next",
    "lfm2_moe": "LFM2 (8B-A1B)",
    "qwen3_5_text": "Qwen3.5 (dense, text)",
    "lfm2": "LFM2 (dense)",
    "granitemoehybrid": "Granite 4, with and without experts",
    "falcon_h1": "Falcon-H1",
    "bamba": "Bamba",
    "jamba": "Jamba",
    "phi": "Phi-1, Phi-1.5, Phi-2",
    "gpt_neox": "GPT-NeoX, Pythia",
    "cohere": "Command R, Command R+",
    "cohere2": "Command R7B, Command A",
    "nemotron_h": "Nemotron-H, Nemotron Nano 2 and 3",
    "qwen3_5": "Qwen3.5 (dense, text part)",
    "qwen3_5_moe": "Qwen3.5 (35B-A3B and larger, text part)",
    "gemma3": "Gemma 3 (text part)",
    "gemma4": "Gemma 4 (31B, 26B-A4B, text part)",
    "gemma4_unified": "Gemma 4 (12B, text part)",
    "qwen2_vl": "Qwen2-VL (text part)",
    "qwen2_5_vl": "Qwen2.5-VL (text part)",
    "qwen3_vl": "Qwen3-VL (dense, text part)",
    "mistral3": "Mistral Small 3, Ministral 3 (text part)",
}


def removable(family: Family) -> str:
    """What methods can take out of a layer of the family."""
    blocks = {block for of in family.blocks.values() for block in of} | (set() if "" in family.blocks else set(DENSE))
    shared = " (also shared)" if family.experts and family.experts.shared else ""
    units = [f"expert channels{shared}", "experts"] if family.experts else ["channels"]
    return ", ".join([*units, *(["groups"] if Block.ATTENTION in blocks and family.whole_attention is None else [])])


# Of the families with mixers, experts or blocks side by side: whose folders vLLM ran, with widths per layer, or stock
# ones alone, in its own models (docs/notes/engines.md).
PER_LAYER_IN_VLLM = ("gemma4_text", "gemma4_unified_text", "phi", "gpt_neox", "cohere")
STOCK_IN_VLLM = (
    *("qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "granitemoe", "glm4_moe", "gpt_oss", "granitemoehybrid"),
    *("falcon_h1", "nemotron_h"),
)


def runtimes(family: Family) -> str:
    """Where pruned models of the family were run, beside transformers."""
    newer = family.mixer or family.experts or family.own_heads or family.side_by_side
    any_widths = not newer or family.model_type in PER_LAYER_IN_VLLM
    stock = ["vLLM (stock)"] if family.model_type in STOCK_IN_VLLM else []
    return ", ".join([*(["vLLM"] if any_widths else stock), *(["GGUF"] if family.model_type in ARCHITECTURES else [])])


def rows() -> Iterator[str]:
    """One for families with equal cells; among them models of several, whose text part is of a family."""
    alike: dict[str, list[str]] = {}
    for name, family in {**FAMILIES, **{name: FAMILIES[part] for name, part in TEXT_PARTS.items()}}.items():
        alike.setdefault(f"{removable(family)} | {runtimes(family)}", []).append(f"`{name}`: {MODELS[name]}")
    for cells, families in alike.items():
        yield f"| {'<br>'.join(families)} | {cells} |\n"


def refused_rows() -> Iterator[str]:
    """One per reason."""
    for reason, names in FAMILIES_BY_REASON.items():
        yield f"| {reason} | {', '.join(f'`{name}`' for name in names.split())} |\n"
    yield f"| {ENCODER_DECODER} | T5, BART and all others |\n"
    yield f"| {SEVERAL_MODELS} | LLaVA and all others than those above |\n"


def with_table(page: str, start: str, table: str) -> str:
    """The page with the table that begins with ``start`` replaced."""
    before, _, rest = page.partition(start)
    return before + table + rest[rest.index("\n\n") + 1 :]


def written(page: str) -> str:
    """The page with both tables as the records have them."""
    page = with_table(page, "| `model_type`: models |", HEADER + "".join(rows()))
    return with_table(page, "| Reason | `model_type` |", REFUSED_HEADER + "".join(refused_rows()))


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
