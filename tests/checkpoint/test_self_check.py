"""A checkpoint that is not the model in memory, or decodes wrongly with a cache, is found before anyone uses it."""

import os
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, dynamic_module_utils

from lightning_prune.checkpoint.self_check import check_checkpoint, probe_logits
from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.cli import main
from lightning_prune.models import modeling_pruned
from lightning_prune.support.errors import CheckpointError
from tests.cutting import cut, layered
from tests.tiny import make_tiny, mixed_plan, tiny_plan, uniform_plan

SOURCE = Path(modeling_pruned.__file__).read_text(encoding="utf-8")
FINDS_THE_CACHE = "next((x for x in inputs if _is_kv_cache(x)), None)"
HALF = (torch.bfloat16, torch.float16)


def written(folder: Path, dtype: torch.dtype = torch.float32, plan: Any = mixed_plan, **options: Any) -> torch.Tensor:
    """Logits of the model that ``folder`` now holds."""
    dense = make_tiny(**options).to(dtype)
    model = cut(dense, plan(dense))
    write_checkpoint(layered(model), folder, beside=None, card="")
    return probe_logits(model)


def narrower_by_turns(model: Any) -> Any:
    layers = range(model.config.num_hidden_layers)
    return tiny_plan(model, [([layer % 2], list(range(0, 40, 1 + layer % 3))) for layer in layers])


@pytest.mark.parametrize(
    ("family", "dtype", "plan"),
    [
        *product(("llama", "qwen2", "gemma2"), HALF, (mixed_plan, uniform_plan)),
        *product(["llama"], [torch.float32, *HALF], [narrower_by_turns]),
    ],
)
def test_a_good_checkpoint_passes_and_leaves_no_trace(
    family: str, plan: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Others pass when they are written, in ``test_write.py``."""
    expected = written(tmp_path / "pruned", dtype, plan, family=family)
    before = set(sys.modules), list(sys.path), dynamic_module_utils.HF_MODULES_CACHE
    facts = check_checkpoint(tmp_path / "pruned", expected)
    assert facts["logits"] == "equal"
    assert facts["dtype"] == str(dtype).removeprefix("torch.")
    assert facts["greedy"] in ("equal", "equal up to a tie")
    assert facts["greedy_tokens"] == 16
    assert (set(sys.modules), list(sys.path), dynamic_module_utils.HF_MODULES_CACHE) == before


def weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def another_rotary_base(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))


def another_dtype(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (weights(lambda t: t["model.norm.weight"][3].nextafter_(torch.tensor(torch.inf))), "another model than"),
        (weights(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), "another model than the one in memory"),
        (another_rotary_base, "another model than the one in memory"),
        (lambda folder: (folder / "modeling_pruned.py").unlink(), "cannot be loaded back"),
        (another_dtype, "in torch.bfloat16, the model in memory"),
        (lambda folder: os.truncate(folder / "model.safetensors", 20_000), "cannot be loaded back"),
    ],
)
def test_another_model_on_disk_is_an_error_that_says_how_it_differs(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    expected = written(tmp_path / "pruned")
    damage(tmp_path / "pruned")
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(tmp_path / "pruned", expected)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*product(("llama", "gemma2", "olmo2"), [torch.float32]), ("llama", HALF[0]), ("qwen2", HALF[1])],
)
def test_a_layer_that_forgets_the_cache_is_found_also_in_half_precision(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    assert FINDS_THE_CACHE in SOURCE
    folder = tmp_path / "pruned"
    expected = written(folder, dtype, family=family)
    (folder / "modeling_pruned.py").write_text(SOURCE.replace(FINDS_THE_CACHE, "None"))
    with pytest.raises(CheckpointError, match=r"decodes differently with a KV cache: at token \d of a left-padded"):
        check_checkpoint(folder, expected)


def test_code_is_never_taken_from_an_earlier_check_of_the_same_name(tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    expected = written(folder)
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # copies the good code to the usual place
    (folder / "modeling_pruned.py").write_text("raise RuntimeError('the file in the folder was run')\n")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="the file in the folder was run"):
            check_checkpoint(folder, expected)
    (folder / "modeling_pruned.py").write_text(SOURCE)
    check_checkpoint(folder, expected)


def test_logits_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    model = make_tiny()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        write_checkpoint(layered(model), tmp_path / "pruned", beside=None, card="")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_checkpoint_never_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    mixed_plan(make_tiny()).save(tmp_path / "plan.json")
    monkeypatch.setattr("lightning_prune.checkpoint.self_check.probe_logits", lambda model: probe_logits(model) + 1e-6)
    make_tiny().save_pretrained(tmp_path / "base")
    assert main(["apply", f"--plan={tmp_path}/plan.json", f"--model={tmp_path}/base", f"--output={tmp_path}/out"]) == 1
    assert "self-check failed: the checkpoint read back is another model" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "plan.json"]
