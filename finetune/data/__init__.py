"""Rows to tokens: read, checked, rendered, packed, held out.

rows.py         training rows as token ids and labels, cached or streamed; the held-out part
sources.py      where rows come from: files, folders, data sets of the Hub
files.py        rows of a file: JSONL, JSON, CSV, Parquet, compressed
forms.py        rows of other data sets, Alpaca's and ShareGPT's, as ours
messages.py     what a row says, checked and in one form: messages, tool calls, tools
templates.py    whether the chat template shows all of that
time_limit.py   a bound on the time of code that comes with a model
words.py        text to token ids: control tokens as text, long texts in part
chat.py         a row as pieces of text, learned or not, and their ids and labels
preferences.py  a row of preferences as token ids
plain_rows.py   the first tokens of a text, for a loss before any training
packing.py      several rows in one sequence, none of which sees another
held_out.py     the rows to measure on: whole documents
batches.py      rows to the batches that a model trains on
preview.py      what is learned of the first rows, in colour
report.py       which rows were used, cut and left out, and why
"""
