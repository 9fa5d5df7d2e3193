"""Before a model is pruned, a tiny random one of the same class and switches is run by parts and whole, cut and masked,
written and read back: a wrong record, or a release of transformers that moved something, would prune wrongly without a
word."""

import copy
import json
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from lightning_prune.checkpoint.cut import parameters_after
from lightning_prune.checkpoint.in_memory_plan import InMemoryPlan
from lightning_prune.checkpoint.plan import LayerPlan, PruningPlan
from lightning_prune.checkpoint.pruned import open_pruned
from lightning_prune.checkpoint.write import write_checkpoint
from lightning_prune.models.checkpoint import NOT_WEIGHTS, Checkpoint
from lightning_prune.models.expert_layers import NoPeriodError, has_experts
from lightning_prune.models.families import (
    LayerStructure,
    choose_layers,
    count_parameters,
    family_of,
    head_dim_of,
    kv_heads_of,
    layer_configs,
    layer_structures,
    uniform_config,
)
from lightning_prune.models.family import GUIDE, OWN_HEADS, Family
from lightning_prune.models.layered import open_layered
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import CheckpointError, UserError, first_line
from lightning_prune.support.quiet import quiet_transformers

LAYERS, CHANNELS, HEAD_DIM, VOCABULARY, WINDOW = 4, 12, 8, 64, 5
EXPERTS_THERE, EXPERT_WIDTH = 8, 16  # two per token, and narrow ones of 8 channels, as their products need
NOT_KIND = (*NOT_WEIGHTS, "auto_map", "how_to_load", "name_or_path", "architectures", "dtype")
TOLERANCE = 1e-4  # of the largest logit: cutting changes the order of fp32 sums, a mistake changes logits by their size


def check_family(config: Any) -> None:
    """Try the family's record on a tiny random model with the switches of ``config``; once per kind and process.

    Raises:
        UserError: unknown family, one that behaves otherwise than its record says, or no place for temporary files.
    """
    family = family_of(config)
    with quiet_transformers():
        tiny = json.dumps(shrunk(config).to_dict(), sort_keys=True, default=str)
    try:
        differs = _tried(family, tiny)
    except OSError as error:
        raise UserError(
            f"A model of a few layers, on which family '{config.model_type}' is tried, cannot be written ({error}). "
            f"Free space where temporary files go, or choose another place with the variable TMPDIR."
        ) from error
    if differs is not None:
        raise UserError(
            f"--model.pretrained: with transformers {transformers.__version__}, models of family '{config.model_type}' "
            f"with this config do not behave as their record says: {differs}. They would be pruned wrongly, so they "
            f"are refused. Use another release of transformers; {GUIDE} says what a record must state."
        )


@lru_cache(maxsize=64)
def _tried(family: Family, values: str) -> str | None:
    untouched = torch.random.fork_rng(devices=[])  # a run's random numbers, of which building a mixer takes some
    place = tempfile.TemporaryDirectory(prefix="lightning-prune-")
    with untouched, place as folder, torch.inference_mode(False), torch.no_grad():
        try:
            with quiet_transformers():
                _try(CONFIG_MAPPING[family.model_type].from_dict(json.loads(values)), Path(folder))
        except (MemoryError, OSError):
            raise
        except SafetensorError as error:  # its word for a full disk, among others; the tensors are our own
            raise OSError(str(error)) from error
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            return str(error).removeprefix("--model.pretrained: ").rstrip(".")
        except (CheckpointError, FloatingPointError) as difference:
            return str(difference)
        except Exception as error:  # of a model that is not what was expected: whatever its code raises
            return f"{type(error).__name__}: {first_line(error)}"
    return None


def shrunk(config: Any) -> Any:
    """A config of the same kind with a few narrow layers: one of each sort the model has, two heads per group where
    groups have more than one."""
    config, family = uniform_config(config), family_of(config)
    tiny, layers = copy.deepcopy(config), layer_configs(config)
    most, least = max(map(kv_heads_of, layers)), min(map(head_dim_of, layers))
    kv_heads = min(4 if family.own_heads else 2, most)
    ratio = config.num_attention_heads // most
    tiny.num_attention_heads, tiny.num_key_value_heads = kv_heads * min(2, ratio), kv_heads
    square = config.hidden_size == config.num_attention_heads * least
    tiny.hidden_size = tiny.num_attention_heads * HEAD_DIM + (0 if square else 2 * HEAD_DIM)
    tiny.vocab_size = VOCABULARY
    for name, value in {**family.tiny, family.width: CHANNELS, **_sizes_of_experts(config, family)}.items():
        if getattr(config, name, None) is not None:
            setattr(tiny, name, value)
    if getattr(layers[0], "head_dim", None) or not square:
        tiny.head_dim = HEAD_DIM
    chosen = _representative(config, family)
    choose_layers(tiny, config, chosen)
    if family.own_heads:  # as many groups as before to one another, two where there are
        heads = [(head_dim_of(layers[one]), kv_heads_of(layers[one])) for one in chosen]
        sizes = [(HEAD_DIM * dim // least, max(min(2, count), kv_heads * count // most)) for dim, count in heads]
        tiny.per_layer_config = {one: dict(zip(OWN_HEADS, of, strict=True)) for one, of in enumerate(sizes)}
    if getattr(config, "sliding_window", None):
        tiny.sliding_window = WINDOW
    tiny.bos_token_id, tiny.eos_token_id, tiny.pad_token_id = 0, 1, None
    rotary = getattr(tiny, "rope_parameters", None) or {}  # one dictionary, or one per layer type
    for entry in [value for value in rotary.values() if isinstance(value, dict)] or [rotary]:
        pairs = max(1, round(HEAD_DIM * entry.get("partial_rotary_factor", 1.0)) // 2)  # of dimensions that rotate
        if "partial_rotary_factor" in entry:
            entry["partial_rotary_factor"] = 2 * pairs / HEAD_DIM
        for name in ("short_factor", "long_factor"):  # a factor per frequency
            if entry.get(name):
                entry[name] = [float(entry[name][0])] * pairs
    for name in NOT_KIND:
        vars(tiny).pop(name, None)
    return tiny


def _sizes_of_experts(config: Any, family: Family) -> dict[str, int]:
    """Config entries for few experts, in two groups where their router chooses among groups first."""
    if family.experts is None or (getattr(config, family.experts.count) or 0) < 2:
        return {}
    sizes = {
        family.experts.count: EXPERTS_THERE,
        family.experts.width: EXPERT_WIDTH,
        family.experts.top_k or "num_experts_per_tok": 2,
    }
    sizes["output_router_logits"] = False  # a loss beside the logits
    if groups := getattr(config, "n_group", None):
        few = min(2, groups)
        sizes |= {"n_group": few, "topk_group": max(1, config.topk_group * few // groups)}
    return sizes


def _representative(config: Any, family: Family) -> list[int]:
    """Layers that show every combination of per-layer entries, in order; ``LAYERS`` of them where there are as many,
    also two of those with attention, without which a hybrid whose others were removed could not decode."""
    values = [entries for name in (*family.per_layer_lists, family.kinds) if (entries := getattr(config, name, None))]
    values.append([has_experts(config, family.experts, layer) for layer in range(config.num_hidden_layers)])
    sorts = list(zip(*(map(str, entries) for entries in values), strict=False))
    if family.period:  # neighbours have one
        sizes = range(min(LAYERS, len(sorts)), len(sorts) + 1)
        runs = (range(start, start + size) for size in sizes for start in range(len(sorts) - size + 1))
        return list(next(run for run in runs if {sorts[layer] for layer in run} == set(sorts)))
    chosen = [sorts.index(sort) for sort in dict.fromkeys(sorts)]
    blocks = [family.blocks_of(config, layer) for layer in range(config.num_hidden_layers)]

    def place(layer: int) -> tuple[int, bool]:
        """Sort key of a layer: those whose blocks fewest chosen layers have come first, then new ones."""
        return sum(blocks[one] == blocks[layer] for one in chosen), layer in chosen

    while len(chosen) < LAYERS:
        chosen.append(min(range(config.num_hidden_layers), key=place))
    last = "full_attention" if family.own_heads else ""  # the only kind that Gemma 4's config takes for the last layer
    kinds = getattr(config, family.kinds, None) or [""] * config.num_hidden_layers
    return sorted(chosen, key=lambda layer: (kinds[layer] == last, layer))


def _try(config: Any, folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # Zeros and ones, as norms and biases start, would hide that one is lost.
    for tensor in model.state_dict().values():
        new = 0.1 * torch.randn_like(tensor)
        tensor.copy_(tensor + new if tensor.dim() == 1 else 2 * new)
    model.save_pretrained(folder / "dense")
    tokens = (torch.arange(2 * 3 * WINDOW).view(2, -1) * 31 + 7) % VOCABULARY
    dense = Checkpoint.open(str(folder / "dense"))
    _run_by_parts(model, dense, tokens)
    for name, plan in _plans(model, dense.path).items():
        with suppress(NoPeriodError):  # such a plan is refused
            _cut_and_mask(model, dense, plan, tokens, folder / name)


def _run_by_parts(model: PreTrainedModel, dense: Checkpoint, tokens: Tensor) -> None:
    layered = open_layered(dense, None, torch.device("cpu"))
    whole = model(input_ids=tokens, use_cache=False).logits
    hidden, outputs = layered.embed(tokens), dict[Block, Tensor]()
    for index, view in enumerate(layered.views):
        over = count_parameters(view.layer) - view.cost
        if over:
            raise CheckpointError(f"layer {index} has {over} parameters that belong to none of its blocks")
        handles = [
            view.projection(block).module.register_forward_hook(
                lambda _, __, out, block=block: outputs.update({block: out})
            )
            for block in view.prunable
        ]
        with layered.layer(index):
            after = layered.run(index, hidden)
            for handle in handles:
                handle.remove()
            before, *streams = layered.streams(index, hidden)
            _same(f"the whole layer {index}, watched,", streams[-1], after)
            for block, stream in list(zip(view.blocks, streams, strict=True))[-len(view.stages) :]:
                where = f"the {block} block of layer {index}"
                if not view.side_by_side:
                    _same(f"{where}, alone,", layered.run_block(index, block, before), stream)
                if block in view.prunable:
                    _same(f"{where}, its projection added,", layered.add(index, before, block, outputs[block]), stream)
                before = stream
            hidden = after
    _same("embedding, layers and head one by one", layered.head(hidden), whole)
    _same("the head on single rows", layered.head(hidden[0, :3]), layered.head(hidden[:1, :3])[0])
    layered.close()


def _same(what: str, actual: Tensor, expected: Tensor) -> None:
    if not torch.equal(actual, expected):
        apart = float((actual - expected).abs().max()) if actual.shape == expected.shape else float("inf")
        raise CheckpointError(f"{what}: differs from the model as transformers runs it (by {apart:.2g})")


def _plans(model: PreTrainedModel, path: str) -> dict[str, PruningPlan]:
    """Layers of one width, with half the groups where groups can be removed; and uneven ones: without attention,
    without MLP, and removed. Where layers are not made of the same blocks or sizes, each is all of these in turn."""
    views, dense = layer_structures(model), count_parameters(model)
    # The share of groups to remove and the channels to keep, or None for a removed layer.
    even = (0.0 if any(view.units(Block.ATTENTION) == 1 for view in views) else 0.5, slice(1, None, 2))
    uneven = [(1.0, slice(3, None)), (0.5, slice(0, None, 2)), (0.0, slice(0)), None]
    treatments: dict[str, list[tuple[float, slice] | None]] = {"uniform": [even] * len(views)}
    for turn in range(1 if len({(view.blocks, view.head_dim) for view in views}) == 1 else len(uneven)):
        order = uneven[turn:] + uneven[:turn]
        treatments[f"uneven {turn}"] = [order[min(index, len(order) - 1)] for index in range(len(views))]
    if any(view.experts for view in views):
        treatments["fewer experts"] = treatments["uniform"]
    plans = {}
    for name, treatment in treatments.items():
        unit = Block.EXPERT if name == "fewer experts" else Block.EXPERT_CHANNEL
        views = [view.with_experts_as(unit) for view in views]
        layers = [_layer_plan(*pair) for pair in zip(views, treatment, strict=True)]
        attention = [layer.layer for layer in layers if Block.ATTENTION in layer.kept]
        if attention and all(layers[index].removed for index in attention):  # which no plan may do
            layers[attention[-1]] = _layer_plan(views[attention[-1]], (0.0, slice(None)))
        counts = {"dense": dense, "pruned": parameters_after(views, dense, layers)}
        plans[name] = PruningPlan("check", None, 0.0, counts, None, path, layers)
    return plans


def _layer_plan(view: LayerStructure, treatment: tuple[float, slice] | None) -> LayerPlan:
    """The plan of one layer, as ``_plans`` says. Of experts three of four are kept, different ones in every layer, or
    half of every expert's channels, different ones in every expert."""
    if treatment is None:
        return LayerPlan(view.index, {block: [] for block in view.blocks})
    share, channels = treatment
    kept = view.all_units
    for block, units in kept.items():
        if block is Block.ATTENTION and not (view.whole_attention and share < 1):
            kept[block] = units[int(share * len(units)) :]
        elif block is Block.MLP:
            kept[block] = units[channels]
        elif block is Block.EXPERT:
            kept[block] = [expert for expert in units if (expert + view.index) % 4]
        elif block is Block.EXPERT_CHANNEL:
            kept[block] = [unit for unit in units if (unit + unit // EXPERT_WIDTH + view.index) % 2 == 0]
    return LayerPlan(view.index, kept)


def _cut_and_mask(model: PreTrainedModel, dense: Checkpoint, plan: PruningPlan, tokens: Tensor, folder: Path) -> None:
    masked, mask = copy.deepcopy(model), InMemoryPlan(plan.layers, lambda layer: {})
    for view in layer_structures(masked):
        mask(view)
    expected = masked(input_ids=tokens, use_cache=False).logits
    pruned = open_pruned(dense, plan)
    left = count_parameters(pruned.net)
    if left != plan.parameters["pruned"]:
        raise CheckpointError(
            f"cutting keeps {left} parameters where the costs of its units say {plan.parameters['pruned']}"
        )
    write_checkpoint(pruned, folder, beside=None, card="")
    apart, scale = float((pruned.logits(tokens) - expected).abs().max()), float(expected.abs().max())
    if not apart <= TOLERANCE * scale:
        raise CheckpointError(
            f"cutting groups, channels and blocks is not the same as masking them ({folder.name} widths: logits of up "
            f"to {scale:.2g} differ by {apart:.2g})"
        )
    pruned.close()
