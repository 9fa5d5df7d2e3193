import json
from pathlib import Path

import pytest
import torch

from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.cli.commands.evaluate import main
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.support.errors import UserError
from tests.cutting import layered_cut
from tests.evaluation.test_zero_shot import needs_harness, task_folder
from tests.tiny import make_tiny, mixed_plan, tiny_tokenizer

__all__ = ["task_folder"]
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
    written = json.loads((tmp_path / "elsewhere" / "efficiency.json").read_text())
    assert (written["dtype"], written["dense"]) == ("bfloat16", None)
    assert main(arguments) == 0
    assert (run / "efficiency.json").exists()


def test_what_cannot_be_measured_or_written_is_refused(run: Path, base: Path) -> None:
    for words, says in (
        ([run], "add --efficiency, --zero-shot, or both"),
        (["a/b/c", "--efficiency", "--output", "."], "^--model: no folder at"),
        ([run, "--dense", "a/b/c", "--efficiency"], "^--dense: no folder at"),
        ([run, "--efficiency", "--batch-sizes", "0"], "--batch-sizes: found 0"),
        ([base, "--efficiency"], r"^--output: .* not part of a run folder"),
    ):
        with pytest.raises(UserError, match=says):
            main(["--model", *map(str, words)])
    assert not (run / "efficiency.json").exists()


@pytest.mark.slow
@needs_harness
def test_zero_shot_writes_both_models_and_their_means(run: Path, base: Path, task_folder: Path) -> None:
    task = ["--zero-shot", "--tasks", "tiny_choice", "--include-path", str(task_folder), "--device", "cpu"]
    assert main(["--model", str(run), "--dense", str(base), *task]) == 0
    written = json.loads((run / "zero_shot.json").read_text())
    for side in ("dense", "pruned"):
        accuracy = written[side]["tasks"]["tiny_choice"]["acc"]["value"]
        assert accuracy in [count / 20 for count in range(21)]
        assert written[side]["mean"] == {"acc": accuracy, "acc_norm": accuracy}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (run / "pruned" / name).unlink()
    with pytest.raises(UserError, match=r"--zero-shot: .* holds no tokenizer"):
        main(["--model", str(run), *task])
