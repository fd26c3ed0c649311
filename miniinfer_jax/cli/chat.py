"""`miniinfer chat`: a conversation in the terminal, or one answer to what is piped in."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from miniinfer_jax.cli.generate import open_small, print_stream
from miniinfer_jax.cli.options import EngineOptions, SamplingOptions, flatten_options
from miniinfer_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from miniinfer_jax.llm import LLM

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."


class Conversation:
    """The messages so far, all of which the model reads before every answer."""

    def __init__(self, llm: "LLM", params: SamplingParams, system: str | None, as_json: bool):
        self._llm = llm
        self._params = params
        self._start = [{"role": "system", "content": system}] if system else []
        self._as_json = as_json
        self.messages = list(self._start)

    def reset(self) -> None:
        self.messages = list(self._start)

    def answer(self, text: str) -> None:
        """Prints the answer and remembers it; a message that cannot be answered is forgotten again."""
        self.messages.append({"role": "user", "content": text})
        try:
            reply = self._print_json() if self._as_json else self._print_text()
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": reply})

    def _print_text(self) -> str:
        prompt = {"prompt_token_ids": self._llm.apply_chat_template(self.messages)}
        return print_stream(self._llm, prompt, self._params)

    def _print_json(self) -> str:
        output = self._llm.chat(self.messages, self._params, use_tqdm=False)[0]
        completion = output.outputs[0]
        document = {
            "role": "assistant",
            "content": completion.text,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": len(completion.token_ids),
        }
        print(json.dumps(document, ensure_ascii=False), flush=True)
        return completion.text


@flatten_options
def chat(
    sampling: SamplingOptions,
    engine: EngineOptions,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as a line of JSON.")] = False,
) -> None:
    """Talk with the model; piped input is one message."""
    params = SamplingParams.from_dict(sampling.as_values())
    if params.n != 1:
        raise ValueError(f"n is {params.n}; a conversation has one answer, use `miniinfer generate` for several")
    is_piped = not sys.stdin.isatty()
    message = sys.stdin.read().strip() if is_piped else ""
    if is_piped and not message:
        raise ValueError("nothing was piped in; write a message: echo 'Hello' | miniinfer chat")
    conversation = Conversation(open_small(engine, params), params, system, as_json)
    if is_piped:
        conversation.answer(message)
    else:
        _converse(conversation)


def _converse(conversation: Conversation) -> None:
    """Reads and answers until the user leaves."""
    print(HELP, file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
        elif text:
            _answer_or_explain(conversation, text)


def _answer_or_explain(conversation: Conversation, text: str) -> None:
    try:
        conversation.answer(text)
    except ValueError as error:
        print(f"error: {error} (/reset starts anew)", file=sys.stderr)
    except KeyboardInterrupt:
        print()
