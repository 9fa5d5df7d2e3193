"""Folders that a fresh process without this package loads, bit for bit the model in memory."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import lightning_prune
from lightning_prune.checkpoint import write
from lightning_prune.checkpoint.cut import layout_of
from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.families import count_parameters
from lightning_prune.support.errors import UserError
from tests.cutting import cut, layered, layered_cut
from tests.tiny import EVERY_FAMILY, make_tiny, mixed_plan, tiny_plan, tiny_tokenizer, tiny_tokens, uniform_plan


def skipped(model: PreTrainedModel, layer: int, attention: bool) -> PruningPlan:
    """Nothing but ``skip`` differs from the dense model, which stock loaders could miss."""
    heads, full = list(range(model.config.num_key_value_heads)), list(range(40))
    kept = [(heads, full)] * 4
    kept[layer] = ([], full) if attention else (heads, [])
    return tiny_plan(model, kept)


PLANS: dict[str, Callable[[PreTrainedModel], PruningPlan]] = {
    "mixed": mixed_plan,
    "uniform": uniform_plan,
    "no_attention": partial(skipped, layer=0, attention=True),
    "no_mlp": partial(skipped, layer=3, attention=False),
}
KINDS = [  # family, KV heads, whether the head is tied, plan
    *(f"llama-{kv_heads}-tied-{plan}" for kv_heads in (4, 2, 1) for plan in PLANS),
    *(f"qwen2-4-untied-{plan}" for plan in ("mixed", "uniform")),
    *(f"{family}-2-tied-{plan}" for family in EVERY_FAMILY if family != "llama" for plan in ("mixed", "uniform")),
    *(f"{family}-2-untied-{plan}" for family in ("gemma2", "phi3", "olmo2") for plan in ("no_attention", "no_mlp")),
]
FAST = [kind for kind in KINDS if kind.startswith("llama") or kind in ("gemma2-2-tied-mixed", "olmo2-2-untied-no_mlp")]

# Runs where lightning_prune cannot be imported, installed or not.
FRESH_PROCESS = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lightning_prune":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import json, pathlib, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
torch.set_num_threads(1)
report = {}
for folder in map(pathlib.Path, sys.argv[1:]):
    known = load_file(folder / "expected.safetensors")
    remote = (folder / "modeling_pruned.py").exists()
    model = AutoModelForCausalLM.from_pretrained(folder, **({"trust_remote_code": True} if remote else {}))
    logits = model(known["tokens"]).logits
    report[folder.name] = [remote, bool(torch.equal(logits, known["logits"])), type(model).__name__, str(model.dtype)]
    if (folder / "tokenizer.json").exists():
        generate = pipeline("text-generation", str(folder), trust_remote_code=remote)
        text = generate("w5 w6 w7", max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]["generated_text"]
        report[folder.name].append(text.count("w"))
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``written(kind)``: a folder, made once, with ``expected.safetensors`` (tokens, logits in memory)."""
    root = tmp_path_factory.mktemp("checkpoints")
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    make_tiny().save_pretrained(tokenizer)
    tiny_tokenizer().save_pretrained(tokenizer)

    def write(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            family, kv_heads, tied, plan = kind.split("-")
            dense = make_tiny(family, kv_heads=int(kv_heads), tied=tied == "tied")
            if kv_heads == "1":
                dense = dense.to(torch.bfloat16)
            beside = Checkpoint.open(str(tokenizer)) if "-4-tied" in kind else None
            write_checkpoint(layered_cut(dense, PLANS[plan](dense)), folder, beside=beside, card="# card\n")
            known = {"tokens": tiny_tokens(), "logits": cut(dense, PLANS[plan](dense))(tiny_tokens()).logits.detach()}
            save_file(known, folder / "expected.safetensors")
        return folder

    return write


@pytest.mark.slow
def test_a_process_without_this_package_gets_the_same_logits(written: Callable[[str], Path], tmp_path: Path) -> None:
    kinds = [kind for kind in KINDS if kind in FAST or not kind.endswith("uniform")]  # which transformers alone loads
    (root,) = {written(kind).parent for kind in kinds}
    result = subprocess.run(
        [sys.executable, "-I", "-c", FRESH_PROCESS, *(f"{root}/{kind}" for kind in kinds)],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report.keys() == set(kinds)
    for name, (remote, equal, class_name, dtype, *words) in report.items():
        family, kv_heads, _, plan = name.split("-", 3)
        assert equal, f"{name}: logits differ"
        assert remote == (plan != "uniform"), name
        alias = name.startswith("llama-4") and plan == "uniform"
        assert class_name == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mistral" if alias else family], name
        assert dtype == ("torch.bfloat16" if kv_heads == "1" else "torch.float32"), name
        assert words == ([7] if "-4-tied" in name else []), name


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in FAST)) for kind in KINDS])
def test_this_package_gets_the_same_logits_and_stock_loaders_refuse_widths_per_layer(
    written: Callable[[str], Path], kind: str
) -> None:
    folder, stock = written(kind), "uniform" in kind
    known, model = load_file(folder / "expected.safetensors"), lightning_prune.load(folder)
    assert torch.equal(model(known["tokens"]).logits, known["logits"])
    assert not model.training
    assert layout_of(model.config) == ("stock" if stock else "per-layer")
    assert not type(model).__module__.startswith("transformers_modules")
    files = {"README.md", "config.json", "model.safetensors", "expected.safetensors"}
    files |= set() if stock else {"modeling_pruned.py"}
    if "-4-tied" in kind:
        files |= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
        assert Checkpoint.open(str(folder)).tokenizer("w9 w95").input_ids == [9, 95]  # type: ignore[misc]
    assert {file.name for file in folder.iterdir()} == files
    config = json.loads((folder / "config.json").read_text())
    assert config["head_dim"] == 8
    assert ("auto_map" in config) == (not stock)
    # Where configs check them. MQA cannot lose a head without losing attention, so its heads never vary.
    checked = [f"{family}-2-tied-mixed" for family in ("gemma2", "gemma3_text", "phi3", "llama")]
    assert bool(config.get("allow_global_per_layer_attribute_access")) == (kind in (*checked, "llama-4-tied-mixed"))
    if not stock:
        with pytest.raises(RuntimeError, match=r"per-layer attribute|size mismatch|ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.parametrize("name", ["llama-2-tied-mixed", "qwen2-4-untied-mixed", "llama-4-tied-uniform"])
def test_the_same_model_gives_the_same_bytes_also_after_loading(
    written: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    first = written(name)
    loaded = lightning_prune.load(first)
    write_checkpoint(layered(loaded), tmp_path / "again", beside=None, card="# card\n")
    lightning_prune.load(first).save_pretrained(tmp_path / "plain")
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (first / file.name).read_bytes(), file.name
        if file.name not in ("README.md", "model.safetensors"):
            assert file.read_bytes() == (tmp_path / "plain" / file.name).read_bytes(), file.name
    # The order of tensors in the file is ours (that of the layers), what is in them is not.
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, tmp_path / "plain"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("tied", [True, False])
def test_shards_are_indexed_and_hold_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    dense, limit = make_tiny("qwen3", tied=tied), 12_000  # smaller than the embedding's 96 × 32 × 4 bytes with more
    monkeypatch.setattr(write, "SHARD_BYTES", limit)
    write_checkpoint(layered_cut(dense, mixed_plan(dense)), tmp_path / "shards", beside=None, card="")
    names = sorted(file.name for file in (tmp_path / "shards").glob("*.safetensors"))
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    assert len(names) > 2
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    shards = {name: load_file(tmp_path / "shards" / name) for name in names}
    assert index["weight_map"] == {key: name for name, shard in shards.items() for key in shard}
    sizes = {name: [tensor.nbytes for tensor in shard.values()] for name, shard in shards.items()}
    assert all(sum(size) <= limit or len(size) == 1 for size in sizes.values()), sizes
    pruned = cut(dense, mixed_plan(dense))
    bytes_in_all = sum(map(sum, sizes.values()))
    assert index["metadata"] == {"total_size": bytes_in_all, "total_parameters": count_parameters(pruned)}
    assert torch.equal(lightning_prune.load(tmp_path / "shards")(tiny_tokens()).logits, pruned(tiny_tokens()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_written_in_the_dtype_of_the_layered_model(tmp_path: Path, dtype: torch.dtype) -> None:
    dense = make_tiny()
    write_checkpoint(layered(dense, dtype), tmp_path / "pruned", beside=None, card="")
    stored = load_file(tmp_path / "pruned" / "model.safetensors")
    assert all(torch.equal(tensor, dense.get_parameter(name).to(dtype)) for name, tensor in stored.items())
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_one_layer_is_in_memory_at_a_time_and_each_is_told(tmp_path: Path) -> None:
    model = layered(make_tiny())
    written = []

    def progress(layer: int) -> None:
        written.append(layer)
        assert all(parameter.is_meta for block in model.layers for parameter in block.parameters())

    write_checkpoint(model, tmp_path / "pruned", beside=None, card="", progress=progress)
    assert written == [0, 1, 2, 3]


@pytest.mark.parametrize("exception", [RuntimeError("stop"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["config", "shard", "card"])
def test_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exception: BaseException, place: str
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise exception

    def after_a_layer(layer: int) -> None:
        if place == "shard" and layer == 1:
            assert [file for file in tmp_path.rglob("model.safetensors") if file.stat().st_size]
            raise exception

    if place == "config":
        monkeypatch.setattr(PretrainedConfig, "save_pretrained", interrupted)
    if place == "card":
        monkeypatch.setattr(write, "write_text", interrupted)
    with pytest.raises(type(exception)):
        write_checkpoint(layered(make_tiny()), tmp_path / "pruned", beside=None, card="", progress=after_a_layer)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_message_and_leaves_the_old_checkpoint(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_text", full)
        with pytest.raises(UserError, match=r"No space left.*--trainer\.default_root_dir.*--output") as error:
            write_checkpoint(layered(make_tiny(seed=1)), folder, beside=None, card="")
    assert str(folder) in str(error.value)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(UserError, match="cannot be written"):
        write_checkpoint(layered(make_tiny()), folder / "config.json" / "pruned", beside=None, card="")


def test_generation_settings_that_transformers_only_warns_about_do_not_stop_the_write(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_checkpoint()
    file = base / "generation_config.json"  # as several published models have it
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_sample": False, "temperature": 0.6}))
    model = lightning_prune.load(base)
    pruned = layered_cut(model, mixed_plan(model))
    write_checkpoint(pruned, tmp_path / "pruned", beside=Checkpoint.open(str(base)), card="")
    saved = json.loads((tmp_path / "pruned" / "generation_config.json").read_text())
    assert saved["temperature"] == 0.6
