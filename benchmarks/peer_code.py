"""The peers of ``peers.py``: the authors' code, run from a checkout, one function per peer.

A checkout is imported as it is. What its code needs to run with today's transformers, on the CPU and on models of other
sizes is changed while it runs:

- all: ``.cuda()`` and ``.to("cuda")`` return the tensor itself. A decoder layer that is called without rotary positions
  computes them; they are an argument of the layer now.
- wanda: its loader of texts returns our tokens.
- flap: the same. 128 (width of a head), 512.0 (parameters of a head per hidden channel) and 2048 (samples) are numbers
  in its text; those of the model replace them, with a GQA group for a head. The biases are recorded, and added by us.
- llm-pruner: gradients are summed over batches of 4, since one batch of all does not fit. GQA as in its ``llama3.py``;
  all layers but the first three and the last, its defaults. Where less than one KV head of a layer is due, which its
  code does not survive, it gets one, and fewer channels. Its package is entered without ``__init__.py``, which imports
  old code of other models.
- torch-pruning: the settings of its ``examples/LLMs/prune_llm.py`` (magnitude, no calibration). Input and output
  embeddings are tied again afterwards.
- slicegpt: ``ml_collections`` may be absent. Attention returns two values now where its layer takes three, and a layer
  returns a tensor where its layer returns a tuple. Perplexity is that of ``distance``, since no stock class reads it.
- shortgpt: tokenizer and model are handed to it. Its last layer is scored on what the final norm returns, as released.
- slimgpt: the authors' solver, with our loop over layers, our counts of units and our λ.
"""

import ast
import importlib.util
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

Removed = dict[str, np.ndarray]  # bool arrays, True where something was removed, by what they are of


@dataclass
class Job:
    """What one process does; it crosses as JSON."""

    run: str
    out: str
    model: str
    work: str
    ratio: float = 0.0
    checkout: str = ""
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    eval_tokens: int = 16384
    kl_windows: int = 16
    measure: bool = True
    guide: str = ""  # what a run of ours removed, for the counts of units

    @property
    def tokens(self) -> Any:
        import torch

        return torch.from_numpy(np.load(Path(self.work) / "calibration.npy"))

    @property
    def sets(self) -> list[Path]:
        return sorted((Path(self.work) / "sets").glob("*.npy"))

    def start(self) -> None:
        """Everything is imported; the clock starts."""
        self.started, self.cost = time.process_time(), (0.0, 0.0)

    def stop(self) -> None:
        """The pruned model is there: seconds, and MiB of the process at most until now."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.cost = (time.process_time() - self.started, peak)

    def dense(self) -> Any:
        """The dense model, fp32, for code that expects an older transformers and a GPU."""
        import torch
        from transformers import LlamaForCausalLM

        move = torch.Tensor.to
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
        torch.Tensor.to = lambda self, *a, **k: self if a == ("cuda",) else move(self, *a, **k)  # type: ignore
        model = LlamaForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        model.seqlen, model.hf_device_map = self.tokens.shape[1], {}

        def rotary(layer: Any, args: Any, kwargs: Any) -> Any:
            if kwargs.get("position_embeddings") is None:
                positions = torch.arange(args[0].shape[1])[None]
                kwargs["position_embeddings"] = model.model.rotary_emb(args[0], positions)
            return args, kwargs

        for layer in model.model.layers:
            layer.register_forward_pre_hook(rotary, with_kwargs=True)
        return model


@dataclass
class Outcome:
    """The pruned model (it gives logits), what was removed and what share of all parameters; ``stock`` where
    ``lightning_prune.evaluate`` can read it."""

    model: Any
    removed: Removed
    achieved: float
    stock: bool = True


def sizes(model: Any) -> tuple[int, int, int, int]:
    """Parameters of a GQA group, of a channel and of all the model (tied ones once); columns of o_proj in a group."""
    config = model.config
    wide = config.num_attention_heads // config.num_key_value_heads * config.head_dim
    group = 2 * (wide + config.head_dim) * config.hidden_size
    return group, 3 * config.hidden_size, sum(one.numel() for one in model.parameters()), wide


def no_units(config: Any) -> Removed:
    layers = range(config.num_hidden_layers)
    heads = {f"{layer}.attention": np.zeros(config.num_key_value_heads, bool) for layer in layers}
    return heads | {f"{layer}.mlp": np.zeros(config.intermediate_size, bool) for layer in layers}


def without_units(model: Any, removed: Removed) -> Outcome:
    """``model`` with the columns of removed units zero, which computes what cutting them does."""
    import torch

    group, channel, total, wide = sizes(model)
    spent = 0
    for index, layer in enumerate(model.model.layers):
        heads, channels = removed[f"{index}.attention"], removed[f"{index}.mlp"]
        spent += int(heads.sum()) * group + int(channels.sum()) * channel
        layer.self_attn.o_proj.weight.data[:, torch.from_numpy(heads.repeat(wide))] = 0
        layer.mlp.down_proj.weight.data[:, torch.from_numpy(channels)] = 0
    return Outcome(model, removed, spent / total)


def share_of_layers(model: Any, ratio: float, skipped: int = 0) -> float:
    """What share of the units of all layers but ``skipped`` is ``ratio`` of all parameters."""
    group, channel, total, _ = sizes(model)
    config = model.config
    layer = config.num_key_value_heads * group + config.intermediate_size * channel
    return ratio * total / (layer * (config.num_hidden_layers - skipped))


def adapted(job: Job, name: str, numbers: dict[float, float]) -> ModuleType:
    """Import a module of a checkout, with other numbers for those in its text and our tokens from its loader."""

    class Renumbered(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.Constant:
            return ast.copy_location(ast.Constant(numbers.get(node.value, node.value)), node)  # type: ignore[call-overload]

    sys.path.insert(0, job.checkout)
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    tree = Renumbered().visit(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))  # type: ignore
    exec(compile(tree, spec.origin, "exec"), module.__dict__)  # type: ignore
    module.get_loaders = lambda *_, **__: ([(row[None], None) for row in job.tokens], None)  # type: ignore[attr-defined]
    return module


def wanda(job: Job) -> Outcome:
    import torch

    prune = adapted(job, "lib.prune", {})
    job.start()
    model = job.dense()
    before = {name: one.detach().clone() for name, one in model.named_parameters() if "_proj" in name}
    pattern = {"prune_n": 2, "prune_m": 4} if job.options["structure"] == "2:4" else {}
    args = SimpleNamespace(nsamples=len(job.tokens), seed=0, sparsity_ratio=job.ratio, use_variant=False)
    prune.prune_wanda(args, model, None, torch.device("cpu"), **pattern)
    job.stop()
    after = dict(model.named_parameters())
    removed = {name: ((after[name] == 0) & (weight != 0)).numpy() for name, weight in before.items()}
    return Outcome(
        model, removed, sum(int(one.sum()) for one in removed.values()) / sum(map(np.size, removed.values()))
    )


def flap(job: Job) -> Outcome:
    import torch
    from transformers import LlamaConfig

    config = LlamaConfig.from_pretrained(job.model)
    wide = config.num_attention_heads // config.num_key_value_heads * config.head_dim
    prune = adapted(job, "lib.prune", {128: wide, 512.0: 2.0 * (wide + config.head_dim), 2048: len(job.tokens)})
    found = []
    prune.compress = lambda layer, *rest, **_: found.append((layer, *rest[:4]))  # type: ignore[attr-defined]
    job.start()
    model = job.dense()
    ratio = share_of_layers(model, job.ratio)
    args = SimpleNamespace(nsamples=len(job.tokens), seed=0, metrics="WIFV", structure="AL-AM", pruning_ratio=ratio)
    prune.prune_flap(SimpleNamespace(**vars(args), unstr=True), model, None, torch.device("cpu"))
    removed, biases = no_units(config), []
    for index in range(config.num_hidden_layers):
        (layer, heads, _, mean_o, _), (_, _, channels, _, mean_down) = found[2 * index : 2 * index + 2]
        removed[f"{index}.attention"], removed[f"{index}.mlp"] = (~heads).numpy(), (~channels).numpy()
        gone = ~heads.repeat_interleave(wide)
        biases.append((layer.self_attn.o_proj, layer.self_attn.o_proj.weight @ (mean_o * gone).float()))
        biases.append((layer.mlp.down_proj, layer.mlp.down_proj.weight @ (mean_down * ~channels).float()))
    outcome = without_units(model, removed)
    for module in [one for one in model.model.layers.modules() if isinstance(one, torch.nn.Linear)]:
        module.bias = torch.nn.Parameter(torch.zeros(module.out_features))
    for module, bias in biases:
        module.bias.data = bias.detach()
    model.config.attention_bias = model.config.mlp_bias = True
    return outcome


def llm_pruner(job: Job) -> Outcome:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    package = ModuleType("LLMPruner")  # without its __init__, which imports other models' old code
    package.__path__ = [f"{job.checkout}/LLMPruner"]
    sys.modules["LLMPruner"] = package
    import LLMPruner.torch_pruning as tp
    from LLMPruner.pruner import hf_llama_pruner as theirs

    job.start()
    model, tokens = job.dense(), job.tokens
    layers = list(model.model.layers)
    keys, gates = [layer.self_attn.k_proj for layer in layers[3:-1]], [layer.mlp.gate_proj for layer in layers[3:-1]]
    share, by_module = share_of_layers(model, job.ratio, skipped=4), {}
    if share * (heads := model.config.num_key_value_heads) < 1:
        group, channel, total, _ = sizes(model)
        by_module = dict.fromkeys(keys, 1 / heads)
        share = (job.ratio * total / len(keys) - group) / (model.config.intermediate_size * channel)
    pruner = tp.pruner.MetaPruner(
        model,
        tokens[:2, :8],
        importance=theirs.TaylorImportance(group_reduction="sum", taylor="param_first"),
        ch_sparsity=share,
        ch_sparsity_dict=by_module,
        consecutive_groups={layer.self_attn.k_proj: model.config.head_dim for layer in layers},
        customized_pruners={LlamaRMSNorm: theirs.hf_rmsnorm_pruner},
        root_module_types=None,
        output_transform=lambda out: out.logits,
        root_instances=keys + gates,
    )
    for batch in tokens.split(4):
        (model(input_ids=batch, labels=batch).loss * len(batch) / len(tokens)).backward()
    removed = no_units(model.config)
    places = {layer.self_attn.k_proj: (f"{i}.attention", model.config.head_dim) for i, layer in enumerate(layers)}
    places |= {layer.mlp.gate_proj: (f"{i}.mlp", 1) for i, layer in enumerate(layers)}
    for group in pruner.step(interactive=True):
        dependency, rows = group[0]
        name, width = places[dependency.target.module]
        removed[name][np.unique(np.array(rows) // width)] = True
        group.prune()
    job.stop()
    return without_units(job.dense(), removed)


def torch_pruning(job: Job) -> Outcome:
    sys.path.insert(0, job.checkout)
    import torch_pruning as tp

    job.start()
    model = job.dense()
    config, total, embedding = model.config, sizes(model)[2], model.model.embed_tokens.weight.numel()
    # Hidden size, heads and channels lose the share p: the embedding keeps 1 − p of itself, a projection (1 − p)².
    rest, kept = total - embedding, (1 - job.ratio) * total
    share = 1 - (np.sqrt(embedding**2 + 4 * rest * kept) - embedding) / (2 * rest)
    attentions = [layer.self_attn for layer in model.model.layers]
    heads = {one.q_proj: config.num_attention_heads for one in attentions}
    heads |= {linear: config.num_key_value_heads for one in attentions for linear in (one.k_proj, one.v_proj)}
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=job.tokens[:1, :8],
        importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        output_transform=lambda out: out.logits,
        pruning_ratio=float(share),
        ignored_layers=[model.lm_head],
        num_heads=heads,
        prune_num_heads=True,
        head_pruning_ratio=float(share),
        round_to=4,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    first = model.model.layers[0]
    config.hidden_size, config.intermediate_size = model.lm_head.in_features, first.mlp.gate_proj.out_features
    config.num_attention_heads = first.self_attn.q_proj.out_features // config.head_dim
    config.num_key_value_heads = first.self_attn.k_proj.out_features // config.head_dim
    for attention in attentions:
        attention.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return Outcome(model, {}, 1 - sum(one.numel() for one in model.parameters()) / total)


def slicegpt(job: Job) -> Outcome:
    import torch
    from transformers.models.llama.modeling_llama import LlamaAttention

    if importlib.util.find_spec("ml_collections") is None:  # it is used for one object with attributes
        sys.modules["ml_collections"] = SimpleNamespace(ConfigDict=SimpleNamespace)  # type: ignore[assignment]
    sys.path.insert(0, str(Path(job.checkout) / "src"))
    from slicegpt import layernorm_fusion, rotate, slicing_scheduler
    from slicegpt.adapters import llama_adapter

    attend, layer = LlamaAttention.forward, llama_adapter.CompressedLlamaDecoderLayer
    as_tuple = layer.forward

    def as_tensor(*args: Any, **kwargs: Any) -> Any:
        LlamaAttention.forward = lambda *some, **others: (*attend(*some, **others), None)  # type: ignore
        try:
            return as_tuple(*args, **kwargs)[0]
        finally:  # the dense model, which it is compared with, has layers of its own
            LlamaAttention.forward = attend

    layer.forward = as_tensor
    job.start()
    model = job.dense()
    config, total = model.config, sizes(model)[2]
    model.config.torch_dtype = torch.float32
    adapter = llama_adapter.LlamaModelAdapter(model)
    layernorm_fusion.replace_layers(adapter, verbose=False)
    layernorm_fusion.fuse_modules(adapter)
    # What d dimensions hold: what scales with d, and two shortcuts d × d a layer. Head and last output stay wide.
    layers, wide, head = config.num_hidden_layers, config.hidden_size, model.lm_head.weight.numel()
    linear = (sum(one.numel() for one in model.parameters()) - head) / wide - config.intermediate_size
    room = (1 - job.ratio) * total - head - config.intermediate_size * wide
    size = next(d for d in range(wide, 0, -1) if linear * d + (2 * layers - 1) * d * d + d * wide <= room)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in job.tokens]
    rotate.rotate_and_slice(adapter, rows, slicing_scheduler.ConstSlicingScheduler(size))
    return Outcome(model, {}, 1 - sum(one.numel() for one in model.parameters()) / total, stock=False)


def shortgpt(job: Job) -> Outcome:
    sys.path.insert(0, str(Path(job.checkout) / "shortgpt"))
    import shortgpt as theirs
    import torch

    rows = job.tokens
    given = SimpleNamespace(input_ids=rows, attention_mask=torch.ones_like(rows))

    class Tokenizer:
        eos_token = ""
        from_pretrained = staticmethod(lambda *_: Tokenizer())

        def __call__(self, *_: Any, **__: Any) -> Any:
            return given

    theirs.AutoTokenizer = Tokenizer
    theirs.AutoModelForCausalLM = SimpleNamespace(from_pretrained=lambda *_, **__: job.dense())
    job.start()
    short = theirs.ShortGPT(job.model, "model.layers")
    total, layer = sizes(short.model)[2], sum(one.numel() for one in short.layers[0].parameters())
    short.n_prune_layers = round(job.ratio * total / layer)
    for given.input_ids in rows.split(4):
        given.attention_mask = torch.ones_like(given.input_ids)
        short.eval_importance(None, stride=rows.shape[1])
    removed = no_units(short.model.config)
    for index in short.remove_layers():
        removed[f"{index}.attention"][:] = removed[f"{index}.mlp"][:] = True
    for index, left in enumerate(short.layers):
        left.self_attn.layer_idx = index
    short.model.config.num_hidden_layers = len(short.layers)
    return Outcome(short.model, removed, short.n_prune_layers * layer / total)


def slimgpt(job: Job) -> Outcome:
    import torch

    sys.path.insert(0, str(Path(job.checkout) / "slim_utils"))
    import slimgpt as theirs

    job.start()
    model, removed = job.dense(), dict(np.load(job.guide))
    hidden = list(model.model.embed_tokens(job.tokens).detach().split(4))
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for name, linear, width in (
                ("attention", layer.self_attn.o_proj, sizes(model)[3]),
                ("mlp", layer.mlp.down_proj, 1),
            ):
                flags = removed[f"{index}.{name}"]
                solver = theirs.SlimGPT(linear, index, SimpleNamespace(no_compensate=False))
                hook = linear.register_forward_hook(lambda _, inputs, out: solver.add_batch(inputs[0], out))  # noqa: B023
                for batch in hidden:
                    layer(batch)
                hook.remove()
                columns = solver.struct_prune(flags.sum() / len(flags), headsize=width, percdamp=0.01)
                flags[:] = False
                flags[(columns // width).unique().numpy()] = True
            hidden = [layer(batch) for batch in hidden]
    return without_units(model, removed)
