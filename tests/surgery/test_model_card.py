from typing import Any

import pytest
import yaml

from lightning_prune.surgery.model_card import model_card
from tests.tiny import make_tiny, mixed_plan


def card(layout: Any = "per-layer", calibration: dict[str, Any] | None = None, **fields: Any) -> str:
    return model_card(mixed_plan(make_tiny(), **fields), layout, calibration)


def front_matter(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    return yaml.safe_load(matter)


def test_front_matter_is_what_the_hub_reads() -> None:
    matter = front_matter(card(base_model="meta-llama/Llama-3.1-8B", method="hgsp"))
    assert matter["base_model"] == "meta-llama/Llama-3.1-8B"
    assert matter["library_name"] == "transformers"
    assert set(matter["tags"]) == {"pruning", "lightning-prune", "hgsp"}


@pytest.mark.parametrize("base_model", ["demo", "/data/models/llama", "./llama", "a: [b"])
def test_base_model_that_is_no_hub_id_stays_out_of_the_front_matter(base_model: str) -> None:
    text = card(base_model=base_model)
    assert "base_model" not in front_matter(text)
    assert f"`{base_model}`" in text


def test_facts_of_the_run_are_stated() -> None:
    text = card(
        parameters={"dense": 1234567, "pruned": 1000000},
        pruning_ratio=0.25,
        achieved_ratio=0.2468,
        calibration_fingerprint="abc123",
        calibration={"dataset": "wikitext2", "num_samples": 128},
    )
    for fact in ("1,234,567", "1,000,000", "0.2500", "0.2468", "abc123", "wikitext2", "num_samples | 128"):
        assert fact in text
    assert "| 0 | skipped | 40 |" in text
    assert "| 2 | 2 | skipped |" in text
    assert "| 3 | layer removed | layer removed |" in text


def test_remote_code_is_asked_for_only_where_it_is_needed() -> None:
    assert "trust_remote_code=True" in card("per-layer")
    assert "trust_remote_code" not in card("stock")
    assert "lightning_prune.load(" in card("stock")
