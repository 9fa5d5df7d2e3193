"""The runs of an experiment before they are made: options checked, calibration sets shared, results recognised."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_prune.commands.lightning_options import PruneCLI
from lightning_prune.comparison.settings import Settings
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.errors import UserError
from lightning_prune.methods.base import PruningMethod
from lightning_prune.reporting.base_model import base_model_sha256
from lightning_prune.reporting.configuration import configuration_sha256


@dataclass(frozen=True)
class Planned:
    """One run to make. ``configuration`` is what ``fit`` would be given; ``sha256`` names its result; ``measurement``
    names what it measures, which is the same at every ratio of a system."""

    label: str
    ratio: float
    configuration: dict[str, Any]
    data: CalibrationDataModule
    sha256: str
    measurement: str

    @property
    def evaluation(self) -> dict[str, str]:
        """Fingerprint by evaluation set."""
        return {item.name: item.manifest["fingerprint"] for item in self.data.evaluation}

    def finished(self, root: Path) -> Path | None:
        """The folder of a finished run with the same result, made by ``compare``, ``fit`` or ``decide``."""
        for folder in sorted((root / self.label).glob("version_*")):
            try:
                metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if metrics.get("configuration_sha256") == self.sha256:
                return folder
        return None

    def build(self) -> PruneCLI:
        """Trainer and method, fresh."""
        return build(self.label, self.configuration)


def plan_runs(settings: Settings) -> list[Planned]:
    """Check every run's options and tokenise every calibration setting once.

    Raises:
        UserError: a mistake in any of them; nothing has been run then.
    """
    shared: dict[str, CalibrationDataModule] = {}
    weights: dict[str, str] = {}
    found = []
    for label in settings.systems:
        for ratio in settings.ratios:
            configuration = settings.configuration(label, ratio)
            cli = build(label, configuration)
            options = yaml.safe_load(cli.resolved_config)
            data = shared.setdefault(json.dumps(options["data"], sort_keys=True), cli.datamodule)
            # The first system may read no data; the evaluation's check against the calibration text needs both.
            data.needs_calibration = True
            data.setup("fit")
            method: PruningMethod = cli.model
            if method.pretrained not in weights:
                weights[method.pretrained] = base_model_sha256(method.pretrained) or method.pretrained
            init = options["model"]["init_args"]
            names = [
                configuration_sha256(
                    type(method).__name__,
                    values,
                    str(cli.trainer.precision),
                    weights[method.pretrained],
                    data.calibration.manifest.fingerprint if method.needs_calibration else None,
                    evaluation,
                )
                for values, evaluation in (
                    (init, {item.name: item.manifest["fingerprint"] for item in data.evaluation}),
                    ({**init, "pruning_ratio": None}, {}),
                )
            ]
            found.append(Planned(label, ratio, configuration, data, *names))
    return found


def build(label: str, configuration: dict[str, Any]) -> PruneCLI:
    """Parse and instantiate one configuration as ``fit`` does.

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


def known_dense(planned: Planned, folders: Sequence[Path]) -> dict[str, tuple[float, int]] | None:
    """Perplexity and tokens of the dense model by evaluation set, from a finished run with the same evaluation."""
    for folder in folders:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        known = {name: manifest["fingerprint"] for name, manifest in metrics["evaluation"].items()}
        dense = {name: (item["dense"], item["tokens"]) for name, item in metrics["perplexity"].items()}
        if known == planned.evaluation and all(value is not None for value, _ in dense.values()):
            return dense
    return None
