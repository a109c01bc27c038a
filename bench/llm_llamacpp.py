"""llama.cpp with a GGUF file and one thread: seconds of each token; run in an environment of its own.

`llm_llamacpp.py FILE` reads lines of JSON, `{"prompt": [ids], "count": n}`, and answers each with `{"times": [...]}`:
greedy, the first with the prompt.
"""

from __future__ import annotations

import json
import sys
import time

import llama_cpp


def main() -> None:
    model = llama_cpp.Llama(sys.argv[1], n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False, logits_all=False)
    for line in sys.stdin:
        asked = json.loads(line)
        model.reset()
        times: list[float] = []
        began = time.perf_counter()
        for _ in model.generate(asked["prompt"], temp=0.0, repeat_penalty=1.0):
            times.append(time.perf_counter() - began)
            if len(times) == asked["count"]:
                break
            began = time.perf_counter()
        print(json.dumps({"times": times}), flush=True)


if __name__ == "__main__":
    main()
