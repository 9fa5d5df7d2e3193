"""Write a model as a Hugging Face folder, whole or not at all."""

import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel

from lightning_prune.errors import UserError
from lightning_prune.files import new_folder, write_text
from lightning_prune.surgery.loading import quiet_transformers, tokenizer_files
from lightning_prune.surgery.self_check import check_checkpoint, probe_logits


def save_checkpoint(model: PreTrainedModel, folder: Path, *, tokenizer_from: str | None, card: str) -> dict[str, Any]:
    """Write config, generation config, safetensors, tokenizer files, ``README.md`` and, for the per-layer
    layout, ``modeling_pruned.py``. The same model gives the same bytes.

    Args:
        model: a causal LM; dtype and device do not matter, tied weights are stored once.
        folder: takes its name only when everything is written; what stood there is replaced then.
        tokenizer_from: folder, hub id or ``demo`` whose tokenizer files are copied, if it has any.
        card: text of ``README.md``.

    Returns:
        What the self-check compared (``check_checkpoint``), before the folder took its name.

    Raises:
        CheckpointError, FloatingPointError: see ``check_checkpoint``; nothing is left behind.
        UserError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    files = tokenizer_files(tokenizer_from) if tokenizer_from is not None else []
    try:
        with new_folder(folder) as temporary:
            with quiet_transformers():
                _save(model, temporary)
            for file in files:
                shutil.copyfile(file, temporary / file.name)
            write_text(temporary / "README.md", card)
            return check_checkpoint(temporary, probe_logits(model))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The checkpoint cannot be written to '{folder}' ({error}). Free space there, or choose another "
            f"place with --trainer.default_root_dir (fit) or --output (apply)."
        ) from error


def _save(model: PreTrainedModel, folder: Path) -> None:
    """As ``save_pretrained``; before 5.23 that refused generation settings that several published models have."""
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = settings
    settings.to_json_file(folder / "generation_config.json", use_diff=True)
