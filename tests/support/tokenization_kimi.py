"""A tokenizer in Python, which a test model brings along: BPE over bytes by ranks, as tiktoken does it."""

import base64
import itertools
import re
from pathlib import Path

import regex
from transformers import PreTrainedTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode


class TikTokenTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tiktoken.model"}
    model_input_names = ["input_ids", "attention_mask"]
    num_reserved_special_tokens = 256
    pat_str = "|".join(
        [
            r"""[\p{Han}]+""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"""
            r"""[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"""
            r"""[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    )

    def __init__(self, vocab_file, bos_token="[BOS]", eos_token="[EOS]", added_tokens_decoder=None, **kwargs):
        lines = Path(vocab_file).read_bytes().splitlines()
        self.ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
        first = len(self.ranks)
        named = {number: token.content for number, token in added_tokens_decoder.items()}
        last = first + self.num_reserved_special_tokens + 2
        self.special = {named.get(i, f"<|reserved_token_{i}|>"): i for i in range(first, last)}
        self.pieces = regex.compile(self.pat_str, regex.V1)
        self.cut = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")
        letters = bytes_to_unicode()
        self.numbers = {"".join(letters[b] for b in token): i for token, i in self.ranks.items()} | self.special
        self.names = {i: name for name, i in self.numbers.items()}
        self.byte_of = {letter: byte for byte, letter in letters.items()}
        super().__init__(bos_token=bos_token, eos_token=eos_token, **kwargs)

    @property
    def vocab_size(self):
        return len(self.numbers)

    def get_vocab(self):
        return dict(self.numbers)

    def _tokenize(self, text, **kwargs):
        found = []
        for part in self.cut.split(text):
            if part in self.special:
                found.append(part)
                continue
            for piece in self.pieces.findall(part):
                found += [self.names[self.ranks[token]] for token in self.merge(piece.encode())]
        return found

    def merge(self, piece):
        parts = [piece[i : i + 1] for i in range(len(piece))]
        if piece in self.ranks:
            return [piece]
        while len(parts) > 1:
            ranks = [self.ranks.get(one + other, len(self.ranks)) for one, other in itertools.pairwise(parts)]
            best = min(ranks)
            if best == len(self.ranks):
                break
            i = ranks.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    def _convert_token_to_id(self, token):
        return self.numbers[token]

    def _convert_id_to_token(self, index):
        return self.names[index]

    def convert_tokens_to_string(self, tokens):
        parts = [bytes(self.byte_of[c] for c in t) if t not in self.special else t.encode() for t in tokens]
        return b"".join(parts).decode("utf-8", "replace")

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = Path(save_directory) / "tiktoken.model"
        lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in self.ranks.items()]
        path.write_bytes(b"\n".join(lines))
        return (str(path),)
