import importlib.util
import json
from pathlib import Path

import pytest
import torch

from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.cli.commands.evaluate import main
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.support.errors import UserError
from tests.cutting import layered_cut
from tests.evaluation.test_zero_shot import own_tasks_only
from tests.tiny import make_tiny, mixed_plan, tiny_tokenizer

SHORT = ["--prompt-length", "8", "--decode-length", "3", "--batch-sizes", "1", "2", "--repeats", "1", "--device", "cpu"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The dense model in bf16, with a tokenizer."""
    make_tiny().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Path:
    """A finished run whose checkpoint is fp32."""
    model = make_tiny()
    pruned = layered_cut(model, mixed_plan(model))
    write_checkpoint(pruned, tmp_path / "run" / "pruned", beside=Checkpoint.open(str(base)), card="")
    (tmp_path / "run" / "metrics.json").write_text("{}")
    return tmp_path / "run"


def test_efficiency_lands_in_the_run_folder_with_both_models_in_one_dtype(
    run: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(run), "--dense", str(base), "--efficiency", *SHORT]) == 0
    found = json.loads((run / "efficiency.json").read_text())
    assert found["dtype"] == "float32"
    assert [found[side]["weight_file_dtype"] for side in ("dense", "pruned")] == ["bfloat16", "float32"]
    # 4 layers × 2 KV heads × 8 numbers, against one layer of one KV head and one of two; keys and values, 4 bytes each
    assert [found[side]["kv_cache_bytes_per_token"] for side in ("dense", "pruned")] == [2 * 64 * 4, 2 * 24 * 4]
    assert found["setting"]["context_length"] == 11
    assert [speed["batch_size"] for speed in found["pruned"]["speed"]] == [1, 2]
    assert all(speed["decode_tokens_per_second"] > 0 for speed in found["dense"]["speed"])
    assert found["models"] == {"dense": str(base), "pruned": str(run / "pruned")}
    output = capsys.readouterr().out
    assert "pruned / dense" in output
    assert output.splitlines()[-1] == f"efficiency: {run / 'efficiency.json'}"


def test_checkpoint_folder_of_a_run_writes_beside_its_metrics_unless_told_otherwise(run: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(run / "pruned"), "--efficiency", *SHORT]
    assert main([*arguments, "--output", str(tmp_path / "elsewhere"), "--precision", "bf16-true"]) == 0
    assert not (run / "efficiency.json").exists()
    assert json.loads((tmp_path / "elsewhere" / "efficiency.json").read_text())["dtype"] == "bfloat16"
    assert main(arguments) == 0
    assert (run / "efficiency.json").exists()


def test_model_outside_a_run_needs_an_output_folder(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--output: .* not part of a run folder"):
        main(["--model", str(base), "--efficiency", *SHORT])
    assert main(["--model", str(base), "--efficiency", "--output", str(tmp_path / "out"), *SHORT]) == 0
    assert json.loads((tmp_path / "out" / "efficiency.json").read_text())["dense"] is None


def test_nothing_to_measure_and_no_model_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Add --efficiency, --zero-shot, or both"):
        main(["--model", str(run)])
    with pytest.raises(UserError, match=r"^--model: no folder at"):
        main(["--model", str(tmp_path / "a" / "b"), "--efficiency", "--output", str(tmp_path)])
    with pytest.raises(UserError, match=r"^--dense: no folder at"):
        main(["--model", str(run), "--dense", str(tmp_path / "a" / "b"), "--efficiency"])
    with pytest.raises(UserError, match="--batch-sizes: found 0"):
        main(["--model", str(run), "--efficiency", "--batch-sizes", "0"])
    assert not (run / "efficiency.json").exists()


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_zero_shot_writes_both_models_and_their_means(
    run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_tasks_only(monkeypatch)
    rows = [{"question": f"w{9 + row} w3", "choices": ["w5", "w7"], "answer": row % 2} for row in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "pick.yaml").write_text(
        "task: pick\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f'dataset_kwargs: {{data_files: {{test: "{tmp_path / "rows.jsonl"}"}}, cache_dir: "{tmp_path / "cache"}"}}\n'
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    task = ["--zero-shot", "--tasks", "pick", "--include-path", str(tmp_path / "tasks"), "--device", "cpu"]
    assert main(["--model", str(run), "--dense", str(base), *task]) == 0
    found = json.loads((run / "zero_shot.json").read_text())
    for side in ("dense", "pruned"):
        metrics = found[side]["tasks"]["pick"]
        assert metrics["acc"]["value"] in [count / 6 for count in range(7)]
        assert found[side]["mean"] == {name: metrics[name]["value"] for name in ("acc", "acc_norm")}
    (run / "pruned" / "tokenizer.json").unlink()
    (run / "pruned" / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"--zero-shot: .* holds no tokenizer"):
        main(["--model", str(run), *task])
