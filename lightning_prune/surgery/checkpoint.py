"""Write a model as a Hugging Face folder, whole or not at all."""

import shutil
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel

from lightning_prune.errors import UserError
from lightning_prune.files import new_folder, write_text
from lightning_prune.surgery.loading import quiet_transformers, tokenizer_files


def save_checkpoint(model: PreTrainedModel, folder: Path, *, tokenizer_from: str | None, card: str) -> None:
    """Write config, generation config, safetensors, tokenizer files, ``README.md`` and, for the per-layer
    layout, ``modeling_pruned.py``. The same model gives the same bytes.

    Args:
        model: a causal LM; dtype and device do not matter, tied weights are stored once.
        folder: takes its name only when everything is written; what stood there is replaced then.
        tokenizer_from: folder, hub id or ``demo`` whose tokenizer files are copied, if it has any.
        card: text of ``README.md``.

    Raises:
        UserError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    files = tokenizer_files(tokenizer_from) if tokenizer_from is not None else []
    try:
        with new_folder(folder) as temporary:
            with quiet_transformers():
                model.save_pretrained(temporary)
            for file in files:
                shutil.copyfile(file, temporary / file.name)
            write_text(temporary / "README.md", card)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The checkpoint cannot be written to '{folder}' ({error}). Free space there, or choose another "
            f"place with --trainer.default_root_dir (fit) or --output (apply)."
        ) from error
