"""``README.md`` of a checkpoint: what was pruned, how, and how to load, serve and convert it."""

import re
from typing import Any, Literal

from huggingface_hub import ModelCardData

from lightning_prune.checkpoint.base_facts import base_facts
from lightning_prune.checkpoint.plan import LayerPlan, PruningPlan
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.support.escape import markdown, markdown_code, markdown_table, public_name

LOADING, LAYERS = "## Loading\n\n", "## What is left of each layer\n\n"


def model_card(
    plan: PruningPlan,
    layout: Literal["stock", "per-layer"],
    calibration: dict[str, Any] | None = None,
    base: Checkpoint | None = None,
) -> str:
    """Markdown with YAML front matter, as the Hugging Face hub reads it, without the folders of this machine.

    Args:
        plan: what was done.
        layout: ``layout_of`` the pruned model; decides how it is loaded.
        calibration: facts to list, such as ``{"dataset": "wikitext2", "num_samples": 128}``; None where
            they are not known (a plan applied later) or nothing was calibrated.
        base: the dense model, whose files say licence and origin. Default: what is at the plan's ``base_model``.
    """
    facts = base_facts(plan.base_model if base is None else base.pretrained, base)
    name = public_name(plan.base_model)
    sections = [
        _front_matter(plan, facts),
        f"# {markdown(name.rsplit('/', 1)[-1] or name)} pruned with {markdown(plan.method)}",
        _summary(plan, facts, calibration),
        usage(layout),
        LAYERS + _layers(plan.layers),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(plan: PruningPlan, facts: dict[str, Any]) -> str:
    method = re.sub(r"[^\w.+-]+", "-", plan.method).strip("-")  # a tag is a word
    tags = ["pruning", "lightning-prune", *([method] if method else [])]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags, **facts)
    return f"---\n{data.to_yaml()}\n---"


def _summary(plan: PruningPlan, facts: dict[str, Any], calibration: dict[str, Any] | None) -> str:
    dense, pruned = plan.parameters["dense"], plan.parameters["pruned"]
    base, home = markdown_code(public_name(plan.base_model)), facts.get("base_model")
    if isinstance(home, str) and home != plan.base_model:
        base += f" (from {markdown_code(home)})"
    rows = [
        ("Base model", base),
        ("Method", markdown(plan.method)),
        # Not every method takes a ratio.
        *([] if plan.pruning_ratio is None else [("Pruning ratio requested", f"{plan.pruning_ratio:.4f}")]),
        ("Pruning ratio achieved", f"{plan.achieved_ratio:.4f}"),
        ("Parameters before", f"{dense:,}"),
        ("Parameters after", f"{pruned:,}"),
        ("Data type", markdown(plan.dtype)),
    ]
    if plan.calibration_fingerprint:
        rows.append(("Calibration fingerprint", markdown_code(plan.calibration_fingerprint)))
    for key, value in (calibration or {}).items():
        if value is not None and not (key == "fingerprint" and value == plan.calibration_fingerprint):
            text = public_name(value) if isinstance(value, str) else value
            rows.append((f"Calibration: {markdown(key)}", markdown(text)))
    if plan.weights_updated:
        rows.append(("Remaining weights", "changed by the method"))
    return markdown_table(("", ""), rows)


def usage(layout: Literal["stock", "per-layer"]) -> str:
    """The sections that say how to load, serve and convert a checkpoint of this layout."""
    remote, flag = ("", "") if layout == "stock" else (", trust_remote_code=True", " --trust-remote-code")
    note = (
        "Every layer has the same widths, so the configuration is a stock one."
        if layout == "stock"
        else "Layers differ in width; `modeling_pruned.py` in this folder builds them (transformers 5.14 or newer). "
        "Without `trust_remote_code=True` transformers leaves that file alone and stops with a table of sizes that do "
        "not match."
    )
    batching = (
        ""
        if layout == "stock"
        else """

transformers' own continuous batching (`generate_batch`, `transformers serve --continuous-batching`) expects as many
heads in every layer, and fails where they differ; vLLM's has no such bound."""
    )
    padded = (
        ""
        if layout == "stock"
        else """

For tools that know the model's family but no widths per layer, a folder in which every layer is padded with zeros to
the widest; it has the same logits and loses part of the saving:

```bash
lightning-prune export --model path/to/this/folder --format stock --output padded
```"""
    )
    return f"""{LOADING}{note}

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{remote})
```

With a new head to train, as a classifier of texts (or of tokens, `AutoModelForTokenClassification`), where
transformers has one for the family:

```python
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained("path/to/this/folder", num_labels=2{remote})
```

With `lightning-prune` installed, no remote code is needed:

```python
import lightning_prune

model = lightning_prune.load("path/to/this/folder")
```

## Serving

With vLLM as it is released, through its transformers backend:

```bash
vllm serve path/to/this/folder{flag}
```{batching}

## Converting

To one file for llama.cpp and what is built on it, where the GGUF format can hold the model (the command says so):

```bash
lightning-prune export --model path/to/this/folder --format gguf --output model.gguf
```{padded}"""


def stock_card(card: str) -> str:
    """The card of the padded form of a checkpoint, from the checkpoint's own; an empty one gives a new one."""
    note = "Every layer is padded with zeros to the widest, so that tools without widths per layer load it.\n\n"
    before, found, rest = card.partition(LOADING)
    if not found:
        before, rest = card + ("\n\n" if card else "# A pruned model, padded\n\n"), ""
    _, next_section, layers = rest.partition(LAYERS)
    return before + note + usage("stock") + "\n" + ("\n" + next_section + layers if next_section else "")


def _layers(layers: list[LayerPlan]) -> str:
    rows = []
    for layer in layers:
        if not layer.kept_kv_heads and not layer.kept_channels:
            rows.append((str(layer.layer), "layer removed", "layer removed"))
        else:
            heads, channels = len(layer.kept_kv_heads), len(layer.kept_channels)
            rows.append((str(layer.layer), str(heads or "skipped"), str(channels or "skipped")))
    return markdown_table(("Layer of the base model", "KV heads", "MLP channels"), rows)
