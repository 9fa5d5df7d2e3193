"""``lightning-prune export``: a checkpoint for engines that do not read it as it is."""

from lightning_prune.cli.parser import PlainParser, some_path


def main(argv: list[str]) -> int:
    """Write ``--model`` to ``--output`` in ``--format``, layer by layer."""
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
    add("--output", type=some_path, required=True, metavar="PATH", help="the file (gguf) or folder (stock) to write")
    text = "gguf: of the matrices; vectors stay fp32. q8_0 has 8 bits and a scale for every 32 numbers of a row. "
    add("--dtype", choices=("f32", "f16", "bf16", "q8_0"), help=text + "Default: as the weights are stored")
    add("--overwrite", action="store_true", help="replace what is at --output, once the new one is complete")
    given = parser.parse_args(argv)

    from lightning_prune.formats.export import export  # after the arguments: --help does not wait for torch

    print(export(given.model, given.format, given.output, given.dtype, overwrite=given.overwrite))
    return 0
