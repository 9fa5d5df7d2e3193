"""How much SlimGPT takes from each layer: logarithmically increasing ratios, then whole groups and channels."""

import math
from collections.abc import Sequence

MAX_RATIO = 0.95  # no layer loses more than this share


def layer_ratios(num_layers: int, target: float, first_ratio: float | None = None) -> list[float]:
    """ρ_i = ρ_0 + (ρ_{n−1} − ρ_0)·ln(i + 1)/ln(n) with a mean of ``target``: later layers lose more.

    The released code divides by ln 32 whatever n is; ln n is the formula. A ρ_{n−1} above ``MAX_RATIO`` is set to that,
    and ρ_0 raised.

    Args:
        num_layers: n.
        target: mean share of the prunable parameters to remove.
        first_ratio: ρ_0. None: target · 0.0625/0.2, the paper's proportion for 20 % of LLaMA-7B.

    Raises:
        ValueError: the target cannot be met; the message names the largest reachable mean.
    """
    if not 0 <= target <= MAX_RATIO:
        raise ValueError(
            f"a mean layer ratio of {target:.4f} cannot be met: it must lie between 0 and {MAX_RATIO:.4f}, the most "
            "one layer may lose."
        )
    if num_layers == 1:
        return [target]
    first = target * (0.0625 / 0.2) if first_ratio is None else first_ratio
    rise = [math.log(i + 1) / math.log(num_layers) for i in range(num_layers)]
    mean_rise = sum(rise) / num_layers
    last = first + (target - first) / mean_rise
    if last > MAX_RATIO:
        last = MAX_RATIO
        first = min(MAX_RATIO, (target - last * mean_rise) / (1 - mean_rise))
    if not (0 <= first <= MAX_RATIO and last >= 0):
        raise ValueError(
            f"first_ratio {first:g} would need a last ratio of {last:.4f} for a mean of {target:.4f}; both must lie "
            f"between 0 and {MAX_RATIO:g}."
        )
    return [first + (last - first) * r for r in rise]


def unit_counts(
    ratios: Sequence[float],
    all_groups: Sequence[int],
    all_channels: Sequence[int],
    attention_unit_cost: int,
    mlp_unit_cost: int,
    budget: int,
) -> list[tuple[int, int]]:
    """GQA groups and MLP channels to remove from each layer, together at most ``budget`` parameters.

    Starts from ⌊K·ρ + ½⌋ and ⌊F·ρ + ½⌋ with ρ the layer's ratio, K its groups, F its channels. What rounding moved is
    corrected on the channels, one per layer in turn, largest ρ first (ties: lower layer), so the shortfall is less than
    one channel. Groups change only where channels cannot do it: one is given back, or one more removed, in the layer
    whose rounding was furthest off. Every layer keeps a group and a channel; a layer with ρ = 0 loses nothing.

    Args:
        ratios: ρ per layer.
        all_groups, all_channels: K and F per layer.
        attention_unit_cost, mlp_unit_cost: parameters of one group and of one channel.
        budget: parameters to remove.

    Raises:
        ValueError: the budget cannot be reached; the message names the largest reachable one.
    """
    # A block that an earlier pruning took out has no unit to keep.
    most_groups, most_channels = ([max(0, count - 1) for count in of] for of in (all_groups, all_channels))
    order = sorted((i for i, ratio in enumerate(ratios) if ratio > 0), key=lambda i: (-ratios[i], i))
    most = sum(most_groups[i] * attention_unit_cost + most_channels[i] * mlp_unit_cost for i in order)
    if budget - most >= mlp_unit_cost:
        raise ValueError(
            f"{budget:,} parameters cannot be removed: at most {most:,} can, when every layer keeps one group and one "
            "channel and layers with ratio 0 stay."
        )
    groups = [min(math.floor(all_groups[i] * ratio + 0.5), most_groups[i]) for i, ratio in enumerate(ratios)]
    channels = [min(math.floor(all_channels[i] * ratio + 0.5), most_channels[i]) for i, ratio in enumerate(ratios)]
    for i in range(len(ratios)):
        if i not in order:
            groups[i] = channels[i] = 0

    def excess(i: int) -> float:
        return groups[i] - all_groups[i] * ratios[i]

    while sum(groups) * attention_unit_cost > budget:
        groups[max((i for i in order if groups[i] > 0), key=lambda i: (excess(i), -i))] -= 1
    room = sum(most_channels[i] for i in order) * mlp_unit_cost
    while budget - sum(groups) * attention_unit_cost - room >= mlp_unit_cost:
        candidates = [i for i in order if groups[i] < most_groups[i]]
        if not candidates or (sum(groups) + 1) * attention_unit_cost > budget:
            break
        groups[min(candidates, key=lambda i: (excess(i), i))] += 1

    removed = sum(groups) * attention_unit_cost + sum(channels) * mlp_unit_cost
    correction = (budget - removed) // mlp_unit_cost
    step = 1 if correction > 0 else -1
    limits = most_channels if correction > 0 else [0] * len(ratios)
    while correction:
        movable = [i for i in order if channels[i] != limits[i]]
        if not movable:
            break
        for i in movable[: abs(correction)]:
            channels[i] += step
            correction -= step
    return list(zip(groups, channels, strict=True))
