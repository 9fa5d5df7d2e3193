"""llama.cpp as it is released computes what transformers computes, from the files that ``export`` writes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import lightning_prune
from lightning_prune.cli import main
from lightning_prune.models.checkpoint import Checkpoint
from tests.engines.asking import ask, difference, needs, prompts
from tests.engines.tokenizers_by_kind import TEXTS, save_tokenizer
from tests.formats.checkpoints import FAMILIES, TOKENS, Plan, gone, save
from tests.tiny import mixed_plan

pytestmark = [pytest.mark.engines, needs("llamacpp")]

LENGTH = 32
GONE = [gone(what, where) for what in ("attention", "mlp", "both") for where in (0, 2, 3)]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 1e4,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}


def export(model: Path, dtype: str) -> Path:
    file = model.parent / f"{dtype}.gguf"
    options = ["--format", "gguf", "--dtype", dtype, "--output", str(file)]
    assert main(["export", "--model", str(model), *options]) == 0
    return file


def compare(model: PreTrainedModel, file: Path, tolerance: float) -> None:
    """At every step of 32 greedy ones the engine's 20 likeliest tokens have transformers' log-probabilities."""
    asked = prompts((1, 5, 17, 60), TOKENS)
    answers = ask("llamacpp", file, {"prompts": asked, "length": LENGTH})["prompts"]
    assert sum(top is not None for answer in answers for top in answer["top"]) > 60
    assert difference(model, asked, answers, LENGTH) <= tolerance


def case(family: str, plan: Plan | None, **options: Any) -> Any:
    words = [family, getattr(plan, "__name__", "dense"), *map(str, options.values())]
    return pytest.param(family, plan, options, id="-".join(words)[:60])


CASES = [
    *(case(family, plan) for family in FAMILIES for plan in (None, mixed_plan, *GONE)),
    *(case("llama", plan, tied=False) for plan in (None, mixed_plan)),
    case("qwen3", None, tied=False),
    *(case("llama", plan, attention_bias=True, mlp_bias=True) for plan in (None, mixed_plan, gone("attention", 2))),
    *(case("llama", plan, rope_parameters=rope) for plan in (None, mixed_plan) for rope in (LLAMA3, YARN, LINEAR)),
    *(case(family, None, rope_parameters=rope) for family in ("qwen2", "qwen3") for rope in (YARN, LINEAR)),
    case("qwen2", mixed_plan, rope_parameters=YARN),
    case("qwen3", mixed_plan, rope_parameters=YARN),
]


@pytest.mark.parametrize(("family", "plan", "options"), CASES)
def test_fp32_files_give_the_log_probabilities_of_transformers(
    family: str, plan: Plan | None, options: dict[str, Any], tmp_path: Path
) -> None:
    model = save(tmp_path / "model", family, plan, **options)
    compare(model, export(tmp_path / "model", "f32"), 1e-4)


@pytest.mark.parametrize("plan", [None, mixed_plan])
@pytest.mark.parametrize("family", FAMILIES)
def test_f16_files_give_the_log_probabilities_of_transformers(family: str, plan: Plan | None, tmp_path: Path) -> None:
    """The engine also multiplies in f16 there; transformers computes with the same weights in fp32."""
    model = save(tmp_path / "model", family, plan, dtype=torch.float16)
    compare(model, export(tmp_path / "model", "f16"), 0.01)
    compare(model, export(tmp_path / "model", "f32"), 1e-4)  # and without rounding nothing is left


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "llama"])
def test_text_goes_in_and_comes_out_as_with_the_tokenizer_of_hugging_face(kind: str, tmp_path: Path) -> None:
    save(tmp_path / "model", plan=mixed_plan)
    tokenizer = save_tokenizer(kind, tmp_path / "model")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    answers = ask("llamacpp", export(tmp_path / "model", "f32"), {"texts": TEXTS, "messages": messages})
    for text, tokens in zip(TEXTS, answers["tokens"], strict=True):
        assert tokens == tokenizer(text)["input_ids"], text
    for text, tokens, back in zip(TEXTS, answers["tokens"], answers["texts"], strict=True):
        expected = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert back.strip() == expected.strip(), text
    assert answers["chat"] == tokenizer.apply_chat_template(messages, tokenize=False)


def test_the_demo_model_pruned_by_a_method_computes_reads_and_writes_the_same(tmp_path: Path) -> None:
    root = ["--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu"]
    assert main(["fit", "--config", "wanda", "--data.num_samples", "8", *root]) == 0
    run = tmp_path / "wanda" / "version_0"
    file, model = export(run, "f16"), lightning_prune.load(run / "pruned").float()
    compare(model, export(run, "f32"), 1e-4)
    compare(model.half().float(), file, 0.02)
    tokenizer: Any = Checkpoint.open(str(run / "pruned")).tokenizer
    answers = ask("llamacpp", file, {"texts": TEXTS[:2]})
    assert answers["tokens"] == [tokenizer(text)["input_ids"] for text in TEXTS[:2]]
