"""``README.md`` of a checkpoint: what was pruned, how, and how to load it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_prune.surgery.plan import LayerPlan, PruningPlan


def model_card(
    plan: PruningPlan, layout: Literal["stock", "per-layer"], calibration: dict[str, Any] | None = None
) -> str:
    """Markdown with YAML front matter, as the Hugging Face hub reads it.

    Args:
        plan: what was done.
        layout: ``layout_of`` the pruned model; decides how it is loaded.
        calibration: facts to list, such as ``{"dataset": "wikitext2", "num_samples": 128}``; None where
            they are not known (a plan applied later) or nothing was calibrated.
    """
    sections = [
        _front_matter(plan),
        f"# {_short_name(plan)} pruned with {plan.method}",
        _summary(plan, calibration),
        "## Loading\n\n" + _loading(layout),
        "## What is left of each layer\n\n" + _layers(plan.layers),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(plan: PruningPlan) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    # The hub takes only repository ids here; a local path would make the card invalid.
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", plan.base_model) and not Path(plan.base_model).exists():
        lines.append(f"base_model: {json.dumps(plan.base_model)}")
    lines += ["tags:", "- pruning", "- lightning-prune", f"- {json.dumps(plan.method)}"]
    return "\n".join(["---", *lines, "---"])


def _short_name(plan: PruningPlan) -> str:
    return Path(plan.base_model).name or plan.base_model


def _summary(plan: PruningPlan, calibration: dict[str, Any] | None) -> str:
    dense, pruned = plan.parameters["dense"], plan.parameters["pruned"]
    rows = [
        ("Base model", f"`{plan.base_model}`"),
        ("Method", plan.method),
        *([("Pruning ratio requested", f"{plan.pruning_ratio:.4f}")] if plan.pruning_ratio is not None else []),
        ("Pruning ratio achieved", f"{plan.achieved_ratio:.4f}"),
        ("Parameters before", f"{dense:,}"),
        ("Parameters after", f"{pruned:,}"),
        ("Data type", plan.dtype),
        ("Calibration fingerprint", f"`{plan.calibration_fingerprint}`" if plan.calibration_fingerprint else "none"),
    ]
    rows += [(f"Calibration: {key}", _cell(value)) for key, value in (calibration or {}).items()]
    if plan.weights_updated:
        rows.append(("Remaining weights", "changed by the method"))
    return _table(("", ""), rows)


def _loading(layout: str) -> str:
    remote = "" if layout == "stock" else ", trust_remote_code=True"
    note = (
        "Every layer has the same widths, so the configuration is a stock one."
        if layout == "stock"
        else "Layers differ in width; `modeling_pruned.py` in this folder builds them (transformers 5.14 or newer)."
    )
    return f"""{note}

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{remote})
```

With `lightning-prune` installed, no remote code is needed:

```python
import lightning_prune

model = lightning_prune.load("path/to/this/folder")
```"""


def _layers(layers: list[LayerPlan]) -> str:
    rows = []
    for layer in layers:
        if not layer.kept_kv_heads and not layer.kept_channels:
            rows.append((str(layer.layer), "layer removed", "layer removed"))
        else:
            heads, channels = len(layer.kept_kv_heads), len(layer.kept_channels)
            rows.append((str(layer.layer), str(heads or "skipped"), str(channels or "skipped")))
    return _table(("Layer of the base model", "KV heads", "MLP channels"), rows)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
