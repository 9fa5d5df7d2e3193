"""Tools that export any transformers model take pruned folders too, and compute what transformers computes."""

from pathlib import Path

import pytest
import torch
from torch.export import Dim
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.formats.checkpoints import FAMILIES, save
from tests.tiny import mixed_plan, tiny_tokens

SHAPES = ({0: Dim.AUTO, 1: Dim.AUTO},)
OTHERS = ((2, 12), (3, 7))  # batch and length; the first ones are those of the export


class Logits(torch.nn.Module):
    """What these tools export: tokens in, logits out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def saved(folder: Path, family: str) -> Logits:
    save(folder, family, mixed_plan)
    return Logits(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_torch_export_takes_any_length(family: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", family)
    program = torch.export.export(model, (tiny_tokens(2, 12),), dynamic_shapes=SHAPES)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for size in OTHERS:
        tokens = tiny_tokens(*size)
        torch.testing.assert_close(loaded(tokens), model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.engines
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_onnx_file_gives_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs onnxscript and onnxruntime: pip install onnxscript onnxruntime")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install onnxruntime")
    model = saved(tmp_path / "model", family)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (tiny_tokens(2, 12),), file, dynamo=True, dynamic_shapes=SHAPES)
    session = onnxruntime.InferenceSession(file)
    for size in OTHERS:
        tokens = tiny_tokens(*size)
        (logits,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(tokens), rtol=1e-4, atol=1e-4)
