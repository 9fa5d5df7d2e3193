"""A checkpoint is opened once; what is wrong with it is one message that names the option."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig
from transformers.utils import logging as transformers_logging

from lightning_prune.methods import Wanda
from lightning_prune.models import checkpoint as checkpoint_module
from lightning_prune.models import weights as weights_module
from lightning_prune.models.checkpoint import Checkpoint, skeleton
from lightning_prune.models.weights import read_headers
from lightning_prune.support.errors import UserError
from tests.methods.behaviour import prune
from tests.tiny import EVERY_FAMILY, make_tiny, tiny_config, tiny_tokenizer, tiny_tokens


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(str(folder))


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_skeleton_has_parameters_without_storage_and_the_real_buffers(family: str) -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as under a half precision
    try:
        net = skeleton(tiny_config(family))
    finally:
        torch.set_default_dtype(default)
    whole = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in net.parameters())
    expected = {name: tensor.shape for name, tensor in whole.state_dict().items()}
    assert {name: tensor.shape for name, tensor in net.state_dict().items()} == expected
    buffers = {name: buffer for name, buffer in whole.named_buffers() if name not in expected}
    assert buffers.keys() == dict(net.named_buffers()).keys()
    for name, buffer in net.named_buffers():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, buffers[name])


def test_loading_prints_nothing_and_leaves_the_log_level(
    tiny_checkpoint: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint()
    tiny_tokenizer().save_pretrained(folder)
    capfd.readouterr()
    before = transformers_logging.get_verbosity()
    checkpoint = opened(folder)
    checkpoint.load(None)
    assert checkpoint.tokenizer("w7 w8").input_ids == [7, 8]  # type: ignore[misc]
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.get_verbosity() == before


def test_tokenizer_that_is_not_there_or_damaged(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint()
    assert opened(folder).tokenizer is None
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"--model\.pretrained: the tokenizer cannot be loaded"):
        _ = opened(folder).tokenizer


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "no folder at") for name in ("/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "a/b/c")),
        *(
            (name, f"no folder here, and the config cannot be loaded from '{name}'")
            for name in ("nobody/nothing-here", "nothing here")
        ),
    ],
)
def test_nothing_there(name: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"--model\.pretrained: .*{message}"):
        Checkpoint.open(name)


def test_a_run_folder_is_told_from_its_checkpoint(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint(), tmp_path / "run" / "pruned")
    with pytest.raises(UserError, match=f"holds no config.json.*A run's checkpoint is in '{tmp_path}/run/pruned'"):
        Checkpoint.open(str(tmp_path / "run"))


def config(**values: Any) -> Callable[[Path], Any]:
    """Replaces entries of ``config.json``; None removes one."""

    def edit(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text()) | values
        kept = {name: value for name, value in raw.items() if name not in values or value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return edit


def text(content: str, name: str = "config.json") -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


QUANTISED = [
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}},
    {"quant_method": "of nobody"},
]


@pytest.mark.parametrize("left_over", QUANTISED, ids=lambda entry: entry["quant_method"])
def test_what_is_left_over_of_a_quantisation_does_not_come_along(
    tiny_checkpoint: Callable[..., Path], left_over: dict[str, Any]
) -> None:
    folder = tiny_checkpoint()
    config(quantization_config=left_over, compression_config={})(folder)
    checkpoint = opened(folder)
    with pytest.warns(UserWarning, match="has a quantization_config, but its weights are not quantised"):
        checkpoint.check()
    model = checkpoint.load(None)
    assert torch.equal(model(tiny_tokens()).logits, make_tiny()(tiny_tokens()).logits)
    for written in (model.config, checkpoint.skeleton().config):
        assert not {"quantization_config", "compression_config"} & written.to_dict().keys()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
        (text("{"), "config cannot be loaded"),
        (text("[]"), "config cannot be loaded"),
        (lambda folder: BertConfig().save_pretrained(folder), "model family 'bert'.*llama"),
        (config(model_type=None), "family 'None'"),
        (config(num_attention_heads=5), "config"),
        (config(hidden_size="wide"), "config"),
        (config(hidden_size=0), "hidden_size 0"),
        (config(num_hidden_layers=5), "num_hidden_layers 5, but its weights have 4 layers"),
        (config(num_hidden_layers=100_000), "num_hidden_layers 100000, but"),  # which would take minutes to build
        (text("{}", "adapter_config.json"), "holds an adapter"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "loaded.*safetensors"),
    ],
)
def test_folder_that_is_refused(
    tiny_checkpoint: Callable[..., Path], edit: Callable[[Path], Any], message: str
) -> None:
    folder = tiny_checkpoint()
    edit(folder)
    with pytest.raises(UserError, match=rf"--model\.pretrained: .*{message}"):
        opened(folder).check()


def test_weights_need_not_be_there(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint()
    (folder / "model.safetensors").unlink()
    assert Checkpoint.open(str(folder), weights=False).config.num_hidden_layers == 4


def test_model_in_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--somebody--tiny"
    folder, template = repository / "snapshots" / commit, "additional_chat_templates/tool_use.jinja"
    make_tiny().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for file in (folder / template, repository / "refs" / "main"):
        file.parent.mkdir()
        file.write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    checkpoint = Checkpoint.open("somebody/tiny")
    assert checkpoint.config.name_or_path == "somebody/tiny"
    assert torch.equal(checkpoint.load(None)(tiny_tokens()).logits, make_tiny()(tiny_tokens()).logits)
    assert {"tokenizer.json", template} <= checkpoint.side_files.keys()


def test_demo_is_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the word does not depend on where the command runs
    demo = Checkpoint.open("demo")
    assert demo.tokenizer is not None
    assert len(demo.tokenizer) <= demo.load(None).config.vocab_size
    # Run folders keep it: it must be what it always was.
    assert demo.fingerprint == "84a10dea98b6577c63d6aba264494d5971146e49dbe4b7c3dbb6668d7feb22dc"


@pytest.mark.parametrize("sampled", [False, True])
def test_fingerprint_follows_the_weights_and_the_config_but_not_the_place(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    if sampled:
        monkeypatch.setattr(checkpoint_module, "HASHED_WHOLE", 0)
        monkeypatch.setattr(checkpoint_module, "PIECE", 1024)
    first, copy, other = tiny_checkpoint(seed=0), tiny_checkpoint(seed=0), tiny_checkpoint(seed=1)
    found = opened(first).fingerprint
    assert len(found) == 64
    assert opened(copy).fingerprint == found
    assert opened(other).fingerprint != found
    config(transformers_version="9", _name_or_path="x")(first)
    assert opened(first).fingerprint == found
    config(rms_norm_eps=0.5)(first)
    assert opened(first).fingerprint != found
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(content))
    assert opened(copy).fingerprint != found


def test_a_run_reads_config_and_headers_of_the_dense_model_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tmp_path / "dense"
    make_tiny().save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    np.save(tmp_path / "tokens.npy", tiny_tokens(6, 12).numpy())
    configs: list[str] = []
    headers: list[str] = []
    watching = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching[0] and event == "open" and str(arguments[0]) == str(dense / "config.json"):
            configs.append(str(arguments[0]))

    monkeypatch.setattr(checkpoint_module, "read_headers", lambda *of: (headers.append(of[0]), read_headers(*of))[1])
    sys.addaudithook(hook)
    try:
        prune(Wanda(str(dense), 0.2), tmp_path / "tokens.npy", tmp_path / "runs")
    finally:
        watching[0] = False
    assert len(configs) == 1
    assert headers.count(str(dense)) == 1


def test_fingerprint_of_recorded_runs_stays() -> None:
    """Run folders keep it: the demo model's must be what it always was."""
    assert Checkpoint.open("demo").fingerprint == "84a10dea98b6577c63d6aba264494d5971146e49dbe4b7c3dbb6668d7feb22dc"


def test_a_bare_name_is_refused_at_once_where_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client would try six times, half a minute, for what is rather a mistyped folder."""

    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(weights_module, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(weights_module, "cached_file", lambda *args, **options: pytest.fail("asked again"))
    with pytest.raises(UserError, match=r"no folder here, and .* from 'no-folder' \(ConnectionError: no route"):
        Checkpoint.open("no-folder")
