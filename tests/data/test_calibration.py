import hashlib
import struct

import torch

from lightning_prune.data.calibration import fingerprint


def test_fingerprint_is_sha256_of_the_shape_line_and_little_endian_int64_ids() -> None:
    tokens = [[1, 2, 70000], [5, 0, 2**40]]
    flat = [token for row in tokens for token in row]
    expected = hashlib.sha256(b"2,3\n" + struct.pack("<6q", *flat)).hexdigest()
    assert fingerprint(torch.tensor(tokens)) == expected


def test_fingerprint_tells_shapes_and_orders_apart_but_not_memory_layouts_and_integer_widths() -> None:
    tokens = torch.arange(12).view(3, 4)
    variants = [tokens, tokens.view(4, 3), tokens.flip(0), tokens.flatten()]
    assert len({fingerprint(variant) for variant in variants}) == 4
    assert fingerprint(tokens.T.contiguous().T) == fingerprint(tokens) == fingerprint(tokens.to(torch.int32))
