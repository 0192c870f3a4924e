"""Let vLLM answer prompts and save the hidden states of what it read and wrote, for `--hidden-from`.

    VENV/bin/python experiments/005_vllm/states.py --target DIR --prompts prompts.jsonl --layers 2 15 27 30 --out DIR

Runs where vLLM is installed, without jsfdd. Writes OUT/chats.jsonl and OUT/states/*.safetensors. The last layer is the
number of the target's layers: what the final norm reads. vLLM's connector is written for CUDA; on a CPU its streams and events
have nothing to do, and are replaced by objects that do nothing.
"""

import argparse
import json
from pathlib import Path

import torch
from engine import make_engine
from vllm import SamplingParams
from vllm.config import KVTransferConfig


class Nothing:
    """A stream or an event of a device that does everything at once."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def record(self, *_):
        pass

    def synchronize(self):
        pass

    def wait_event(self, _):
        pass

    def query(self):
        return True


def without_cuda() -> None:
    """Replace what the connector asks of CUDA."""
    torch.cuda.Event = torch.cuda.Stream = Nothing
    torch.cuda.stream = Nothing
    empty_like = torch.empty_like
    torch.empty_like = lambda x, **options: empty_like(x, **{k: v for k, v in options.items() if k != "pin_memory"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--stop-tokens", type=int, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    states = args.out / "states"
    states.mkdir(parents=True)
    llm = make_engine(
        args.target,
        speculative_config={
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": args.layers}},
        },
        kv_transfer_config=KVTransferConfig(
            kv_connector="ExampleHiddenStatesConnector",
            kv_role="kv_producer",
            kv_connector_extra_config={"shared_storage_path": str(states)},
        ),
    )
    if not torch.cuda.is_available():
        without_cuda()  # only now: the engine puts objects of its own in their place as it starts
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=args.max_new_tokens,
        stop_token_ids=args.stop_tokens,
        extra_args={"kv_transfer_params": {"include_output_tokens": True}},
    )
    rows = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    asked = [[{"role": "user", "content": row["turns"][0]}] for row in rows]
    outputs = llm.chat(asked, sampling, use_tqdm=False)
    # The engine saves a finished request in the step after, which those that finish last do not have; a short one brings it.
    llm.chat(asked[0], SamplingParams(max_tokens=3), use_tqdm=False)
    with (args.out / "chats.jsonl").open("w") as file:
        for row, messages, output in zip(rows, asked, outputs, strict=True):
            answer = output.outputs[0]
            message = {"role": "assistant", "content": answer.text}
            if answer.finish_reason == "length":
                message["truncated"] = True
            chat = {"id": row["id"], "source": row.get("source", "vllm"), "messages": [*messages, message]}
            file.write(json.dumps(chat) + "\n")
    print(len(rows), sum(len(output.outputs[0].token_ids) for output in outputs), "tokens")


if __name__ == "__main__":
    main()
