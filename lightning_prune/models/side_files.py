"""The files of a model folder beside config and weights: tokenizer, templates, processor, their code."""

import re
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.dynamic_module_utils import get_relative_import_files

from lightning_prune.models.weights import find_file

VOCABULARIES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.bpe", "tekken.json", "encoder.json")
OTHERS = (
    "special_tokens_map.json",
    "added_tokens.json",
    "*chat_template*",
    "*.jinja",
    "additional_chat_templates/*",
    "*SYSTEM_PROMPT*.txt",
    "*processor_config.json",
    "tokenization_*.py",
    "*process*.py",
    "custom_generate/*",
)


def side_files(path: str) -> dict[str, Path]:
    """The files of a folder or hub id for its tokenizer, chat templates, processor and own decoding, with the Python
    files that an ``auto_map`` of them names: name below the folder → file, sorted. Of a hub model they are downloaded.
    """
    folder = Path(path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(path, allow_patterns=[*VOCABULARIES, *OTHERS, "*.py"]))
        except Exception:  # of the hub's client, without a common base; what is in the cache will do
            config = find_file(path, "config.json")
            folder = folder if config is None else config.parent
    files = {file for pattern in (*VOCABULARIES, *OTHERS) for file in folder.glob(pattern)}
    modules: list[str] = []
    for file in [file for file in files if file.name.endswith("_config.json") and file.is_file()]:
        with suppress(OSError):  # loading the tokenizer says more
            modules += re.findall(r'"(\w+)\.\w+"', file.read_text("utf-8", "ignore"))  # "module.Class" of an auto_map
    for code in [folder / f"{module}.py" for module in modules]:
        files.add(code)
        with suppress(OSError, ValueError):  # code that is not there or not text; importing it says more
            files.update(map(Path, get_relative_import_files(code)))
    return {str(file.relative_to(folder)): file for file in sorted(files) if file.is_file()}


def has_vocabulary(files: dict[str, Path]) -> bool:
    """Whether a tokenizer can be among ``side_files``."""
    return any(fnmatch(name, pattern) for name in files for pattern in VOCABULARIES)
