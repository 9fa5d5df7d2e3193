import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_prune.models import fingerprint as base_model
from lightning_prune.models.fingerprint import base_model_sha256


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("sampled", [False, True])
def test_same_weights_elsewhere_agree_and_other_weights_do_not(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    if sampled:
        monkeypatch.setattr(base_model, "WHOLE_BELOW", 0)
        monkeypatch.setattr(base_model, "PIECE", 1024)
    first, copy, other = tiny_checkpoint(seed=0), tiny_checkpoint(seed=0), tiny_checkpoint(seed=1)
    found = base_model_sha256(str(first))
    assert found is not None
    assert len(found) == 64
    assert base_model_sha256(str(copy)) == found
    assert base_model_sha256(str(other)) != found
    flip(copy / "model.safetensors", -1)
    assert base_model_sha256(str(copy)) != found


def test_config_counts_but_not_where_it_was_saved_from(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint()
    before = base_model_sha256(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "9", "_name_or_path": "x"}))
    assert base_model_sha256(str(folder)) == before
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert base_model_sha256(str(folder)) != before


def test_model_without_safetensors_has_no_fingerprint(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint()
    (folder / "model.safetensors").unlink()
    assert base_model_sha256(str(folder)) is None
