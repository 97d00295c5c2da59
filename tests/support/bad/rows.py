"""Rows that cannot be learned from, for verbs that read data. A kind more is an entry of `ROWS` more."""

from collections.abc import Iterator

from .trying import Case

ROWS = {
    "not JSON": b"w1 w2\n",
    "cut off": b'{"prompt": "w1", \n',
    "a list": b'["w1", "w2"]\n',
    "a number": b"7\n",
    "null": b"null\n",
    "no known key": b'{"question": "w1", "answer": "w2"}\n',
    "no key": b"{}\n",
    "a prompt alone": b'{"prompt": "w1"}\n',
    "text that is a number": b'{"text": 7}\n',
    "empty text": b'{"text": ""}\n',
    "empty completion": b'{"prompt": "w1", "completion": " "}\n',
    "no messages": b'{"messages": []}\n',
    "messages that are text": b'{"messages": "w1"}\n',
    "a message without a role": b'{"messages": [{"content": "w1"}]}\n',
    "no answer": b'{"messages": [{"role": "user", "content": "w1"}]}\n',
    "an empty answer": b'{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": ""}]}\n',
    "content that is a number": b'{"messages": [{"role": "assistant", "content": 7}]}\n',
    "a picture": b'{"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}\n',
    "a call without a name": b'{"messages": [{"role": "assistant", "content": null, "tool_calls": [{}]}]}\n',
    "a mask that is a word": b'{"messages": [{"role": "assistant", "content": "w1", "mask": "yes"}]}\n',
}
VERBS = {
    "finetune": [
        *("finetune", "lora_attention", "model={base}", "data={folder}/rows.jsonl", "output_dir={folder}/run"),
        *("max_length=32", "dtype=auto", "training.max_steps=1"),
    ],
    "experts": ["experts", "{base}", "{folder}/rows.jsonl", "--output", "{folder}/out"],
    "esft score": ["esft", "score", "{base}", "{folder}/rows.jsonl", "--output", "{folder}/scores.json"],
    "evaluate": ["evaluate", "{base}", "--data", "{folder}/rows.jsonl", "--output", "{folder}/out"],
}


def row_cases() -> Iterator[Case]:
    def writing(content: bytes):
        return lambda folder, places: (folder / "rows.jsonl").write_bytes(content)

    for name, content in ROWS.items():
        for verb, arguments in VERBS.items():
            yield Case(f"{verb}: {name}", arguments, writing(content), says="line 1" if verb == "finetune" else "")
