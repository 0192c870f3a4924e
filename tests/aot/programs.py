"""The shapes that are compiled, and every stage's program of them."""

import dataclasses

from jsfdd.commands.ahead import lower_decode, lower_hidden, lower_score, lower_train
from jsfdd.data.batches import Shape
from jsfdd.decoding.settings import DecodeSetup, TreeShape
from jsfdd.models.architecture import DecoderConfig, Experts, Rope
from jsfdd.models.draft import draft_config
from jsfdd.training.recipe import Recipe

# The widths of a tile, so that what is read in the programs is not padding; seven layers, as an EAGLE-3 draft needs.
TOY = DecoderConfig(
    family="llama", vocab_size=2048, hidden_size=256, intermediate_size=512, num_layers=7, num_heads=4, num_kv_heads=2,
    head_dim=128, max_position=4096, rms_norm_eps=1e-5, rope=Rope(1e4), tie_embeddings=False,
)  # fmt: skip
# Heads of 64, three for keys, and several rows: the compiler then likes to lay a cache out anew.
NARROW = dataclasses.replace(TOY, head_dim=64, num_heads=6, num_kv_heads=3)
MIXTURE = dataclasses.replace(TOY, num_layers=2, experts=Experts(8, 2, 256, normalised=True))
SMOLLM2 = DecoderConfig(
    family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
    head_dim=64, max_position=8192, rms_norm_eps=1e-5, rope=Rope(1e5), tie_embeddings=True,
)  # fmt: skip
SHAPE, PROMPTS = Shape(1, 512), Shape(8, 128)
READ, TRAINED, NEW_TOKENS = Shape(2, 2048), Shape(1, 2048), 128  # SmolLM2's
TREE = TreeShape(depth=4, top_k=4, nodes=12)
EAGLE = Recipe(compute_dtype="bfloat16")
EAGLE3 = Recipe(draft_kind="eagle3", compute_dtype="bfloat16", draft_steps=2)
PLAIN_DECODING = DecodeSetup(target=NARROW, max_new_tokens=64, stop_tokens=(2,))
TREES = DecodeSetup(
    target=NARROW, drafts=(draft_config(NARROW),), num_draft_tokens=4, max_new_tokens=64, stop_tokens=(2,), tree=TREE
)
CHAINS = DecodeSetup(
    target=SMOLLM2, drafts=(draft_config(SMOLLM2),), num_draft_tokens=4, max_new_tokens=NEW_TOKENS, stop_tokens=(2,)
)

PROGRAMS = {
    "SmolLM2 score": lambda mesh: lower_score(SMOLLM2, mesh, READ),
    "SmolLM2 hidden states": lambda mesh: lower_hidden(SMOLLM2, mesh, READ),
    "SmolLM2 train": lambda mesh: lower_train(SMOLLM2, mesh, TRAINED, EAGLE),
    "SmolLM2 evaluate": lambda mesh: lower_decode(CHAINS, mesh, Shape(1, READ.length)),
    "score": lambda mesh: lower_score(TOY, mesh, SHAPE, keep_hidden=True),
    "mixture": lambda mesh: lower_score(MIXTURE, mesh, SHAPE),
    "EAGLE-3 states": lambda mesh: lower_hidden(TOY, mesh, SHAPE, layers=(2, 3, 4)),
    "EAGLE-3": lambda mesh: lower_train(TOY, mesh, SHAPE, EAGLE3),
    "plain": lambda mesh: lower_decode(PLAIN_DECODING, mesh, PROMPTS),
    "tree": lambda mesh: lower_decode(TREES, mesh, PROMPTS),
}


def cache_size(name: str) -> int | None:
    """Elements of the target's keys, or of its values, on one device; None of a program that has no cache."""
    setups = {"SmolLM2 evaluate": (CHAINS, 1, READ.length), "plain": (PLAIN_DECODING, *PROMPTS), "tree": (TREES, *PROMPTS)}
    if name not in setups:
        return None
    setup, rows, length = setups[name]
    target = setup.target
    return target.num_layers * rows * target.num_kv_heads * target.head_dim * setup.cache_slots(length)
