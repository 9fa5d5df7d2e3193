"""Distance from the dense model against float64, position by position; long windows; what both models write."""

import contextlib
import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_prune import api
from lightning_prune.calibration import residuals
from lightning_prune.cli import main
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.evaluation import continuations
from lightning_prune.evaluation import distance as module
from lightning_prune.evaluation.continuations import Continuations, common_beginning, greedy
from lightning_prune.evaluation.distance import Distances, losses_and_distances
from lightning_prune.evaluation.perplexity import Evaluation, Measured, measure
from lightning_prune.models import head
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.layered import open_head
from lightning_prune.models.model_slot import ModelSlot
from lightning_prune.support.progress import Progress
from lightning_prune.support.timing import Seconds
from tests.methods.behaviour import save_tokens, trainer_for
from tests.naive_losses import naive_losses
from tests.tiny import make_tiny, tiny_tokenizer, tiny_tokens


def naive_distance(dense: np.ndarray, other: np.ndarray) -> list[float]:
    """KL, agreement and acceptance as means over all positions but the last, in float64."""
    sums, count = [0.0, 0.0, 0.0], 0
    for dense_rows, rows in zip(dense.astype(np.float64), other.astype(np.float64), strict=True):
        for a, b in zip(dense_rows[:-1], rows[:-1], strict=True):
            p, q = np.exp(a - a.max()), np.exp(b - b.max())
            p, q = p / p.sum(), q / q.sum()
            sums[0] += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
            sums[1] += p.argmax() == q.argmax()
            sums[2] += sum(min(x, y) for x, y in zip(p, q, strict=True))
            count += 1
    return [one / count for one in sums]


def random_logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(6, 9, 96, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batches", [[6], [1] * 6, [2, 4]])
@pytest.mark.parametrize("chunk", [1, 4 * 96 * 7, 2**27])
def test_batches_chunks_and_padding_do_not_change_the_value(
    monkeypatch: pytest.MonkeyPatch, batches: list[int], chunk: int
) -> None:
    monkeypatch.setattr(head, "LOGITS_BYTES", chunk)
    monkeypatch.setattr(module, "PIECE_BYTES", chunk // 3)
    dense, other, tokens, weight = random_logits(1), random_logits(2), tiny_tokens(6, 9), torch.ones(6)
    other[4] = torch.nan
    weight[4] = 0
    metric = Distances()
    losses = []
    for p, q, ids, counted in zip(*(x.split(batches) for x in (dense, other, tokens, weight)), strict=True):
        loss, found = losses_and_distances(lambda rows: rows, q, lambda rows: rows, p, ids, 96)
        metric.update(found, counted)
        losses.append(loss)
    counts = weight > 0
    expected = naive_distance(dense[counts].numpy(), other[counts].numpy())
    assert metric.reduced().tolist() == pytest.approx(expected, rel=1e-5)
    assert int(metric.tokens) == 5 * 8
    none = Distances()  # from itself
    none.update(losses_and_distances(torch.neg, dense, torch.neg, dense, tokens, 96)[1], torch.ones(6))
    assert none.reduced().tolist() == pytest.approx([0.0, 1.0, 1.0], abs=1e-6)
    naive = naive_losses(other[counts].numpy(), tokens[counts].numpy())
    assert torch.cat(losses)[counts].numpy() == pytest.approx(np.array(naive), rel=1e-5)


# Two models


def save(folder: Path, name: str, **options: object) -> PreTrainedModel:
    model = make_tiny(**options)  # type: ignore[arg-type]
    model.save_pretrained(folder / name)
    return model


def compared(
    folder: Path, sets: list[Path], batch_size: int = 4, onload: str = "model", precision: str = "32-true"
) -> tuple[Measured, Measured]:
    """What both models showed; the dense one is closed."""
    data = CalibrationDataModule(eval_datasets=[str(one) for one in sets], eval_batch_size=batch_size, continuations=2)
    data.needs_calibration = False
    slot, results = ModelSlot(onload, Seconds()), list[Measured]()
    for name in ("dense", "other"):
        label = Evaluation("demo")
        label.label = "test"  # type: ignore[assignment]
        trainer = trainer_for(label, folder / "logs", precision)  # type: ignore[arg-type]
        how = {"reference": results[0]} if results else {"scratch": folder}
        results.append(
            measure(trainer, data, Checkpoint.open(str(folder / name)), name, slot, Progress(shown=False), **how)
        )  # type: ignore[arg-type]
    results[0].close()
    return results[0], results[1]


@pytest.mark.parametrize(
    ("batch_size", "onload", "mapped", "tied"),
    [(1, "layer", False, False), (3, "model", True, False), (16, "layer", True, True)],
)
def test_two_models_are_as_far_apart_as_in_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, batch_size: int, onload: str, mapped: bool
) -> None:
    if mapped:
        monkeypatch.setattr(residuals, "SHARE", 0)
    models = [save(tmp_path, "dense", tied=tied), save(tmp_path, "other", tied=True, seed=3, hidden=24, layers=2)]
    sets = [tiny_tokens(7, 16, seed=4), tiny_tokens(3, 30, seed=5)]
    files = [save_tokens(tmp_path / f"{number}.npy", tokens) for number, tokens in enumerate(sets)]
    dense, other = compared(tmp_path, files, batch_size, onload)
    for file, tokens in zip(files, sets, strict=True):
        with torch.no_grad():
            logits = [copy.deepcopy(model).double()(input_ids=tokens).logits.numpy() for model in models]
        found = other.distance[file.name]
        values = [found.kl_divergence, found.top1_agreement, found.expected_acceptance]
        assert values == pytest.approx(naive_distance(*logits), rel=1e-4)
        perplexity = math.exp(np.mean(naive_losses(logits[1], tokens.numpy())))
        assert other.perplexity[file.name].perplexity == pytest.approx(perplexity, rel=1e-5)
    assert dense.distance == {}
    assert not list(tmp_path.glob("residuals*"))


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])  # in fp32 both are as in float64, see above
def test_placement_changes_nothing_and_perplexity_is_that_without_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(continuations, "NEW_TOKENS", 8)  # each of them reads every layer
    save(tmp_path, "dense"), save(tmp_path, "other", seed=3)
    file = save_tokens(tmp_path / "tokens.npy")
    model, layer = (compared(tmp_path, [file], 4, onload, precision)[1] for onload in ("model", "layer"))
    assert (model.perplexity, model.distance) == (layer.perplexity, layer.distance)
    assert model.written is not None
    assert model.written == layer.written
    save(tmp_path, "dense", seed=3)
    assert compared(tmp_path, [file], 4, "model", precision)[0].perplexity == model.perplexity


def test_only_the_streams_and_the_head_are_kept(tmp_path: Path) -> None:
    save(tmp_path, "dense", tied=False)
    dense = Checkpoint.open(str(tmp_path / "dense"))
    kept = open_head(dense, torch.float32, torch.device("cpu"))
    loaded = {name for name, parameter in kept.net.named_parameters() if not parameter.is_meta}
    assert loaded == {"model.norm.weight", "lm_head.weight"}
    data = CalibrationDataModule(eval_datasets=[str(save_tokens(tmp_path / "tokens.npy"))], continuations=0)
    label = Evaluation("demo")
    label.label = "test"  # type: ignore[assignment]
    trainer, slot = trainer_for(label, tmp_path / "logs"), ModelSlot("layer", Seconds())  # type: ignore[arg-type]
    data.needs_calibration = False
    measured = measure(trainer, data, dense, "", slot, Progress(shown=False), scratch=tmp_path)
    assert [stream.nbytes for stream in measured.streams] == [10 * 16 * 32 * 4]
    measured.close()
    assert measured.streams == []


# Continuations


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    net, prompts = make_tiny(family), tiny_tokens(5, 12)
    expected = net.generate(prompts, do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=1)
    assert torch.equal(greedy(net, prompts, 20), expected[:, 12:])
    ends = frozenset(int(token) for token in expected[:, 15])
    assert greedy(net, prompts, 20, ends).shape[1] <= 4  # every row has come to an end


def test_what_is_said_of_continuations() -> None:
    def wrote(*texts: list[int]) -> Continuations:
        return Continuations(torch.zeros(len(texts), 2), 9, list(texts), frozenset({1}))

    left, right = wrote([5, 6, 7, 8, 5, 6, 7, 8, 5], [4, 1]), wrote([5, 6, 9, 8, 7, 6, 5, 4, 3], [4, 1])
    assert left.repeated == pytest.approx(2 / 6)  # 5678 and 6785 come twice among six runs of four
    assert (right.repeated, wrote([1]).repeated) == (0.0, None)
    assert (left.ended, right.ended) == (0.5, 0.5)
    assert common_beginning(left, right) == (2 + 2) / 2


# The doors


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Two models with a tokenizer, and a text of 600 words."""
    for name, seed in (("dense", 0), ("other", 3)):
        save(tmp_path, name, seed=seed)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    # No word that begins with a special token.
    words = " ".join(f"w{30 + token % 66}" for token in tiny_tokens(1, 600)[0].tolist())
    (tmp_path / "text.txt").write_text(words, encoding="utf-8")
    return tmp_path


def run_test(folder: Path, *more: str, model: str = "other") -> int:
    options = [f"--model.pretrained={folder / model}", f"--data.eval_datasets=[{folder / 'text.txt'}]"]
    options += ["--data.eval_seq_len=16", f"--data.cache_dir={folder / 'cache'}", "--trainer.accelerator=cpu"]
    options += [f"--trainer.default_root_dir={folder / 'logs'}", "--trainer.enable_progress_bar=false"]
    return main(["test", *options, *more])


def test_command_and_function_compare_any_two_models_in_both_windows(text: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_test(text, f"--dense={text / 'dense'}") == 0
    (file,) = (text / "logs").glob("test/version_0/metrics.json")
    metrics = json.loads(file.read_text())
    shown = capsys.readouterr().out
    windows = {"text.txt": (16, 37), "text.txt@128": (128, 4)}  # 128 positions
    assert {name: (one["seq_len"], one["windows"]) for name, one in metrics["evaluation"].items()} == windows
    ids = torch.tensor([int(word[1:]) for word in (text / "text.txt").read_text().split()])
    models = [AutoModelForCausalLM.from_pretrained(text / name).double() for name in ("dense", "other")]
    for name, (length, number) in windows.items():
        tokens = ids[: length * number].view(number, length)
        with torch.no_grad():
            expected = naive_distance(*(model(input_ids=tokens).logits.numpy() for model in models))
        assert list(metrics["distance"][name].values()) == pytest.approx(expected, rel=1e-4)
        assert f"distance {name}: KL {expected[0]:.4g} nats per token" in shown
    written = metrics["continuations"]
    sizes = {"evaluation_set": "text.txt", "prompts": 16, "prompt_tokens": 16, "new_tokens": 64}
    assert written.items() >= sizes.items()
    prompt = ids[: 37 * 16].view(37, 16)[:1]
    texts = [tiny_tokenizer().decode(greedy(model, prompt, 64, frozenset({1}))[0]) for model in models]
    assert len(written["examples"]) == 3
    asked = " ".join(f"w{i}" for i in prompt[0].tolist())
    assert written["examples"][0] == {"prompt": asked, "dense": texts[0], "pruned": texts[1]}

    options: dict[str, Any] = {"seq_len": 16, "accelerator": "cpu", "verbose": False, "dense": models[0].float()}
    found: Any = api.evaluate(text / "other", [text / "text.txt"], **options)
    of_the_command = metrics["distance"]["text.txt"]["kl_divergence"]
    assert found["text.txt"]["kl_divergence"] == pytest.approx(of_the_command, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "sets", "written"),
    [
        (["--data.eval_long_seq_len=0", "--data.continuations=0"], ["text.txt"], False),
        (["--data.eval_long_seq_len=64", "--model.onload=model"], ["text.txt", "text.txt@64"], True),
        # Not twice as long as the others; and layer by layer nothing is written by a model too large for it.
        (["--data.eval_long_seq_len=31", "--model.onload=layer"], ["text.txt"], False),
    ],
)
def test_both_can_be_shortened_or_left_out(
    text: Path, options: list[str], sets: list[str], written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuations, "READ_BYTES", 0)
    with pytest.warns(match="layer by layer") if "=layer" in options[1] else contextlib.nullcontext():
        assert run_test(text, f"--dense={text / 'dense'}", *options) == 0
    metrics = json.loads((text / "logs" / "test" / "version_0" / "metrics.json").read_text())
    assert list(metrics["perplexity"]) == sets
    assert ("continuations" in metrics) is written


@pytest.mark.parametrize("what", ["vocabulary", "tokenizer", "nothing"])
def test_models_that_cannot_be_compared_are_refused(text: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    if what == "vocabulary":
        save(text, "dense", vocab_size=90)
    elif what == "tokenizer":
        file = text / "dense" / "tokenizer.json"
        file.write_text(file.read_text().replace('"w7"', '"v7"'))
    model = text / ("missing" if what == "nothing" else "dense")
    assert run_test(text, f"--dense={model}") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --dense: ")
    assert str(model) in error
    assert not (text / "logs").exists()
