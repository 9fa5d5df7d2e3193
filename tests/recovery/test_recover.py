"""The command: what it leaves, how it goes on, and what it refuses."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import lightning_prune
from lightning_prune.checkpoint.whole import WHOLE_NOTE
from lightning_prune.cli import main
from lightning_prune.recovery import Recovery
from lightning_prune.runs.folder import RunFolder
from tests.models.test_text_part import several
from tests.recovery.conftest import prune
from tests.tiny import make_tiny, tiny_tokenizer, tiny_tokens

Command = Callable[..., int]
LABEL = {"lora": "wanda_lora", "all": "wanda_full"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def shapes(folder: Path) -> dict[str, torch.Size]:
    return {name: one.shape for name, one in weights(folder).items()}


def facts_of(run: Path) -> Any:
    return json.loads((run / "recovery.json").read_text())


@pytest.mark.parametrize("train", ["lora", "all"])
def test_a_run_folder_beside_its_parent_with_the_same_layout(
    train: str, pruned: Path, recover: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.train", train, "--model.learning_rate", "0.01"]
    assert recover(pruned, *options) == 0
    folder = tmp_path / "logs" / LABEL[train] / "version_0"
    told = capsys.readouterr().out
    assert told.splitlines()[-1] == f"pruned model: {folder}/pruned"
    assert shapes(pruned) == shapes(folder / "pruned")
    before, after = weights(pruned), weights(folder / "pruned")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == (set(before) if train == "all" else {name for name in before if "_proj" in name})
    assert (folder / "pruned" / "modeling_pruned.py").is_file()
    assert not (folder / "training").exists()
    lightning_prune.load(folder / "pruned")

    parent, run = RunFolder.open(pruned.parent, "--runs"), RunFolder.open(folder, "--runs")
    facts = run.recovery
    assert facts is not None
    assert (run.plan.layers, run.plan.weights_updated) == (parent.plan.layers, True)
    assert facts.text["windows"] == 38
    assert facts.text["held_out_windows"] == 2  # a twentieth of 40
    assert facts.tokens_seen == 2 * 38 * 16
    assert facts.steps == 2 * 5  # batches of 8 windows
    assert facts.stopped_by == "epochs"
    name = "evaluation.npy"
    assert facts.perplexity[name] == parent.metrics.perplexity[name].pruned
    assert run.metrics.perplexity[name].dense == parent.metrics.perplexity[name].dense
    # What is reported is what the written model does.
    tokens = torch.from_numpy(np.load(pruned.parents[3] / "evaluation.npy"))
    with torch.no_grad():
        logits = lightning_prune.load(folder / "pruned")(tokens).logits[:, :-1].double()
        dense = lightning_prune.load(pruned.parents[3] / "model")(tokens).logits[:, :-1].double().log_softmax(-1)
    divergence = (dense.exp() * (dense - logits.log_softmax(-1))).sum(-1).mean()
    assert re.search(rf"^distance {name} +KL {float(divergence):.3}", told, re.MULTILINE)
    assert f"verdict {name}" in told
    loss = -torch.log_softmax(logits, -1).gather(2, tokens[:, 1:, None]).mean()
    assert run.metrics.perplexity[name].pruned == pytest.approx(float(loss.exp()), rel=1e-4)

    assert main(["compare", "--runs", str(pruned.parent), str(folder), "--root", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    assert "Audit: no differences" in printed
    assert "Table 2" not in printed
    (row,) = [line for line in printed.splitlines() if f"{facts.tokens_seen:,}" in line]
    assert "wanda" in row
    assert main(["decide", "--run", str(folder), "--trainer.default_root_dir", str(tmp_path / "d")]) == 2
    assert str(pruned.parent) in capsys.readouterr().err


def test_bf16_trains_adapters_in_fp32_gradients_accumulate_and_only_phases_are_told(
    pruned: Path, recover: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--trainer.precision", "bf16-true", "--trainer.accumulate_grad_batches", "3"]
    capsys.readouterr()
    assert recover(pruned, *options, "--model.learning_rate", "0.01", "--trainer.max_steps", "3") == 0
    err = capsys.readouterr().err
    assert [line.partition(":")[0] for line in err.splitlines()] == [
        "training",
        "perplexity of the dense model",
        "perplexity of the recovered model",
    ]
    facts = facts_of(tmp_path / "logs" / "wanda_lora" / "version_0")
    assert (facts["precision"], facts["stopped_by"]) == ("bf16-true", "steps")
    assert facts["tokens_seen"] == (38 + 24) * 16  # a round of 38 windows is steps of three batches and two


def test_training_lowers_the_loss_it_trains(pruned: Path, recover: Command, tmp_path: Path) -> None:
    """Distillation on random tokens: the student comes nearer to its teacher, which cross-entropy cannot show."""
    options = ["--model.distillation", "1", "--model.learning_rate", "0.003", "--trainer.max_epochs", "6"]
    assert recover(pruned, *options, "--model.train", "all", "--model.patience", "9") == 0
    dense = lightning_prune.load(pruned.parents[3] / "model")
    tokens = tiny_tokens(40, 16, seed=3)[:8]

    def divergence(folder: Path) -> float:
        with torch.no_grad():
            p, q = (torch.log_softmax(one(tokens).logits.double(), -1) for one in (dense, lightning_prune.load(folder)))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert divergence(tmp_path / "logs" / "wanda_full" / "version_0" / "pruned") < 0.9 * divergence(pruned)


def test_training_that_only_harms_leaves_the_model_as_it_was(pruned: Path, recover: Command, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no state had a lower held-out loss"):
        assert recover(pruned, "--model.train", "all", "--model.learning_rate", "10", "--trainer.max_steps", "2") == 0
    run = tmp_path / "logs" / "wanda_full" / "version_0"
    before, after = weights(pruned), weights(run / "pruned")
    assert all(torch.equal(before[name], values) for name, values in after.items())
    assert facts_of(run)["held_out_loss"]["before"] == facts_of(run)["held_out_loss"]["after"]


@pytest.fixture
def power_cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The ninth step fails; calling it brings the power back."""
    step, seen = Recovery.training_step, 0

    def interrupted(self: Recovery, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == 9:  # five batches are an epoch: in the middle of the second, after a state that was kept
            raise RuntimeError("the power fails")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Recovery, "training_step", interrupted)
    return lambda: monkeypatch.setattr(Recovery, "training_step", step)


@pytest.mark.slow
@pytest.mark.parametrize("train", LABEL)
def test_a_run_that_was_interrupted_ends_with_the_weights_of_an_undisturbed_one(
    train: str,
    pruned: Path,
    recover: Command,
    tmp_path: Path,
    power_cut: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--trainer.max_epochs", "3", "--trainer.val_check_interval", "2", "--model.patience", "99"]
    config = {"lora": "recover_lora", "all": "recover_full"}[train]
    root = tmp_path / "logs" / LABEL[train]
    with pytest.raises(RuntimeError, match="the power fails") as failure:
        recover(pruned, *options, config=config)
    assert any("lightning-prune recover --config" in note for note in failure.value.__notes__)
    last = root / "version_0" / "training" / "last.ckpt"
    assert last.is_file()
    power_cut()

    shutil.copytree(root, tmp_path / "copy")
    last.write_bytes(last.read_bytes()[:100])
    assert recover(pruned, *options, "--resume", config=config) == 2
    assert "Leave --resume out" in capsys.readouterr().err
    shutil.copytree(tmp_path / "copy", root, dirs_exist_ok=True)
    assert recover(pruned, *options, "--resume", config=config) == 0
    assert recover(pruned, *options, config=config) == 0
    assert sorted(entry.name for entry in root.iterdir()) == ["version_0", "version_1"]
    first, second = (weights(root / name / "pruned") for name in ("version_0", "version_1"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    resumed, undisturbed = (facts_of(root / name) for name in ("version_0", "version_1"))
    assert resumed["tokens_seen"] == undisturbed["tokens_seen"] == 3 * 38 * 16
    assert resumed["held_out_loss"] == undisturbed["held_out_loss"]


@pytest.mark.slow
def test_what_the_pruned_folder_holds_beside_its_text_model_is_carried_through(
    tmp_path: Path, recover: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    several("gemma3", tmp_path / "sees")
    whole = ["--model.pretrained", f"{tmp_path}/sees", "--model.keep", "whole", "--model.allocation", "uniform"]
    pruned = prune(tmp_path, "wanda", *whole)
    assert recover(pruned, "--model.train", "all") == 0
    folder = tmp_path / "logs" / "wanda_full" / "version_0" / "pruned"
    before, after = (
        {name: tensor for file in one.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for one in (pruned, folder)
    )
    assert before.keys() == after.keys()
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        name for name in before if "language_model" not in name
    }
    assert AutoModelForImageTextToText.from_pretrained(folder).config.model_type == "gemma3"
    assert WHOLE_NOTE in (folder / "README.md").read_text()
    assert "left out" not in capsys.readouterr().err


def test_zeroed_weights_of_mask_pruning_stay_zero(tmp_path: Path, recover: Command) -> None:
    masked = prune(tmp_path, "magnitude", "--model.structure", "unstructured")
    for train, label in (("lora", "magnitude_lora"), ("all", "magnitude_full")):
        options = ["--model.train", train, "--model.learning_rate", "0.01", "--model.weight_decay", "0.1"]
        assert recover(masked, *options) == 0
        folder = tmp_path / "logs" / label / "version_0"
        before, after = weights(masked), weights(folder / "pruned")
        projections = [name for name in before if "_proj" in name]
        assert all(torch.equal(before[name] == 0, after[name] == 0) for name in projections)
        assert all(not torch.equal(before[name], after[name]) for name in projections)
        assert facts_of(folder)["zeroed_weights"] == sum(int((before[name] == 0).sum()) for name in projections) > 0


def test_training_ends_when_the_time_is_over(pruned: Path, recover: Command, tmp_path: Path) -> None:
    endless = ["--trainer.max_epochs", "-1", "--model.patience", "1000000"]
    assert recover(pruned, *endless, "--trainer.max_time", "00:00:00:01") == 0
    facts = facts_of(tmp_path / "logs" / "wanda_lora" / "version_0")
    assert facts["stopped_by"] == "time"
    assert 1 <= facts["seconds"] < 60


def test_training_ends_when_the_held_out_loss_rises_and_the_best_state_is_written(
    pruned: Path, recover: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[float] = []

    def note(self: Recovery) -> None:
        measured.append(float(self.trainer.callback_metrics["held_out/loss"]))

    monkeypatch.setattr(Recovery, "on_validation_end", note)
    assert recover(pruned, "--model.learning_rate", "0.5", "--model.patience", "1", "--trainer.max_epochs", "50") == 0
    folder = tmp_path / "logs" / "wanda_lora" / "version_0"
    facts = facts_of(folder)
    assert facts["stopped_by"] == "held-out loss"
    assert facts["steps"] < 250
    before, *losses, last = measured
    assert last > min(losses)  # so that the last state is not the best one
    assert facts["held_out_loss"] == {"before": before, "after": min(losses)}
    held_out = torch.from_numpy(np.load(pruned.parents[3] / "training.npy"))[-2:]
    with torch.no_grad():
        loss = lightning_prune.load(folder / "pruned")(held_out, labels=held_out).loss
    assert float(loss) == pytest.approx(min(losses), rel=1e-4)


def test_a_model_without_whole_layers_keeps_its_stock_layout(tmp_path: Path, recover: Command) -> None:
    short = prune(tmp_path, "shortgpt")
    assert recover(short, "--model.learning_rate", "0.01") == 0
    folder = tmp_path / "logs" / "shortgpt_lora" / "version_0" / "pruned"
    assert not (folder / "modeling_pruned.py").exists()
    assert shapes(folder) == shapes(short)


def test_what_was_recovered_is_recovered_again_on_the_protocol_of_the_run_that_pruned(tmp_path: Path) -> None:
    make_tiny().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for number, name in enumerate(("calibration", "evaluation", "training")):
        words = (30 + tiny_tokens(1, 600, seed=number)[0] % 66).tolist()
        (tmp_path / f"{name}.txt").write_text(" ".join(f"w{word}" for word in words), encoding="utf-8")
    root = ["--trainer.default_root_dir", str(tmp_path), "--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    data = [f"--data.dataset={tmp_path}/calibration.txt", f"--data.eval_datasets=[{tmp_path}/evaluation.txt]"]
    data += ["--data.num_samples", "8", "--data.seq_len", "16", "--data.bos", "always", "--data.continuations", "2"]
    assert main(["fit", "--config", "wanda", "--model.pretrained", f"{tmp_path}/model", *root, *data]) == 0
    runs = [tmp_path / "wanda/version_0"]
    for name in ("once", "twice"):
        words = ["--model.pretrained", f"{runs[-1]}/pruned", "--model.label", name, "--trainer.max_steps", "1"]
        text = ["--data.dataset", f"{tmp_path}/training.txt", "--data.seq_len", "16"]
        assert main(["recover", "--config", "recover_full", *words, *text, *root]) == 0
        runs.append(tmp_path / name / "version_0")
    first, *others = (json.loads((run / "metrics.json").read_text()) for run in runs)
    assert {one["bos"] for one in first["evaluation"].values()} == {"every window"}
    for one in others:
        assert one["evaluation"] == first["evaluation"]
        assert one["continuations"]["prompts"] == 2


REFUSED: dict[str, tuple[list[str], str]] = {
    "no model": (["--model.pretrained", ""], "--model.pretrained"),
    "the run instead of its pruned folder": (["--model.pretrained", "RUN"], "--model.pretrained"),
    "a model that no run pruned": (["--model.pretrained", "DENSE"], "--model.pretrained"),
    "the evaluation text": (["--data.dataset", "EVALUATION"], "--data.eval_datasets"),
    "its tokens under another name": (["--data.dataset", "COPY"], "--data.eval_datasets"),
    "a longer text that holds it": (["--data.dataset", "LONGER"], "--data.eval_datasets"),
    "nothing held out": (["--data.held_out", "0"], "--data.held_out"),
    "all held out": (["--data.held_out", "0.999"], "--data.held_out"),
    "no such text": (["--data.dataset", "nothing.npy"], "nothing.npy"),
    "half of an adapter": (["--model.lora_rank", "0"], "--model.lora_rank"),
    "a share above one": (["--model.distillation", "1.5"], "--model.distillation"),
    "another precision": (["--trainer.precision", "64-true"], "--trainer.precision"),
    "a negative rate": (["--model.learning_rate", "-1"], "--model.learning_rate"),
    "a rate without end": (["--model.learning_rate", ".inf"], "--model.learning_rate: found inf"),
    "a decay that leaves nothing": (["--model.weight_decay", "1e308"], "--model.weight_decay: found 1e+308"),
    "a rank above all": (["--model.lora_rank", "4611686018427387904"], "no matrix here is wider than 96"),
    "an unknown kind": (["--model.train", "some"], "--model.train"),
    "an option that does not exist": (["--model.lora_rnk", "3"], "Did you mean --model.lora_rank?"),
    "all weights in bf16": (["--model.train", "all", "--trainer.precision", "bf16-true"], "bf16-mixed"),
    "two processes": (["--trainer.devices", "2"], "--trainer.devices"),
    "a run without an end": (["--trainer.max_epochs", "-1"], "--trainer.max_epochs"),
    "a part of the held-out text": (["--trainer.limit_val_batches", "1"], "--trainer.limit_val_batches"),
    "another teacher": (["--model.teacher", "nowhere/at/all"], "--model.teacher"),
    "a label that is no name": (["--model.label", "../up"], "--model.label"),
    "nothing to resume": (["--resume"], "--resume"),
    "an early stop by another name": (
        ["--trainer.callbacks", "{class_path: EarlyStopping, init_args: {monitor: val_loss}}"],
        "--model.patience",
    ),
    "states of one's own": (["--trainer.callbacks", "ModelCheckpoint"], "ModelCheckpoint"),
    "a dataset twice": (["--data.eval_datasets", "[EVALUATION, EVALUATION]"], "--data.eval_datasets"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_ends_in_one_sentence_and_leaves_nothing(
    name: str, pruned: Path, recover: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, says = REFUSED[name]
    home = pruned.parents[3]
    words = {"RUN": pruned.parent, "DENSE": home / "model", "EVALUATION": home / "evaluation.npy"}
    words |= {"COPY": tmp_path / "copy.npy", "LONGER": tmp_path / "longer.npy"}
    evaluation = np.load(words["EVALUATION"])
    np.save(words["COPY"], evaluation)
    np.save(words["LONGER"], np.concatenate([tiny_tokens(9, 16, 7), evaluation]))
    for word, path in words.items():
        options, says = [option.replace(word, str(path)) for option in options], says.replace(word, str(path))
    assert recover(pruned, *options) == 2
    error = capsys.readouterr().err
    (message,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert says in message
    assert "Traceback" not in error
    assert not (tmp_path / "logs").exists()
