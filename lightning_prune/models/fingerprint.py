"""A fingerprint of the dense model, cheap enough to take in every run."""

import hashlib
import json
from pathlib import Path

from transformers.utils import cached_file

from lightning_prune.models.loading import resolve

WHOLE_BELOW = 64 * 2**20  # bytes; larger files are sampled
PIECES, PIECE = 64, 64 * 2**10
NOT_WEIGHTS = ("_name_or_path", "transformers_version")


def base_model_sha256(pretrained: str) -> str | None:
    """SHA-256 over the config and the weights, 64 hexadecimal digits; None where no safetensors file is found.

    Files above 64 MiB give their size, their header (names, shapes, dtypes) and 64 evenly spaced pieces of 64 KiB.
    So a fine-tuned model differs, and the same model under another name or path does not.
    """
    path = resolve(pretrained)
    config = _file(path, "config.json")
    index = _file(path, "model.safetensors.index.json")
    names = ["model.safetensors"]
    if index is not None:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    weights = [_file(path, name) for name in names]
    if config is None or None in weights:
        return None
    facts = json.loads(config.read_text(encoding="utf-8"))
    facts = {key: value for key, value in facts.items() if key not in NOT_WEIGHTS}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for file in weights:
        assert file is not None
        _add(digest, file)
    return digest.hexdigest()


def _file(path: str, name: str) -> Path | None:
    found = cached_file(
        path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found)


def _add(digest: "hashlib._Hash", path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"\n{size}\n".encode())
    with path.open("rb") as file:
        if size <= WHOLE_BELOW:
            digest.update(file.read())
            return
        length = file.read(8)
        digest.update(length + file.read(int.from_bytes(length, "little")))
        for piece in range(PIECES):
            file.seek((size - PIECE) * piece // (PIECES - 1))
            digest.update(file.read(PIECE))
