"""A run's values in its loggers, under the same tags for every method and logger, so that runs share charts."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import matplotlib
import numpy as np
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_prune.checkpoint.scores import BLOCKS, Scores
from lightning_prune.models.vocabulary import Block
from lightning_prune.support.errors import UserError, first_line
from lightning_prune.support.escape import plain
from lightning_prune.support.files import FULL


def log_importance(logger: Logger, scores: Scores) -> None:
    """Importance per layer as scalars whose step is the layer, and where a logger has a place for them score histograms
    and the kept-fraction map.

    ``importance/<block>`` is the block's share of the model's whole importance, so methods of different scales share a
    chart; ``score/<block>`` is the mean score of the block's units in the method's own unit.
    """
    total = float(scores.importance.sum()) or 1.0
    importances = scores.per_layer(scores.importance).tolist()
    curves: list[dict[str, float]] = [{"importance/layer": importance / total} for importance in importances]
    for (layer, block), rows in scores.blocks.rows().items():
        if block is not Block.LAYER:
            curves[layer][f"importance/{block}"] = float(scores.importance[rows].sum()) / total
            _log_histogram(logger, f"log10 score/{block}", np.log10(scores.score[rows].clip(min=1e-30)), layer)
        curves[layer][f"score/{block}"] = float(scores.score[rows].mean())
        curves[layer][f"kept fraction/{block}"] = float(scores.kept[rows].mean())
    for layer, values in enumerate(curves):
        if isinstance(logger, TensorBoardLogger):  # whose log_metrics hides what a full disk says
            for tag, value in values.items():
                logger.experiment.add_scalar(tag, value, layer)
        else:
            logger.log_metrics(values, layer)
    _log_figure(logger, "kept fraction", kept_fraction_figure(scores))


def _log_histogram(logger: Logger, tag: str, values: Any, layer: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_histogram(tag, values, layer)
    elif isinstance(logger, CometLogger):
        logger.experiment.log_histogram_3d(values, tag, layer)
    elif isinstance(logger, WandbLogger):
        from wandb import Histogram  # type: ignore[import-not-found, unused-ignore]  # there, as its logger is

        logger.log_metrics({tag: Histogram(values)}, layer)


def _log_figure(logger: Any, tag: str, figure: Figure) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_figure(tag, figure)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_figure(logger.run_id, figure, f"{tag}.png")
    elif isinstance(logger, CometLogger):
        logger.experiment.log_figure(tag, figure)
    elif callable(getattr(logger, "log_image", None)):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        logger.log_image(tag, [np.asarray(canvas.buffer_rgba())[:, :, :3].copy()])


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
    """Log importance, and ``options`` with the final numbers and ``more``, in every logger at the end of a run. A
    logger that fails, as when its server is gone, costs a warning and not the run."""
    results = {"achieved ratio": float(metrics["pruning_ratio"]["achieved"])} if "pruning_ratio" in metrics else {}
    for name, values in metrics["perplexity"].items():
        results[f"perplexity {plain(name)}"] = float(values["pruned"] if "pruned" in values else values["perplexity"])
    for name, values in metrics.get("distance", {}).items():
        results |= {f"{key.replace('_', ' ')} {plain(name)}": float(value) for key, value in values.items()}
    final = {f"hparams/{name}": value for name, value in (results | dict(more)).items()}
    for logger in trainer.loggers:
        try:
            if scores is not None:
                log_importance(logger, scores)
            if isinstance(logger, TensorBoardLogger):  # options and numbers make one row there
                logger.log_hyperparams(options, final)
            else:
                logger.log_hyperparams(options)
                logger.log_metrics(final, 0)
            logger.finalize("success")
        except Exception as error:
            if isinstance(logger, TensorBoardLogger):
                raise
            rank_zero_warn(f"{type(logger).__name__} did not receive all results ({first_line(error)}).")


def open_loggers(trainer: L.Trainer) -> None:
    """Have every logger begin, before anything is calibrated for it; UserError where one cannot: nothing can be written
    there, nobody answers, nobody is logged in."""
    for logger in trainer.loggers:
        try:
            getattr(logger, "experiment", None)
        except Exception as error:  # every tracker's client has its own
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            raise UserError(
                f"--trainer.logger: {type(logger).__name__} cannot begin ({first_line(error)}). Check its options, or "
                "leave it out."
            ) from None


def close_loggers(trainer: L.Trainer) -> None:
    """Undo ``open_loggers``: end what would outlive the run, so that the next run of this process is one of its own."""
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
        elif isinstance(logger, TensorBoardLogger):  # its thread would write to a folder that is being removed
            logger.experiment.close()
