"""What a run shows in TensorBoard, under the same tags for every method, so that runs overlay."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import matplotlib
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.utils.tensorboard import SummaryWriter

from lightning_prune.checkpoint.scores import BLOCKS, Scores
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.escape import plain


def log_importance(writer: SummaryWriter, scores: Scores) -> None:
    """Importance per layer as scalars whose step is the layer, score histograms, and the kept-fraction map.

    ``importance/<block>`` is the block's share of the model's whole importance, so methods of different scales
    overlay; ``score/<block>`` is the mean score of the block's units in the method's own unit.
    """
    total = float(scores.importance.sum()) or 1.0
    for layer, importance in enumerate(scores.per_layer(scores.importance).tolist()):
        writer.add_scalar("importance/layer", importance / total, layer)
    for (layer, block), rows in scores.blocks.rows().items():
        if block is not Block.LAYER:
            writer.add_scalar(f"importance/{block}", float(scores.importance[rows].sum()) / total, layer)
            writer.add_histogram(f"log10 score/{block}", np.log10(scores.score[rows].clip(min=1e-30)), layer)
        writer.add_scalar(f"score/{block}", float(scores.score[rows].mean()), layer)
        writer.add_scalar(f"kept fraction/{block}", float(scores.kept[rows].mean()), layer)
    writer.add_figure("kept fraction", kept_fraction_figure(scores))


def kept_fraction_figure(scores: Scores) -> Figure:
    """Heat map, layer × block, of the share of units that are kept."""
    blocks = [block for block in BLOCKS if scores.of_kind(block).any()]
    figure = Figure(figsize=(max(4.0, 0.35 * scores.num_layers + 2), 0.6 * len(blocks) + 1.4), layout="constrained")
    axes = figure.subplots()
    kept = np.stack([scores.kept_fraction(block) for block in blocks])
    image = axes.imshow(kept, vmin=0, vmax=1, cmap=matplotlib.colormaps["viridis"], aspect="auto")
    axes.set_xlabel("layer")
    axes.set_yticks(range(len(blocks)), blocks)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label="kept fraction")
    return figure


def log_result(
    trainer: L.Trainer,
    options: dict[str, Any],
    metrics: dict[str, Any],
    scores: Scores | None = None,
    more: Mapping[str, float] = {},
) -> None:
    """At the end of a run: importance, and the HParams row of ``options``, final numbers and ``more``."""
    results = {"achieved ratio": float(metrics["pruning_ratio"]["achieved"]), **more}
    for name, values in metrics["perplexity"].items():
        results[f"perplexity {plain(name)}"] = float(values["pruned"])
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            if scores is not None:
                log_importance(logger.experiment, scores)
            logger.log_hyperparams(options, {f"hparams/{name}": value for name, value in results.items()})
            logger.finalize("success")
