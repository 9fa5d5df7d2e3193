"""The beginning-of-sequence token in front of every window."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import lightning_prune
from lightning_prune.data.calibration import shared_windows
from lightning_prune.data.sampling import aligned_windows, draw_windows
from lightning_prune.data.tokenization import window_start
from lightning_prune.recovery.data import RecoveryDataModule
from lightning_prune.support.errors import UserError
from tests.data.conftest import make_text

BOS = "<s>"


@pytest.fixture(scope="session")
def beginning(tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tokenizer with a `<s>` that it puts before every text by itself."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_special_tokens({"bos_token": BOS})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
    )
    folder = tmp_path_factory.mktemp("beginning")
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"][0] == tokenizer.bos_token_id
    return str(folder)


@pytest.fixture
def build(set_up: Any, beginning: str, text_file: str) -> Any:
    return partial(set_up, tokenizer=beginning, eval_datasets=[text_file])


def stream_of(folder: str, text_file: str) -> tuple[list[int], int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(Path(text_file).read_text(), add_special_tokens=False)["input_ids"], tokenizer.bos_token_id


def windows_of(stream: list[int], length: int, bos: int) -> list[list[int]]:
    body = length - 1
    return [[bos, *stream[at : at + body]] for at in range(0, len(stream) - body + 1, body)]


def test_every_window_begins_with_it_inside_its_length(build: Any, beginning: str, text_file: str) -> None:
    data = build(seed=5, eval_seq_len=32)
    stream, bos = stream_of(beginning, text_file)
    windows = windows_of(stream, 16, bos)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(5)).tolist()
    assert data.calibration.tokens.tolist() == [windows[i] for i in order[:11]]
    assert data.calibration.manifest.bos == "every window"
    (held_out,) = data.evaluation
    assert held_out.tokens.tolist() == windows_of(stream, 32, bos)
    facts = held_out.manifest
    assert (facts["bos"], facts["stride"], facts["seq_len"]) == ("every window", 31, 32)
    assert facts["predicted_tokens"] == len(held_out.tokens) * 31  # every token but the first, which nothing predicts


def test_never_gives_the_tokens_without_it(build: Any, beginning: str, text_file: str) -> None:
    data = build(sampling="sequential", bos="never")
    stream, _ = stream_of(beginning, text_file)
    assert data.calibration.tokens.flatten().tolist() == stream[: 11 * 16]
    assert (data.calibration.manifest.bos, data.evaluation[0].manifest["bos"]) == ("none", "none")
    assert data.evaluation[0].manifest["stride"] == 16


def test_auto_is_what_the_tokenizer_does(tokenizer_folder: str, beginning: str) -> None:
    plain, begins = (AutoTokenizer.from_pretrained(folder) for folder in (tokenizer_folder, beginning))
    assert window_start(begins, "auto") == window_start(begins, "always") == begins.bos_token_id
    assert window_start(begins, "never") is None
    assert window_start(plain, "auto") is None
    with pytest.raises(UserError, match=r"--data\.bos always.*auto or never"):
        window_start(plain, "always")
    plain.add_special_tokens({"bos_token": BOS})  # it has one, and does not put it (Qwen, SmolLM)
    assert (window_start(plain, "auto"), window_start(plain, "always")) == (None, plain.bos_token_id)
    with pytest.raises(UserError, match=r"--data\.bos.*auto, never, always"):
        window_start(plain, "sometimes")


def test_a_window_that_begins_with_it_anyway_gets_no_second_one() -> None:
    stream = torch.tensor([9, 1, 2, 3, 4, 5, 9, 6, 7, 8, 1, 2, 9, 3, 4])
    rows = [[9, 1, 2, 3], [9, 3, 4, 5], [9, 6, 7, 8], [9, 8, 1, 2]]  # the fifth would need a token after the end
    assert aligned_windows(stream, 4, bos=9).tolist() == rows
    assert draw_windows(stream, None, 4, stride=6, bos=9).tolist() == [[9, 1, 2, 3], [9, 6, 7, 8]]
    assert aligned_windows(torch.tensor([1, 2]), 4, bos=9).shape == (0, 4)
    with pytest.raises(UserError, match="15 tokens, but 18 are needed"):
        draw_windows(stream, 6, 4, bos=9)


def test_in_memory_and_in_training_likewise(build: Any, beginning: str, text_file: str, tmp_path: Path) -> None:
    stream, bos = stream_of(beginning, text_file)
    expected = windows_of(stream, 16, bos)
    text = Path(text_file).read_text()
    drawn = lightning_prune.calibration_set(text, beginning, num_samples=len(expected), seq_len=16)
    assert sorted(drawn.tolist()) == sorted(expected)
    assert bos not in lightning_prune.calibration_set(text, beginning, seq_len=16, num_samples=5, bos="never")

    other = tmp_path / "other.txt"
    other.write_text(make_text(400, shift=7))
    data = build(kind=RecoveryDataModule, num_samples=None, eval_datasets=[str(other)])
    assert data.calibration.tokens.tolist() == expected
    assert data.manifest["bos"] == "every window"
    # A window of the text is found again in it, though the token is put elsewhere there.
    assert shared_windows(data.calibration.tokens[:, 1:], torch.tensor([stream[100:140]])) == 1
    part = tmp_path / "part.txt"
    part.write_text(text[len(text) // 3 :])
    with pytest.raises(UserError, match=r"holds 9\d% of the windows"):
        build(kind=RecoveryDataModule, num_samples=None, eval_datasets=[str(part)])


def test_recovery_follows_the_pruning_run_unless_told_otherwise(build: Any, text_file: str) -> None:
    given: Any
    cases = (None, "never", "none"), (None, "auto", "every window"), ("auto", "never", "every window")
    for given, run, then in cases:
        data = RecoveryDataModule(None, seq_len=16, bos=given)
        data._streams.tokenizer = build().tokenizer
        data.follow(text_file, None, [], None, run, {"continuations": 3})
        data.setup("fit")
        assert data.manifest["bos"] == then
        assert data.continuations == 3
