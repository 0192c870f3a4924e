"""Compare what jsfdd and vLLM emitted, proposed and counted: WORK (as run.sh filled it) OUT.json

python experiments/005_vllm/compare.py WORK experiments/005_vllm/results.json
"""

import json
import sys
from pathlib import Path


def per_position(rows, depth):
    """How often each draft position was accepted."""
    return [sum(count > i for row in rows for count in row) for i in range(depth)]


def until_stop(row, limit):
    """vLLM's counts as jsfdd counts: draft tokens after a stop token are not part of the answer. A cut at `limit` stays."""
    counts = list(row["accepted"])
    if counts and len(row["tokens"]) < limit:
        position = 1 + sum(count + 1 for count in counts[:-1])
        counts[-1] = min(counts[-1], len(row["tokens"]) - position)
    return counts


def main(work: Path, out: Path) -> None:
    jsfdd_run = json.loads((work / "ours.json").read_text())
    served = json.loads((work / "served.json").read_text())
    plain = work / "served_plain.json"  # vLLM without a draft; null in the results if it was not run
    plain = json.loads(plain.read_text()) if plain.exists() else None
    depth, limit = jsfdd_run["settings"]["num_draft_tokens"], jsfdd_run["settings"]["max_new_tokens"]
    pairs = list(zip(jsfdd_run["rows"], served["rows"], strict=True))
    same_text = [a["tokens"] == b["tokens"] == a["plain_tokens"] for a, b in pairs]
    served_counts = [until_stop(b, limit) for _, b in pairs]
    differences, proposed, equal, margins = [], 0, 0, []
    for (a, b), counts, same in zip(pairs, served_counts, same_text):
        if not same:
            at = next((i for i, (x, y) in enumerate(zip(a["tokens"], b["tokens"])) if x != y), None)
            gap = None if at is None else a["target_margins"][at]
            differences.append({"prompt": a["id"], "what": "text", "position": at, "margin": gap})
            continue
        for step, (x, y, gap) in enumerate(zip(a["proposals"], b["proposals"], a["draft_margins"])):
            agree = next((i for i in range(depth) if x[i] != y[i]), depth)
            proposed, equal = proposed + depth, equal + sum(p == q for p, q in zip(x, y))
            margins += gap
            if agree < depth:  # what follows was drafted from another token
                differences.append({"prompt": a["id"], "what": "proposal", "step": step, "depth": agree, "margin": gap[agree]})
        if a["accepted"] != counts:
            differences.append({"prompt": a["id"], "what": "counts", "ours": a["accepted"], "vllm": counts})
    accepted = [row["accepted"] for row in jsfdd_run["rows"]]
    steps, all_steps = sum(map(len, accepted)), sum(map(len, served_counts))
    result = {
        "vllm": served["vllm"],
        "settings": jsfdd_run["settings"],
        "prompts": len(pairs),
        "tokens": sum(len(row["tokens"]) for row in jsfdd_run["rows"]),
        "same_prompt_ids": sum(b["same_prompt"] for _, b in pairs),
        "same_text": sum(same_text),
        "same_text_as_vllm_without_a_draft": plain
        and sum(b["tokens"] == c["tokens"] for b, c in zip(served["rows"], plain["rows"], strict=True)),
        "jsfdd": {
            "verifications": steps,
            "accepted_per_position": per_position(accepted, depth),
            "tau": 1 + sum(map(sum, accepted)) / steps,
        },
        "vllm_as_it_counts": {
            "verifications": served["drafts"],
            "accepted_per_position": served["accepted_per_position"],
            "tau": 1 + sum(served["accepted_per_position"]) / served["drafts"],
        },
        "vllm_without_tokens_after_a_stop": {
            "verifications": all_steps,
            "accepted_per_position": per_position(served_counts, depth),
            "tau": 1 + sum(map(sum, served_counts)) / all_steps,
        },
        "prompts_with_equal_counts_at_every_step": sum(a["accepted"] == y for (a, _), y in zip(pairs, served_counts)),
        "proposed_tokens_compared": proposed,
        "proposed_tokens_equal": equal,
        "smallest_margin_of_a_proposal": min(margins, default=None),
        "differences": differences,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
