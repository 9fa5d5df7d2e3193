"""Run one method on a tiny model and a token array, the way the command does but without files to evaluate on."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import lightning_prune
from lightning_prune.checkpoint.in_memory_plan import InMemoryPlan
from lightning_prune.data.datamodule import CalibrationDataModule
from lightning_prune.methods.base import PruningMethod
from lightning_prune.models.families import layer_structures
from lightning_prune.runs.folder import RunFolder
from tests.methods.behaviour import save_tokens, trainer_for


def save_base(model: PreTrainedModel, folder: Path) -> str:
    """Save a model as the base to prune; returns what goes into ``pretrained``."""
    model.save_pretrained(folder)
    return str(folder)


def run_method(
    method: PruningMethod, tokens: Tensor, folder: Path, batch_size: int = 4, precision: str = "32-true"
) -> PruningMethod:
    """Calibrate on ``tokens`` ``[N, L]``, prune, and save below ``folder``; returns the finished method."""
    folder.mkdir(parents=True, exist_ok=True)
    path = str(save_tokens(folder / "tokens.npy", tokens))
    data = CalibrationDataModule(path, batch_size=batch_size, eval_datasets=[], tokenizer=method.pretrained)
    data.needs_calibration = method.needs_calibration
    method.run_folder = RunFolder(folder)
    trainer_for(method, folder, precision).fit(method, data)
    return method


def pruned_by(method: PruningMethod) -> PreTrainedModel:
    """The model that a finished method wrote."""
    assert method.pruned_folder is not None
    return lightning_prune.load(method.pruned_folder)


def masked_by(method: PruningMethod) -> PreTrainedModel:
    """The dense model in float32, whole, with what a finished method removes silenced and its new weights in place."""
    masked = lightning_prune.load(method.pretrained, torch.float32)
    mask = InMemoryPlan(method.plan.layers, method.driver.loop.new_parameters_of)
    for view in layer_structures(masked):
        mask(view)
    return masked


def mean_token_loss(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Mean cross-entropy over all predicted tokens, each weighing the same, written out."""
    log_probabilities = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits.double(), dim=-1)
    picked = log_probabilities[:, :-1].gather(2, tokens[:, 1:, None])
    return -picked.mean()


def inputs_of(model: PreTrainedModel, linear: torch.nn.Linear, tokens: Tensor) -> Tensor:
    """What one linear reads in a whole forward, ``[tokens, in]``."""
    found: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    return found[0]


def projections(model: PreTrainedModel, layer: int) -> dict[str, torch.nn.Linear]:
    """The seven projections of a layer by module name."""
    block = model.model.layers[layer]
    return {
        name: getattr(block.self_attn if name in ("q_proj", "k_proj", "v_proj", "o_proj") else block.mlp, name)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
