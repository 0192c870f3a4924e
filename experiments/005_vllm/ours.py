"""Answer prompts with jsfdd, greedily, with and without the draft: what was emitted, step by step, and by what margin.

    python experiments/005_vllm/ours.py --draft DIR --prompts FILE… --out ours.json

Proposals and margins come from a slow twin of the decoder that reads the whole sequence again for every step.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jsfdd.data.chat import read_prompts
from jsfdd.data.template import render_prompt
from jsfdd.decoding.generate import make_stream, prepare_params
from jsfdd.decoding.prompts import prompt_batch
from jsfdd.decoding.settings import decode_setup
from jsfdd.decoding.stream import stream
from jsfdd.models.attention import causal_view
from jsfdd.models.draft import draft_head_logits, layer_of
from jsfdd.models.target import embed_tokens, final_state, head_logits, hidden_states
from jsfdd.weights.draft import check_draft, load_draft
from jsfdd.weights.target import load_target


def answer(programs, params, prompt, max_new_tokens):
    """(tokens, accepted draft tokens of each step) of one prompt."""
    tokens, accepted = [], []
    for emitted in stream(programs, params, prompt_batch([prompt], [0], 1, seed=0), temperature=0.0):
        tokens += emitted.tokens[0, : emitted.count[0]].tolist()
        accepted += emitted.accepted[emitted.active].tolist()
    return tokens[:max_new_tokens], accepted


def make_twin(target, draft, depth):
    """Proposals of every step of one answer, each from the whole sequence, and the margins of all choices."""
    config, layer = target.config, layer_of(draft)

    def margins(logits):
        best = jax.lax.top_k(logits, 2)
        return best[1][..., 0], best[0][..., 0] - best[0][..., 1]

    @jax.jit
    def twin(params, draft_params, tokens, lengths):
        """tokens [T], lengths [S]: tokens that were there before each step. -> proposals, margins [S,G]; margins [T]."""
        hidden = hidden_states(config, params, tokens[None], draft.target_layers)[0]
        _, target_margins = margins(head_logits(config, params, final_state(config, hidden)))
        steps, rows = len(lengths), jnp.arange(len(lengths))
        embedding = jnp.tile(embed_tokens(config, params, jnp.roll(tokens, -1))[None], (steps, 1, 1))
        states = layer.apply({"params": draft_params}, hidden, method="read")
        states = jnp.tile(states[None], (steps, 1, 1))
        proposals, gaps = [], []
        for i in range(depth):
            last = lengths - 2 + i  # the pair (h, x) of the newest token but one, then the draft's own guesses
            view = causal_view(steps, len(tokens))
            guess, _ = layer.apply({"params": draft_params}, embedding, states, view, None, method="decode")
            guess = guess[rows, last]
            token, gap = margins(draft_head_logits(config, params, draft, draft_params, guess))
            proposals.append(token)
            gaps.append(gap)
            embedding = embedding.at[rows, last + 1].set(embed_tokens(config, params, token))
            states = states.at[rows, last + 1].set(guess)
        return jnp.stack(proposals, 1), jnp.stack(gaps, 1), target_margins

    return twin


def padded(values, size):
    return jnp.asarray(np.pad(np.asarray(values, np.int32), (0, size - len(values)), mode="edge"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    draft, draft_params, _ = load_draft(args.draft)
    target = load_target("smollm2")
    check_draft(target, draft, str(args.draft))
    params = prepare_params(target.params, [draft_params])
    depth, longest = args.num_draft_tokens, args.max_new_tokens
    speculative = make_stream(decode_setup(target, [draft], num_draft_tokens=depth, max_new_tokens=longest))
    plain = make_stream(decode_setup(target, max_new_tokens=longest))
    twin = make_twin(target, draft, depth)

    # Evenly spread over the files' rows, so that every source is in.
    prompts = read_prompts(args.prompts)
    chosen = [prompts[i] for i in np.linspace(0, len(prompts) - 1, min(args.count, len(prompts))).round().astype(int)]
    rows = []
    for prompt in chosen:
        messages = [{"role": "user", "content": prompt.turns[0]}]
        ids = render_prompt(target.tokenizer, messages)
        tokens, accepted = answer(speculative, params, ids, longest)
        plain_tokens, _ = answer(plain, params._replace(drafts=()), ids, longest)
        # Tokens that were there before each step: the prompt, the first token, and what earlier steps emitted.
        lengths = len(ids) + 1 + np.concatenate([[0], np.cumsum(np.array(accepted[:-1]) + 1)]).astype(int)
        row = {"id": prompt.id, "source": prompt.source, "messages": messages, "prompt": list(map(int, ids)), "tokens": tokens}
        row |= {"plain_tokens": plain_tokens, "accepted": accepted, "proposals": [], "draft_margins": []}
        sequence = [*ids, *tokens]
        size = -(-(len(sequence) + depth) // 64) * 64
        steps = len(accepted)
        if steps:
            proposals, gaps, target_margins = twin(
                target.params, draft_params, padded(sequence, size), padded(lengths, longest)
            )
            row["proposals"], row["draft_margins"] = proposals[:steps].tolist(), gaps[:steps].tolist()
            row["target_margins"] = target_margins[len(ids) - 1 : len(sequence) - 1].tolist()
        rows.append(row)
        print(f"{prompt.id}: {len(tokens)} tokens, accepted {sum(accepted)} in {steps} steps", flush=True)
    settings = {"num_draft_tokens": depth, "max_new_tokens": longest, "stop_tokens": list(target.stop_tokens)}
    args.out.write_text(json.dumps({"settings": settings, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
