"""Text about a result: the verdict, the tables that commands end with, and sections of the model card."""

import math
from typing import Any, TypeGuard

from lightning_prune.support.escape import markdown, markdown_table, public_name

NEAR_DENSE, DEGRADED, BADLY_DEGRADED, UNUSABLE = "near dense", "degraded", "badly degraded", "unusable"
# The dense perplexity is missing and the pruned one better than token frequencies, or the dense model itself is not.
UNKNOWN = "not comparable"
# Within a family of models, halving the size costs about a tenth (Llama 13B to 7B: 12 % on WikiText-2).
NEAR = 1.1
BIT = 2.0  # one bit per token
STEP = 0.005  # of ratios: further below the request is explained
LEAST = 0.01  # nats: a share of what is lost to rounding means nothing
LOST = 1.2  # times the dense perplexity in short windows: more context should lower it
Rows = list[tuple[str, str]]
LEGEND = (
    f"Verdict: {NEAR_DENSE} up to {NEAR:g} times the dense perplexity (about what halving a model's size costs), "
    f"{DEGRADED} up to {BIT:g} times (one bit per token lost), {BADLY_DEGRADED} above. {UNUSABLE.capitalize()}, "
    "whatever the ratio: at least half of what the dense model gains over token frequencies without context is lost "
    "(perplexity at or above √(dense × unigram)), or the perplexity is not finite. A KL divergence of x nats counts as "
    "e^x times the dense perplexity; the worse of both decides."
)


def verdict_word(
    pruned: float | None, dense: float | None, unigram: float | None, divergence: float | None = None
) -> str:
    """One word of the scale in ``LEGEND``; perplexities are on the same tokens, ``divergence`` is KL(dense ‖ pruned).

    A language model's gain is ln(unigram) - ln(dense) nats per token, what it knows from context. The loss from
    pruning is ln(pruned) - ln(dense), or the divergence in nats per token, which is the same loss on text that the
    dense model wrote, whichever is larger. None, NaN and infinity: it was not finite, not known, or not measured.
    """
    if divergence is not None and _finite(pruned):
        pruned = max(pruned, _as_perplexity(divergence, dense))
    limit = unusable_limit(dense, unigram)
    if _lost_itself(dense, unigram) and _finite(pruned):
        return UNKNOWN if pruned <= BIT * dense else UNUSABLE
    if not _finite(pruned) or (limit is not None and pruned >= limit):
        return UNUSABLE
    if not _finite(dense):
        return UNKNOWN
    ratio = pruned / dense
    return NEAR_DENSE if ratio <= NEAR else DEGRADED if ratio <= BIT else BADLY_DEGRADED


def unusable_limit(dense: float | None, unigram: float | None) -> float | None:
    """The perplexity from which on a pruned model is unusable; None where the unigram model's is not known."""
    if not _finite(unigram):
        return None
    return min(unigram, math.sqrt(dense * unigram)) if _finite(dense) else unigram


def verdict(metrics: dict[str, Any], name: str) -> str:
    """The word and its reason, for one evaluation set of a ``metrics.json``."""
    pruned, dense = metrics["perplexity"][name]["pruned"], metrics["perplexity"][name]["dense"]
    unigram = metrics.get("evaluation", {}).get(name, {}).get("unigram_perplexity")
    distance = metrics.get("distance", {}).get(name)
    divergence = None if distance is None else distance["kl_divergence"]
    divergence = math.inf if distance is not None and not _finite(divergence) else divergence
    word = verdict_word(pruned, dense, unigram, divergence)
    if not _finite(pruned):
        return f"{word} (perplexity is not finite)"
    if _lost_itself(dense, unigram):
        return f"{word} (on this text the dense model itself does not beat token frequencies, perplexity {unigram:.1f})"
    if _finite(unigram) and pruned >= unigram:
        return f"{word} (no better than token frequencies alone, perplexity {unigram:.1f})"
    if not _finite(dense):
        return f"{word} (the dense perplexity is not finite)"
    reason = f"{pruned / dense:.2f} times the dense perplexity"
    if divergence is not None and (worse := _as_perplexity(divergence, dense)) > pruned:
        pruned = worse
        reason = f"a KL divergence of {divergence:.2f} counts as {pruned / dense:.2f} times the dense perplexity"
    if word == UNUSABLE and _finite(unigram) and _finite(pruned):
        lost = math.log(pruned / dense) / math.log(unigram / dense)
        reason += f": {lost:.0%} of the way from the dense model to token frequencies"
    return f"{word} ({reason})"


def _lost_itself(dense: float | None, unigram: float | None) -> TypeGuard[float]:
    """Whether the dense model gains nothing from context, so that a loss has nothing to be measured by."""
    return _finite(dense) and _finite(unigram) and dense >= unigram


def _as_perplexity(divergence: float, dense: float | None) -> float:
    """Perplexity equivalent to a KL divergence of ``divergence`` nats per token."""
    return dense * math.exp(min(divergence, 700.0)) if _finite(dense) and _finite(divergence) else math.inf


def evaluation_section(metrics: dict[str, Any]) -> str:
    """The model card's section on how good the pruned model is; empty when nothing was evaluated."""
    if not metrics["perplexity"]:
        return ""
    rows, distances = [], metrics.get("distance", {})
    for name, item in metrics["perplexity"].items():
        values = [_number(item[which]) for which in ("dense", "pruned")]
        if distances:
            values += [_number(distances[name]["kl_divergence"], 4), share(distances[name]["top1_agreement"])]
        rows.append((markdown(public_name(name)), f"{item['tokens']:,}", *values, verdict(metrics, name)))
    more = ("KL", "Top-1 agreement") if distances else ()
    header = ("Set", "Tokens", "Dense perplexity", "Pruned perplexity", *more, "Verdict")
    return "\n" + "\n\n".join(["## Evaluation", markdown_table(header, rows), LEGEND]) + "\n"


def regained(dense: float | None, pruned: float | None, recovered: float | None) -> float | None:
    """Share of the lost log-perplexity that training gave back, (ln pruned − ln recovered) / (ln pruned − ln dense);
    None where less than ``LEAST`` nats were lost."""
    if not (_finite(dense) and _finite(pruned) and _finite(recovered)):
        return None
    lost = math.log(pruned / dense)
    return math.log(pruned / recovered) / lost if lost >= LEAST else None


def _given_back(value: float | None) -> str:
    if _finite(value) and value < 0:
        return f"a further {share(-value)} lost"
    return f"{share(value)} of the lost log-perplexity regained"


def share(value: float | None) -> str:
    """A share as a table cell."""
    return f"{value:.0%}" if _finite(value) else "–"


def _number(value: float | None, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if _finite(value) else "not finite"


def summary_table(label: str, metrics: dict[str, Any]) -> str:
    """Summary table of a run, from its ``metrics.json``."""
    parameters, ratio = metrics["parameters"], metrics["pruning_ratio"]
    requested = "" if ratio["requested"] is None or metrics.get("target") else f"requested {ratio['requested']:.4f}, "
    far = bool(requested) and ratio["requested"] - ratio["achieved"] > STEP
    step = ", since the next removal would exceed the request" if far else ""
    rows = [
        ("method", label),
        ("parameters", f"{parameters['dense']:,} → {parameters['pruned']:,}"),
        ("pruning ratio", f"{requested}achieved {ratio['achieved']:.4f}{step}"),
    ]
    if before := (metrics.get("method") or {}).get("history"):
        rows.insert(1, ("pruned before", f"{before}; 'dense' below is what that left"))
    if target := metrics.get("target"):
        memory = target["kind"] == "memory"
        most, reached = (both_units(target[key]) if memory else f"{target[key]:,}" for key in ("limit", "reached"))
        what = target["kind"].replace("_", " ")
        if memory:
            what = f"weights and KV cache of {target['batch']} × {target['context']:,} tokens"
        rows.append(("target", f"at most {most}, reached {reached} ({what})"))
    for name, item in metrics["perplexity"].items():
        # A perplexity says nothing without its protocol: how long the windows are, and of which split.
        protocol = metrics["evaluation"].get(name, {})
        split = "" if protocol.get("split") in (None, "all") else f" of the {protocol['split']} split"
        windows = f"{split} in windows of {protocol['seq_len']}" if "seq_len" in protocol else ""
        values = f"dense {item['dense']:.3f}, pruned {item['pruned']:.3f} ({item['tokens']:,} tokens{windows})"
        rows.append((f"perplexity {name}", f"{values}, {verdict(metrics, name)}{_too_long(metrics, name)}"))
    rows += [*comparison_rows(metrics), *_footprint_rows(metrics)]
    serving = metrics.get("serving") or {}
    if sizes := serving.get("tensor_parallel"):
        alone = " alone: heads and widths have no common divisor" if sizes == [1] else ""
        rows.append(("tensor parallel", f"on {', '.join(map(str, sizes))} device{'s' * (len(sizes) > 1)}{alone}"))
    if serving.get("note"):
        rows.append(("serving", serving["note"]))
    return _aligned(rows, metrics)


def _too_long(metrics: dict[str, Any], name: str) -> str:
    short = metrics["perplexity"].get(metrics["evaluation"].get(name, {}).get("long_windows_of"), {}).get("dense")
    remark = too_long(short, metrics["perplexity"][name]["dense"])
    return f"; {remark}" if remark else ""


def too_long(short: float | None, long: float | None) -> str:
    """A sentence where the dense model itself fails in windows longer than those it was trained on; else empty. The
    arguments are its perplexities in short and in long windows; None: not measured, or not finite."""
    if not (_finite(short) and _finite(long) and long > LOST * short):
        return ""
    return f"the dense model itself is {long / short:.1f} times worse in these longer windows, so they say little"


def _footprint_rows(metrics: dict[str, Any]) -> Rows:
    """Table rows on size and speed, which a user of the model will notice."""
    if (footprint := metrics.get("footprint")) is None:
        return []
    dense, pruned = footprint["dense"], footprint["pruned"]
    sizes = metrics["parameters"]
    rows = []
    if "pruned_active" in sizes:
        rows.append(("active", f"{sizes['dense_active']:,} → {sizes['pruned_active']:,} parameters of one token"))
    rows.append(("weight files", f"{size(dense['file_bytes'])} → {size(pruned['file_bytes'])}"))
    memory = zip(dense["memory_bytes"].items(), pruned["memory_bytes"].values(), strict=True)
    both = [f"{size(before)} → {size(after)} at {int(context):,} tokens" for (context, before), after in memory]
    rows.append(("memory", f"{', '.join(both)} (weights and KV cache of one sequence)"))
    before, after = dense["flops_per_token"], pruned["flops_per_token"]
    text = f"{before / 1e9:.3g} → {after / 1e9:.3g} GFLOPs, {after / before:.0%} of the dense model's"
    rows.append(("one token", f"{text} (without attention over the context)"))
    return rows


def size(count: int) -> str:
    """Bytes as MB or GB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def both_units(count: int) -> str:
    """Bytes as MB or GB and as MiB or GiB, one of which was given."""
    binary = f"{count / 2**30:,.2f} GiB" if count >= 1e9 else f"{count / 2**20:,.1f} MiB"
    return f"{size(count)} ({binary})"


def comparison_rows(metrics: dict[str, Any]) -> Rows:
    """Table rows on the distance from the dense model and on both models' continuations, from a ``metrics.json``."""
    rows = []
    for name, item in metrics.get("distance", {}).items():
        kl, agreement, acceptance = (item[key] for key in ("kl_divergence", "top1_agreement", "expected_acceptance"))
        value = "not finite"
        if _finite(kl):
            value = f"KL {kl:.4g} nats per token, top-1 agreement {agreement:.1%}, expected acceptance {acceptance:.1%}"
        rows.append((f"distance {name}", value))
    if written := metrics.get("continuations"):
        repeated, ended = (
            " → ".join(share(written[side][key]) for side in ("dense", "pruned"))
            for key in ("repeated_4grams", "ended")
        )
        value = f"equal for the first {written['common_beginning']:.1f} of {written['new_tokens']} tokens"
        value += f", repeated 4-grams {repeated}, ended {ended} ({written['prompts']} prompts)"
        rows.append(("continuations", value))
    return rows


def recovery_table(label: str, metrics: dict[str, Any]) -> str:
    """Summary table of a recovery, from a ``metrics.json`` with the ``recovery.json`` under ``recovery``."""
    record = metrics["recovery"]
    rows = [("system", f"{label}, from {record['parent']}"), *_recovery_rows(record, metrics)]
    rows += [(f"verdict {name}", verdict(metrics, name) + _too_long(metrics, name)) for name in metrics["perplexity"]]
    rows += comparison_rows(metrics)
    seconds = {name.replace("evaluate pruned", "evaluate"): value for name, value in metrics["seconds"].items()}
    return _aligned(rows, metrics | {"seconds": seconds})


def card_section(record: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The model card's section on the training, without the folders of this machine."""
    rows = [
        ("weights", "low-rank adapters, merged" if record["train"] == "lora" else "all"),
        ("text", public_name(record["text"]["dataset"])),
        ("teacher", "none" if record["teacher"] is None else public_name(record["teacher"])),
        *_recovery_rows(record, metrics),
    ]
    return "\n## Recovery\n\n" + markdown_table(("", ""), [(markdown(a), markdown(b)) for a, b in rows]) + "\n"


def _recovery_rows(record: dict[str, Any], metrics: dict[str, Any]) -> Rows:
    loss = record["held_out_loss"]
    work = f"{record['trainable_parameters']:,} parameters, {record['tokens_seen']:,} tokens, {record['steps']:,} steps"
    rows = [
        ("trained", f"{work}, {record['seconds']:.0f} s; ended by {record['stopped_by']}"),
        ("held-out loss", f"{loss['before']:.4f} → {loss['after']:.4f}"),
    ]
    for name, item in metrics["perplexity"].items():
        values = item["dense"], record["perplexity"].get(name), item["pruned"]
        dense, pruned, recovered = map(_number, values)
        text = f"dense {dense}, pruned {pruned}, recovered {recovered} ({item['tokens']:,} tokens)"
        rows.append((f"perplexity {public_name(name)}", f"{text}: {_given_back(regained(*values))}"))
    if record["zeroed_weights"] is not None:
        rows.append(("zeroed weights", f"{record['zeroed_weights']:,}, all still zero"))
    return rows


def _aligned(rows: Rows, metrics: dict[str, Any]) -> str:
    """Two columns that end with time and memory."""
    rows.append(("seconds", ", ".join(f"{phase} {value:.1f}" for phase, value in metrics["seconds"].items())))
    rows.append(("peak memory", f"{metrics['peak_memory_bytes'] / 2**20:,.0f} MiB"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
