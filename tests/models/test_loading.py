import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig
from transformers.utils import logging as transformers_logging

import lightning_prune
from lightning_prune.models.loading import load_config, load_model, load_tokenizer, meta_model
from lightning_prune.support.errors import UserError
from tests.cutting import cut
from tests.tiny import EVERY_FAMILY, make_tiny, mixed_plan, tiny_tokenizer, tiny_tokens


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_dense_model_comes_back_in_eval_mode(tiny_checkpoint: Callable[..., Path], family: str) -> None:
    model = load_model(str(tiny_checkpoint(family=family)), None)
    assert not model.training
    assert torch.equal(model(tiny_tokens()).logits, make_tiny(family)(tiny_tokens()).logits)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16, torch.float16])
def test_weights_have_the_asked_dtype_and_rotary_tables_float32(
    tmp_path: Path, stored: torch.dtype, asked: torch.dtype | None, pruned: bool
) -> None:
    model = make_tiny().to(stored)
    (cut(model, mixed_plan(model)) if pruned else model).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), asked)
    assert {parameter.dtype for parameter in loaded.parameters()} == {asked or stored}
    assert {buffer.dtype for buffer in loaded.buffers()} == {torch.float32}


def test_meta_model_has_the_names_and_shapes_of_the_loaded_one(tmp_path: Path) -> None:
    for model in (make_tiny("qwen2"), cut(make := make_tiny("qwen2"), mixed_plan(make))):
        model.save_pretrained(tmp_path)
        meta = meta_model(load_config(str(tmp_path)))
        assert all(parameter.is_meta for parameter in meta.parameters())
        assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_loading_prints_nothing_and_leaves_the_log_level(
    tiny_checkpoint: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint()
    capfd.readouterr()
    before = transformers_logging.get_verbosity()
    load_model(str(folder), None)
    load_tokenizer(str(folder))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert transformers_logging.get_verbosity() == before


def test_model_without_a_tokenizer_has_none(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint()
    assert load_tokenizer(str(folder)) is None
    tiny_tokenizer().save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer is not None
    assert tokenizer("w7 w8").input_ids == [7, 8]


def test_damaged_tokenizer_is_a_message(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"--model\.pretrained: the tokenizer cannot be loaded"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "a/b/c"])
def test_missing_folder(name: str) -> None:
    with pytest.raises(UserError, match=r"--model\.pretrained: no folder at"):
        load_config(name)


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--model\.pretrained: .*no config\.json"):
        load_model(str(tmp_path), None)


@pytest.mark.parametrize("name", ["nobody/nothing-here", "nothing here"])
def test_hub_id_that_cannot_be_reached(name: str) -> None:
    with pytest.raises(UserError, match=rf"--model\.pretrained: the config cannot be loaded from '{name}'"):
        load_config(name)


def test_family_without_a_record(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"--model\.pretrained: model family 'bert'.*llama"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: "{",
        lambda raw: json.dumps({k: v for k, v in raw.items() if k != "model_type"}),
        lambda raw: json.dumps({**raw, "num_attention_heads": 5}),
        lambda raw: json.dumps({**raw, "hidden_size": "wide"}),
    ],
)
def test_config_that_is_damaged(tiny_checkpoint: Callable[..., Path], edit: Callable[[dict], str]) -> None:
    file = tiny_checkpoint() / "config.json"
    file.write_text(edit(json.loads(file.read_text())))
    with pytest.raises(UserError, match=r"--model\.pretrained: "):
        load_model(str(file.parent), None)


def test_weights_that_are_cut_short(tiny_checkpoint: Callable[..., Path]) -> None:
    file = tiny_checkpoint() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"--model\.pretrained: the weights cannot be loaded"):
        load_model(str(file.parent), None)


def test_weights_only_as_a_pickle(tiny_checkpoint: Callable[..., Path]) -> None:
    file = tiny_checkpoint() / "model.safetensors"
    file.unlink()
    torch.save(make_tiny().state_dict(), file.parent / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"--model\.pretrained: the weights cannot be loaded.*safetensors"):
        load_model(str(file.parent), None)


def test_weights_with_a_tensor_missing(tiny_checkpoint: Callable[..., Path]) -> None:
    file = tiny_checkpoint() / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(file.parent), None)


def test_weights_of_another_shape(tiny_checkpoint: Callable[..., Path]) -> None:
    file = tiny_checkpoint() / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--model\.pretrained: tensor 'model\.norm\.weight'.*\[31\].*\[32\]"):
        load_model(str(file.parent), None)


def test_demo_is_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the word does not depend on where the command runs
    model, tokenizer = load_model("demo", None), load_tokenizer("demo")
    assert tokenizer is not None
    assert len(tokenizer) <= model.config.vocab_size
    assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_load_takes_a_path_and_a_dtype(tiny_checkpoint: Callable[..., Path]) -> None:
    assert lightning_prune.load(tiny_checkpoint(), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, lightning_prune; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    root = Path(lightning_prune.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("value", [{"quant_method": "bitsandbytes", "load_in_8bit": True}, {}])
def test_quantised_model(tiny_checkpoint: Callable[..., Path], key: str, value: dict) -> None:
    file = tiny_checkpoint() / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=rf"--model\.pretrained: .* {key}.*before it was quantised"):
        load_config(str(file.parent))


def test_model_with_an_adapter_beside_it(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "demo", "peft_type": "LORA"}))
    with pytest.raises(UserError, match="holds an adapter"):
        load_model(str(folder), None)
