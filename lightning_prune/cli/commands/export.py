"""``lightning-prune export``: a checkpoint for engines that do not read it as it is."""

import argparse
import os
from pathlib import Path
from typing import Any

from lightning_prune.cli.parser import PlainParser
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import check_writable, read_file, writable

OPTION = "--output"
CARD_LIMIT = 10_000_000  # bytes of a README.md, which has a few thousand


def main(argv: list[str]) -> int:
    """Write ``--model`` to ``--output`` in ``--format``, layer by layer.

    Raises:
        UserError: the format cannot hold the model, or the output is there already or cannot be written.
    """
    arguments = _parser().parse_args(argv)
    model, output = _model(arguments.model), arguments.output.expanduser()
    if arguments.format == "stock" and arguments.dtype:
        raise UserError("--dtype belongs to --format gguf; a stock folder keeps the dtype of the weights.")
    _check_output(output, arguments.format == "stock", arguments.overwrite)

    # After the arguments, so that --help does not wait for torch.
    from lightning_prune.models.weights import OPTION as PRETRAINED
    from lightning_prune.support.progress import Progress

    progress = Progress()
    export = _gguf if arguments.format == "gguf" else _stock
    try:
        with writable(output.absolute().parent, OPTION):
            export(model, output.absolute(), arguments.dtype, progress)  # whose errors are known as this place's
    except UserError as error:
        raise UserError(str(error).replace(PRETRAINED, "--model")) from None
    finally:
        progress.close()
    return 0


def _gguf(model: str, output: Path, dtype: str | None, progress: Any) -> None:
    from lightning_prune.export.gguf_file import gguf_package, write_gguf
    from lightning_prune.models.checkpoint import Checkpoint

    gguf_package()
    checkpoint = Checkpoint.open(model)
    config: Any = checkpoint.config
    names = {"float16": "f16", "bfloat16": "bf16"}
    chosen = dtype or names.get(str(checkpoint.stored_dtype).removeprefix("torch."), "f32")
    phase, last = f"writing {output.name}", 0

    def show(_: str, done: int, total: int) -> None:
        nonlocal last
        progress.expect(phase, total)
        progress.advance(phase, done - last)
        last = done

    written = write_gguf(checkpoint, output, chosen, show)
    progress.finish(phase)
    progress.close()
    if written.left_in_f16:
        print(
            f"{written.left_in_f16} matrices are in f16: their rows are no multiple of 32, which q8_0 needs. "
            "--model.round_to 32 (fit) makes widths that are."
        )
    if written.window is not None and written.window < config.max_position_embeddings:
        print(f"the context is {written.window} tokens, the model's sliding window: the format has none for it.")
    print(f"GGUF file ({written.architecture}, {chosen}): {output}")


def _stock(model: str, output: Path, _: str | None, progress: Any) -> None:
    from lightning_prune.checkpoint.model_card import stock_card
    from lightning_prune.export.stock import write_stock
    from lightning_prune.models.checkpoint import Checkpoint

    def show(layer: int, total: int) -> None:
        progress.expect("padding", total)
        progress.advance("padding", 1, f"layer {layer + 1} of {total}")

    readme = Path(model) / "README.md"
    card = read_file(readme, CARD_LIMIT, "--model").decode("utf-8", errors="replace") if readme.is_file() else ""
    padded = write_stock(Checkpoint.open(model), output, stock_card(card), show)
    progress.finish("padding")
    progress.close()
    print(padded.sentence())
    print(f"stock checkpoint: {output}")


def _model(given: str) -> str:
    """The model's folder; a run folder stands for the checkpoint in it."""
    if not given:
        raise UserError("--model is empty. Give a run folder, a model folder, a hub id or 'demo'.")
    inner = Path(given).expanduser() / "pruned"
    return str(inner) if (inner / "config.json").is_file() else given


def _check_output(output: Path, folder: bool, overwrite: bool) -> None:
    try:
        there = os.path.lexists(output)
        empty = folder and output.is_dir() and not any(output.iterdir())
    except OSError as error:
        raise UserError(f"{OPTION}: '{output}' cannot be used ({error.strerror}).") from None
    if there and output.is_dir() != folder:
        kind = "no folder, and a stock checkpoint is one" if folder else "a folder, and a GGUF model is a file"
        raise UserError(f"{OPTION}: '{output}' is {kind}. Give another name.")
    if there and not (empty or overwrite):
        raise UserError(f"{OPTION}: '{output}' exists. Give another name, or add --overwrite.")
    check_writable(output.absolute().parent, OPTION)


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog="lightning-prune export",
        description="Write a checkpoint for engines that do not read it as it is. gguf: one file for llama.cpp and "
        "what is built on it, tokenizer and chat template included; layers keep their own widths. stock: a Hugging "
        "Face folder in which every layer is padded with zeros to the widest, for tools that know the family but no "
        "widths per layer; it says how much of the saving that costs. vLLM and transformers need no export: they take "
        "the folder with --trust-remote-code. One layer is in memory at a time.",
        epilog="examples: lightning-prune export --model logs/wanda/version_0 --format gguf --output model.gguf; "
        "lightning-prune export --model logs/wanda/version_0 --format stock --output padded",
    )
    parser.add_model()
    add = parser.add_argument
    add("--format", choices=("gguf", "stock"), required=True, help="what to write")
    add("--output", type=Path, required=True, metavar="PATH", help="the file (gguf) or folder (stock) to write")
    add(
        "--dtype",
        choices=("f32", "f16", "bf16", "q8_0"),
        help="gguf: of the matrices; vectors stay fp32. q8_0 has 8 bits and a scale for every 32 numbers of a row. "
        "Default: as the weights are stored",
    )
    add("--overwrite", action="store_true", help="replace what stands at --output, once the new one is complete")
    return parser
