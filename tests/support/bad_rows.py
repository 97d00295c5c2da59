"""Lines of a JSONL file, and whole files, that no row can be learned from, each with the reason that is said.

Of a tokenizer with `tiny_run.TEMPLATE`; a good row is `{"prompt": "w1", "completion": "w2"}`.
"""

import gzip
import json

USER = {"role": "user", "content": "w1"}
ANSWER = {"role": "assistant", "content": "w2"}


def _row(**keys):
    return json.dumps(keys).encode()


# Name -> the line, and what the report calls it.
BAD_LINES = {
    "cut off": (b'{"text": "w1', "not JSON"),
    "not UTF-8": (b'{"text": "w1 \xff"}', "not JSON"),
    "a word": (b"w1", "not JSON"),
    "single quotes": (b"{'text': 'w1'}", "not JSON"),
    "two objects": (b'{"text": "w1"} {"text": "w2"}', "not JSON"),
    "a comma behind": (b'{"text": "w1"},', "not JSON"),
    "a number of 5000 digits": (b'{"text": "w1", "n": ' + b"9" * 5000 + b"}", "not JSON"),
    "a number": (b"3", "no JSON object"),
    "a string": (b'"w1"', "no JSON object"),
    "null": (b"null", "no JSON object"),
    "nothing in it": (b"{}", "of no known kind"),
    "unknown keys": (_row(txt="w1"), "of no known kind"),
    "keys that would steer a terminal": (rb'{"\u001b[31m\n": 1}', "of no known kind"),
    "200 kB of a key": (_row(**{"a" * 200_000: 1}), "of no known kind"),
    "text that is a number": (_row(text=5), "of no known kind"),
    "text that is a list": (_row(text=["w1"]), "of no known kind"),
    "prompt alone": (_row(prompt="w1"), "of no known kind"),
    "completion alone": (_row(completion="w1"), "of no known kind"),
    "empty text": (_row(text=""), "empty"),
    "blank text": (_row(text=" \n"), "empty"),
    "empty completion": (_row(prompt="w1", completion=""), "empty"),
    "lone surrogate": (rb'{"text": "w1 \ud800"}', "no text in Unicode"),
    "lone low surrogate": (rb'{"text": "\udfff w1"}', "no text in Unicode"),
    "surrogates in the wrong order": (rb'{"text": "\ude00\ud83d"}', "no text in Unicode"),
    "surrogate in a key": (rb'{"text": "w1", "\ud800": 1}', "no text in Unicode"),
    "surrogate in a message": (rb'{"messages": [{"role": "user", "content": "\ud800"}]}', "no text in Unicode"),
    "surrogate as a row": (rb'"\ud800"', "no text in Unicode"),
    "noncharacter": (rb'{"text": "\ufdd0<s>"}', "no text in Unicode"),
    "surrogate in tools": (_row(messages=[USER, ANSWER], tools='["\\ud800"]'), "no text in Unicode"),
    "150 lists deep": (b'{"text": "w1", "x": ' + b"[" * 150 + b"]" * 150 + b"}", "nested too deeply"),
    "100,000 lists deep": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "100,000 objects deep": (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "tools 100,000 deep": (_row(messages=[USER, ANSWER], tools="[" * 100_000), "nested too deeply"),
    "a key twice": (b'{"text": "w1", "text": "w2"}', "a key that is there twice"),
    "a long key twice": (b'{"' + b"a" * 2000 + b'": 1, "' + b"a" * 2000 + b'": 1}', "a key that is there twice"),
    "a surrogate behind a long key": (b'{"' + b"a" * 2000 + rb'": "\ud800"}', "no text in Unicode"),
    "a key of a message twice": (
        b'{"messages": [{"role": "user", "role": "assistant", "content": "w1"}]}',
        "a key that is there twice",
    ),
    "messages that are text": (_row(messages="w1"), "malformed messages"),
    "messages without roles": (_row(messages=[{"content": "w1"}, ANSWER]), "malformed messages"),
    "a message that is a number": (_row(messages=[3, ANSWER]), "malformed messages"),
    "half a weight": (_row(messages=[USER, {**ANSWER, "weight": 0.5}]), "malformed messages"),
    "no messages": (_row(messages=[]), "empty"),
    "empty answer": (_row(messages=[USER, {**ANSWER, "content": " "}]), "empty"),
    "no content": (_row(messages=[{"role": "user"}, ANSWER]), "empty"),
    "no answer": (_row(messages=[USER]), "no answer"),
    "all masked": (_row(messages=[USER, {**ANSWER, "mask": 1}]), "nothing to learn"),
    "content that is a number": (_row(messages=[USER, {**ANSWER, "content": 5}]), "content that is no text"),
    "a picture": (
        _row(messages=[{**USER, "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]),
        "content that is no text",
    ),
    "tools that are no JSON": (_row(messages=[USER, ANSWER], tools="{"), "`tools` is not JSON"),
    "tools that are numbers": (_row(messages=[USER, ANSWER], tools=[3]), "malformed tools"),
    "tool calls that are numbers": (_row(messages=[USER, {**ANSWER, "tool_calls": [3]}]), "malformed messages"),
    "ShareGPT from nobody": (_row(conversations=[{"from": "ghost", "value": "w1"}]), "unknown role"),
    "ShareGPT without values": (_row(conversations=[{"from": "human"}]), "empty"),
    "ShareGPT of numbers": (_row(conversations=[{"from": "human", "value": "w1"}, 3]), "malformed messages"),
    "ShareGPT that is text": (_row(conversations="w1"), "malformed messages"),
    "ShareGPT without an answer": (_row(conversations=[{"from": "human", "value": "w1"}]), "no answer"),
    "Alpaca of numbers": (_row(instruction=1, output="w1"), "of no known kind"),
    "Alpaca without an instruction": (_row(instruction=" ", input="", output="w1"), "empty"),
    "Alpaca without an output": (_row(instruction="w1", output=""), "empty"),
    "Alpaca with half a history": (_row(instruction="w1", output="w2", history=[["w3"]]), "malformed messages"),
}

# Name of a file -> its bytes, and a piece of the one line that ends the reading, whatever `bad_rows` says.
BAD_FILES = {
    "empty.jsonl": (b"", "has no rows to learn from"),
    "blank.jsonl": (b"\n \n", "has no rows to learn from"),
    "empty.json": (b"[]", "has no rows to learn from"),
    "latin.json": (b'[{"text": "\xe9"}]', "is not text in UTF-8"),
    "empty.csv": (b"", "has no rows to learn from"),
    "twice.csv": (b"text,text\nw1,w2\n", "has two columns 'text'"),
    "nonsense.parquet": (b"PAR1 or not", "cannot be read behind its beginning"),
    "nonsense.jsonl.gz": (b"no gzip", "cannot be read behind its beginning"),
    "nonsense.jsonl.zst": (b"no zstandard", "cannot be read behind its beginning"),
    "nonsense.jsonl.xz": (b"no xz", "cannot be read behind its beginning"),
    "nonsense.jsonl.bz2": (b"no bzip2", "cannot be read behind its beginning"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "w1"}\n' * 10_000)[:-20], "cannot be read behind its beginning"),
}
