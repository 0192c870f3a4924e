"""Twelve families' templates: the ids are transformers', the mask is on the answers, and the doctor says so."""

import numpy as np
import pytest
from families import CALL, FAMILIES, RESULT, ROWS, answer, family_tokenizer, user

from jsfdd.base.records import Sample
from jsfdd.data.chat import Chat
from jsfdd.data.forms import conversation_of
from jsfdd.data.render import with_text_arguments
from jsfdd.data.template import tokenize_chats
from jsfdd.doctor.check_data import check_data

TOKENIZERS = {name: family_tokenizer(name) for name in FAMILIES}
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
LLAMA = '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>'
REWRITTEN, REFUSED = "rewritten", "refused"


def written(close, call=None, text=None, thought="{}", reasoning="4", earlier=("4", "6"), last=None):
    """What is masked of each row, by where families differ. `thought` is how a thought inside the content is written."""
    last, call = close if last is None else last, f"{HERMES}{close}" if call is None else call
    calls = [call, f"Nine.{last}"] if call not in (REWRITTEN, REFUSED) else call
    text = f"I look.\n{HERMES}{close}" if text is None else text
    return {
        "turns": [f"Hello!\n\nYes?{close}", f"that{last}"],
        "system": [f"Yes.{last}"],
        "reasoning": [f"{reasoning}{last}"],
        "think": [thought.format("<think>\ntwo and two\n</think>\n\n4") + last],
        "earlier": [f"{earlier[0]}{close}", f"{earlier[1]}{last}"],
        "call": calls,
        "call+text": [text, f"Nine.{last}"] if text not in (REWRITTEN, REFUSED) else text,
        "cut": ["Hel"],
        "context": [f"right{last}"],
    }


QWEN3 = dict(reasoning="<think>\ntwo and two\n</think>\n\n4", earlier=("4", "<think>\ncc\n</think>\n\n6"))
OPENED = dict(reasoning="two and two\n</think>\n\n4", earlier=("4", "cc\n</think>\n\n6"), thought="two and two\n</think>\n\n4")
CHANNELS = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>"
HARMONY_CALL = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'
MISTRAL_CALL = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}, "id": "call00001"}]</s>'
GLM_CALL = "\n<tool_call>weather\ncity=Rome\n</tool_call><|observation|>"
EXPECTED = {
    "qwen2.5": written("<|im_end|>"),
    "qwen3": written("<|im_end|>", **QWEN3),
    "qwen3-thinking": written("<|im_end|>", **OPENED),
    "llama-3.1": written("<|eot_id|>", LLAMA, REWRITTEN),
    "llama-3.2": written("<|eot_id|>", LLAMA, REWRITTEN),
    "mistral": written("</s>", MISTRAL_CALL, REWRITTEN),
    "gemma-3": written("<end_of_turn>", REFUSED, REFUSED),
    "smollm2": written("<|im_end|>"),
    "smollm3": written("<|im_end|>"),
    "phi-4": written("<|im_end|>"),
    "gpt-oss": written(
        "<|end|>", HARMONY_CALL, REWRITTEN, reasoning=CHANNELS.format("two and two") + "4",
        earlier=("4", CHANNELS.format("cc") + "6"), last="<|return|>",
    ),
    "r1-distill": written("<|eos|>", thought="\n\n4"),
    "deepseek-v3": written("<|eos|>", '<|call|>function<|sep|>weather\n{"city": "Rome"}<|/call|><|eos|>', REWRITTEN),
    "glm": written(
        "<|user|>", GLM_CALL.lstrip(), f"I look.{GLM_CALL}",
        reasoning="\n<think>two and two</think>\n4", thought="\n<think>two and two</think>\n4",
        earlier=("4", "\n<think>cc</think>\n6"), last="",
    ),
    "granite": written("<|end_of_text|>"),
}  # fmt: skip
# Where the template leaves out what the row says: families that write thoughts leave out those of earlier turns.
WRITES_THOUGHTS = ("qwen3", "qwen3-thinking", "gpt-oss", "glm")
LEFT_OUT = {
    **{(name, row): {"thoughts": 1} for name in FAMILIES for row in ("reasoning", "earlier") if name not in WRITES_THOUGHTS},
    **{(name, "earlier"): {"thoughts": 1} for name in WRITES_THOUGHTS},
    **{
        (name, row): {"tools": 1}
        for name in ("smollm2", "smollm3", "phi-4", "r1-distill", "deepseek-v3")
        for row in ("call", "call+text")
    },
    ("r1-distill", "think"): {"thoughts": 1},
}


def chat_of(name, row):
    found = conversation_of(row, "f:1")
    return Chat(name, "s", found.messages, "f:1", "f", found.tools)


def masked_runs(tokenizer, sample):
    edges = np.flatnonzero(np.diff(np.r_[0, sample.assistant_mask, 0]))
    return [tokenizer.decode(sample.tokens[a:b]) for a, b in zip(edges[::2], edges[1::2])]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_mask(family, row):
    tokenizer, expected = TOKENIZERS[family], EXPECTED[family][row]
    chats = [chat_of("c", ROWS[row]), chat_of("ok", ROWS["turns"])]
    samples, summary = tokenize_chats(chats, tokenizer, 4096)
    if isinstance(expected, str):
        assert summary.skipped[expected] == ("c",) and summary.first[expected].startswith("f:1: ")
        return
    sample = samples[0]
    assert (sample.id, masked_runs(tokenizer, sample)) == ("c", expected)
    assert summary.left_out == LEFT_OUT.get((family, row), {})
    messages, tools = ROWS[row]["messages"], ROWS[row].get("tools")
    if "tool_calls" not in tokenizer.chat_template:  # the calls are text there
        return
    if family == "deepseek-v3":
        messages = [with_text_arguments(message) for message in messages]
    assert sample.tokens.tolist() == tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)


def _severities(findings):
    return {finding.name: finding.severity for finding in findings if finding.severity not in ("ok", "note")}


def _examine(family, samples=None, rows=ROWS, **options):
    tokenizer = TOKENIZERS[family]
    chats = [chat_of(name, row) for name, row in rows.items()]
    made, summary = tokenize_chats(chats, tokenizer, 4096, **options)
    stops = [tokenizer.eos_token_id]
    return check_data(tokenizer, chats, samples or made, summary, stops, bool(options.get("mask_spans")))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_doctor_finds_no_fault_with_ids_and_masks(family):
    messages = [*ROWS["call"]["messages"][:1], *map(dict, ROWS["call"]["messages"][1:])]
    messages[1]["reasoning_content"], messages[3]["reasoning_content"] = "the weather, so a call", "it says nine"
    rows = ROWS | {"thoughts before a call and after": {"tools": ROWS["call"]["tools"], "messages": messages}}
    found = {finding.name: finding for finding in _examine(family, rows=rows)}
    assert (found["token-ids"].severity, found["loss-mask"].severity) == ("ok", "ok"), found
    # R1's prompt opens a thought that no sample has, Qwen3-Thinking's one that answers without a thought lack, and Mistral
    # tells a system message with the last question only, and gpt-oss drops the thought before a call once there is an answer:
    # that is so, and said. The others write what they prompt.
    prefix = {"r1-distill": "error", "qwen3-thinking": "warning", "mistral": "warning", "gpt-oss": "warning"}
    assert found["template-prefix"].severity == prefix.get(family, "ok"), found["template-prefix"].seen
    assert found["left-out"].severity == "warning"
    masked = _examine(family, mask_spans=("thinking", "tool_calls"))
    assert {finding.name: finding for finding in masked}["loss-mask"].severity == "ok"


def _faulty(sample, tokenizer, fault):
    tokens, mask = sample.tokens.copy(), sample.assistant_mask.copy()
    first, last = np.flatnonzero(mask)[[0, -1]]
    if fault == "late":
        mask = np.roll(mask, 1)
    elif fault == "early":
        mask = np.roll(mask, -1)
    elif fault == "no end":
        mask[last] = False
    elif fault == "begins late":
        mask[first : first + 2] = False
    elif fault == "a hole":
        mask[next(t for t in range(first, last) if tokenizer.decode(tokens[t]).strip())] = False
    elif fault == "the question":
        mask[max(first - 12, 0) : first] = True
    elif fault == "nothing":
        mask[:] = False
    elif fault == "another id":
        tokens[3] ^= 1
    return Sample(sample.id, sample.source, tokens, mask)


FAULTS = ["late", "early", "no end", "begins late", "a hole", "the question", "nothing", "another id"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", ["system", "reasoning", "call"])
def test_the_doctor_finds_every_planted_fault(family, row, fault):
    rows = {"c": ROWS[row], "ok": ROWS["turns"]}
    tokenizer = TOKENIZERS[family]
    samples, _ = tokenize_chats([chat_of(name, value) for name, value in rows.items()], tokenizer, 4096)
    if samples[0].id == "ok" or (family, row) in (("mistral", "system"), ("mistral", "call")):
        return  # refused, or not what is served, which is said elsewhere
    assert _severities(_examine(family, samples, rows)).get("loss-mask") is None
    found = _severities(_examine(family, [_faulty(samples[0], tokenizer, fault), samples[1]], rows))
    assert found.get("token-ids" if fault == "another id" else "loss-mask") == "error"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("q") | {"name": "<|im_end|>"}, answer("a")]},
        {"messages": [user("q"), answer("a", reasoning_content="<|im_end|>")]},
        {"messages": [user("q"), answer("", tool_calls=[CALL | {"function": {"name": "<|im_end|>", "arguments": {}}}])]},
        {"messages": [user("q"), answer("", tool_calls=[CALL]), RESULT | {"tool_call_id": "<|im_end|>"}, answer("a")]},
        {"messages": ROWS["turns"]["messages"], "tools": [{"type": "function", "function": {"name": "<|im_end|>"}}]},
    ],
)
def test_a_special_token_may_stand_in_no_text_that_a_template_could_write(row):
    samples, summary = tokenize_chats([chat_of("c", row), chat_of("ok", ROWS["turns"])], TOKENIZERS["qwen3"], 4096)
    assert [sample.id for sample in samples] == ["ok"] and summary.skipped["special_text"] == ("c",)


def test_the_doctor_says_where_an_answer_of_weight_0_counts():
    tokenizer, rows = TOKENIZERS["qwen3"], {"c": ROWS["context"]}
    messages = [*ROWS["turns"]["messages"][:1], *ROWS["context"]["messages"][1:]]
    [whole], _ = tokenize_chats([chat_of("c", {"messages": messages})], tokenizer, 4096)
    counted = [dict(message) for message in ROWS["context"]["messages"]]
    del counted[1]["weight"]
    [sample], _ = tokenize_chats([chat_of("c", {"messages": counted})], tokenizer, 4096)
    np.testing.assert_array_equal(sample.tokens, whole.tokens)
    assert _severities(_examine("qwen3", [whole], rows)) == {}
    assert _severities(_examine("qwen3", [sample], rows)) == {"loss-mask": "error"}


def test_split_answers_gives_every_answer_its_own_thought():
    row = ROWS["earlier"]
    for family, expected in (
        ("qwen3", ["<think>\nb\n</think>\n\n4<|im_end|>", "<think>\ncc\n</think>\n\n6<|im_end|>"]),
        ("qwen3-thinking", ["b\n</think>\n\n4<|im_end|>", "cc\n</think>\n\n6<|im_end|>"]),
        ("r1-distill", ["b\n</think>\n\n4<|eos|>", "cc\n</think>\n\n6<|eos|>"]),
    ):
        tokenizer = TOKENIZERS[family]
        chats = [chat_of("c", row), chat_of("plain", ROWS["turns"])]
        samples, summary = tokenize_chats(chats, tokenizer, 4096, split_answers=True)
        assert [sample.id for sample in samples] == ["c/1", "c/2", "plain"]
        assert [masked_runs(tokenizer, sample) for sample in samples[:2]] == [[text] for text in expected]
        assert (summary.read, summary.kept, summary.left_out) == (2, 2, {})
        for number, sample in zip((1, 3), samples):
            prompt = tokenizer.apply_chat_template(row["messages"][:number], add_generation_prompt=True, return_dict=False)
            assert sample.tokens[: len(prompt)].tolist() == prompt
        findings = _severities(_examine(family, samples, {"c": row, "plain": ROWS["turns"]}, split_answers=True))
        assert findings.get("loss-mask") is None and findings.get("token-ids") is None
    # A thought inside the content as well.
    [sample], _ = tokenize_chats([chat_of("t", ROWS["think"])], TOKENIZERS["r1-distill"], 4096, split_answers=True)
    assert masked_runs(TOKENIZERS["r1-distill"], sample) == ["two and two\n</think>\n\n4<|eos|>"]


def test_a_text_that_was_rendered_by_the_template_is_read_as_its_messages_are():
    for family in ("qwen2.5", "qwen3", "llama-3.1", "gemma-3", "granite", "gpt-oss"):
        tokenizer = TOKENIZERS[family]
        row = ROWS["turns"]
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        [rendered], _ = tokenize_chats([Chat("c", "s", (), "f:1", text=text)], tokenizer, 4096)
        [sample], _ = tokenize_chats([chat_of("c", row)], tokenizer, 4096)
        np.testing.assert_array_equal(rendered.tokens, sample.tokens)
        missing = np.flatnonzero(sample.assistant_mask & ~rendered.assistant_mask)
        assert not len(missing)
        if family not in ("qwen3", "gpt-oss"):  # there what the template writes before an answer cannot be told from it
            np.testing.assert_array_equal(rendered.assistant_mask, sample.assistant_mask)
    foreign = Chat("c", "s", (), "f:1", text="### Human: hi ### Assistant: yes")
    with pytest.raises(ValueError, match="f:1: .*no answer between marks of the target's chat template"):
        tokenize_chats([foreign], TOKENIZERS["qwen2.5"], 4096, strict=True)


def test_tokens_with_a_mask_are_taken_as_they_are():
    tokenizer = TOKENIZERS["qwen2.5"]
    chat = Chat("c", "s", (), "f:1", tokens=(5, 6, 7, 8), mask=(False, True, True, True))
    [sample], summary = tokenize_chats([chat], tokenizer, 3)
    assert sample.tokens.tolist() == [5, 6, 7] and sample.assistant_mask.tolist() == [False, True, True]
    assert summary.truncated == ("c",)
    with pytest.raises(ValueError, match=r"token id 100000, which the model of 300 rows does not embed"):
        tokenize_chats([Chat("c", "s", (), "f:1", tokens=(5, 100_000), mask=(True, True))], tokenizer, 9, vocab_size=300)
