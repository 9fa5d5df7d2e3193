"""A layered model as a Hugging Face folder, whole or not at all, one layer in memory at a time."""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_prune.checkpoint.cut import layout_of
from lightning_prune.checkpoint.model_card import model_card
from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.checkpoint.pruned import NewWeights, open_pruned
from lightning_prune.checkpoint.self_check import check_checkpoint, compare_logits, probe_tokens
from lightning_prune.checkpoint.serving_notes import pattern_note
from lightning_prune.checkpoint.whole import WHOLE_NOTE, tensors_beside, whole_config, whole_names, why_text_alone
from lightning_prune.models import modeling_pruned
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.expert_files import stored_parts
from lightning_prune.models.families import family_of
from lightning_prune.models.layered import LayeredModel, open_layered
from lightning_prune.models.weights import DTYPES, renamed
from lightning_prune.support.errors import UserError
from lightning_prune.support.files import new_folder, write_json, write_text
from lightning_prune.support.memory import free_host_bytes, give_back_freed_memory
from lightning_prune.support.quiet import quiet_transformers

LARGE = 64 * 2**20  # bytes of a checkpoint from which on collecting garbage is worth its time
WHOLE_SHARE = 0.5  # of free host memory that a model may take to be checked whole
SHARD_BYTES = 5 * 10**9
ALIGNED, LENGTH_BYTES = 64, 8  # of a tensor's place in a file; of the number before its header
# Of tensors that are written as they are, beside the text model.
WHOLE_NUMBERS = {
    f"{kind.upper()}{bits}": getattr(torch, f"{'u' * (kind == 'u')}int{bits}")
    for kind in "iu"
    for bits in (8, 16, 32, 64)
}
BITS = {
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
STORED_NAMES = {dtype: name for name, dtype in (DTYPES | WHOLE_NUMBERS | BITS).items()}


def write_checkpoint(
    model: LayeredModel,
    folder: Path,
    *,
    beside: Checkpoint | None,
    card: str,
    whole: bool = False,
    progress: Callable[[int], None] = lambda layer: None,
) -> dict[str, Any]:
    """Write config, generation config, safetensors, tokenizer files, ``README.md`` and, for the per-layer layout,
    ``modeling_pruned.py``. The same model gives the same bytes. What the self-check compared comes back.

    Args:
        model: gives every layer in the dtype to write.
        folder: takes its name only when everything is written and checked, and replaces what was there.
        beside: the checkpoint whose side files (tokenizer, templates) and generation config are taken, if it has any.
        card: text of ``README.md``.
        whole: write the model of several that ``beside`` holds, with this one for its text model.
        progress: told the number of every layer that has been written.

    Raises:
        CheckpointError, FloatingPointError: see ``checkpoint.self_check``; nothing is left.
        UserError: the folder cannot be written or the disk is full; nothing is left.
    """
    try:
        with new_folder(folder) as temporary:
            _write_config(model, temporary, beside if whole else None)
            if beside is not None:
                for name, file in beside.side_files.items():
                    (temporary / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, temporary / name)
                if beside.generation_config is not None:
                    # Not save_pretrained, which refuses settings that several published models have.
                    beside.generation_config.to_json_file(temporary / "generation_config.json", use_diff=True)
            expected = write_weights(model, temporary, progress, beside, whole)
            write_text(temporary / "README.md", card + (f"\n{WHOLE_NOTE}\n" if whole else ""))
            return _check(model, temporary, expected, whole)
    except OSError as error:
        raise UserError(
            f"The checkpoint cannot be written to '{folder}' ({error}). Free space there, or choose another "
            f"place with --trainer.default_root_dir (fit) or --output (apply)."
        ) from error


def write_pruned(
    dense: Checkpoint,
    plan: PruningPlan,
    new_weights: NewWeights,
    folder: Path,
    *,
    calibration: dict[str, Any] | None = None,
    note: str = "",
    progress: Callable[[int], None] = lambda layer: None,
) -> dict[str, Any]:
    """Cut the plan out of the dense model, layer by layer, and ``write_checkpoint`` with its card, which also says
    ``calibration`` (the set's manifest) and ``note`` (a sentence). Where the plan keeps the whole model of several and
    that is not possible, a warning says why.
    """
    pruned, whole = open_pruned(dense, plan, new_weights), plan.keep == "whole"
    if whole and (reason := why_text_alone(dense, pruned.config, plan.removed_layers)):
        rank_zero_warn(f"--model.keep whole: the text model alone is written, because {reason}.")
        whole = False
    card = model_card(plan, layout_of(pruned.config), calibration, dense)
    card += "".join(f"\n{line}\n" for line in (note, pattern_note(pruned.config)) if line)
    check = write_checkpoint(pruned, folder, beside=dense, card=card, whole=whole, progress=progress)
    pruned.close()
    return check


def _write_config(model: LayeredModel, folder: Path, whole: Checkpoint | None) -> None:
    config = model.config
    config.architectures = [type(model.net).__name__]
    config.dtype = model.dtype
    if layout_of(config) == "per-layer":
        for key, value in modeling_pruned.identity(type(model.net).__name__).items():
            setattr(config, key, value)
        shutil.copyfile(modeling_pruned.__file__, folder / "modeling_pruned.py")
    with quiet_transformers():
        config.save_pretrained(folder)
    if whole is not None:
        write_json(folder / "config.json", whole_config(whole, config))
    if derived := {name: getattr(config, name) for name in family_of(config).derived}:
        write_json(folder / "config.json", json.loads((folder / "config.json").read_text("utf-8")) | derived)


def _check(model: LayeredModel, folder: Path, expected: Tensor, part: bool) -> dict[str, Any]:
    """Check the written folder through transformers where the model fits into memory. Else, and where it is a ``part``
    of the folder's model, check it layer by layer and without decoding."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if not part and size <= WHOLE_SHARE * free_host_bytes():
        try:
            return check_checkpoint(folder, expected)
        finally:
            if size > LARGE:  # what was read back refers to itself, and would be there when perplexity is measured
                gc.collect()
                give_back_freed_memory()
    read_back = open_layered(Checkpoint.open(str(folder)), model.dtype, expected.device)
    with torch.no_grad():
        return compare_logits(read_back.logits(probe_tokens(model.config.vocab_size)), expected)


@torch.no_grad()
def write_weights(
    model: LayeredModel,
    folder: Path,
    progress: Callable[[int], None],
    beside: Checkpoint | None,
    whole: bool,
) -> Tensor:
    """Write every parameter, with the arguments of ``write_checkpoint``, and run the probe through the layers as they
    pass: its logits ``[2, 12, V]``."""
    parameters = dict(model.net.named_parameters())
    dtype = model.dtype or next(iter(parameters.values())).dtype
    order = [*model.outside[:1], *(name for inside in model.layer_names for name in inside.values())]
    order += model.outside[1:]
    family, stock = family_of(model.config), layout_of(model.config) == "stock"
    names = family.experts if beside is None else beside.expert_names
    # transformers packs and renames what files of its own classes hold, not of others.
    experts, published = names if stock else None, {new: old for old, new in family.renamed.items() if stock}
    source = beside if whole else None
    named = (lambda name: renamed(name, published)) if source is None else whole_names(source)

    def stored(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {named(part): values for part, values in stored_parts(name, tensor, experts)}

    announced: dict[str, Tensor] = {}
    for name in order:
        kind = torch.float32 if name in model.wide else dtype
        announced |= stored(name, parameters[name].to("meta", kind))
    shards = _Shards(folder, announced, {} if source is None else tensors_beside(source))
    for name in model.outside:
        shards.write(stored(name, parameters[name]))
    hidden = model.embed(probe_tokens(model.config.vocab_size))
    for index, inside in enumerate(model.layer_names):
        with model.layer(index) as layer:
            model.announce(index + 1)
            for inner, name in inside.items():
                shards.write(stored(name, layer.get_parameter(inner)))
            hidden = model.run(index, hidden)
        progress(index)
    return model.head(hidden)


class _Shards:
    """Safetensors files with their headers and index, in which every tensor has a place that is then filled. Of
    ``tensors``, in the order of the files, the shapes are enough; those ``beside`` have a file of their own, which is
    filled at once."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor], beside: dict[str, Tensor]) -> None:
        self.tensors = tensors | beside
        shards: list[list[str]] = [[]]
        taken = 0
        for name, tensor in tensors.items():
            if taken + tensor.nbytes > SHARD_BYTES and shards[-1]:
                shards.append([])
                taken = 0
            shards[-1].append(name)
            taken += tensor.nbytes
        shards += [[*beside]] if beside else []
        count = len(shards)
        files = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        files = files if count > 1 else ["model.safetensors"]
        self.places: dict[str, tuple[Path, int]] = {}  # file, and the first byte in it
        weight_map: dict[str, str] = {}
        for file, names in zip(files, shards, strict=True):
            self._begin(folder / file, names)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            every = self.tensors.values()
            parameters, size = sum(tensor.numel() for tensor in every), sum(tensor.nbytes for tensor in every)
            index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": weight_map}
            write_json(folder / "model.safetensors.index.json", index)
        self.write(beside)

    def _begin(self, path: Path, names: list[str]) -> None:
        """A file with its header. Tensors of an odd size are the last ones, so that the others begin at multiples of
        ``ALIGNED``, where a loader that maps the file computes with them as with a copy."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts: dict[str, int] = {}
        end = 0
        of = self.tensors
        for name in sorted(names, key=lambda name: (of[name].nbytes % ALIGNED != 0, -of[name].itemsize)):
            starts[name], end = end, end + of[name].nbytes
            kind = STORED_NAMES[of[name].dtype]
            header[name] = {"dtype": kind, "shape": list(of[name].shape), "data_offsets": [starts[name], end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + LENGTH_BYTES) % ALIGNED)
        path.write_bytes(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        self.places |= {name: (path, LENGTH_BYTES + len(text) + start) for name, start in starts.items()}

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Write some tensors into their places in the files."""
        for name, tensor in tensors.items():
            if tensor.shape != self.tensors[name].shape:
                raise RuntimeError(f"{name} {tuple(tensor.shape)} comes where {self.tensors[name].shape} is announced.")
            path, start = self.places[name]
            values = tensor.detach().to(device="cpu", dtype=self.tensors[name].dtype).contiguous()
            with path.open("r+b") as file:
                file.seek(start)
                file.write(values.flatten().view(torch.uint8).numpy().data)
