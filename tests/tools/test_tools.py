"""Tools that people use on checkpoints, on one whose layers differ: a row per tool, as ``docs/tools.md`` lists them.

The checkpoint has a layer without attention, one without an MLP and narrow ones. A row is skipped where its tool is not
installed; ``tests/engines`` has the servers.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from tests.cutting import cut
from tests.engines.test_exporters import Logits
from tests.tiny import make_tiny, mixed_plan, tiny_plan, tiny_tokenizer, tiny_tokens

DOCS = Path(__file__).parents[2] / "docs" / "tools.md"
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@dataclass(frozen=True)
class Bench:
    """A pruned checkpoint, and room to work in."""

    folder: Path
    room: Path

    def load(self, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
        """What a user loads."""
        return auto.from_pretrained(self.folder, trust_remote_code=True, **options).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint: 2 or 1 of 2 KV heads or none, 40 to 3 channels or none."""
    path = tmp_path_factory.mktemp("checkpoint")
    dense = make_tiny("llama")
    cut(dense, mixed_plan(dense)).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def same_logits(bench: Bench, other: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(other(tiny_tokens()).logits, bench.load()(tiny_tokens()).logits, rtol=0, atol=tolerance)


def close_logits(bench: Bench, other: Any, within: float) -> None:
    """Quantised weights: other numbers, near the same prediction."""
    expected, found = bench.load()(tiny_tokens()).logits, other(tiny_tokens()).logits.float()
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < within, error


def again(bench: Bench, auto: Any = AutoModelForCausalLM) -> Any:
    """What was saved in the room."""
    return auto.from_pretrained(bench.room, trust_remote_code=True).eval()


def falls(losses: list[float]) -> None:
    assert losses[-1] < 0.9 * losses[0], losses


def pipeline_for_text(bench: Bench) -> None:
    """From the folder, as from a model in memory."""
    for model in (str(bench.folder), bench.load()):
        write = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer(), trust_remote_code=True)
        text = write("w5 w6 w7", **{**GREEDY, "pad_token_id": 1})[0]["generated_text"]
        expected = bench.load().generate(torch.tensor([[5, 6, 7]]), **GREEDY)[0]
        assert re.findall(r"w\d+", text) == [f"w{token}" for token in expected.tolist()]


def sampling(bench: Bench) -> None:
    torch.manual_seed(3)
    found = bench.load().generate(tiny_tokens(), **{**GREEDY, "do_sample": True}, top_k=5, num_return_sequences=4)
    assert found.shape == (8, tiny_tokens().shape[1] + 6)
    likely = bench.load()(found[:, :-1]).logits.topk(5).indices  # every token drawn was among the five likeliest
    drawn = found[:, 1:, None]
    assert bool((likely == drawn).any(-1)[:, -6:].all())


def beam_search(bench: Bench) -> None:
    model, options = bench.load(), {**GREEDY, "num_beams": 3}
    expected = model.generate(tiny_tokens(), use_cache=False, **options)
    assert torch.equal(model.generate(tiny_tokens(), **options), expected)


def trainer(bench: Bench) -> None:
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in tiny_tokens(batch=4)] * 6
    options = {"per_device_train_batch_size": 4, "learning_rate": 0.03, "logging_steps": 1, "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(bench.room), report_to=[], save_strategy="no", **options)
    made = Trainer(model=bench.load(), args=arguments, train_dataset=rows)
    made.train()
    falls([entry["loss"] for entry in made.state.log_history if "loss" in entry])
    made.save_model()
    torch.testing.assert_close(again(bench)(tiny_tokens()).logits, made.model.eval()(tiny_tokens()).logits)


def lora(bench: Bench) -> None:
    """Learns, merges into plain weights of the same widths, and saves them."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(bench.load(), peft.LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM"))
    falls(train(adapted, tiny_tokens(batch=4)))
    expected = adapted.eval()(input_ids=tiny_tokens()).logits
    merged = adapted.merge_and_unload()
    merged.save_pretrained(bench.room)
    saved = again(bench)
    torch.testing.assert_close(saved(tiny_tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    assert {n: p.shape for n, p in saved.named_parameters()} == {n: p.shape for n, p in bench.load().named_parameters()}


def save_and_reload(bench: Bench, sharded: bool = False) -> None:
    bench.load().save_pretrained(bench.room, max_shard_size="10kB" if sharded else "5GB")
    assert (len(list(bench.room.glob("*.safetensors"))) > 1) is sharded
    same_logits(bench, again(bench), 0)


def device_map_and_disk_offload(bench: Bench) -> None:
    pytest.importorskip("accelerate")
    where = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    where |= {f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(4)}
    model = bench.load(device_map=where, offload_folder=str(bench.room))
    assert {p.device.type for p in model.model.layers[1].parameters()} == {"meta"}
    same_logits(bench, model)


def gradient_checkpointing(bench: Bench) -> None:
    plain, checkpointed = bench.load().train(), bench.load().train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model(tiny_tokens(), labels=tiny_tokens()).loss.backward()
    for expected, parameter in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def hidden_states_and_attentions(bench: Bench) -> None:
    """Hidden states of every layer, attentions of those that have attention."""
    model = bench.load(attn_implementation="eager")
    out = model(tiny_tokens(), output_hidden_states=True, output_attentions=True)
    with_attention = sum("attention" not in layer.skip for layer in model.config.per_layer_config)
    assert (len(out.hidden_states), len(out.attentions)) == (1 + len(model.model.layers), with_attention)
    assert with_attention < len(model.model.layers)


def resized_embeddings(bench: Bench) -> None:
    model = bench.load()
    model.resize_token_embeddings(100)
    assert model(tiny_tokens()).logits.shape[-1] == 100
    torch.testing.assert_close(model(tiny_tokens()).logits[..., :96], bench.load()(tiny_tokens()).logits)


def decoder_without_head(bench: Bench) -> None:
    expected = bench.load()(tiny_tokens(), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(bench.load(AutoModel)(tiny_tokens()).last_hidden_state, expected)


def evaluation_harness(bench: Bench) -> None:
    """Log-likelihoods are sums of what the logits say."""
    huggingface, instance = (pytest.importorskip(f"lm_eval.{name}") for name in ("models.huggingface", "api.instance"))
    model = bench.load()
    harness = huggingface.HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=2, device="cpu")
    request = ("w5 w6 w7", " w8 w9")
    ((found, _),) = harness.loglikelihood([instance.Instance("loglikelihood", {}, request, 0)], disable_tqdm=True)
    logs = model(torch.tensor([[5, 6, 7, 8, 9]])).logits.double().log_softmax(-1)[0]
    assert found == pytest.approx(float(logs[2, 8] + logs[3, 9]), rel=1e-4)


def compiled(bench: Bench) -> None:
    same_logits(bench, torch.compile(bench.load(), backend="aot_eager"))


def exported(bench: Bench) -> None:
    program = torch.export.export(
        Logits(bench.load()), (tiny_tokens(2, 12),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},)
    )
    for batch, length in ((2, 12), (3, 7)):
        tokens = tiny_tokens(batch, length)
        torch.testing.assert_close(program.module()(tokens), bench.load()(tokens).logits, rtol=1e-5, atol=1e-5)


def onnx(bench: Bench) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(Logits(bench.load()), (tiny_tokens(),), bench.room / "model.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(bench.room / "model.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: tiny_tokens().numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), bench.load()(tiny_tokens()).logits, rtol=1e-4, atol=1e-4)


def executorch(bench: Bench) -> None:
    exir, runtime = pytest.importorskip("executorch.exir"), pytest.importorskip("executorch.runtime")
    program = torch.export.export(Logits(bench.load()), (tiny_tokens(),))
    (bench.room / "model.pte").write_bytes(exir.to_edge_transform_and_lower(program).to_executorch().buffer)
    method = runtime.Runtime.get().load_program(bench.room / "model.pte").load_method("forward")
    (logits,) = method.execute((tiny_tokens(),))
    torch.testing.assert_close(logits, bench.load()(tiny_tokens()).logits, rtol=1e-4, atol=1e-4)


def torchao_int8(bench: Bench) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = bench.load()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    close_logits(bench, model, 0.05)


def bitsandbytes(bench: Bench, bits: int, within: float) -> None:
    for package in ("bitsandbytes", "accelerate"):
        pytest.importorskip(package)
    wanted = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_compute_dtype=torch.float32)
    close_logits(bench, bench.load(quantization_config=wanted), within)


def continuous_batching(bench: Bench) -> None:
    """Refused where heads differ, right where they do not: the card says so."""
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)  # by itself it takes nine tenths of the memory
    options = {"generation_config": GenerationConfig(**GREEDY), "continuous_batching_config": small}
    narrow = bench.load().generate_batch(inputs=tiny_tokens().tolist(), **options)
    assert all(not result.generated_tokens for result in narrow.values())
    dense = make_tiny("llama")
    heads, channels = list(range(dense.config.num_key_value_heads)), list(range(40))
    equal = cut(dense, tiny_plan(dense, [(heads, channels[: 40 - 10 * layer]) for layer in range(4)]))
    found = equal.generate_batch(inputs=tiny_tokens().tolist(), **options)
    expected = equal.generate(tiny_tokens(), **GREEDY)[:, -6:].tolist()
    assert [found[name].generated_tokens for name in sorted(found)] == expected


def train(model: Any, tokens: Tensor, labels: Tensor | None = None) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens, labels=tokens if labels is None else labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def classifier(bench: Bench, auto: Any, labels: Tensor) -> None:
    """Reads what the decoder puts out, learns, and is loaded again with its head."""
    torch.manual_seed(0)
    model = bench.load(auto, num_labels=3)
    expected = bench.load(AutoModel)(tiny_tokens()).last_hidden_state
    assert torch.equal(model.base_model(tiny_tokens()).last_hidden_state, expected)
    model.config.pad_token_id = 0
    falls(train(model.train(), tiny_tokens(batch=4), labels))
    model.eval().save_pretrained(bench.room)
    assert torch.equal(again(bench, auto)(tiny_tokens()).logits, model(tiny_tokens()).logits)


# As in docs/tools.md → what it does.
TOOLS: dict[str, Callable[[Bench], None]] = {
    "`pipeline`": pipeline_for_text,
    "sampling": sampling,
    "beam search": beam_search,
    "`Trainer`": trainer,
    "LoRA, with merge (peft)": lora,
    "save and reload": save_and_reload,
    "sharded saving": partial(save_and_reload, sharded=True),
    "`device_map` and disk offload": device_map_and_disk_offload,
    "gradient checkpointing": gradient_checkpointing,
    "hidden states and attentions": hidden_states_and_attentions,
    "resized embeddings": resized_embeddings,
    "`AutoModel`": decoder_without_head,
    "`AutoModelForSequenceClassification`": partial(
        classifier, auto=AutoModelForSequenceClassification, labels=torch.tensor([0, 1, 2, 1])
    ),
    "`AutoModelForTokenClassification`": partial(
        classifier, auto=AutoModelForTokenClassification, labels=tiny_tokens(batch=4) % 3
    ),
    "lm-evaluation-harness": evaluation_harness,
    "`torch.compile`": compiled,
    "`torch.export`": exported,
    "ONNX": onnx,
    "ExecuTorch": executorch,
    "torchao int8": torchao_int8,
    "bitsandbytes 8 bit": partial(bitsandbytes, bits=8, within=0.05),
    "bitsandbytes 4 bit": partial(bitsandbytes, bits=4, within=0.65),
    "continuous batching of transformers": continuous_batching,
}
SLOW = ("`torch.compile`", "`torch.export`")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TOOLS])
def test_tool(name: str, folder: Path, tmp_path: Path) -> None:
    TOOLS[name](Bench(folder, tmp_path))


def test_page_lists_every_tool_and_no_other() -> None:
    listed = re.findall(r"^\| (?!tool \||---)(.+?) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == list(TOOLS)
