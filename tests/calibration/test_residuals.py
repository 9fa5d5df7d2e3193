"""The residual stream in memory or in a mapped file: the same values, and no file is left."""

from pathlib import Path

import pytest
import torch

from lightning_prune.calibration import residuals
from lightning_prune.calibration.loop import CalibrationLoop
from lightning_prune.calibration.residuals import ResidualStore
from lightning_prune.calibration.wavefront import RemovalPass
from lightning_prune.methods.taylor import TaylorPass
from tests.calibration.driving import drive
from tests.calibration.test_results import assert_same
from tests.cutting import CPU, layered
from tests.tiny import make_tiny, tiny_tokens


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_put_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool, dtype: torch.dtype
) -> None:
    if mapped:
        monkeypatch.setattr(residuals, "SHARE", 0)
    values = torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    store = ResidualStore(7, tmp_path)
    for rows in (slice(4, 7), slice(0, 4)):
        given = values[rows].clone().requires_grad_()
        store.put(rows, given)
        given.detach().zero_()  # what is kept does not follow it
    assert store.values is not None
    assert (store.values.untyped_storage().filename is not None) is mapped
    assert list(tmp_path.iterdir()) == []  # the file has no name while it is in use
    for rows in (slice(0, 7), slice(2, 3), slice(5, 7)):
        found = store.get(rows, CPU)
        assert (found.dtype, found.requires_grad) == (dtype, False)
        assert torch.equal(found, values[rows])
    store.put(slice(1, 3), -values[1:3])
    assert torch.equal(store.get(slice(0, 3), CPU), torch.cat([values[:1], -values[1:3]]))
    store.close()
    store.put(slice(0, 2), values[:2, :, :3])  # room for another shape once it was closed
    assert torch.equal(store.get(slice(0, 2), CPU), values[:2, :, :3])
    assert list(tmp_path.iterdir()) == []


def test_passes_over_mapped_files_give_the_same_bits_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tiny_tokens(5, 9)

    def results() -> CalibrationLoop:
        return drive([TaylorPass(), RemovalPass()], layered(make_tiny()), tokens, tmp_path / "scratch")

    in_memory = results()
    monkeypatch.setattr(residuals, "SHARE", 0)
    mapped = results()
    assert_same(mapped, in_memory)
    assert list((tmp_path / "scratch").iterdir()) == []
