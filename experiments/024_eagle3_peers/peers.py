"""Load ours.py's drafts with a peer's own class and compare its outputs with ours: WORK TARGET OUT.json PEER.

    python experiments/024_eagle3_peers/peers.py WORK TARGET eagle.json eagle EAGLE_CHECKOUT
    python experiments/024_eagle3_peers/peers.py WORK TARGET speculators.json speculators

Runs where torch is installed and transformers, 4.57 for a checkout of github.com/SafeAILab/EAGLE and 5.19 for speculators
0.9.0, without jsfdd. What is compared is what enters the draft's head: our step n + 1 at row t is the peers' at t − n, as
they shift the tokens instead.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def eagle_draft(directory: Path, target: Path):
    """EAGLE-3's draft as EaModel builds it, decoding with its cache. -> (streams, tokens, steps) -> outputs."""
    from eagle.model.cnets import Model
    from eagle.model.configs import EConfig

    config = EConfig.from_pretrained(directory / "config.json")
    model = Model(config, load_emb=False)
    if config.vocab_size == config.draft_vocab_size:
        del model.d2t, model.t2d
    loaded = model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    assert not loaded.unexpected_keys and loaded.missing_keys == ["embed_tokens.weight"], loaded
    model.embed_tokens.weight.data = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    model.eval()
    model.reset()

    def run(streams, tokens, steps):
        """[(the rows of a step that are compared, outputs)]: all of step 1, one row of every later step."""
        compared = [(slice(None), model.norm(model(streams, input_ids=tokens)))]
        for last in range(1, steps):  # `last` steps after the one that reads the target's states
            first = tokens.shape[1] - last
            out, cache = model(streams[:, :first], input_ids=tokens[:, :first], use_cache=True)
            for row in range(first, tokens.shape[1]):
                out, cache = model(out[:, -1:], input_ids=tokens[:, row : row + 1], past_key_values=cache, use_cache=True)
            compared.append((slice(tokens.shape[1] - 1, None), model.norm(out)))
        return compared

    return run, model.lm_head, model


def speculators_draft(directory: Path, target: Path):
    """speculators' draft with its verifier's embedding, unrolled as it trains. -> (streams, tokens, steps) -> outputs."""
    from speculators import SpeculatorModel

    model = SpeculatorModel.from_pretrained(directory)
    assert type(model).__name__ == "Eagle3DraftModel", type(model)
    config = model.config.transformer_layer_config
    config._attn_implementation = "eager"
    model = type(model).from_pretrained(directory, config=model.config).eval()
    assert not any(x.isnan().any() for x in model.parameters()), "a parameter that no tensor filled"
    # Beside transformers 5.19 a file without the embedding leaves it at zero: speculators looks for NaN and borrows nothing.
    model.embed_tokens.weight.data = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    inputs_read = []
    model.lm_head.register_forward_pre_hook(lambda _module, inputs: inputs_read.append(inputs[0]))

    def run(streams, tokens, steps):
        rows = []
        for row, ids in zip(streams, tokens):  # it takes one packed row
            inputs_read.clear()
            model(row[None], ids[None], torch.zeros_like(ids[None]), ttt_steps=steps)
            rows.append([x[0] for x in inputs_read])
        return [(slice(n, None), torch.stack([row[n] for row in rows])[:, : tokens.shape[1] - n]) for n in range(steps)]

    return run, model.lm_head, model


def compare_losses(model, streams, tokens, final, loss, gradient) -> dict:
    """Their training loss of one row, every token in it, and what it does to fc, against ours."""
    from speculators.losses.eager import kl_div_loss

    model.verifier_norm = torch.nn.Identity()  # what is given is normed
    p = torch.softmax(model.verifier_lm_head(final)[0], -1)
    entropy = -(p * p.log()).sum(-1)
    with torch.enable_grad():
        model.zero_grad()
        config = {"kl_div": (kl_div_loss, 1.0)}
        documents = torch.zeros_like(tokens[:1])
        model_loss = {"verifier_last_hidden_states": final, "ttt_steps": len(loss), "loss_config": config}
        _, total, metrics = model(streams[:1], tokens[:1], documents, torch.ones_like(documents), **model_loss)
        total.backward()
    peer_loss = [metrics[f"loss_{n}_sum"].item() + entropy[n:].mean().item() for n in range(len(loss))]  # KL and H(p)
    change = (model.fc.weight.grad - gradient).norm() / gradient.norm()
    return {"loss": list(map(float, loss)), "their_loss": peer_loss, "gradient_difference": change.item()}


LOADERS = {"eagle": eagle_draft, "speculators": speculators_draft}


@torch.no_grad()
def main(work: Path, target: Path, out: Path, peer: str, checkout: str = "") -> None:
    sys.path.insert(0, checkout)
    arrays = np.load(work / "arrays.npz")
    tokens = torch.from_numpy(arrays["tokens"]).long()
    rows = []
    for entry in json.loads((work / "index.json").read_text()):
        if entry["flavour"] != peer:
            continue
        streams = torch.from_numpy(arrays["hidden " + " ".join(map(str, entry["layers"]))])
        run, head, model = LOADERS[peer](work / entry["name"], target)
        jsfdd_outputs = torch.from_numpy(arrays[entry["name"]])
        for step, (places, peer_outputs) in enumerate(run(streams, tokens, len(jsfdd_outputs))):
            expected = jsfdd_outputs[step][:, places]
            difference, scale = (expected - peer_outputs).abs().max().item(), expected.pow(2).mean().sqrt().item()
            equal = head(expected).argmax(-1) == head(peer_outputs).argmax(-1)
            rows.append(
                {
                    "case": entry["case"],
                    "peer": entry["flavour"],
                    "step": step + 1,
                    "positions": equal.numel(),
                    "max_difference_over_rms": difference / scale,
                    "same_proposal": int(equal.sum()),
                }
            )
            print(rows[-1], flush=True)
        if f"{entry['name']} loss" in arrays:
            stored = [torch.from_numpy(arrays[f"{entry['name']} {part}"]) for part in ("loss", "gradient")]
            final = torch.from_numpy(arrays["final"])
            rows.append({"case": entry["case"], "step": "loss", **compare_losses(model, streams, tokens, final, *stored)})
            print(rows[-1], flush=True)
    packages = ("torch", "transformers", *(["speculators"] if peer == "speculators" else []))
    versions = {name: importlib.metadata.version(name) for name in packages}
    out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *sys.argv[4:])
