"""Turns one sequence's tokens into text as they come, and finds stop strings in it."""

from typing import Any

from tokenizers.decoders import DecodeStream

from miniinfer_jax.sampling_params import SamplingParams


class Detokenizer:
    """The text of the tokens so far. `text` is all that can no longer change; a character may span several tokens.

    A stop string ends the text in front of it (behind it with include_stop_str_in_output). Text that may still
    become a stop string is in `text` but not in `settled_len`, so that a stream never shows it too early.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._params = params
        self._stream = DecodeStream(skip_special_tokens=params.skip_special_tokens)
        self._longest_stop = max((len(stop) for stop in params.stop_strings), default=0)

    @classmethod
    def of(cls, tokenizer: Any, params: SamplingParams, token_ids: list[int]) -> "Detokenizer | None":
        """One that has taken token_ids; None where no text is asked for, or possible."""
        if tokenizer is None or not params.detokenize:
            return None
        return cls(tokenizer, params).fork(token_ids)

    @property
    def settled_len(self) -> int:
        """Characters of `text` that no stop string can take back."""
        return max(0, len(self.text) - max(0, self._longest_stop - 1))

    def append(self, token_id: int, num_tokens: int) -> str | None:
        """Takes the next token, the num_tokens-th; returns the stop string that it completes, if any."""
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token_id)
        if not piece:
            return None
        first = max(0, len(self.text) - self._longest_stop + 1)  # where a stop string may begin that ends in piece
        self.text += piece
        if num_tokens < self._params.min_tokens:
            return None
        return self._cut_at_stop(first)

    def _cut_at_stop(self, first: int) -> str | None:
        found = [(self.text.find(stop, first), stop) for stop in self._params.stop_strings]
        found = [(place, stop) for place, stop in found if place >= 0]
        if not found:
            return None
        place, stop = min(found, key=lambda one: one[0])
        self.text = self.text[: place + len(stop) if self._params.include_stop_str_in_output else place]
        return stop

    def fork(self, token_ids: list[int]) -> "Detokenizer":
        """One more detokenizer, that has taken token_ids, none of which ended the text."""
        fork = Detokenizer(self._tokenizer, self._params)
        for num_tokens, token_id in enumerate(token_ids, 1):
            fork.append(token_id, num_tokens)
        return fork

    def finish(self, token_ids: list[int]) -> None:
        """Completes the text of a sequence that no stop string ended: its last bytes may be no whole character."""
        whole = self._tokenizer.decode(token_ids, skip_special_tokens=self._params.skip_special_tokens)
        if whole.startswith(self.text):
            self.text = whole
