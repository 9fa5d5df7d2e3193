"""``calibration_appendix.md``: what a paper's Methods section has to say about calibration and hardware."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from lightning_prune.comparison.audit import Audit, by_value
from lightning_prune.comparison.records import Run
from lightning_prune.comparison.sections import Section, markdown
from lightning_prune.comparison.tables import table
from lightning_prune.runs.records import as_dict
from lightning_prune.runs.verdict import LEGEND
from lightning_prune.support.escape import public_name

TOKENISED = (
    "The fingerprint of the token ids was checked to be equal in all of them. The text was tokenised whole with the "
    "model's own tokenizer, without special tokens or padding."
)
LONGEST = 200  # characters of what a method measured; every cell of its column is as wide
MEASURED = "Perplexity is exp of the mean loss over all tokens but the first of windows that do not overlap."


def appendix(audit: Audit) -> str:
    """Markdown: a table per calibration set, then evaluation, methods' parameters, hardware and software."""
    parts = []
    tokens = {run: run.calibration.fingerprint for run in audit.runs if run.calibration is not None}
    for number, runs in enumerate(by_value(tokens).values(), start=1):
        facts = {"value": as_dict(runs[0].calibration)}  # type: ignore[arg-type]
        parts.append(Section(f"Calibration set {number}: {_labels(runs)}", [TOKENISED], [("", _table(facts))]))
    if free := [run for run in audit.runs if run.calibration is None]:
        parts.append(Section("Without data", [f"{_labels(free)} reads weights only and used no calibration data."]))
    sets = {name: as_dict(facts) for run in audit.runs for name, facts in run.metrics.evaluation.items()}
    parts.append(Section("Evaluation", [MEASURED, LEGEND], [("", _table(sets))] if sets else []))
    for label, runs in by_value({run: run.label for run in audit.runs}).items():
        columns = {
            f"{run.size} ({run.folder.name})": as_dict(run.details) | {"achieved ratio": run.achieved} for run in runs
        }
        parts.append(Section(f"Parameters of {label}", tables=[("", _table(columns, LONGEST))]))
    machines = {run: run.environment.model_dump(exclude={"command"}) for run in audit.runs}
    for runs in by_value(machines).values():
        facts = {"value": machines[runs[0]]}
        parts.append(Section(f"Hardware and software of {_labels(runs)}", tables=[("", _table(facts))]))
    return markdown("Calibration and setting", parts)


def _table(columns: Mapping[str, Mapping[str, Any]], longest: int | None = None) -> pd.DataFrame:
    """A column per mapping, a row per fact of any of them; facts within a fact have its name in front. What is longer
    than ``longest`` characters is cut, since method.json has it."""
    flat = {name: _flat(facts) for name, facts in columns.items()}
    keys = dict.fromkeys(key for facts in flat.values() for key in facts)
    return table(
        [{"property": key} | {name: _cut(facts.get(key, "–"), longest) for name, facts in flat.items()} for key in keys]
    )


def _cut(text: str, longest: int | None) -> str:
    return text if longest is None or len(text) <= longest else f"{text[:longest]} … (all of it: method.json)"


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in facts.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: _value(value)}
    return flat


def _labels(runs: Sequence[Run]) -> str:
    return ", ".join(dict.fromkeys(run.label for run in runs))


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "none"
    return "–" if value is None else f"{value:.6g}" if isinstance(value, float) else public_name(str(value))
