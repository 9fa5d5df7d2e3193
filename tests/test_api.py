"""The functions of ``import lightning_prune as lp`` give what the commands give."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification, PreTrainedModel

import lightning_prune as lp
from lightning_prune.cli import main
from lightning_prune.models.vocabulary import Block
from tests.comparison.fake_run import write_run
from tests.methods.running import save_base
from tests.tiny import make_tiny, tiny_config, tiny_tokenizer, tiny_tokens

CPU = {"accelerator": "cpu", "verbose": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("python") / "base"
    tiny_tokenizer().save_pretrained(folder)
    return save_base(make_tiny(layers=3), folder)


@pytest.fixture(scope="module")
def wanda(base: str) -> lp.PrunedModel:
    return lp.prune(base, "wanda", 0.25, tiny_tokens(8, 16), evaluate_on=[tiny_tokens(6, 16, seed=1)], **CPU)


@pytest.fixture(scope="module")
def magnitude(base: str) -> lp.PrunedModel:
    return lp.prune(base, "magnitude", 0.25, evaluate_on=[tiny_tokens(6, 16, seed=1)], **CPU)


def test_prune_leaves_what_fit_leaves(base: str, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", tiny_tokens(8, 16).numpy())
    words = ["fit", "--config", "hgsp_taylor", "--model.pretrained", base, "--model.score_norm", "block"]
    words += ["--model.pruning_ratio", "0.25", "--data.dataset", str(tmp_path / "tokens.npy"), "--data.eval_datasets"]
    words += ["[]", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path / "logs")]
    assert main(words) == 0
    options = {"score_norm": "block", "calibration": tiny_tokens(8, 16), **CPU}
    pruned = lp.prune(base, "hgsp_taylor", 0.25, **options)
    theirs = tmp_path / "logs" / "hgsp_taylor" / "version_0"
    for name in ("scores.csv", "pruned/model.safetensors"):
        assert (pruned.folder / name).read_bytes() == (theirs / name).read_bytes(), name
    assert pruned.plan.layers == lp.PrunedModel(theirs).plan.layers
    assert len(pruned.scores) == 3 * (2 + 40)
    assert int(pruned.scores["pruned"].sum()) == sum(
        42 - len(layer.kept[Block.ATTENTION]) - len(layer.kept[Block.MLP]) for layer in pruned.plan.layers
    )
    assert pruned.metrics["pruning_ratio"]["achieved"] <= 0.25
    pruned.save_pretrained(tmp_path / "copy")
    tokens = tiny_tokens()
    with torch.no_grad():
        assert torch.equal(lp.load(tmp_path / "copy")(tokens).logits, pruned.model(tokens).logits)


def test_a_loaded_model_becomes_the_pruned_one_in_place(wanda: lp.PrunedModel) -> None:
    model = make_tiny(layers=3)
    before = sum(parameter.numel() for parameter in model.parameters())
    pruned = lp.prune(model, "wanda", 0.25, tiny_tokens(8, 16), inplace=True, **CPU)
    assert sum(parameter.numel() for parameter in model.parameters()) == pruned.plan.parameters["pruned"] < before
    with torch.no_grad():
        assert torch.equal(model(tiny_tokens()).logits, wanda.model(tiny_tokens()).logits)
        model.generate(tiny_tokens(1, 4), max_new_tokens=3, pad_token_id=1)


@pytest.mark.parametrize(
    "wrap",
    [lambda model: model.train(), lambda model: torch.nn.DataParallel(torch.compile(model))],
    ids=["training", "both wrappers"],
)
def test_what_is_plainly_meant_is_unwrapped(wrap: Callable, magnitude: lp.PrunedModel) -> None:
    model = make_tiny(layers=3)
    wrapped = wrap(model)
    training = model.training
    pruned = lp.prune(wrapped, "magnitude", 0.25, inplace=True, **CPU)
    assert pruned.plan.layers == magnitude.plan.layers
    assert model.training is training
    with torch.no_grad():
        assert torch.equal(model.eval()(tiny_tokens()).logits, magnitude.model(tiny_tokens()).logits)


def on_meta() -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config())


LORA = peft.LoraConfig(target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: peft.get_peft_model(make_tiny(), LORA), "adapter. Give model.merge_and_unload()"),
        (lambda: torch.nn.DataParallel(peft.get_peft_model(make_tiny(), LORA)), "adapter"),
        (lambda: (model := make_tiny(), setattr(model, "_hf_peft_config_loaded", True))[0], "adapter"),
        (lambda: make_tiny().model, "LlamaModel has no language model head"),
        (lambda: LlamaForSequenceClassification(tiny_config()), "LlamaForSequenceClassification has no language"),
        (on_meta, "on the meta device and has no weights"),
        (lambda: torch.nn.Linear(2, 2), "found a Linear"),
        (lambda: make_tiny().state_dict(), "found a OrderedDict"),
    ],
)
def test_models_that_are_none_of_ours_are_one_sentence(make: Callable, says: str) -> None:
    for call in (lambda it: lp.prune(it, "magnitude", 0.25, **CPU), lambda it: lp.evaluate(it, [tiny_tokens()], **CPU)):
        with pytest.raises(lp.UserError, match=re.escape(says)) as raised:
            call(make())
        assert len(str(raised.value)) < 200
    with pytest.raises(lp.UserError) as raised:
        lp.load(make())
    assert len(str(raised.value)) < 400


def test_a_loaded_model_is_evaluated_as_its_folder(base: str) -> None:
    on = [tiny_tokens(6, 16, seed=1)]
    assert lp.evaluate(make_tiny(layers=3), on, **CPU) == lp.evaluate(base, on, **CPU)


def test_a_temporary_run_has_the_settings_of_generation_and_goes_with_its_result_one_in_a_folder_stays(
    base: str, tmp_path: Path
) -> None:
    model = make_tiny(layers=3)
    model.generation_config.temperature = 0.6  # without do_sample, which transformers would not save
    pruned = lp.prune(model, "magnitude", 0.25, **CPU)
    folder = pruned.folder
    assert json.loads((folder / "pruned" / "generation_config.json").read_text())["temperature"] == 0.6
    assert model.generation_config.temperature == 0.6
    del pruned
    assert not folder.exists()
    kept = lp.prune(base, "magnitude", 0.2, folder=tmp_path / "logs", **CPU)
    assert kept.folder == tmp_path / "logs" / "magnitude" / "version_0"


def test_evaluate_and_compare_give_the_numbers_of_the_run(
    base: str, wanda: lp.PrunedModel, magnitude: lp.PrunedModel
) -> None:
    held_out, runs = tiny_tokens(6, 16, seed=1), [magnitude, wanda]
    for run in runs:
        ((dense, pruned),) = run.perplexity.values()
        assert lp.evaluate(run, [held_out], **CPU) == {"set_0.npy": pytest.approx(pruned, rel=1e-6)}
        assert lp.evaluate(run, held_out, **CPU) == {"set_0.npy": pytest.approx(pruned, rel=1e-6)}  # one set as it is
        assert lp.evaluate(base, [held_out], **CPU) == {"set_0.npy": pytest.approx(dense, rel=1e-6)}
    table = lp.compare(runs)
    assert set(table["system"]) == {"magnitude", "wanda"}
    (quality,) = (name for name in table.columns if name.startswith("perplexity"))
    assert list(table[quality]) == sorted(pruned for run in runs for _, pruned in run.perplexity.values())
    assert "<table" in table._repr_html_()
    assert "parameters" in repr(runs[0])


def test_windows_of_texts_have_their_length_and_token_ids_keep_theirs(base: str, tmp_path: Path) -> None:
    text, array, ids = tmp_path / "text.txt", tmp_path / "ids.npy", tiny_tokens(6, 16, seed=1)
    text.write_text(" ".join(f"w{2 + (7 * i * i + i) % 90}" for i in range(500)))
    np.save(array, ids.numpy())
    every = {seq_len: lp.evaluate(base, [text, array, ids], seq_len=seq_len, **CPU) for seq_len in (None, 128, 32)}
    assert every[None] == every[128] == lp.evaluate(base, text, **CPU) | every[128]
    assert every[32]["text.txt"] != every[128]["text.txt"]
    assert every[32] == lp.evaluate(base, text, seq_len=32, **CPU) | lp.evaluate(base, array, **CPU) | {
        "set_2.npy": every[32]["ids.npy"]
    }


def test_the_tokenizer_of_a_loaded_model_may_be_a_folder(base: str, tmp_path: Path) -> None:
    pruned = lp.prune(make_tiny(layers=3), "magnitude", 0.25, tokenizer=base, **CPU)
    saved = AutoTokenizer.from_pretrained(pruned.folder / "pruned")
    assert saved.get_vocab() == tiny_tokenizer().get_vocab()
    with pytest.raises(lp.UserError, match=f"no usable tokenizer in '{tmp_path}'"):
        lp.prune(make_tiny(layers=3), "magnitude", 0.25, tokenizer=str(tmp_path), **CPU)


def test_runs_of_one_target_are_together_the_best_first(tmp_path: Path) -> None:
    target = {"kind": "memory", "limit": 6 * 2**30, "reached": 1, "context": 8192, "batch": 1}
    known = (("a", 0.26, 12.0), ("b", 0.25, 13.0))
    runs = [write_run(tmp_path, name, None, one, perplexity=ppl, target=target) for name, one, ppl in known]
    table = lp.compare([*runs, write_run(tmp_path, "c", 0.2, perplexity=14.0)])
    assert list(table["system"]) == ["c", "a", "b"]
    assert list(table["target"].fillna("")) == ["", "6GiB", "6GiB"]


def test_seeds_of_the_calibration_are_one_row_with_their_deviation(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "magnitude", no_data=True, perplexity=20.0)]
    for seed, value in enumerate((11.0, 12.0, 13.0)):
        drawn = {"seed": seed, "fingerprint": str(seed) * 64}
        runs.append(write_run(tmp_path, perplexity=value, calibration=drawn))
    table = lp.compare(runs)
    assert list(table["system"]) == ["wanda", "magnitude"]
    assert list(table["perplexity demo"]) == [12.0, 20.0]
    assert list(table["n"]) == [3, 1]
    assert table["deviation demo"][0] == 1.0
    assert np.isnan(table["deviation demo"][1])
    assert table.attrs["differences"] == []


def test_runs_that_do_not_compare_are_in_tables_of_their_own(tmp_path: Path) -> None:
    other = {"fingerprint": "9" * 64}
    runs = [write_run(tmp_path, "best", perplexity=11.0, calibration=other)]
    runs += [write_run(tmp_path, name, perplexity=value) for name, value in (("b", 13.0), ("a", 12.0))]
    with pytest.warns(UserWarning, match=r"differ in calibration tokens \(fingerprint\): do not compare") as warned:
        table = lp.compare(runs)
    assert [one.filename for one in warned] == [__file__]  # the caller's line, not one of this package
    assert table.columns[0] == "table"
    assert list(table["table"]) == [1, 1, 2]  # the largest first, as on the command line
    assert list(table["system"]) == ["a", "b", "best"]
    assert len(table.attrs["differences"]) == 1
    alike = [write_run(tmp_path / root, "one", calibration=facts) for root, facts in (("x", {}), ("y", other))]
    with pytest.warns(UserWarning, match="do not compare"):
        table = lp.compare(alike)
    assert all(str(tmp_path / root / "one") in table.attrs["differences"][0] for root in ("x", "y"))  # of one name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "table" not in lp.compare(runs[1:])


def test_a_table_without_quality_says_how_to_get_one(base: str) -> None:
    pruned = lp.prune(base, "magnitude", 0.25, **CPU)
    with pytest.warns(UserWarning, match="No run measured a perplexity: give evaluate_on"):
        lp.compare([pruned])


def test_one_run_may_be_given_as_it_is(wanda: lp.PrunedModel) -> None:
    for one in (wanda, wanda.folder, str(wanda.folder)):
        assert list(lp.compare(one)["system"]) == ["wanda"]


def test_text_is_read_with_the_tokenizer_beside_a_loaded_model(wanda: lp.PrunedModel, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(wanda.folder / "pruned")
    (tmp_path / "own.txt").write_text(" ".join(f"w{i % 50}" for i in range(400)))
    text, options = [str(tmp_path / "own.txt")], {"seq_len": 16, **CPU}
    assert lp.evaluate(wanda.model, text, **options) == lp.evaluate(wanda, text, **options)


def test_what_prune_returns_is_exported_after_other_functions_were_used(wanda: lp.PrunedModel, tmp_path: Path) -> None:
    assert "zeros" in lp.export(wanda, "stock", tmp_path / "padded", verbose=False)
    assert lp.load(tmp_path / "padded").config.model_type == "llama"


def test_apply_makes_the_checkpoint_of_a_plan_again(base: str, wanda: lp.PrunedModel, tmp_path: Path) -> None:
    folder = lp.apply(wanda.plan, base, tmp_path / "again", verbose=False)
    expected = (wanda.folder / "pruned" / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == expected


def test_calibration_sets_from_text_a_file_a_dataset_and_token_ids(base: str, tmp_path: Path) -> None:
    texts = [" ".join(f"w{2 + (7 * i + j) % 90}" for j in range(50)) for i in range(6)]
    one = lp.calibration_set("\n\n".join(texts), tiny_tokenizer(), num_samples=5, seq_len=16, seed=3)
    assert one.shape == (5, 16)
    assert torch.equal(lp.calibration_set(texts, base, 5, 16, seed=3), one)
    rows = datasets.Dataset.from_dict({"text": texts})
    assert torch.equal(lp.calibration_set(rows, base, 5, 16, seed=3), one)
    file = tmp_path / "my_text.txt"
    file.write_text("\n\n".join(texts), encoding="utf-8")
    assert torch.equal(lp.calibration_set(file, base, 5, 16, seed=3), one)
    assert torch.equal(lp.calibration_set(str(file), base, 5, 16, seed=3), one)
    stream = torch.tensor(tiny_tokenizer()("\n\n".join(texts))["input_ids"])
    assert torch.equal(lp.calibration_set(stream, num_samples=5, seq_len=16, seed=3), one)
    assert torch.equal(lp.calibration_set(tiny_tokens(4, 9).numpy()), tiny_tokens(4, 9))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda base: lp.prune(base, "wandaa", **CPU), "no shipped configuration 'wandaa'"),
        (lambda base: lp.prune(base, "wanda", 1.5, tiny_tokens(8, 16), **CPU), "--model.pruning_ratio: found 1.5"),
        (lambda base: lp.prune(base, "wanda", temprature=1, **CPU), "temprature"),
        (lambda base: lp.prune(base, "wanda", calibration=3, **CPU), "calibration: found int. Give the name"),
        (lambda base: lp.prune(base, "wanda", inplace=True, **CPU), "inplace"),
        (lambda base: lp.prune(base, "wanda", 0.1, target_parameters="20k", **CPU), "and target_parameters: give one"),
        (lambda base: lp.export(base, "gguf", "out", dtype="f3"), "--dtype: found 'f3'; allowed: f32, f16"),
        (lambda base: lp.export(base, "onnx", "out"), "--format: found 'onnx'; allowed: gguf, stock"),
        (lambda base: lp.calibration_set("a b c"), "tokenizer: found none"),
        (lambda base: lp.calibration_set(torch.zeros(3)), "token ids: found torch.float32"),
        (lambda base: lp.calibration_set({"a": 1}, base), "found dict"),
        (lambda base: lp.calibration_set(["a word \ud800 " * 9], base), r"calibration data holds '\\ud800', half of"),
        (lambda base: lp.calibration_set("my_txt.txt", base), "no file or folder 'my_txt.txt', and no corpus"),
        (lambda base: lp.evaluate(base, []), "nothing to evaluate on"),
        (lambda base: lp.compare([]), "runs: the list is empty"),
        (lambda base: lp.compare([base]), "run"),
    ],
)
def test_mistakes_raise_one_error_and_print_nothing(base: str, call, says: str, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(lp.UserError, match=says):
        call(base)
    assert capfd.readouterr().out == ""
