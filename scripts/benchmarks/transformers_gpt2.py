#!/usr/bin/env python3
"""Continues prompts with transformers' GPT-2 on PyTorch, for scripts/benchmarks/decoding.py.

    .venv-torch/bin/python scripts/benchmarks/transformers_gpt2.py FOLDER NUM_CORES

scripts/benchmarks/decoding.py writes a model into FOLDER, and runs this in an environment that has PyTorch and nothing
of trainer's. Each line of standard input is JSON: prompts (a list of lists of tokens), num_tokens, top_k (null is
greedy) and is_static (which cache); the answer, a line of JSON, has the tokens of the whole texts.
"""

import json
import sys

if __name__ == "__main__" and (len(sys.argv) != 3 or sys.argv[1].startswith("-")):
    is_asked = sys.argv[1:] in (["-h"], ["--help"])
    print(__doc__, end="", file=sys.stdout if is_asked else sys.stderr)
    sys.exit(0 if is_asked else 2)

import torch
import transformers

SEED = 0


def main() -> None:
    """Continues prompts until standard input ends."""
    folder, num_cores = sys.argv[1:]
    torch.set_num_threads(int(num_cores))
    torch.manual_seed(SEED)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", dtype=torch.float32
    ).eval()
    # Padding and [UNK] need not be kept back: the benchmark's model never writes them. Nothing ends a text early.
    model.generation_config.suppress_tokens = None
    model.generation_config.eos_token_id = None
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        prompts = torch.tensor(job["prompts"])
        settings = {"do_sample": False} if job["top_k"] is None else {"do_sample": True, "top_k": job["top_k"]}
        if job["is_static"]:
            settings |= {"cache_implementation": "static", "disable_compile": True}
        with torch.inference_mode():
            texts = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=job["num_tokens"], **settings
            )
        print(json.dumps(texts.tolist()), flush=True)


if __name__ == "__main__":
    main()
