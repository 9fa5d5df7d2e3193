"""One call for either format."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from lightning_prune.checkpoint.model_card import stock_card
from lightning_prune.formats.stock import write_stock
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.weights import OPTION as PRETRAINED
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import check_writable, read_file, writable
from lightning_prune.support.progress import Progress

OPTION = "--output"
FORMATS, DTYPES = ("gguf", "stock"), ("f32", "f16", "bf16", "q8_0")
CARD_LIMIT = 10_000_000  # bytes of a README.md, which has a few thousand


def export(
    model: str | os.PathLike[str],
    format: Literal["gguf", "stock"],
    output: str | Path,
    dtype: str | None = None,
    *,
    overwrite: bool = False,
    verbose: bool = True,
) -> str:
    """Write a checkpoint for engines that do not read it as it is, one layer in memory at a time.

    Args:
        model: run folder, model folder, hub id, ``demo``, or what ``prune`` returned.
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
    if not str(output).strip():
        raise UserError(f"{OPTION} is empty. Give the file or folder to write.")
    for option, value, allowed in (("--format", format, FORMATS), ("--dtype", dtype, (None, *DTYPES))):
        if value not in allowed:
            raise UserError(f"{option}: found '{value}'; allowed: {', '.join(filter(None, allowed))}.")
    inner, target = Path(model).expanduser() / "pruned", Path(output).expanduser().absolute()
    source = str(inner) if os.path.isfile(inner / "config.json") else str(model)
    if format == "stock" and dtype:
        raise UserError("--dtype belongs to --format gguf; a stock folder keeps the dtype of the weights.")
    if format == "gguf" and find_spec("gguf") is None:
        raise UserError("--format gguf needs the package gguf. Install it in the clone: pip install '.[gguf]'")
    progress = Progress(verbose)
    try:
        with writable(target.parent, OPTION):
            _check_output(target, format == "stock", overwrite)
            checkpoint = Checkpoint.open(source)
            if format == "gguf":
                from lightning_prune.formats.gguf_file import write_gguf  # the package is optional

                return write_gguf(checkpoint, target, dtype, progress)
            readme = Path(checkpoint.pretrained) / "README.md"
            card = read_file(readme, CARD_LIMIT, "--model").decode("utf-8", "replace") if readme.is_file() else ""
            return f"{write_stock(checkpoint, target, stock_card(card), progress)}\nstock checkpoint: {target}"
    except UserError as error:
        raise UserError(str(error).replace(PRETRAINED, "--model")) from None
    finally:
        progress.close()


def _check_output(output: Path, folder: bool, overwrite: bool) -> None:
    exists = os.path.lexists(output)
    if exists and output.is_dir() != folder:
        kind = "not a folder, and a stock checkpoint is one" if folder else "a folder, and a GGUF model is a file"
        raise UserError(f"{OPTION}: '{output}' is {kind}. Give another name.")
    if exists and not overwrite and not (folder and not any(output.iterdir())):
        raise UserError(f"{OPTION}: '{output}' exists. Give another name, or add --overwrite.")
    check_writable(output.parent, OPTION)
