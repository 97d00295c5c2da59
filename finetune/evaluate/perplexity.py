"""Perplexity of a text: how well a model foresees it, per token and per byte.

The text is tokenized whole and read in windows that overlap. Each window begins with BOS, which is never scored, as a
training row does (EOS stands in for a missing BOS). The first window scores all its tokens, each later one the
`stride` tokens that no window before it has scored; the tokens ahead of these are their context:

    window 1   BOS t1 ............ tW        scores t1 ... tW
    window 2   BOS    tS+1 ....... tW+S      scores tW+1 ... tW+S

so every token of the text is scored once. Figures per byte compare models of different vocabularies.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_deepseek_moe.chunked_loss import chunked_cross_entropy, is_plain_head

from ..data.chat import IGNORED
from ..errors import UserError

LONGEST_WINDOW = 2048
_CHUNK_BYTES = 128 * 2**20  # of float32 logits


class TextScore(NamedTuple):
    """Sum of the tokens' cross-entropies in nats, over so many tokens and bytes of UTF-8."""

    nats: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """Perplexity of a token: e to the mean cross-entropy."""
        return math.exp(min(self.nats / self.tokens, 700.0))  # float64 ends at e^709

    @property
    def bits_per_byte(self) -> float:
        """Mean cross-entropy of a byte in bits, which compares models of different vocabularies."""
        return self.nats / math.log(2) / self.bytes


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = path.read_bytes().decode()  # line ends stay as they are
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read text {path}: {reason}") from error
    if not text:
        raise UserError(f"text {path} is empty: there is nothing to measure")
    return text


def score_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    show: Callable[[int, int], None] = lambda done, of: None,
) -> TextScore:
    """Cross-entropy of `text`, as the module's docstring says. Logits of all tokens are never held at once.

    Args:
        window: tokens that the model sees at a time, with BOS; by default its context, and 2048 at most.
        stride: tokens by which a window moves on; half a window by default.
        batch_size: windows in one forward pass.
        show: called with the windows done and their number.

    Raises:
        UserError: window or stride do not fit the model, there is neither BOS nor EOS, or no memory.
    """
    context = model.config.max_position_embeddings
    window = min(context, LONGEST_WINDOW) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 2 <= window <= context:
        raise UserError(f"a window of {window} tokens: it must hold 2 and fit into the model's context of {context}")
    if not 1 <= stride < window:
        raise UserError(f"a stride of {stride} tokens: it lies between 1 and {window - 1}, what a window can score")
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise UserError("the tokenizer has neither BOS nor EOS for the first token of a text to follow")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = ids[1:] if ids[:1] == [first] else ids
    rows = list(_windows(ids, first, window - 1, stride))
    model.eval()
    nats = 0.0
    try:
        with torch.inference_mode():
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                # Later positions do not reach earlier ones, so padding on the right needs no mask.
                inputs, targets = (
                    nn.utils.rnn.pad_sequence([row[i] for row in batch], batch_first=True, padding_value=fill)
                    for i, fill in ((0, first), (1, IGNORED))
                )
                nats += _loss_sum(model, inputs.to(model.device), targets.to(model.device))
                show(start + len(batch), len(rows))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{batch_size} windows of {window} tokens do not fit into memory: lower the batch size or the window"
        ) from error
    return TextScore(nats, len(ids), len(text.encode()))


def _windows(ids: list[int], first: int, length: int, stride: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets `[T]` of each window over `length` tokens: position i is scored on target i."""
    scored = 0
    while scored < len(ids):
        end = min(scored + (stride if scored else length), len(ids))
        begin = max(0, end - length)
        targets = torch.full((end - begin,), IGNORED)
        targets[scored - begin :] = torch.tensor(ids[scored:end])
        yield torch.tensor([first, *ids[begin : end - 1]]), targets
        scored = end


def _loss_sum(model: PreTrainedModel, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    hidden_states = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
    head, hidden_states, targets = model.get_output_embeddings(), hidden_states.flatten(0, 1), targets.flatten()
    if is_plain_head(head):
        return chunked_cross_entropy(hidden_states, head.weight, targets, _CHUNK_BYTES)[0].item()
    rows = max(1, _CHUNK_BYTES // (4 * model.config.vocab_size))
    parts = zip(hidden_states.split(rows), targets.split(rows), strict=True)
    return sum(nn.functional.cross_entropy(head(part).float(), of, reduction="sum").item() for part, of in parts)
