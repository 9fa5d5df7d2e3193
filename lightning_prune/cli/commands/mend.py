"""``lightning-prune mend``: give an existing checkpoint the modeling file of this version."""

import argparse
import json
from pathlib import Path
from typing import Any

from lightning_prune.cli.parser import PlainParser
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import read_file

LIMIT = 10_000_000  # bytes of config.json and of the modeling file, which have a few thousand


def main(argv: list[str]) -> int:
    """Replace ``modeling_pruned.py`` in ``--model``, and what ``config.json`` says of it, where either is older.

    The weights are not touched. Each file is replaced whole, the modeling file first: it serves older configs too,
    so the folder loads at any moment.

    Raises:
        UserError: the folder is no per-layer checkpoint of this package, or cannot be written.
    """
    folder: Path = _parser().parse_args(argv).model.expanduser()
    config = _read_config(folder)

    # After the arguments, so that --help does not wait for transformers.
    from lightning_prune.models import modeling_pruned
    from lightning_prune.support.files import write_text

    source = Path(modeling_pruned.__file__)
    _refuse_foreign(folder, config, source.name)
    stated = config | modeling_pruned.identity(config["architectures"][0].removeprefix("Pruned"))
    wanted = {
        source.name: source.read_text(encoding="utf-8"),
        "config.json": json.dumps(stated, indent=2, sort_keys=True) + "\n",  # as transformers writes it
    }
    try:
        stale = [name for name, text in wanted.items() if _bytes(folder / name) != text.encode()]
        for name in stale:
            write_text(folder / name, wanted[name])
    except OSError as error:
        raise UserError(f"--model: '{folder}' cannot be mended ({error.strerror}).") from error
    print(f"{folder}: {'replaced ' + ' and '.join(stale) if stale else 'nothing to mend'}")
    return 0


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        inner = folder / "pruned"
        hint = f" Did you mean '{inner}'?" if inner.is_dir() else ""
        raise UserError(
            f"--model: '{folder}' holds no config.json. Give the folder of a pruned checkpoint on this machine.{hint}"
        )
    try:
        found = json.loads(read_file(file, LIMIT, "--model"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"--model: '{file}' cannot be read as JSON ({error}).") from None
    return found if isinstance(found, dict) else {}


def _refuse_foreign(folder: Path, config: dict[str, Any], modeling_file: str) -> None:
    """Raise UserError unless this package wrote the checkpoint in ``folder``, in the per-layer layout."""
    from lightning_prune.models.modeling_pruned import classes_of

    if not config.get("per_layer_config") and "auto_map" not in config:
        raise UserError(
            f"--model: the layers of '{folder}' are all stock, so there is no modeling file in it to mend. "
            "Give a checkpoint whose layers differ in width."
        )
    model_type, architectures, auto_map = (config.get(key) for key in ("model_type", "architectures", "auto_map"))
    names = classes_of(str(model_type)).values()
    code = _bytes(folder / modeling_file)
    if not (
        architectures in [[f"{prefix}{name}"] for prefix in ("", "Pruned") for name in names]
        and isinstance(auto_map, dict)
        and auto_map
        and all(value in [f"{Path(modeling_file).stem}.{name}" for name in names] for value in auto_map.values())
        and (code is None or b"class PrunedMixin" in code)
    ):
        raise UserError(
            f"--model: '{folder}' is no checkpoint that lightning-prune wrote: its architectures, auto_map or "
            f"{modeling_file} are foreign. Nothing was changed."
        )


def _bytes(file: Path) -> bytes | None:
    return read_file(file, LIMIT, "--model") if file.is_file() else None


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog="lightning-prune mend",
        description="Replace the modeling file of a pruned checkpoint, and what its config.json says of it, by those "
        "of this version. The weights stay as they are. Checkpoints written before the file learned to follow "
        "transformers 5.24 decode wrongly there with left padding, static caches and hand-written loops until then.",
        epilog="example: lightning-prune mend --model logs/wanda/version_0/pruned",
    )
    parser.add_argument(
        "--model",
        "--model.pretrained",
        dest="model",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="a pruned checkpoint on this machine",
    )
    return parser
