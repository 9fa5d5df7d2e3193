"""The runs of an experiment are parsed and built as ``fit`` builds its one."""

from typing import Any

from lightning_prune.cli.lightning_cli import PruneCLI
from lightning_prune.methods.base import PruningMethod
from lightning_prune.support.errors import UserError


def build(label: str, configuration: dict[str, Any]) -> PruneCLI:
    """Trainer, method and data of one configuration.

    Raises:
        UserError: names the system.
    """
    try:
        cli = PruneCLI(configuration, PruningMethod, subclasses=True, command="fit")
    except UserError as error:
        raise UserError(f"system '{label}': {error}") from None
    if cli.trainer.world_size > 1:
        raise UserError(
            f"--trainer.devices: an experiment runs on one device, found {cli.trainer.world_size}. "
            "Prune large models with fit, then compare their folders with --runs."
        )
    return cli
