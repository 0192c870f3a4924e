"""jsfdd: cheap training of speculative-decoding draft models in JAX.

    import jsfdd
    target = jsfdd.load_target("smollm2")
    table = jsfdd.score(target, jsfdd.read_chats("chats.jsonl"))

These names are the public interface; docs/python.md shows how to use them. Each is imported from its room on first use, so
`import jsfdd` itself is fast.
"""

import importlib
import logging

__version__ = "0.1.0"

# When imported, transformers warns that it needs PyTorch for models. jsfdd does not use its models.
logging.getLogger("transformers").addFilter(lambda record: not record.getMessage().startswith("PyTorch was not found"))

_PUBLIC = {
    "jsfdd.weights.target": ("Target", "load_target"),
    "jsfdd.models.foreign": ("ForeignTarget", "foreign_target"),
    "jsfdd.models.architecture": ("DecoderConfig", "Rope"),
    "jsfdd.models.draft": ("Draft",),
    "jsfdd.weights.draft": ("load_draft",),
    "jsfdd.base.mesh": ("make_mesh",),
    "jsfdd.base.records": ("Sample",),
    "jsfdd.data.chat": ("read_chats", "read_prompts"),
    "jsfdd.data.template": ("tokenize_chats",),
    "jsfdd.scoring.flatness": ("effective_choices", "token_flatness", "token_scores"),
    "jsfdd.selection.sfdd": ("select",),
    "jsfdd.training.recipe": ("Recipe",),
    "jsfdd.decoding.settings": ("TreeShape",),
    "jsfdd.decoding.verify": ("verify",),
    "jsfdd.decoding.answers": ("generate",),
    "jsfdd.api": (
        "draft_logits", "evaluate", "export", "head_logits", "hidden_states", "init_draft", "score", "train",
    ),
}  # fmt: skip
_ROOM = {name: room for room, names in _PUBLIC.items() for name in names}

__all__ = sorted(_ROOM)  # noqa: PLE0605


def __getattr__(name: str):
    if name not in _ROOM:
        raise AttributeError(f"module 'jsfdd' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_ROOM[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
