"""The same with transformers' generate on torch: PROMPTS NEW_TOKENS MODEL_DIRECTORY -> JSON on stdout. See compare.py."""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM

prompts, new_tokens = json.loads(open(sys.argv[1]).read()), int(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[3], dtype=torch.float32).eval()


def run(ids):
    tokens = torch.tensor([ids])
    begin = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, min_new_tokens=new_tokens,
            max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return out[0, len(ids) :].tolist(), time.perf_counter() - begin


run(prompts[0])
answers, seconds = zip(*(run(ids) for ids in prompts))
print(json.dumps({"answers": answers, "seconds": seconds}))
