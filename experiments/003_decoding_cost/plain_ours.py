"""Greedy plain decoding with jsfdd, batch 1: PROMPTS(json of token ids) NEW_TOKENS -> JSON on stdout. See compare.py."""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from jsfdd.base.mesh import make_mesh
from jsfdd.decoding.generate import make_generate, prepare_params
from jsfdd.decoding.settings import DecodeSetup
from jsfdd.decoding.state import PromptBatch
from jsfdd.weights.target import load_target

prompts, new_tokens = json.loads(open(sys.argv[1]).read()), int(sys.argv[2])
target = load_target("smollm2")
decode = make_generate(DecodeSetup(target=target.config, max_new_tokens=new_tokens), make_mesh())
params = prepare_params(target.params)


def run(ids):
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(ids)] = ids
    batch = PromptBatch(jnp.asarray(tokens), jnp.array([len(ids)], jnp.int32), jax.random.key(0)[None])
    begin = time.perf_counter()
    answer = np.asarray(decode(params, batch, 0.0).tokens)[0].tolist()
    return answer, time.perf_counter() - begin


run(prompts[0])
answers, seconds = zip(*(run(ids) for ids in prompts))
print(json.dumps({"answers": answers, "seconds": seconds}))
