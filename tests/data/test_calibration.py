import torch

from lightning_prune.data.calibration import fingerprint


def test_fingerprint_tells_shapes_and_orders_apart_but_not_memory_layouts_and_integer_widths() -> None:
    """What it is the digest of is in ``test_datamodule.py``."""
    tokens = torch.arange(12).view(3, 4)
    variants = [tokens, tokens.view(4, 3), tokens.flip(0), tokens.flatten()]
    assert len({fingerprint(variant) for variant in variants}) == 4
    assert fingerprint(tokens.T.contiguous().T) == fingerprint(tokens) == fingerprint(tokens.to(torch.int32))
