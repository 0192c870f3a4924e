"""The shapes that are compiled, and every stage's program of them."""

import dataclasses

from jsfdd.commands.ahead import lower_decode, lower_hidden, lower_score, lower_train
from jsfdd.data.batches import Shape
from jsfdd.decoding.settings import DecodeSetup, TreeShape
from jsfdd.models.architecture import DecoderConfig, Rope
from jsfdd.models.draft import draft_config
from jsfdd.training.recipe import Recipe

# The widths of a tile, so that what is read in the programs is not padding; seven layers, as an EAGLE-3 draft needs.
TOY = DecoderConfig(
    family="llama", vocab_size=2048, hidden_size=256, intermediate_size=512, num_layers=7, num_heads=4, num_kv_heads=2,
    head_dim=128, max_position=4096, rms_norm_eps=1e-5, rope=Rope(1e4), tie_embeddings=False,
)  # fmt: skip
# Heads of 64, three for keys, and several rows: the compiler then likes to lay a cache out anew.
NARROW = dataclasses.replace(TOY, head_dim=64, num_heads=6, num_kv_heads=3)
SHAPE, PROMPTS = Shape(1, 512), Shape(8, 128)
TREE = TreeShape(depth=4, top_k=4, nodes=12)
RECIPES = {
    "EAGLE": Recipe(compute_dtype="bfloat16"),
    "EAGLE-3": Recipe(draft_kind="eagle3", compute_dtype="bfloat16", draft_steps=2),
}


def setup(kind: str) -> DecodeSetup:
    """Plain decoding, chains of four, or trees."""
    if kind == "plain":
        return DecodeSetup(target=NARROW, max_new_tokens=64, stop_tokens=(2,))
    draft, tree = draft_config(NARROW), TREE if kind == "tree" else None
    return DecodeSetup(target=NARROW, drafts=(draft,), num_draft_tokens=4, max_new_tokens=64, stop_tokens=(2,), tree=tree)


def lowered(name: str, mesh):
    """The program of a stage: of reading, of training (the name of a recipe), or of decoding."""
    if name == "score":
        return lower_score(TOY, mesh, SHAPE, keep_hidden=True)
    if name == "hidden":
        return lower_hidden(TOY, mesh, SHAPE, layers=(2, 3, 4))
    if name in RECIPES:
        return lower_train(TOY, mesh, SHAPE, RECIPES[name])
    return lower_decode(setup(name), mesh, PROMPTS)
