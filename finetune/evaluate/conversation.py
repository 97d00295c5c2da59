"""A conversation with a model: its history, and answers that compute only what is new in it."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TextStreamer,
)

from modeling_deepseek_moe.transformers_names import CACHE_NAME

from ..data.messages import checked_messages
from ..data.templates import render_chat
from ..errors import UserError, first_line
from .answers import stop_tokens, text_of


class Conversation:
    """Turns of user and assistant, and the model's states of the tokens that it has read.

    The history is rendered anew for each answer; of the tokens that begin it as they began the last one, the states
    are still in the cache. So editing the history, or a template that rewrites earlier turns, costs time only.

    Attributes:
        messages: `{"role": ..., "content": ...}` in order, with the system message if there is one.
        prompt_tokens: length of the last prompt.
        new_tokens: length of the last answer.
        computed_tokens: how many tokens of the last prompt were not in the cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        max_new_tokens: int = 1024,
        **sampling: Any,
    ):
        """
        Args:
            model, tokenizer: the tokenizer has a chat template.
            system: the system message.
            max_new_tokens: the most tokens of an answer.
            **sampling: options of `generate`: `do_sample`, `temperature`, `top_p`.

        Raises:
            UserError: no chat template, or one that refuses the system message.
        """
        if not tokenizer.chat_template:
            raise UserError(
                "the model's tokenizer has no chat template, so there is no telling how to talk to it: fine-tune it "
                "on `messages` with a tokenizer that has one, or take a model that was trained to chat"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._ends = stop_tokens(model, tokenizer)
        self._cache, self._cached = DynamicCache(config=model.config), []
        self.prompt_tokens = self.new_tokens = self.computed_tokens = 0
        self._render([*self.messages, {"role": "user", "content": "?"}])

    def ask(
        self, text: str, show: Callable[[str], None] = lambda piece: None, stopped: Callable[[], bool] = lambda: False
    ) -> str:
        """The answer to one more message, both of which join the history; a stopped answer as far as it came.

        Args:
            text: what the user says.
            show: called with each piece of the answer as it comes.
            stopped: asked after each token whether to leave it at that.

        Raises:
            UserError: the template refuses the message, or the history no longer fits into the model's context; the
                history is as it was before.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = self._generate(self._render(asked), show, stopped)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def undo(self) -> str | None:
        """Take back the last question and its answer; the question, None if there was none."""
        if len(self.messages) < 2:
            return None
        *self.messages, question, _ = self.messages
        return question["content"]

    def clear(self) -> None:
        """Begin anew, with the same system message."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    @property
    def context(self) -> int:
        """Tokens that question, answer and all that was said before may have."""
        return self.model.config.max_position_embeddings

    def _render(self, messages: list[dict[str, Any]]) -> list[int]:
        messages = checked_messages(messages)
        try:
            text = render_chat(self.tokenizer, messages, prompt=True)
        except UserError:
            raise
        except Exception as error:  # a template is a program of its own and can fail in any way
            raise UserError(f"the chat template refuses this: {first_line(error)}") from error
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _generate(self, prompt: list[int], show: Callable[[str], None], stopped: Callable[[], bool]) -> str:
        room = self.context - len(prompt)
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, and the model's context is {self.context}: "
                "say less, take something back, or begin anew"
            )
        kept = self._keep(prompt)
        self.prompt_tokens, self.computed_tokens = len(prompt), len(prompt) - kept
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        inputs = torch.tensor([prompt], device=self.model.device)
        try:
            tokens = self.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                **{CACHE_NAME: self._cache},
                max_new_tokens=min(self.max_new_tokens, room),
                eos_token_id=self._ends or None,
                pad_token_id=pad,
                streamer=_Pieces(self.tokenizer, show),
                stopping_criteria=[_StopWhen(stopped)],
                **self.sampling,
            )[0].tolist()
        except BaseException:
            # Some layers may have read a token more than others.
            self._cache, self._cached = DynamicCache(config=self.model.config), []
            raise
        # The last token was chosen, not read.
        self._cached = tokens[: self._cache.get_seq_length()]
        new = tokens[len(prompt) :]
        self.new_tokens = len(new)
        return text_of(new[:-1] if new[-1:] and new[-1] in self._ends else new, self.tokenizer)

    def _keep(self, prompt: list[int]) -> int:
        """Leaves in the cache what the prompt begins with, but for its last token, which has to be read."""
        most = min(len(self._cached), len(prompt) - 1)
        kept = next((i for i in range(most) if self._cached[i] != prompt[i]), most)
        self._cache.crop(kept - len(self._cached))
        self._cached = self._cached[:kept]
        return kept


class _StopWhen(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]):
        self._stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._stopped(), device=input_ids.device, dtype=torch.bool)


class _Pieces(TextStreamer):
    """Hands over each piece of text that no later token can change."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._show(text)
