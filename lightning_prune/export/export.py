"""One call for either format."""

import os
from pathlib import Path
from typing import Literal

from lightning_prune.checkpoint.model_card import stock_card
from lightning_prune.export.gguf_file import gguf_package, write_gguf
from lightning_prune.export.stock import write_stock
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.weights import OPTION as PRETRAINED
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import check_writable, read_file, writable
from lightning_prune.support.progress import Progress

OPTION = "--output"
CARD_LIMIT = 10_000_000  # bytes of a README.md, which has a few thousand
GGUF_DTYPES = {"float16": "f16", "bfloat16": "bf16"}


def export(
    model: str | Path,
    format: Literal["gguf", "stock"],
    output: str | Path,
    dtype: str | None = None,
    *,
    overwrite: bool = False,
    verbose: bool = True,
) -> str:
    """Write a checkpoint for engines that do not read it as it is, one layer in memory at a time.

    Args:
        model: run folder, model folder, hub id, or ``demo``.
        format: ``gguf`` is one file for llama.cpp; ``stock`` a Hugging Face folder in which every layer is padded with
            zeros to the widest.
        output: the file (gguf) or folder (stock) to write.
        dtype: of a GGUF file's matrices: f32, f16, bf16 or q8_0; None keeps the checkpoint's.
        overwrite: replace ``output``, once the new one is complete.
        verbose: show progress.

    Returns:
        What was written, and what differs from the checkpoint, in a sentence each.

    Raises:
        UserError: the format cannot hold the model, or the output exists or cannot be written.
    """
    if not str(model):
        raise UserError("--model is empty. Give a run folder, a model folder, a hub id or 'demo'.")
    inner, target = Path(model).expanduser() / "pruned", Path(output).expanduser().absolute()
    source = str(inner) if (inner / "config.json").is_file() else str(model)
    if format == "stock" and dtype:
        raise UserError("--dtype belongs to --format gguf; a stock folder keeps the dtype of the weights.")
    _check_output(target, format == "stock", overwrite)
    progress = Progress(verbose)
    try:
        with writable(target.parent, OPTION):
            opened = Checkpoint.open(source)
            return _gguf(opened, target, dtype, progress) if format == "gguf" else _stock(opened, target, progress)
    except UserError as error:
        raise UserError(str(error).replace(PRETRAINED, "--model")) from None
    finally:
        progress.close()


def _gguf(checkpoint: Checkpoint, output: Path, dtype: str | None, progress: Progress) -> str:
    gguf_package()
    chosen = dtype or GGUF_DTYPES.get(str(checkpoint.stored_dtype).removeprefix("torch."), "f32")
    phase, last = f"writing {output.name}", 0

    def show(_: str, done: int, total: int) -> None:
        nonlocal last
        progress.expect(phase, total)
        progress.advance(phase, done - last)
        last = done

    written = write_gguf(checkpoint, output, chosen, show)
    progress.finish(phase)
    lines = []
    if written.left_in_f16:
        lines.append(
            f"{written.left_in_f16} matrices are in f16: the length of their rows is not a multiple of 32, which q8_0 "
            "needs. --model.round_to 32 (fit) makes widths that are."
        )
    if written.window is not None and written.window < checkpoint.config.max_position_embeddings:
        lines.append(f"the context is {written.window} tokens, the model's sliding window: the format has none for it.")
    return "\n".join([*lines, f"GGUF file ({written.architecture}, {chosen}): {output}"])


def _stock(checkpoint: Checkpoint, output: Path, progress: Progress) -> str:
    def show(layer: int, total: int) -> None:
        progress.expect("padding", total)
        progress.advance("padding", 1, f"layer {layer + 1} of {total}")

    readme = Path(checkpoint.pretrained) / "README.md"
    card = read_file(readme, CARD_LIMIT, "--model").decode("utf-8", errors="replace") if readme.is_file() else ""
    padded = write_stock(checkpoint, output, stock_card(card), show)
    progress.finish("padding")
    return f"{padded.sentence()}\nstock checkpoint: {output}"


def _check_output(output: Path, folder: bool, overwrite: bool) -> None:
    try:
        exists = os.path.lexists(output)
        empty = folder and output.is_dir() and not any(output.iterdir())
    except OSError as error:
        raise UserError(f"{OPTION}: '{output}' cannot be used ({error.strerror}).") from None
    if exists and output.is_dir() != folder:
        kind = "not a folder, and a stock checkpoint is one" if folder else "a folder, and a GGUF model is a file"
        raise UserError(f"{OPTION}: '{output}' is {kind}. Give another name.")
    if exists and not (empty or overwrite):
        raise UserError(f"{OPTION}: '{output}' exists. Give another name, or add --overwrite.")
    check_writable(output.parent, OPTION)
