"""Our plain decoding against transformers' `generate`: same weights, prompts and tokens, turn about. See README.md.

python compare.py --torch-python PYTHON --model DIRECTORY
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from jsfdd.data.chat import read_prompts
from jsfdd.data.template import render_prompt
from jsfdd.weights.target import load_target

HERE = Path(__file__).parent
SMOKE = bool(os.environ.get("SMOKE"))
NEW_TOKENS, COUNT, ROUNDS = (8, 2, 1) if SMOKE else (64, 8, 3)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch-python", required=True, help="an interpreter with torch and transformers")
    parser.add_argument("--model", required=True, help="SmolLM2 as a directory: experiments/005_vllm/write_target.py")
    arguments = parser.parse_args()
    target = load_target("smollm2")
    from importlib.resources import files

    rows = read_prompts((Path(str(files("jsfdd.data.demo") / "eval_prompts.jsonl")),))[:: 40 // COUNT][:COUNT]
    ids = [render_prompt(target.tokenizer, [{"role": "user", "content": row.turns[0]}]) for row in rows]
    assert max(map(len, ids)) <= 64
    seconds, answers = {"jsfdd": [], "transformers": []}, {}
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.json"
        prompts.write_text(json.dumps(ids))
        for _ in range(ROUNDS):
            for name, command in {
                "jsfdd": [sys.executable, HERE / "plain_ours.py", prompts, str(NEW_TOKENS)],
                "transformers": [arguments.torch_python, HERE / "plain_theirs.py", prompts, str(NEW_TOKENS), arguments.model],
            }.items():
                out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
                seconds[name].append(sum(out["seconds"]))
                answers[name] = out["answers"]
    tokens = COUNT * NEW_TOKENS
    equal = sum(
        a == b
        for jsfdd_answer, peer_answer in zip(answers["jsfdd"], answers["transformers"])
        for a, b in zip(jsfdd_answer, peer_answer)
    )
    rates = {name: [tokens / s for s in values] for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(rates["jsfdd"], rates["transformers"])]
    results = {
        "prompts": COUNT,
        "new_tokens": NEW_TOKENS,
        "tokens_per_second": rates,
        "ratios": ratios,
        "equal_tokens": f"{equal} of {tokens}",
    }
    print(json.dumps(results, indent=1))
    if not SMOKE:
        (HERE / "compare.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
