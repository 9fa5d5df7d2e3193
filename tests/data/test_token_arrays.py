from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from lightning_prune.data.token_arrays import is_token_array, load_token_array
from lightning_prune.support.errors import UserError

TOKENS = torch.arange(12).view(3, 4)


def test_npy_and_safetensors_are_taken_as_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", TOKENS.numpy())
    np.save(tmp_path / "big.npy", TOKENS.numpy().astype(">i8"))
    np.save(tmp_path / "columns.npy", np.asfortranarray(TOKENS.numpy()))
    save_file({"anything": TOKENS}, tmp_path / "a.safetensors")
    save_file({"tokens": TOKENS, "other": torch.zeros(1)}, tmp_path / "b.safetensors")
    for name in ("a.npy", "big.npy", "columns.npy", "a.safetensors", "b.safetensors"):
        assert is_token_array(name)
        tokens = load_token_array(str(tmp_path / name))
        assert tokens.dtype == torch.int64
        assert torch.equal(tokens, TOKENS)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [  # more of them are in tests/hostile
        ("a.npy", np.zeros((2, 4), np.int32), "int32.*int64"),
        ("a.npy", np.zeros((4, 1), np.int64), r"\[4, 1\].*int64"),
        ("a.npy", np.array([["a"]]), "cannot read.*int64"),
        ("a.npy", b"not an array at all", "cannot read.*int64"),
        ("a.safetensors", b"", "cannot read.*int64"),
        ("a.safetensors", save({"x": TOKENS, "y": TOKENS.clone()}), "2 tensors.*x, y.*tokens"),
        ("none.npy", None, r"none\.npy.*No such file"),
    ],
)
def test_wrong_arrays_are_refused(name: str, content: Any, words: str, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        np.save(tmp_path / name, content)
    with pytest.raises(UserError, match=words) as error:
        load_token_array(str(tmp_path / name))
    assert "--data.dataset" in str(error.value)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    np.save(tmp_path / "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="without pickle"):
        load_token_array(str(tmp_path / "a.npy"))
    assert not (tmp_path / "exploded").exists()
