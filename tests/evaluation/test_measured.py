"""Perplexity, and distance from the dense model, against float64; long windows; what both models write."""

import contextlib
import copy
import json
import math
import shutil
from collections import Counter
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
from lightning_prune.evaluation import continuations, perplexity
from lightning_prune.evaluation import distance as module
from lightning_prune.evaluation.continuations import Continuations, common_beginning, greedy
from lightning_prune.evaluation.distance import TokenMeans, losses_and_distances
from lightning_prune.evaluation.perplexity import Evaluation, Measured, measure, unigram_perplexity
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


def naive_perplexity(logits: np.ndarray, tokens: torch.Tensor) -> float:
    return math.exp(np.mean(naive_losses(logits, tokens.numpy())))


def random_logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(6, 9, 96, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batches", [[6], [1] * 6, [2, 4]])
@pytest.mark.parametrize("chunk", [1, 4 * 96 * 7, 2**27])
def test_batches_chunks_and_padding_do_not_change_the_value(
    monkeypatch: pytest.MonkeyPatch, batches: list[int], chunk: int
) -> None:
    monkeypatch.setattr(head, "LOGITS_BYTES", chunk)
    monkeypatch.setattr(module, "DENSE_BYTES", chunk // 2)
    monkeypatch.setattr(module, "PIECE_BYTES", chunk // 3)
    dense, other, tokens, weight = random_logits(1), random_logits(2), tiny_tokens(6, 9), torch.ones(6)
    other[4] = torch.nan
    weight[4] = 0
    means, alone, itself = TokenMeans(4), TokenMeans(1), TokenMeans(4)
    for p, q, ids, counted in zip(*(x.split(batches) for x in (dense, other, tokens, weight)), strict=True):
        values = losses_and_distances(lambda rows: rows, q, lambda rows: rows, p, ids, 96)
        means.update(counted, *values)
        alone.update(counted, values[0])
    counts = weight > 0
    expected = naive_distance(dense[counts].numpy(), other[counts].numpy())
    assert means.reduced()[1:].tolist() == pytest.approx(expected, rel=1e-5)
    assert means.perplexity() == pytest.approx(naive_perplexity(other[counts].numpy(), tokens[counts]), rel=1e-5)
    assert alone.perplexity() == means.perplexity()
    assert int(means.tokens) == 5 * 8
    itself.update(torch.ones(6), *losses_and_distances(torch.neg, dense, torch.neg, dense, tokens, 96))
    assert itself.reduced()[1:].tolist() == pytest.approx([0.0, 1.0, 1.0], abs=1e-6)
    assert itself.distance().kl_divergence >= 0
    assert itself.distance().expected_acceptance <= 1


def naive_unigram(predicted: list[int], vocab_size: int) -> float:
    """Every token's probability under the frequencies of all others."""
    total, nats = len(predicted), 0.0
    once = sum(count == 1 for count in Counter(predicted).values())
    for number, token in enumerate(predicted):
        others = predicted[:number] + predicted[number + 1 :]
        unseen = vocab_size - len(set(others))
        seen = (1 - once / total) * others.count(token) / max(1, total - 1)
        nats -= math.log(seen if token in others else once / total / unseen)
    return math.exp(nats / total)


def test_unigram_perplexity_is_of_the_predicted_tokens_each_left_out_of_its_frequency() -> None:
    tokens = torch.tensor([[9, 1, 1, 5, 6], [9, 1, 2, 2, 6]])  # 9 is never predicted, 5 once
    assert unigram_perplexity(tokens, 11) == pytest.approx(naive_unigram([1, 1, 5, 6, 1, 2, 2, 6], 11), rel=1e-12)
    assert unigram_perplexity(torch.arange(51).view(1, 51), 60) == pytest.approx(11.0, rel=1e-12)  # 60 − 49 unseen
    assert unigram_perplexity(torch.ones(2, 9, dtype=torch.long), 60) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("size", [4_000, 16_000, 200_000])
def test_unigram_perplexity_of_a_short_text_is_nearer_to_the_truth_than_that_of_its_own_frequencies(size: int) -> None:
    shares = 1 / torch.arange(1, 20_001, dtype=torch.float64)  # Zipf's law
    text = torch.multinomial(shares, size, replacement=True, generator=torch.Generator().manual_seed(0))
    own = text.bincount(minlength=20_000) / size
    truth, by_heart = (float(-(p * p.log()).nansum()) for p in (shares / shares.sum(), own))
    found = math.log(unigram_perplexity(torch.cat([text[:1], text]).view(1, -1), 20_000))
    assert abs(found - truth) < 0.7 * abs(by_heart - truth)


def save(folder: Path, name: str, **options: object) -> PreTrainedModel:
    model = make_tiny(**options)  # type: ignore[arg-type]
    model.save_pretrained(folder / name)
    return model


def measured(
    folder: Path,
    sets: list[Path],
    *models: str,
    batch_size: int = 4,
    onload: str = "model",
    precision: str = "32-true",
    prompts: int = 2,
) -> tuple[list[Measured], ModelSlot]:
    """What the models showed, each but the first compared with the first; and the slot, with the last one open."""
    files = [str(one) for one in sets]
    data = CalibrationDataModule(eval_datasets=files, eval_batch_size=batch_size, continuations=prompts)
    data.needs_calibration = False
    slot, results = ModelSlot(onload, Seconds()), list[Measured]()
    for name in models:
        label = Evaluation("demo")
        label.label = "test"  # type: ignore[assignment]
        trainer = trainer_for(label, folder / "logs", precision)  # type: ignore[arg-type]
        how = {"reference": results[0]} if results else {"scratch": folder}
        checkpoint, progress = Checkpoint.open(str(folder / name)), Progress(shown=False)
        results.append(measure(trainer, data, checkpoint, name, slot, progress, **how))  # type: ignore[arg-type]
    return results, slot


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
    (dense, other), _ = measured(tmp_path, files, "dense", "other", batch_size=batch_size, onload=onload)
    assert list(dense.perplexity) == list(other.distance) == ["0.npy", "1.npy"]
    for file, tokens in zip(files, sets, strict=True):
        with torch.no_grad():
            logits = [copy.deepcopy(model).double()(input_ids=tokens).logits.numpy() for model in models]
        found = other.distance[file.name]
        values = [found.kl_divergence, found.top1_agreement, found.expected_acceptance]
        assert values == pytest.approx(naive_distance(*logits), rel=1e-4)
        for one, own in zip((dense, other), logits, strict=True):
            result = one.perplexity[file.name]
            assert result.perplexity == pytest.approx(naive_perplexity(own, tokens), rel=1e-5)
            assert result.tokens == tokens[:, 1:].numel()
    assert dense.distance == {}
    assert [stream.nbytes for stream in dense.streams] == [tokens.numel() * 32 * 4 for tokens in sets]
    dense.close()
    assert dense.streams == []
    assert not list(tmp_path.glob("residuals*"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_placement_changes_nothing_and_perplexity_is_that_without_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(continuations, "NEW_TOKENS", 8)  # each of them reads every layer
    save(tmp_path, "dense"), save(tmp_path, "other", seed=3)
    sets = [save_tokens(tmp_path / "one.npy", tiny_tokens(7, 16, seed=4)), save_tokens(tmp_path / "two.npy")]
    models = ("dense", "other")
    (_, model), (_, layer) = (
        measured(tmp_path, sets, *models, onload=onload, precision=precision)[0] for onload in ("model", "layer")
    )
    assert (model.perplexity, model.distance) == (layer.perplexity, layer.distance)
    assert model.written is not None
    assert model.written == layer.written
    reads, found = [], []
    for onload, step_bytes in (("model", 0), ("layer", perplexity.STEP_BYTES), ("layer", 1)):
        monkeypatch.setattr(perplexity, "STEP_BYTES", step_bytes)  # of 1, every batch crosses the layers on its own
        (alone,), slot = measured(tmp_path, sets, "other", batch_size=2, onload=onload, precision=precision, prompts=0)
        found.append(alone.perplexity)
        reads.append(slot.model.bytes_read)
        slot.close()
    assert found[0] == found[1] == found[2]
    # Windows cross together, so each layer was read once per evaluation set; singly, once per batch.
    once, together, singly = reads
    assert singly - together == (4 + 5 - 2) * (together - once) > 0
    (alone,), _ = measured(tmp_path, sets, "other", precision=precision)
    assert alone.perplexity == model.perplexity


def test_of_the_model_to_compare_with_only_the_head_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, "dense", tied=False)
    kept = open_head(Checkpoint.open(str(tmp_path / "dense")), torch.float32, torch.device("cpu"))
    loaded = {name for name, parameter in kept.net.named_parameters() if not parameter.is_meta}
    assert loaded == {"model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    net, prompts = make_tiny(family), tiny_tokens(5, 12)
    expected = net.generate(prompts, do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=1)
    assert torch.equal(greedy(net, prompts, 20), expected[:, 12:])
    ends = frozenset(int(token) for token in expected[:, 15])
    assert greedy(net, prompts, 20, ends).shape[1] <= 4  # every row has come to an end


def test_the_head_reads_no_strided_view() -> None:
    """For one, a CPU copies the head once per prompt in bf16: 16 times 131 MB for a small Llama."""
    net, contiguous = make_tiny(), []
    net.lm_head.register_forward_hook(lambda _, inputs, output: contiguous.append(inputs[0].is_contiguous()))
    greedy(net, tiny_tokens(5, 12), 3)
    assert contiguous == [True] * 3


def test_what_is_said_of_continuations() -> None:
    def wrote(*texts: list[int]) -> Continuations:
        return Continuations(torch.zeros(len(texts), 2), 9, list(texts), frozenset({1}))

    left, right = wrote([5, 6, 7, 8, 5, 6, 7, 8, 5], [4, 1]), wrote([5, 6, 9, 8, 7, 6, 5, 4, 3], [4, 1])
    assert left.repeated == pytest.approx(2 / 6)  # 5678 and 6785 come twice among six runs of four
    assert (right.repeated, wrote([1]).repeated) == (0.0, None)
    assert (left.ended, right.ended) == (0.5, 0.5)
    assert common_beginning(left, right) == (2 + 2) / 2
    assert left.first(4).repeated == 0.0
    assert left.first(4).new_tokens == 4


def test_a_model_with_fewer_positions_is_compared_over_what_both_can_write(text: Path) -> None:
    shutil.copytree(text / "dense", text / "few")
    config = json.loads((text / "few/config.json").read_text())
    (text / "few/config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    assert run_test(text, f"--dense={text / 'dense'}", "--data.continuations=2", model="few") == 0
    (file,) = (text / "logs").glob("test/version_0/metrics.json")
    written = json.loads(file.read_text())["continuations"]
    assert (written["new_tokens"], written["common_beginning"]) == (24, 24)  # 40 less the prompt's 16; equal weights
    assert written["dense"] == written["pruned"]


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
