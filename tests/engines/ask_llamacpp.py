"""Answers questions about a GGUF file with llama.cpp; runs in the interpreter of an environment that has ``xllamacpp``.

    python ask_llamacpp.py model.gguf < questions.json > answers.json

Questions: ``{"prompts": [[token, …], …], "length": n, "texts": ["…", …], "messages": [...]}``. Answers: for every
prompt ``n`` tokens chosen greedily, and for each of them the log-probabilities of the 20 likeliest, None where its
bytes are no text (the engine leaves those out); for every text its tokens and the text that those give back; the prompt
that the chat template makes of the messages.
"""

import json
import os
import sys
import urllib.request
from typing import Any

import xllamacpp


def main() -> None:
    answers_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engine talks on stdout
    questions = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx = 512
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    server = xllamacpp.Server(params)

    def ask(path: str, **question: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/{path}", json.dumps(question).encode(), headers)
        return json.load(urllib.request.urlopen(request))

    answers: dict[str, Any] = {"prompts": [], "tokens": [], "texts": []}
    for prompt in questions.get("prompts", []):
        found = ask(
            "completion",
            prompt=prompt,
            n_predict=questions["length"],
            n_probs=20,
            temperature=0,
            cache_prompt=False,
            return_tokens=True,
            ignore_eos=True,
        )
        shown = iter(found.get("completion_probabilities", []))
        step = next(shown, None)
        top: list[dict[int, float] | None] = []
        for token in found["tokens"]:
            if step is not None and step["id"] == token:
                top.append({item["id"]: item["logprob"] for item in step["top_logprobs"]})
                step = next(shown, None)
            else:
                top.append(None)
        answers["prompts"].append({"tokens": found["tokens"], "top": top})
    for text in questions.get("texts", []):
        tokens = ask("tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        answers["tokens"].append(tokens)
        answers["texts"].append(ask("detokenize", tokens=tokens)["content"])
    if "messages" in questions:
        answers["chat"] = ask("apply-template", messages=questions["messages"])["prompt"]
    json.dump(answers, answers_to)
    answers_to.close()
    os._exit(0)  # the engine's threads outlive a plain return


if __name__ == "__main__":
    main()
