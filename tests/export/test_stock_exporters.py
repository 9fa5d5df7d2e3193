"""Tools that export any transformers model take pruned folders too."""

from pathlib import Path

import pytest
import torch
from torch.export import Dim
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.export.checkpoints import save
from tests.tiny import mixed_plan, tiny_tokens


class Logits(torch.nn.Module):
    """What these tools export: tokens in, logits out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_torch_export_takes_any_length(family: str, tmp_path: Path) -> None:
    save(tmp_path / "model", family, mixed_plan)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    program = torch.export.export(Logits(model), (tiny_tokens(2, 12),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for batch, length in ((2, 12), (3, 7)):
        tokens = tiny_tokens(batch, length)
        torch.testing.assert_close(loaded(tokens), model(tokens).logits, rtol=1e-5, atol=1e-5)
