"""``README.md`` of a checkpoint: what was pruned, how, and how to load, serve and convert it."""

import re
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCardData
from jinja2 import StrictUndefined, Template

from lightning_prune.checkpoint.base_facts import base_facts, history
from lightning_prune.checkpoint.plan import LayerPlan, PruningPlan
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.family import DENSE
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.escape import markdown, markdown_code, markdown_table, public_name

LOADING, LAYERS = "## Loading\n\n", "## What is left of each layer\n\n"
ACTIVE = (("dense_active", "before"), ("pruned_active", "after"))
COLUMNS = {
    Block.ATTENTION: "KV heads",
    Block.MLP: "MLP channels",
    Block.EXPERT: "Experts",
    Block.EXPERT_CHANNEL: "Channels of all experts",
}


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
        calibration: facts to list, such as ``{"dataset": "wikitext2", "num_samples": 128}``, where they are known.
        base: the dense model, whose files say licence and origin. Default: what is at the plan's ``base_model``.
    """
    pretrained, path = (plan.base_model, plan.base_model) if base is None else (base.pretrained, base.path)
    facts, before = base_facts(pretrained, path, None if base is None else base.raw), history(path)
    method = re.sub(r"[^\w.+-]+", "-", plan.method).strip("-")  # a tag is a word
    tags = ["pruning", "lightning-prune", *([method] if method else [])]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags, **facts)
    # The folder of a pruned model is called "pruned".
    name = before.partition(" → ")[0] if before else public_name(plan.base_model)
    blocks = [one for one in COLUMNS if one in DENSE or any(one in layer.kept for layer in plan.layers)]
    layers = [(str(layer.layer), *(_left(layer, block) for block in blocks)) for layer in plan.layers]
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {markdown(name)} pruned with {markdown(plan.method)}",
        _summary(plan, facts, before, calibration),
        usage(layout),
        LAYERS + markdown_table(("Layer of the base model", *(COLUMNS[block] for block in blocks)), layers),
    ]
    return "\n\n".join(sections) + "\n"


def _left(layer: LayerPlan, block: Block) -> str:
    """The kept units of a block, as a table cell."""
    if layer.removed:
        return "layer removed"
    if block is Block.ATTENTION and layer.kept.get(Block.MIXER):
        return "whole mixer"
    return str(len(layer.kept[block]) or "skipped") if block in layer.kept else "none"


def _summary(plan: PruningPlan, facts: dict[str, Any], before: str, calibration: dict[str, Any] | None) -> str:
    name, home = public_name(plan.base_model), facts.get("base_model")
    base = markdown_code(name)
    if isinstance(home, str) and home != name:
        base += f" (from {markdown_code(home)})"
    fingerprint = plan.calibration_fingerprint
    rows = [
        ("Base model", base),
        ("Before", markdown(before) if before else None),
        ("Method", markdown(plan.method)),
        # Not every method takes a ratio.
        ("Pruning ratio requested", None if plan.pruning_ratio is None else f"{plan.pruning_ratio:.4f}"),
        ("Pruning ratio achieved", f"{plan.achieved_ratio:.4f}"),
        ("Parameters before", f"{plan.parameters['dense']:,}"),
        ("Parameters after", f"{plan.parameters['pruned']:,}"),
        *((f"Active parameters {when}", f"{plan.parameters[key]:,}") for key, when in ACTIVE if key in plan.parameters),
        ("Data type", markdown(plan.dtype)),
        ("Calibration fingerprint", markdown_code(fingerprint) if fingerprint else None),
    ]
    for key, value in (calibration or {}).items():
        if value is not None and (key, value) != ("fingerprint", fingerprint):
            text = public_name(value) if isinstance(value, str) else value
            rows.append((f"Calibration: {markdown(key)}", markdown(text)))
    rows.append(("Remaining weights", "changed by the method" if plan.weights_updated else None))
    return markdown_table(("", ""), [(title, text) for title, text in rows if text is not None])


def usage(layout: Literal["stock", "per-layer"]) -> str:
    """The sections that say how to load, serve and convert a checkpoint of this layout."""
    template = Template(Path(__file__).with_name("usage.md.jinja").read_text("utf-8"), undefined=StrictUndefined)
    return str(template.render(stock=layout == "stock"))


def stock_card(card: str) -> str:
    """The card of the padded form of a checkpoint, from the checkpoint's own; an empty one gives a new one."""
    note = "Every layer is padded with zeros to the widest, so that tools without widths per layer load it.\n\n"
    before, marker, rest = card.partition(LOADING)
    if not marker:
        before, rest = card + ("\n\n" if card else "# A pruned model, padded\n\n"), ""
    _, next_section, layers = rest.partition(LAYERS)
    return before + note + usage("stock") + "\n" + ("\n" + next_section + layers if next_section else "")
