"""Answer the prompts of ours.json with vLLM, greedily, with or without an exported draft.

    VENV/bin/python experiments/005_vllm/served.py --target DIR [--draft DIR] --ours ours.json --out served.json

Runs where vLLM is installed, without jsfdd. Beside vLLM's own counters it notes what the scheduler counted at each step and
what the draft proposed, by wrapping the two functions that know.
"""

import argparse
import json
from pathlib import Path

from engine import make_engine
from vllm import SamplingParams, __version__
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.spec_decode.metrics import SpecDecodingStats

PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
DRAFTS = "vllm:spec_decode_num_drafts"


def record(accepted: list, proposals: list) -> None:
    """Note every step's count of accepted tokens, and every proposal."""
    observe, propose = SpecDecodingStats.observe_draft, SpecDecodeBaseProposer.propose

    def observed(self, num_draft_tokens, num_accepted_tokens):
        accepted.append(num_accepted_tokens)
        return observe(self, num_draft_tokens, num_accepted_tokens)

    def proposed(self, *args, **kwargs):
        result = propose(self, *args, **kwargs)
        drafted = result[0] if isinstance(result, tuple) else result
        proposals.append(drafted[0].tolist())
        return result

    SpecDecodingStats.observe_draft, SpecDecodeBaseProposer.propose = observed, proposed


def counters(llm) -> tuple[int, list[int]]:
    """(drafts, accepted per position) since the start, as vLLM itself reports them."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    return metrics[DRAFTS].value, list(metrics[PER_POSITION].values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--ours", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    jsfdd_run = json.loads(args.ours.read_text())
    settings = jsfdd_run["settings"]
    accepted, proposals = [], []
    speculation = {}
    if args.draft:
        record(accepted, proposals)
        depth = settings["num_draft_tokens"]
        eagle3 = "draft_vocab_size" in json.loads((args.draft / "config.json").read_text())
        speculation["speculative_config"] = {
            "method": "eagle3" if eagle3 else "eagle",
            "model": str(args.draft),
            "num_speculative_tokens": depth,
            "draft_sample_method": "probabilistic",  # as the card says; greedy decoding does not ask
        }
    llm = make_engine(args.target, disable_log_stats=False, **speculation)
    sampling = SamplingParams(temperature=0.0, max_tokens=settings["max_new_tokens"], stop_token_ids=settings["stop_tokens"])
    tokenizer = llm.get_tokenizer()
    rows = []
    # One at a time with a draft, so that every count belongs to a prompt; without one only the texts matter.
    for group in ([row] for row in jsfdd_run["rows"]) if args.draft else [jsfdd_run["rows"]]:
        accepted.clear()
        proposals.clear()
        outputs = llm.generate([{"prompt_token_ids": row["prompt"]} for row in group], sampling, use_tqdm=False)
        for row, output in zip(group, outputs, strict=True):
            rendered = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
            rows.append(
                {
                    "id": row["id"],
                    "tokens": list(output.outputs[0].token_ids),
                    "accepted": list(accepted),
                    "proposals": list(proposals),
                    # Would a client that sends messages instead of ids get the same prompt?
                    "same_prompt": tokenizer.encode(rendered, add_special_tokens=False) == row["prompt"],
                }
            )
            print(row["id"], len(rows[-1]["tokens"]), sum(rows[-1]["accepted"]), flush=True)
    result = {"vllm": __version__, "rows": rows}
    if args.draft:
        result["drafts"], result["accepted_per_position"] = counters(llm)
    args.out.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
