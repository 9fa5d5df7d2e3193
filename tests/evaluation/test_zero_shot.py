import functools
import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from lightning_prune.evaluation import zero_shot
from lightning_prune.evaluation.zero_shot import Metric, ZeroShotResult, check_tasks
from lightning_prune.support.errors import UserError
from tests.cutting import cut
from tests.tiny import make_tiny, mixed_plan, tiny_tokenizer

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

TASK = """\
task: {name}
dataset_path: {dataset}
dataset_kwargs: {{data_files: {{test: "{file}"}}, cache_dir: "{cache}"}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def documents() -> list[dict[str, Any]]:
    """Twenty questions of four words with two-word answers, by a fixed rule."""
    word = lambda number: f"w{2 + number * 7 % 90}"  # noqa: E731
    return [
        {
            "question": " ".join(word(11 * row + column) for column in range(4)),
            "choices": [f"{word(5 * row + choice)} {word(row + 13 * choice)}" for choice in range(3)],
            "answer": row % 3,
        }
        for row in range(20)
    ]


@pytest.fixture
def task_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task on local data and one whose data is nowhere."""
    from lm_eval.tasks import TaskManager

    # Without the harness's own thousands of tasks, whose YAML takes eight seconds to read.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    folder, file = tmp_path / "tasks", tmp_path / "test.jsonl"
    folder.mkdir()
    file.write_text("\n".join(json.dumps(row) for row in documents()))
    for name, dataset in (("tiny_choice", "json"), ("lost_choice", "nobody/has-this")):
        text = TASK.format(name=name, dataset=dataset, file=file, cache=tmp_path / "cache")
        (folder / f"{name}.yaml").write_text(text)
    return folder


@needs_harness
@pytest.mark.parametrize("begins", [False, True])
def test_accuracy_of_a_pruned_model_is_that_of_its_own_log_likelihoods(task_folder: Path, begins: bool) -> None:
    dense = make_tiny()
    model, tokenizer = cut(dense, mixed_plan(dense)), tiny_tokenizer()
    if begins:  # as Llama's and Gemma's tokenizers do
        begin = TemplateProcessing(single="w0 $A", special_tokens=[("w0", 0)])
        tokenizer.backend_tokenizer.post_processor = begin
    right = 0
    for row in documents():
        likelihoods = []
        asked = tokenizer(row["question"])["input_ids"]
        assert (asked[0] == 0) == begins
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(f"{row['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                logs = model(ids).logits[0].double().log_softmax(-1)
            likelihoods.append(sum(float(logs[at - 1, ids[0, at]]) for at in range(len(asked), ids.shape[1])))
        right += likelihoods.index(max(likelihoods)) == row["answer"]
    accuracy = right / 20
    assert 0 < accuracy < 1

    manager = check_tasks(["tiny_choice"], task_folder)
    metric = zero_shot.zero_shot(model, tokenizer, ["tiny_choice"], manager, batch_size=3).tasks["tiny_choice"]["acc"]
    assert (metric.value, metric.stderr) == pytest.approx((accuracy, math.sqrt(accuracy * (1 - accuracy) / 19)))


@needs_harness
def test_task_that_cannot_be_had_is_named(task_folder: Path) -> None:
    with pytest.raises(UserError, match=r"--tasks: the data of 'lost_choice' cannot be loaded"):
        check_tasks(["tiny_choice", "lost_choice"], task_folder)
    with pytest.raises(UserError, match=r"--tasks: 'tiny_chioce' is not a task"):
        check_tasks(["tiny_chioce"], task_folder)
    with pytest.raises(UserError, match=r"--include-path: no folder"):
        check_tasks(["tiny_choice"], task_folder / "nowhere")


def test_missing_harness_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lm-eval.*pip install '\.\[eval\]'"):
        check_tasks(["piqa"])


def test_mean_takes_acc_where_a_task_has_no_acc_norm() -> None:
    tasks = {
        "both": {"acc": Metric(0.5, 0.1), "acc_norm": Metric(0.7, 0.1)},
        "plain": {"acc": Metric(0.3, None)},
        "other": {"perplexity": Metric(9.0, None)},
    }
    result = ZeroShotResult(tasks, "0.4.9")
    assert result.mean == pytest.approx({"acc": 0.4, "acc_norm": 0.5})
    assert result.to_json()["tasks"]["both"]["acc_norm"] == {"value": 0.7, "stderr": 0.1}
    assert ZeroShotResult({"other": tasks["other"]}, "0.4.9").mean == {}


def test_a_table_has_a_column_per_model_and_only_shares_become_percent() -> None:
    metrics = {
        "acc": (0.5, "50.00 ± 1.00"),
        "exact_match,strict-match": (0.25, "25.00 ± 1.00"),
        "prompt_level_strict_acc": (0.125, "12.50 ± 1.00"),
        "word_perplexity": (12.345, "12.345 ± 0.010"),
        "byte_perplexity": (0.9, "0.900 ± 0.010"),  # below 1, and no share all the same
        "brier_score": (0.5, "0.500 ± 0.010"),
    }
    one = {"task": {name: Metric(value, 0.01) for name, (value, _) in metrics.items()}}
    other = {"task": {name: Metric(0.5, None) for name in metrics} | {"acc": Metric(0.55, None)}}
    shown = zero_shot.table({"dense": ZeroShotResult(one, "0.4.9"), "pruned": ZeroShotResult(other, "0.4.9")})
    lines = [re.split(r"  +", line) for line in shown.splitlines() if line.startswith("task ")]
    cells = {metric: values for _, metric, *values in lines}
    assert cells["metric"] == ["dense", "pruned"]
    assert {name: cells[name][0] for name in metrics} == {name: text for name, (_, text) in metrics.items()}
    assert cells["acc"][1] == "55.00"
    assert "percent" in shown
    values = {"dense": 71.5, "pruned": 0.5}
    squad = {side: ZeroShotResult({"squad": {"f1": Metric(value, None)}}, "0") for side, value in values.items()}
    assert zero_shot.table(squad).splitlines()[1].split() == ["squad", "f1", "71.500", "0.500"]  # in percent already
