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
    assert raw["format"] == 2
    assert raw["removed_layers"] == [3]
    assert raw["layers"][2] == {"layer": 2, "kept": {"attention": [0, 1], "mlp": []}}


def test_a_plan_of_format_1_is_the_same_plan(plan: PruningPlan, tmp_path: Path) -> None:
    raw = plan.to_json()
    raw["format"] = 1
    raw["layers"] = [
        {"layer": one["layer"], "kept_kv_heads": one["kept"]["attention"], "kept_channels": one["kept"]["mlp"]}
        for one in raw["layers"]
    ]
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    assert PruningPlan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: {**raw, "format": 3}, "format 3"),
        (lambda raw: [raw], "is not a plan"),
        (lambda raw: {k: v for k, v in raw.items() if k != "method"}, "method"),
        (lambda raw: {**raw, "surprise": 1}, "surprise"),
        (lambda raw: {**raw, "layers": [{"layer": 0}]}, r"layers\[0\]\.kept"),
        (lambda raw: {**raw, "layers": [{"layer": 0, "kept": {"attention": None}}]}, r"layers\[0\]\.kept\.attention"),
        (lambda raw: {**raw, "layers": [{"layer": 0, "kept": {"attention": [0.5], "mlp": []}}]}, "0.5"),
        (lambda raw: {**raw, "layers": [{"layer": 0, "kept": {"heads": [0]}}]}, "heads"),
        (lambda raw: {**raw, "format": 1, "layers": [{"layer": 0, "kept_kv_heads": [0]}]}, r"layers\[0\]\.kept"),
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


def test_file_that_is_not_there_or_no_json(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    with pytest.raises(UserError, match=r"--plan: .*cannot read"):
        PruningPlan.load(file)
    for content in (b"{", b"\xff\xfe\x00"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"--plan: .*cannot be read as JSON"):
            PruningPlan.load(file)
