"""``calibration_appendix.md``: what a paper's Methods section has to say about calibration and hardware."""

import json
from collections.abc import Sequence
from typing import Any

from lightning_prune.comparison.audit import Audit
from lightning_prune.comparison.run import Run
from lightning_prune.runs.verdict import LEGEND
from lightning_prune.support.escape import markdown, markdown_code, markdown_table, public_name

CALIBRATION_ROWS = (
    ("Dataset", "dataset"),
    ("Configuration", "configuration"),
    ("Split", "split"),
    ("Revision", "revision"),
    ("SHA-256 of the text", "text_sha256"),
    ("SHA-256 of the tokenizer", "tokenizer_sha256"),
    ("Samples", "num_samples"),
    ("Tokens per sample", "seq_len"),
    ("Sampling", "sampling"),
    ("Stride", "stride"),
    ("Seed", "seed"),
    ("Fingerprint of the token ids (SHA-256)", "fingerprint"),
)


def appendix(audit: Audit) -> str:
    """Markdown: one paragraph and table per calibration set, then methods' parameters, hardware and software."""
    runs = [run for group in audit.groups for run in group.all]
    parts = ["# Calibration and setting", *_calibrations(runs), *_without_data(runs), _evaluation(runs)]
    parts += ["## Parameters of the methods", *_methods(runs), "## Hardware and software", *_environments(runs)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _calibrations(runs: Sequence[Run]) -> list[str]:
    sets: dict[str, list[Run]] = {}
    for run in runs:
        if run.calibration is not None:
            sets.setdefault(str(run.calibration["fingerprint"]), []).append(run)
    parts = []
    for number, users in enumerate(sets.values(), start=1):
        facts = users[0].calibration or {}
        parts.append(f"## Calibration set {number}: {_labels(users)}\n\n{_paragraph(facts, users)}")
        rows = [(name, _value(facts.get(key))) for name, key in CALIBRATION_ROWS]
        parts.append(markdown_table(("Property", "Value"), rows))
    return parts


def _paragraph(facts: dict[str, Any], users: list[Run]) -> str:
    how = {
        "random": f"drawn at random without overlap (seed {facts['seed']})",
        "sequential": "taken from its beginning",
        "sliding": f"taken from its beginning, one every {facts['stride']} tokens",
        "given": "used as given",
    }[facts["sampling"]]
    total = facts["num_samples"] * facts["seq_len"]
    return (
        f"{_labels(users)} calibrated on the same {facts['num_samples']} sequences of {facts['seq_len']} tokens "
        f"({total:,} tokens) from the {markdown(facts['split'])} split of {_value(facts['dataset'])}, {how}. The text "
        f"was tokenised whole with the model's own tokenizer, without special tokens or padding. The token ids have "
        f"the SHA-256 fingerprint {markdown_code(facts['fingerprint'])}, which was checked to be equal in all of them."
    )


def _without_data(runs: Sequence[Run]) -> list[str]:
    free = [run for run in runs if run.calibration is None]
    return [f"{_labels(free)} reads weights only and used no calibration data."] if free else []


def _evaluation(runs: Sequence[Run]) -> str:
    rows: dict[tuple[str, ...], None] = {}
    for run in runs:
        for name, facts in run.evaluation.items():
            tokens = f"{facts['predicted_tokens']:,}"
            row = (
                markdown(name),
                markdown(facts["split"]),
                markdown(facts["seq_len"]),
                tokens,
                markdown(facts["bos"]),
                markdown_code(facts["fingerprint"]),
            )
            rows[row] = None
    if not rows:
        return ""
    columns = ("Set", "Split", "Tokens per window", "Predicted tokens", "BOS", "Fingerprint")
    text = "Perplexity is exp of the mean loss over all tokens but the first of windows that do not overlap."
    return f"## Evaluation\n\n{text}\n\n{markdown_table(columns, list(rows))}\n\n{LEGEND}"


def _methods(runs: Sequence[Run]) -> list[str]:
    parts = []
    for label in dict.fromkeys(run.label for run in runs):
        mine = [run for run in runs if run.label == label]
        ratios = [f"{run.requested:g} ({markdown(run.folder.name)})" for run in mine]
        keys = [key for key in dict.fromkeys(key for run in mine for key in _flat(run.details)) if key != "label"]
        details = [_flat(run.details) for run in mine]
        rows = [(markdown(key), *(_value(values.get(key)) for values in details)) for key in keys]
        rows.append(("achieved ratio", *(f"{run.achieved:.6f}" for run in mine)))
        parts.append(f"### {markdown(label)}\n\n{markdown_table(('Parameter', *ratios), rows)}")
    return parts


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return found


def _environments(runs: Sequence[Run]) -> list[str]:
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        facts = {key: value for key, value in run.environment.items() if key != "command"}
        kinds.setdefault(json.dumps(facts, sort_keys=True), []).append(run)
    parts = []
    for text, users in kinds.items():
        facts = json.loads(text)
        gpus = ", ".join(markdown(gpu["name"]) for gpu in facts.get("gpus", [])) or "none"
        rows = [
            ("Device", _value(facts.get("device"))),
            ("Precision", _value(facts.get("precision"))),
            ("GPUs", gpus),
            ("CUDA", _value(facts.get("cuda"))),
            (
                "CPU",
                f"{markdown(facts['cpu']['name'])}, {facts['cpu']['cores']} cores, {facts['cpu']['threads']} threads",
            ),
            ("Memory", f"{facts['memory_bytes'] / 2**30:.1f} GiB"),
            ("Platform", _value(facts.get("platform"))),
            ("Python", _value(facts.get("python"))),
            *((markdown(name), _value(version)) for name, version in facts["packages"].items()),
        ]
        who = f"{_labels(users)}:\n\n" if len(kinds) > 1 else ""
        parts.append(who + markdown_table(("Property", "Value"), rows))
    return parts


def _labels(runs: Sequence[Run]) -> str:
    return markdown(", ".join(dict.fromkeys(run.label for run in runs)))


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value) or "none"
    return markdown(public_name(value) if isinstance(value, str) else value)
