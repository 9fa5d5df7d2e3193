"""The runs of an experiment before they are made: options checked, calibration sets shared, results recognised."""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.runs.build import build
from lightning_prune.runs.configuration import configuration_sha256
from lightning_prune.runs.folder import RunFolder
from lightning_prune.runs.settings import Settings


@dataclass(frozen=True)
class Planned:
    """One run to make.

    Attributes:
        label, ratio: what it is called.
        seed: of its calibration samples, None where the experiment has no seeds.
        configuration: what ``fit`` would be given.
        data: shared by all runs with the same ``data`` section.
        sha256: names its result, see ``configuration_sha256``.
        measurement: names what it measures, which is the same at every ratio of a system.
        dense: names the evaluation of the dense model, the same for most systems.
    """

    label: str
    ratio: float
    seed: int | None
    configuration: dict[str, Any]
    data: CalibrationDataModule
    sha256: str
    measurement: str
    dense: str

    @property
    def name(self) -> str:
        """What it is called where the run stands beside others."""
        return f"{self.label} {self.ratio:g}{'' if self.seed is None else f' seed {self.seed}'}"

    def finished(self, root: Path) -> Path | None:
        """The folder of a finished run with the same result, made by ``compare``, ``fit`` or ``decide``."""
        for folder in RunFolder.finished_below(root / self.label):
            if folder.is_pruning_run and folder.configuration_sha256() == self.sha256:
                return folder.path
        return None


def plan_runs(settings: Settings) -> list[Planned]:
    """Check every run's options, by building it, and tokenise every calibration setting once.

    A system on which another seed changes nothing (it reads no data, or token ids as given) runs once.

    Raises:
        UserError: a mistake in any of them; nothing has been run then.
    """
    shared: dict[str, CalibrationDataModule] = {}
    weights: dict[str, str] = {}
    found: list[Planned] = []
    seeds: list[int | None] = [*settings.seeds] or [None]
    for label in settings.systems:
        for seed, ratio in product(seeds, settings.ratios):
            configuration = settings.configuration(label, ratio, seed)
            built = build(label, configuration)
            options = yaml.safe_load(built.resolved_config)
            data = shared.setdefault(json.dumps(options["data"], sort_keys=True), built.datamodule)
            # The first system may read no data; the evaluation's check against the calibration text needs both.
            data.needs_calibration = True
            if settings.show_progress:
                data.show_progress()
            method = built.model
            if method.pretrained not in weights:
                method.checkpoint.check()
                weights[method.pretrained] = method.checkpoint.fingerprint
            data.setup("fit")
            init = options["model"]["init_args"]
            evaluation = {item.name: item.manifest["fingerprint"] for item in data.evaluation}
            calibration = data.calibration.manifest.fingerprint if method.needs_calibration else None
            base = (str(built.trainer.precision), weights[method.pretrained])
            name = type(method).__name__
            sha256 = configuration_sha256(name, init, *base, calibration, evaluation)
            if any((run.label, run.sha256) == (label, sha256) for run in found):
                continue
            found.append(
                Planned(
                    label,
                    ratio,
                    seed,
                    configuration,
                    data,
                    sha256=sha256,
                    measurement=configuration_sha256(name, init | {"pruning_ratio": None}, *base, calibration, {}),
                    dense=configuration_sha256("dense", {}, *base, None, evaluation),
                )
            )
    return found
