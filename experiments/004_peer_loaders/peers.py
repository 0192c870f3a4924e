"""Load ours.py's drafts with the peers' own classes and compare their hidden states with ours: WORK TARGET EAGLE OUT.json.

Also lets speculators convert the drafts of flavour eagle to its own format, for reread.py.

    python experiments/004_peer_loaders/peers.py WORK TARGET EAGLE_CHECKOUT results.json

Runs where torch, transformers 4.57 and speculators 0.4.0.1 are installed, without jsfdd. EAGLE_CHECKOUT is a checkout of
github.com/SafeAILab/EAGLE.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def eagle_draft(directory: Path, embedding: torch.Tensor):
    """EAGLE-1's draft as EaModel builds it: bias from config.json, weights not strictly. -> (hidden, tokens) -> hidden."""
    from eagle.model.cnets1 import Model
    from eagle.model.configs import EConfig

    bias = json.loads((directory / "config.json").read_text()).get("bias", True)
    model = Model(EConfig.from_pretrained(directory / "config.json"), load_emb=False, bias=bias)
    loaded = model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    assert not loaded.unexpected_keys and loaded.missing_keys == ["embed_tokens.weight"], loaded
    model.embed_tokens.weight.data = embedding
    model.eval()
    model.reset()
    return lambda hidden, tokens: model(hidden, input_ids=tokens)


def speculators_draft(directory: Path, target: Path):
    """speculators' EAGLE-1 draft with its verifier attached. Its last hidden state is what enters the head."""
    from speculators import SpeculatorModel

    model, loaded = SpeculatorModel.from_pretrained(directory, verifier_attachment_mode="detached", output_loading_info=True)
    assert type(model).__name__ == "EagleSpeculator", type(model)
    assert not loaded["unexpected_keys"] and not loaded["missing_keys"], loaded
    # Attached on loading, the verifier's embedding would be drawn anew: to transformers it is a weight that the file lacks.
    model.attach_verifier(str(target), mode="train_only")
    # Its decoder layer is built outside of a transformers model, which would have chosen one; without a choice it fails.
    model.config.transformer_layer_config._attn_implementation = "eager"
    model.eval()
    inputs_read = []

    def keep(_module, _inputs, output):
        inputs_read.append(output[0] if isinstance(output, tuple) else output)

    model.transformer.register_forward_hook(keep)

    def run(hidden, tokens):
        rows = []
        for row, ids in zip(hidden, tokens):  # row by row: with transformers 4.54 and later it keeps the batch's first alone
            inputs_read.clear()
            model(ids[None], row[None], attention_mask=torch.ones_like(ids[None]))
            rows.append(inputs_read[0].reshape(row.shape))
        return torch.stack(rows)

    return run


def convert(directory: Path, target: Path, out: Path) -> None:
    """speculators' own converter of EAGLE's directories."""
    from speculators.convert.eagle.eagle_converter import EagleConverter

    EagleConverter().convert(str(directory), str(out), str(target), validate=False)


@torch.no_grad()
def main(work: Path, target: Path, checkout: Path, out: Path) -> None:
    sys.path.insert(0, str(checkout))
    torch.manual_seed(0)
    arrays = np.load(work / "arrays.npz")
    tokens, hidden = torch.from_numpy(arrays["tokens"]).long(), torch.from_numpy(arrays["hidden"])
    head = load_file(target / "model.safetensors")["model.embed_tokens.weight"]  # tied
    rows = []
    for entry in json.loads((work / "index.json").read_text()):
        directory = work / entry["name"]
        load = eagle_draft(directory, head) if entry["flavour"] == "eagle" else speculators_draft(directory, target)
        jsfdd_states, peer_states = torch.from_numpy(arrays[entry["name"]]), load(hidden, tokens)
        difference = (jsfdd_states - peer_states).abs().max().item()
        scale = jsfdd_states.pow(2).mean().sqrt().item()
        equal = (jsfdd_states @ head.T).argmax(-1) == (peer_states @ head.T).argmax(-1)
        rows.append(
            {
                "case": entry["case"],
                "peer": entry["flavour"],
                "positions": equal.numel(),
                "rms": scale,
                "max_difference": difference,
                "max_difference_over_rms": difference / scale,
                "same_proposal": int(equal.sum()),
            }
        )
        print(rows[-1], flush=True)
        if entry["flavour"] == "eagle":
            convert(directory, target, work / "converted" / entry["name"])
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "speculators")}
    out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
