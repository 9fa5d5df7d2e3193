"""A model whose layers come and go is the whole model of transformers, bit for bit."""

import contextlib
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_prune
from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.families import layer_structures
from lightning_prune.models.layered import LayeredModel, Onload, open_layered
from lightning_prune.models.vocabulary import Block
from tests.cutting import CPU, MemorySource, cut, layered
from tests.tiny import (
    CUTTABLE,
    EVERY_FAMILY,
    ONE_BLOCK,
    SIDE_BY_SIDE,
    WHOLE_ATTENTION,
    make_tiny,
    mixed_plan,
    tiny_tokens,
)

FULL, HALF = torch.float32, torch.bfloat16
KINDS: list[tuple[str, dict[str, Any], torch.dtype, bool]] = [
    *((family, {"tied": dtype is FULL}, dtype, False) for family in EVERY_FAMILY for dtype in (FULL, HALF)),
    ("llama", {"attention_bias": True, "mlp_bias": True}, HALF, False),
    ("mistral", {"sliding_window": 5}, FULL, False),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}, HALF, False),
    *((family, {}, FULL, True) for family in EVERY_FAMILY),
]


def resident(model: LayeredModel) -> list[bool]:
    """Of every layer, whether a weight is in memory."""
    return [any(not parameter.is_meta for parameter in layer.parameters()) for layer in model.layers]


@pytest.mark.parametrize(("family", "extra", "dtype", "pruned"), KINDS)
@torch.no_grad()
def test_layers_one_by_one_give_the_logits_of_the_whole_model(
    tmp_path: Path, family: str, extra: dict[str, Any], dtype: torch.dtype, pruned: bool
) -> None:
    saved = make_tiny(family, **extra).to(dtype)
    saved = cut(saved, mixed_plan(saved)) if pruned else saved
    saved.save_pretrained(tmp_path, max_shard_size="12KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    whole = lightning_prune.load(tmp_path)
    assert not whole.training
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in saved.state_dict().items())
    placements: tuple[Onload, ...] = ("layer", "model")
    for onload in placements:
        model = open_layered(Checkpoint.open(str(tmp_path)), None, CPU, onload)
        for shape in ((2, 12), (3, 9)):  # masks and rotary tables follow the shape
            tokens = tiny_tokens(*shape)
            expected = whole(input_ids=tokens, use_cache=False).logits
            assert torch.equal(model.logits(tokens), expected)
        model.close()


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("stored", [FULL, HALF])
@pytest.mark.parametrize("asked", [None, FULL, HALF, torch.float16, torch.float64])
@torch.no_grad()
def test_weights_come_in_the_asked_dtype_and_rotary_tables_in_float32(
    tmp_path: Path, stored: torch.dtype, asked: torch.dtype | None, pruned: bool
) -> None:
    saved = make_tiny().to(stored)
    (cut(saved, mixed_plan(saved)) if pruned else saved).save_pretrained(tmp_path)
    model, whole = open_layered(Checkpoint.open(str(tmp_path)), asked, CPU), lightning_prune.load(tmp_path, dtype=asked)
    model.load_all()
    for net in (model.net, whole):
        assert {parameter.dtype for parameter in net.parameters()} == {asked or stored}
        assert {buffer.dtype for buffer in net.buffers()} == {FULL}
    assert torch.equal(model.logits(tiny_tokens()), whole(input_ids=tiny_tokens(), use_cache=False).logits)


def test_a_layer_has_weights_between_enter_and_leave_alone() -> None:
    model = layered(make_tiny())
    assert resident(model) == [False] * 4
    held = [weakref.ref(parameter) for parameter in model.enter(1).parameters()]
    model.announce(2)  # is read, but not in place yet
    assert resident(model) == [False, True, False, False]
    model.leave(1)
    assert resident(model) == [False] * 4
    assert not [reference for reference in held if reference() is not None]
    with contextlib.suppress(ArithmeticError), model.layer(3):
        assert resident(model) == [False, False, False, True]
        raise ArithmeticError
    assert resident(model) == [False] * 4
    assert not model.net.get_input_embeddings().weight.is_meta


def test_kept_layers_are_read_once_and_changed_ones_again() -> None:
    model = layered(make_tiny(), onload="model")
    read = model.bytes_read
    for _ in range(3):
        model.logits(tiny_tokens())
    one = sum(parameter.numel() * 4 for parameter in model.layers[0].parameters())
    assert model.bytes_read - read == 4 * one
    assert resident(model) == [True] * 4
    view = model.views[2]
    gate = view.linears["gate"]
    gate.weight = nn.Parameter(torch.zeros_like(gate.weight))
    model.leave(2, changed=True)
    model.enter(2)
    assert bool(gate.weight.any())
    assert model.bytes_read - read == 5 * one
    model.announce(0)
    model.close()
    assert resident(model) == [False] * 4


def test_a_pass_and_a_writer_read_every_parameter_once_and_ahead_of_time(tmp_path: Path) -> None:
    """No announced layer is read again when its turn comes."""
    dense = make_tiny()
    model = layered(dense)
    source: MemorySource = model._reader.source  # type: ignore[assignment]
    embedding, before = list(source.asked), model.bytes_read
    model.logits(tiny_tokens())
    inside = [name for names in model.layer_names for name in names.values()]
    assert source.asked == [*embedding, *inside]
    assert model.bytes_read - before == sum(p.numel() * 4 for p in dense.model.layers.parameters())
    assert model.evaluations == 4
    write_checkpoint(model, tmp_path / "out", beside=None, card="")
    assert sorted(source.asked) == sorted([*embedding, *inside, *inside])


@pytest.mark.parametrize("family", [family for family in EVERY_FAMILY if family not in (*SIDE_BY_SIDE, *ONE_BLOCK)])
@torch.no_grad()
def test_attention_and_mlp_apart_are_the_layer(family: str) -> None:
    dense = make_tiny(family)
    model, tokens = layered(dense), tiny_tokens()
    kept: dict[str, Tensor] = {}
    layer, parts = dense.model.layers[1], layer_structures(dense)[1].parts
    first, second = parts
    parts[second].entry.register_forward_pre_hook(lambda _, args: kept.update(middle=args[0]))
    layer.register_forward_hook(lambda _, args, out: kept.update(after=out[0] if isinstance(out, tuple) else out))
    dense(input_ids=tokens, use_cache=False)
    hidden = model.embed(tokens)
    with model.layer(0):
        hidden = model.run(0, hidden)
    with model.layer(1):
        middle = model.run_block(1, first, hidden)
        assert torch.equal(middle, kept["middle"])
        assert torch.equal(model.run_block(1, second, middle), kept["after"])
        assert torch.equal(model.run(1, hidden), kept["after"])  # nothing stays replaced
        for found, expected in zip(model.streams(1, hidden), (hidden, kept["middle"], kept["after"]), strict=True):
            assert torch.equal(found, expected)
    assert model.evaluations == 5


@pytest.mark.parametrize("family", SIDE_BY_SIDE)
@torch.no_grad()
def test_blocks_side_by_side_both_read_the_layers_input(family: str) -> None:
    model, tokens = layered(make_tiny(family)), tiny_tokens()
    hidden, added, kept = model.embed(tokens), dict[Block, Tensor](), dict[str, Tensor]()
    parts = model.views[0].parts
    assert (list(parts), model.views[0].stages) == ([Block.MIXER, Block.MLP], (Block.MLP,))
    handles = [
        module.register_forward_hook(
            lambda _, args, out, block=block: added.update({block: out[0] if isinstance(out, tuple) else out})
        )
        for block, part in parts.items()
        for module in part.modules
    ]
    with model.layer(0):
        after = model.run(0, hidden)
        for handle in handles:
            handle.remove()
        close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
        close(after, hidden + added[Block.MIXER] + added[Block.MLP])
        for block, output in added.items():
            close(model.run_block(0, block, hidden), hidden + output)
            close(model.run_without(0, block, hidden), after - output)
        close(model.beside(0, hidden), hidden + added[Block.MIXER])
        for found, expected in zip(model.streams(0, hidden), (hidden, after - added[Block.MLP], after), strict=True):
            close(found, expected)
        projection = model.views[0].projection(Block.MLP).module
        projection.register_forward_hook(lambda _, args, out: kept.update(output=out))
        model.run(0, hidden)
        assert torch.equal(model.add(0, hidden, Block.MLP, kept["output"]), after)
        close(model.add(0, hidden, Block.MLP, kept["output"], alone=True), after - added[Block.MIXER])


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@torch.no_grad()
def test_what_a_projection_reads_is_known_without_its_product(family: str) -> None:
    dense = make_tiny(family)
    model, tokens = layered(dense), tiny_tokens()
    hidden, seen = model.embed(tokens), []
    with model.layer(0):
        for block in model.views[0].prunable:
            module = model.views[0].projection(block).module
            handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            model.run_block(0, block, hidden)
            inner = model.inner(0, block, hidden)
            handle.remove()
            assert all(torch.equal(inner, one) for one in seen[-2:])  # the hook saw it both times
            assert torch.isfinite(module(inner)).all()  # nothing stays replaced
    assert len(seen) == 4


@pytest.mark.parametrize("family", [*CUTTABLE, *WHOLE_ATTENTION])
@torch.no_grad()
def test_what_a_block_puts_out_is_added_as_the_layer_does(family: str) -> None:
    """Of another output than its own: post-norms, multipliers and residuals are those of the layer."""
    dense = make_tiny(family)
    model, tokens = layered(dense), tiny_tokens()
    hidden, output = model.embed(tokens), torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1))
    layer = dense.model.layers[0]
    kept: dict[str, Tensor] = {}
    layer.self_attn.forward = lambda *_, **__: (output, None)
    layer.mlp.forward = lambda *_, **__: 2 * output
    mlp = layer_structures(dense)[0].parts[Block.MLP]
    mlp.entry.register_forward_pre_hook(lambda _, args: kept.update(middle=args[0]))
    layer.register_forward_hook(lambda _, args, after: kept.update(after=after))
    dense(input_ids=tokens, use_cache=False)
    with model.layer(0):
        middle = model.add(0, hidden, Block.ATTENTION, output)
        assert torch.equal(middle, kept["middle"])
        assert torch.equal(model.add(0, middle, Block.MLP, 2 * output), kept["after"])
    assert model.evaluations == 0
