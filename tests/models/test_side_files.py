"""What lies beside the weights of published models comes along, and works there."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lightning_prune.checkpoint.apply import apply
from lightning_prune.models.checkpoint import Checkpoint
from tests.tiny import make_tiny, mixed_plan, tiny_tokenizer, uniform_plan

TAKEN = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "special_tokens_map.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "qwen.tiktoken", "tekken.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja", "SYSTEM_PROMPT.txt"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenization_own.py", "image_processing_own.py", "custom_generate/generate.py"),
)
NOT_TAKEN = ("modeling_own.py", "README.md", "training_args.bin", "onnx/tokenizer.json", "pytorch_model.bin")
OWN_TOKENIZER = """
from transformers import PreTrainedTokenizerFast
from .helper_of_own import OFFSET


class OwnTokenizer(PreTrainedTokenizerFast):
    offset = OFFSET
"""


def test_all_that_belongs_to_tokenizer_templates_and_processor(tmp_path: Path) -> None:
    for name in (*TAKEN, *NOT_TAKEN):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    os.mkfifo(tmp_path / "vocab.pipe")
    make_tiny().save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert set(checkpoint.side_files) == set(TAKEN)
    assert all(file == tmp_path / name for name, file in checkpoint.side_files.items())


@pytest.mark.parametrize("make_plan", [mixed_plan, uniform_plan])
def test_a_tokenizer_of_its_own_code_works_in_the_pruned_folder(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], make_plan: Callable
) -> None:
    folder = tiny_checkpoint()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "w5"}
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(OWN_TOKENIZER)
    (folder / "helper_of_own.py").write_text("OFFSET = 3\n")
    model = make_tiny()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    plan = make_plan(model, parameters={"dense": parameters, "pruned": 0})
    pruned = apply(plan, folder, tmp_path / "pruned", verbose=False)
    loaded = AutoTokenizer.from_pretrained(pruned, trust_remote_code=True)
    assert loaded.offset == 3
    assert loaded("w7 w8").input_ids == [7, 8]
    assert loaded.apply_chat_template([{"role": "user", "content": "w9"}], tokenize=False) == "w9"
    assert loaded.get_chat_template("tool_use") == "w5"
