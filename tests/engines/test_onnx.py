"""The ONNX exporter of torch takes pruned folders; onnxruntime computes what transformers computes."""

from pathlib import Path

import pytest
import torch
from torch.export import Dim
from transformers import AutoModelForCausalLM

from tests.export.checkpoints import FAMILIES, save
from tests.export.test_stock_exporters import Logits
from tests.tiny import mixed_plan, tiny_tokens

pytest.importorskip("onnxscript", reason="needs onnxscript and onnxruntime: pip install onnxscript onnxruntime")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install onnxruntime")
pytestmark = pytest.mark.engines


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_onnx_file_gives_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    save(tmp_path / "model", family, mixed_plan)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    file = tmp_path / "model.onnx"
    torch.onnx.export(Logits(model), (tiny_tokens(2, 12),), file, dynamo=True, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(file)
    for batch, length in ((2, 12), (3, 7)):
        tokens = tiny_tokens(batch, length)
        (logits,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(tokens).logits, rtol=1e-4, atol=1e-4)
