import json
from pathlib import Path

import pytest

from lightning_prune.checkpoint.plan import PruningPlan
from lightning_prune.support.errors import UserError
from tests.tiny import make_tiny, mixed_plan


@pytest.fixture
def plan() -> PruningPlan:
    return mixed_plan(make_tiny(), calibration_fingerprint="ab", dtype="bfloat16", weights_updated=True)


def test_round_trip(plan: PruningPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    raw = json.loads((tmp_path / "plan.json").read_text())
    assert raw["format"] == 1
    assert raw["removed_layers"] == [3]
    assert raw["layers"][2] == {"layer": 2, "kept_kv_heads": [0, 1], "kept_channels": []}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: {**raw, "format": 2}, "format 2"),
        (lambda raw: [raw], "is no plan"),
        (lambda raw: {k: v for k, v in raw.items() if k != "method"}, "method"),
        (lambda raw: {**raw, "surprise": 1}, "surprise"),
        (lambda raw: {**raw, "layers": [{"layer": 0}]}, "kept_kv_heads"),
        (
            lambda raw: {**raw, "layers": [{"layer": 0, "kept_kv_heads": None, "kept_channels": []}]},
            r"layers\[0\]\.kept_kv_heads",
        ),
        (lambda raw: {**raw, "layers": [{"layer": 0, "kept_kv_heads": [0.5], "kept_channels": []}]}, "0.5"),
        (lambda raw: {**raw, "parameters": {"dense": 3}}, "pruned"),
        (lambda raw: {**raw, "parameters": {"dense": "3", "pruned": 2}}, "dense"),
    ],
)
def test_file_that_is_no_plan(plan: PruningPlan, tmp_path: Path, edit, message: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(edit(plan.to_json())))
    with pytest.raises(UserError, match=message) as error:
        PruningPlan.load(file)
    assert str(error.value).startswith("--plan: ")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read"), (b"{", "cannot be read as JSON"), (b"\xff\xfe\x00", "as JSON")]
)
def test_file_that_is_not_there_or_no_json(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"--plan: .*{message}"):
        PruningPlan.load(tmp_path / "plan.json")
