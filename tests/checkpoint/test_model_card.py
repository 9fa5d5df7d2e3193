import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_prune.checkpoint.cut import layout_of
from lightning_prune.checkpoint.model_card import model_card, stock_card
from lightning_prune.checkpoint.plan import LayerPlan
from lightning_prune.checkpoint.write import write_pruned
from lightning_prune.cli import main
from lightning_prune.models.checkpoint import Checkpoint
from lightning_prune.models.vocabulary import Block
from tests.formats.checkpoints import Plan, save
from tests.tiny import make_tiny, mixed_plan, tiny_tokens, uniform_plan


def card(layout: Any = "per-layer", calibration: dict[str, Any] | None = None, **fields: Any) -> str:
    return model_card(mixed_plan(make_tiny(), **fields), layout, calibration)


def front_matter(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    return yaml.safe_load(matter)


CACHED = "snapshots/0e9e39f249a16976918f6564b8830bc894c89659/"


@pytest.mark.parametrize(
    ("base_model", "home", "shown"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", "`meta-llama/Llama-3.1-8B`"),
        ("demo", None, "`demo`"),
        ("/home/me/models/llama", None, "`llama`"),
        ("a: [b", None, r"a: \[b"),
        (f"/home/me/models--org--name--with-dashes/{CACHED}", "org/name--with-dashes", "`org/name--with-dashes`"),
        (f"/home/me/models--gpt2/{CACHED}", "gpt2", "`gpt2`"),
    ],
)
def test_front_matter_is_what_the_hub_reads(base_model: str, home: str | None, shown: str) -> None:
    text = card(base_model=base_model, method="hgsp")
    matter = front_matter(text)
    assert matter.get("base_model") == home
    assert matter["library_name"] == "transformers"
    assert matter["pipeline_tag"] == "text-generation"
    assert set(matter["tags"]) == {"pruning", "lightning-prune", "hgsp"}
    assert f"| Base model | {shown} |" in text
    assert f"# {shown.replace('`', '')} pruned with hgsp" in text
    assert "/home" not in text
    assert "0e9e39f" not in text


def test_a_folder_of_the_hubs_cache_is_the_hub_model_and_not_the_one_its_card_names(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--llama" / CACHED
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nbase_model: meta-llama/Llama-3.1-8B\nlicense: llama3.1\n---\n")
    (folder / "config.json").write_text('{"_name_or_path": "/checkpoints/1"}')
    matter = front_matter(card(base_model=f"{folder}/"))
    assert (matter["base_model"], matter["license"]) == ("org/llama", "llama3.1")


@pytest.mark.parametrize("recovered", [False, True])
def test_a_model_that_was_pruned_before_names_the_chain(tmp_path: Path, recovered: bool) -> None:
    recovery = "\n## Recovery\n\n| | |\n" if recovered else ""
    base, chain = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"
    for number, method in enumerate(("wanda", "hgsp_taylor", "slimgpt")):
        text = card(base_model=base, method=method)
        assert front_matter(text)["base_model"] == "meta-llama/Llama-3.1-8B"
        assert text.count("\n# meta-llama/Llama-3.1-8B pruned with ") == 1
        if number:
            assert f"| Base model | `pruned` (from `meta-llama/Llama-3.1-8B`) |\n| Before | {chain} |" in text
        else:
            assert "Before" not in text
        chain += f" → {method}" + (" → recovered" if recovered else "")
        folder = tmp_path / str(number) / "pruned"
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(text + recovery)
        base = str(folder)


def test_facts_of_the_run_are_stated_once() -> None:
    text = card(
        parameters={"dense": 1234567, "pruned": 1000000},
        pruning_ratio=0.25,
        achieved_ratio=0.2468,
        calibration_fingerprint="abc123",
        calibration={"dataset": "/home/me/secret/wiki.txt", "num_samples": 128, "seed": None, "fingerprint": "abc123"},
    )
    for fact in ("1,234,567", "1,000,000", "0.2500", "0.2468", "abc123", "dataset | wiki.txt", "num_samples | 128"):
        assert text.count(fact) == 1
    for layer in ("| 0 | skipped | 40 |", "| 2 | 2 | skipped |", "| 3 | layer removed | layer removed |"):
        assert layer in text
    assert "None" not in text
    assert "trust_remote_code=True" in text
    assert "trust_remote_code" not in card("stock")


def test_what_is_left_of_experts_is_in_the_card() -> None:
    layers = [
        LayerPlan(0, {Block.ATTENTION: [0, 1], Block.EXPERT: [0, 2, 5]}),
        LayerPlan(1, {Block.MIXER: [0], Block.MLP: [1, 2, 3, 4]}),
        LayerPlan(2, {Block.MIXER: [], Block.MLP: []}),
    ]
    counts = {"dense": 1_000_000, "pruned": 900_000, "dense_active": 400_000, "pruned_active": 390_000}
    text = card("stock", layers=layers, parameters=counts)
    rows = [
        "Layer of the base model | KV heads | MLP channels | Experts",
        "0 | 2 | none | 3",
        "1 | whole mixer | 4 | none",
    ]
    rows += ["2 | layer removed | layer removed | layer removed"]
    rows += ["Active parameters before | 400,000", "Active parameters after | 390,000"]
    assert all(f"| {row} |" in text for row in rows), text


HOSTILE = ("a: b", "- a", "---\nlicense: mit", "'\"", "#x", "!!python/object/apply:os.system [id]", "*a", "{a")
HOSTILE += ("\x1b[31m", "\udc80", "a\u2028b", "<script>|`$", "null", "1", "")


@pytest.mark.parametrize("name", HOSTILE)
def test_front_matter_and_tables_survive_any_name(name: str) -> None:
    text = card(method=name, base_model=f"/models/{name}", calibration={"dataset": f"/data/{name}", name: name})
    matter = front_matter(text)
    assert set(matter) == {"library_name", "pipeline_tag", "tags"}
    assert matter["tags"][:2] == ["pruning", "lightning-prune"]
    assert all(isinstance(tag, str) for tag in matter["tags"])
    text.encode("utf-8")
    assert "<script>" not in text
    assert "\x1b" not in text
    body = text.split("---\n", 2)[2]
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {3, 4}  # two columns above, three below
    assert sum(line.startswith("# ") for line in body.splitlines()) == 1


OTHER = {"license": "other", "license_name": "own", "base_model": "org/x"}
OTHER |= {"license_link": "https://huggingface.co/org/x/blob/main/LICENSE"}


@pytest.mark.parametrize(
    ("readme", "config", "expected"),
    [
        (None, {}, {}),
        (None, {"LICENSE": "    Apache License\n  Version 2.0, January 2004\n"}, {"license": "apache-2.0"}),
        (None, {"LICENSE": "MIT License\n\nCopyright (c)"}, {"license": "mit"}),
        (None, {"LICENSE": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n"}, {}),
        ("# no front matter\nlicense: mit\n", {}, {}),
        ("---\nlicense: apache-2.0\n---\n# A model\n", {}, {"license": "apache-2.0"}),
        ("---\r\nlicense: mit\r\n---\r\n", {}, {"license": "mit"}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {}, {"license": ["mit", "apache-2.0"]}),
        (None, {"license": "gemma"}, {"license": "gemma"}),
        (None, {"_name_or_path": "org/llama"}, {"base_model": "org/llama"}),
        (None, {"_name_or_path": "/home/me/llama"}, {}),
        ("---\nbase_model: org/first\n---\n", {}, {"base_model": "org/first"}),
        ("---\nbase_model: [org/a, org/b]\n---\n", {}, {"base_model": ["org/a", "org/b"]}),
        ("---\nbase_model: /home/me/llama\n---\n", {}, {}),
        ("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nbase_model: org/x\n---\n", {}, OTHER),
        ("---\nlicense: other\nlicense_link: /home/me/LICENSE\n---\n", {}, {"license": "other"}),
        ("---\nlicense: {a: 1}\nbase_model: 3\n---\n", {}, {}),
        ("---\nlicense: 'a: b'\n---\n", {}, {}),
        ("---\n[broken\n---\n", {"license": 7}, {}),
        ("---\n- a list\n---\n", {}, {}),
        ("---\n" + "[" * 5000 + "\n---\n", {}, {}),
    ],
)
def test_licence_and_origin_are_what_the_base_model_says(
    tmp_path: Path, readme: str | None, config: dict[str, Any], expected: dict[str, Any]
) -> None:
    if readme is None:
        os.mkfifo(tmp_path / "README.md")  # opening it would wait for a writer
    else:
        (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    (tmp_path / "LICENSE").write_text(config.get("LICENSE", ""))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config), encoding="utf-8")
    matter = front_matter(card(base_model=str(tmp_path)))
    assert {key: matter[key] for key in matter if key not in ("library_name", "pipeline_tag", "tags")} == expected


def test_licence_is_read_where_the_model_is_now_and_no_file_names_that_folder(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_tiny().save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"_name_or_path": str(base)}))
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    plan = mixed_plan(make_tiny(), base_model=f"{tmp_path}/where/it/was")
    facts = {"dataset": str(tmp_path / "text.txt")}
    write_pruned(Checkpoint.open(str(base)), plan, lambda layer: {}, tmp_path / "out", calibration=facts)
    assert front_matter((tmp_path / "out" / "README.md").read_text())["license"] == "mit"
    assert "license" not in front_matter(model_card(plan, "stock"))
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("plan_of", [mixed_plan, uniform_plan])
def test_commands_of_the_card_run(
    plan_of: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the server's, which ``tests/engines`` starts."""
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    expected = save(tmp_path / "path" / "to" / "this" / "folder", plan=plan_of)(tiny_tokens()).logits
    layout = layout_of(Checkpoint.open("path/to/this/folder").config)
    text = card(layout)
    for block in blocks(text, "python"):
        found: dict[str, Any] = {}
        exec(block, found)
        if "Classification" in block:
            assert found["model"](tiny_tokens(batch=1)).logits.shape == (1, 2)
        else:
            assert torch.equal(found["model"](tiny_tokens()).logits, expected)
    commands = [shlex.split(line) for block in blocks(text, "bash") for line in block.splitlines()]
    mine = [command for command in commands if command[0] == "lightning-prune"]
    assert [command[5] for command in mine] == (["gguf"] if layout == "stock" else ["gguf", "stock"])
    for command in mine:
        assert main(command[1:]) == 0, capsys.readouterr().err
        assert Path(command[-1]).exists()
    assert [command[:2] for command in commands if command not in mine] == [["vllm", "serve"]]


def test_card_of_a_padded_checkpoint_says_how_to_load_that_one() -> None:
    text = stock_card(card())
    assert front_matter(text) == front_matter(card())
    assert "trust_remote_code" not in text
    assert "--format stock" not in text
    assert "padded with zeros" in text
    assert text.count("## Loading") == 1
    assert "| 3 | layer removed | layer removed |" in text
    assert "## Loading" in stock_card("")
    assert stock_card("# Own words").startswith("# Own words\n\n")
