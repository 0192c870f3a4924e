"""SmolLM2 answers the demo's training prompts: chats.jsonl, the text that the demo scores and trains on.

Drafts learn best from the target's own text, and text that the target wrote can be shipped with the package.
Answers are sampled; one that reaches the limit is cut after its last whole sentence, so that every answer ends as one.
"""

import argparse
import json
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jsfdd.base.mesh import make_mesh
from jsfdd.data.chat import read_prompts
from jsfdd.data.template import render_prompt
from jsfdd.decoding.generate import make_generate, prepare_params
from jsfdd.decoding.settings import decode_setup
from jsfdd.decoding.state import PromptBatch
from jsfdd.weights.target import load_target

WIDTHS = (64, 128, 192, 256, 320)


def cut_to_sentence(text: str) -> str:
    """Up to the last end of a sentence or line; the whole text where there is none."""
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)|\n", text)]
    return text[: ends[-1]].rstrip() if ends else text


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-new-tokens", type=int, default=120)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    target = load_target("smollm2")
    prompts = read_prompts([args.prompts])
    decode = make_generate(decode_setup(target, max_new_tokens=args.max_new_tokens), make_mesh(data=1))
    params = prepare_params(target.params)
    messages = [[] for _ in prompts]
    start = time.perf_counter()
    for turn in range(max(len(p.turns) for p in prompts)):
        rows = [i for i, p in enumerate(prompts) if len(p.turns) > turn]
        for i in rows:
            messages[i].append({"role": "user", "content": prompts[i].turns[turn]})
        ids = {i: render_prompt(target.tokenizer, messages[i]) for i in rows}
        rows.sort(key=lambda i: len(ids[i]))
        for first in range(0, len(rows), args.batch_size):
            chosen = rows[first : first + args.batch_size]
            width = next(w for w in WIDTHS if w >= len(ids[chosen[-1]]))
            tokens = np.zeros((args.batch_size, width), np.int32)
            lengths = np.zeros(args.batch_size, np.int32)
            for k, i in enumerate(chosen):
                tokens[k, : len(ids[i])], lengths[k] = ids[i], len(ids[i])
            base = jax.random.fold_in(jax.random.key(args.seed), turn)
            keys = jax.vmap(lambda i, base=base: jax.random.fold_in(base, i))(jnp.arange(args.batch_size) + first)
            batch = PromptBatch(jnp.asarray(tokens), jnp.asarray(lengths), keys)
            out = decode(params, batch, args.temperature)
            for k, i in enumerate(chosen):
                answer = np.asarray(out.tokens[k, : out.lengths[k]])
                text = target.tokenizer.decode(answer, skip_special_tokens=True).strip()
                whole = answer[-1] in target.stop_tokens
                messages[i].append({"role": "assistant", "content": text if whole else cut_to_sentence(text)})
            print(f"turn {turn + 1}: {first + len(chosen)}/{len(rows)}  {time.perf_counter() - start:.0f} s", flush=True)
    with args.out.open("w", encoding="utf-8") as file:
        for prompt, conversation in zip(prompts, messages, strict=True):
            row = {"id": prompt.id, "source": prompt.source, "messages": conversation}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
