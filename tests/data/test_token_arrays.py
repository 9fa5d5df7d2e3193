from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

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


def test_wrong_arrays_are_refused(tmp_path: Path) -> None:
    shapes = {(2, 4): "int32", (8,): r"\[8\]", (0, 4): r"\[0, 4\]", (4, 1): r"\[4, 1\]"}
    wrong = [(np.zeros(shape, np.int32 if words == "int32" else np.int64), words) for shape, words in shapes.items()]
    for array, words in [*wrong, (np.zeros((2, 4), np.float32), "float32"), (np.array([["a"]]), "cannot read")]:
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(UserError, match=f"{words}.*int64.*--data.dataset"):
            load_token_array(str(tmp_path / "a.npy"))
    for content, name in product((b"", b"not an array at all"), ("a.npy", "a.safetensors")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read.*int64.*--data\.dataset"):
            load_token_array(str(tmp_path / name))


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    np.save(tmp_path / "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="without pickle"):
        load_token_array(str(tmp_path / "a.npy"))
    assert not (tmp_path / "exploded").exists()


def test_ambiguous_and_missing_files_are_named(tmp_path: Path) -> None:
    save_file({"x": TOKENS, "y": TOKENS.clone()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"2 tensors.*x, y.*tokens"):
        load_token_array(str(tmp_path / "a.safetensors"))
    with pytest.raises(UserError, match=r"--data\.dataset.*none\.npy.*No such file"):
        load_token_array(str(tmp_path / "none.npy"))
