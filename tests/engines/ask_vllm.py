"""Answers questions about a checkpoint with vLLM; runs in the interpreter of an environment that has ``vllm``.

    python ask_vllm.py folder < questions.json > answers.json

Questions: ``{"models": [folder, …], "prompts": [[token, …], …], "length": n}``, the folders below the one given, one
engine after another in one process because importing vLLM takes longest. All prompts go to the engine at once, which
batches them as it likes. Answers: for every model and prompt ``n`` tokens chosen greedily, and for each of them the
log-probabilities of the 20 likeliest; or, for a model that vLLM refuses, its words.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

answers_to = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # the engine talks on stdout

from vllm import LLM, SamplingParams  # noqa: E402


def answer(folder: Path, prompts: list[list[int]], length: int) -> list[dict[str, Any]]:
    engine = LLM(
        str(folder),
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
    )
    wanted = SamplingParams(temperature=0, max_tokens=length, logprobs=20, ignore_eos=True, detokenize=False)
    found = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted, use_tqdm=False)
    outputs = [output.outputs[0] for output in found]
    return [
        {
            "tokens": list(output.token_ids),
            "top": [{str(token): entry.logprob for token, entry in step.items()} for step in output.logprobs],
        }
        for output in outputs
    ]


def main() -> None:
    questions = json.load(sys.stdin)
    answers: dict[str, Any] = {}
    for name in questions["models"]:
        try:
            answers[name] = answer(Path(sys.argv[1]) / name, questions["prompts"], questions["length"])
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}"
        gc.collect()
    json.dump(answers, answers_to)
    answers_to.close()
    os._exit(0)  # the engine's threads outlive a plain return


if __name__ == "__main__":
    main()
