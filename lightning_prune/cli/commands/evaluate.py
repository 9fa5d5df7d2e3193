"""``lightning-prune evaluate``: what a pruned model costs to run, and what it still knows."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_prune.cli.parser import PlainParser, some_path
from lightning_prune.support.errors import UserError

# The seven common-sense tasks that structured-pruning papers report since LLM-Pruner.
TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


def main(argv: list[str]) -> int:
    """Measure one model, with ``--dense`` beside its base model; write ``efficiency.json`` and ``zero_shot.json``."""
    given = _parser().parse_args(argv)
    if not (given.efficiency or given.zero_shot):
        raise UserError(
            "Nothing to measure: add --efficiency, --zero-shot, or both. lightning-prune test measures perplexity."
        )
    model_folder, output = _places(given.model, given.output)

    # After the arguments, so that --help does not wait for torch.
    from lightning_prune.evaluation.zero_shot import check_tasks
    from lightning_prune.models.checkpoint import Checkpoint
    from lightning_prune.models.model_slot import DTYPES
    from lightning_prune.models.weights import OPTION
    from lightning_prune.support.files import check_writable

    check_writable(output, "--output")
    device = _device(given.device)
    opened: dict[str, Checkpoint] = {}
    for name, path in (("dense", given.dense), ("pruned", model_folder)):
        try:
            opened |= {} if path is None else {name: Checkpoint.open(path)}
        except UserError as error:
            raise UserError(str(error).replace(OPTION, "--model" if name == "pruned" else "--dense")) from None
    # One dtype for both: a dense bf16 folder beside a pruned fp32 one would compare formats, not models.
    dtype = DTYPES[given.precision] if given.precision else opened["pruned"].stored_dtype
    manager = check_tasks(given.tasks, given.include_path) if given.zero_shot else None
    _measure(given, opened, manager, dtype, device, output)
    return 0


def _measure(given: Any, models: dict[str, Any], manager: Any, dtype: Any, device: Any, output: Path) -> None:
    """Load one model after the other, measure it, and write what was measured."""
    import torch

    from lightning_prune.evaluation import efficiency, zero_shot
    from lightning_prune.runs.environment import environment
    from lightning_prune.support.files import write_json

    setting = efficiency.Setting(
        prompt_length=given.prompt_length,
        decode_length=given.decode_length,
        context_length=given.context_length or given.prompt_length + given.decode_length,
        batch_sizes=tuple(given.batch_sizes),
        repeats=given.repeats,
    )
    costs: dict[str, efficiency.Efficiency] = {}
    knowledge: dict[str, zero_shot.ZeroShotResult] = {}
    for name, opened in models.items():
        if given.zero_shot and opened.tokenizer is None:
            raise UserError(
                f"--zero-shot: '{opened.pretrained}' holds no tokenizer. Save the model's tokenizer files there."
            )
        model: Any = opened.load(dtype).to(device)
        if given.efficiency:
            costs[name] = efficiency.measure(model, opened, setting, name)
        if given.zero_shot:
            batch = given.eval_batch_size
            knowledge[name] = zero_shot.zero_shot(model, opened.tokenizer, given.tasks, manager, batch)
        del model

    used_dtype = str(dtype).removeprefix("torch.")
    facts = {
        "models": {name: opened.pretrained for name, opened in models.items()},
        "environment": environment(used_dtype, device),
    }
    if given.efficiency:
        threads = torch.get_num_threads()
        report = efficiency.EfficiencyReport(
            setting, str(device), used_dtype, threads, costs["pruned"], costs.get("dense")
        )
        write_json(output / "efficiency.json", asdict(report) | facts)
        print(f"\n{report.table()}\nefficiency: {output / 'efficiency.json'}")
    if given.zero_shot:
        write_json(output / "zero_shot.json", {name: item.to_json() for name, item in knowledge.items()} | facts)
        print(f"\n{zero_shot.table(knowledge)}\nzero-shot: {output / 'zero_shot.json'}")


def _places(model: str, output: Path | None) -> tuple[str, Path]:
    """The model's folder and where results go: the run folder that holds it, unless ``--output`` says otherwise."""
    folder = Path(model).expanduser()
    run = folder if (folder / "pruned").is_dir() else folder.resolve().parent
    if folder == run:
        folder = run / "pruned"
    if output is None and not (run / "metrics.json").is_file():
        raise UserError(f"--output: '{model}' is not part of a run folder, so say where the results go.")
    return (str(folder) if folder.is_dir() else model), output or run


def _device(name: str) -> Any:
    from lightning_prune.support.devices import CPU, accelerator

    here = accelerator()
    if name not in ("auto", "cpu") and (here is None or name not in ("gpu", here.type)):
        raise UserError(f"--device: found {name}, but torch finds {here or 'no accelerator'}. Choose cpu or auto.")
    return CPU if name == "cpu" or here is None else here


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog="lightning-prune evaluate",
        description="Measure what a pruned model costs to run (--efficiency) and what it still knows (--zero-shot). "
        "Tables go to the terminal, efficiency.json and zero_shot.json to the run folder of the model. "
        "Perplexity is measured by 'lightning-prune test'.",
        epilog="examples: lightning-prune evaluate --model logs/wanda/version_0 --dense demo --efficiency; "
        "lightning-prune evaluate --model logs/wanda/version_0 --zero-shot --tasks arc_easy piqa",
    )
    parser.add_model()
    add = parser.add_argument
    add("--dense", metavar="MODEL", help="the base model, measured in the same process and shown beside it")
    add(
        "--output", type=some_path, metavar="FOLDER", help="where the JSON files go. Default: the run folder of --model"
    )
    text = "of both models' weights. Default: as --model is stored"
    add("--precision", choices=("32-true", "bf16-true", "16-true"), help=text)
    kinds = ("auto", "cpu", "gpu", "cuda", "xpu", "mps")
    add("--device", choices=kinds, default="auto", help="auto is an accelerator where there is one")

    add = parser.add_argument_group("efficiency").add_argument
    text = (
        "parameters, MACs and KV-cache bytes per token (from the shapes), weights on disk, tokens per second of "
        "prefill and greedy decoding, peak memory (GPU: allocated by torch; CPU: resident set of the process)"
    )
    add("--efficiency", action="store_true", help=text)
    add("--batch-sizes", type=int, nargs="+", default=[1, 16], metavar="N", help="sequences at a time. Default: 1 16")
    add("--prompt-length", type=int, default=128, metavar="N", help="tokens of the prefill. Default: 128")
    add("--decode-length", type=int, default=32, metavar="N", help="tokens decoded after it. Default: 32")
    text = "tokens that one token attends to when MACs are counted. Default: --prompt-length + --decode-length"
    add("--context-length", type=int, metavar="N", help=text)
    add("--repeats", type=int, default=5, metavar="N", help="timed runs, of which the median counts. Default: 5")

    add = parser.add_argument_group("zero-shot (lm-eval: pip install '.[eval]')").add_argument
    add("--zero-shot", action="store_true", help="accuracy on tasks of the LM Evaluation Harness, no examples given")
    add("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=f"default: {' '.join(TASKS)}")
    add("--include-path", type=some_path, metavar="FOLDER", help="folder with further tasks as YAML files")
    add("--eval-batch-size", type=int, default=16, metavar="N", help="sequences per forward pass. Default: 16")
    return parser
