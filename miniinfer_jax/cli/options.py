"""The options that several commands share, each written once: `SamplingOptions` and `EngineOptions`.

A command names such a group as one argument; `flatten_options` shows its fields to typer one by one.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from miniinfer_jax.llm import LLM


def _flag(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help)


def parse_logit_bias(entries: list[str]) -> dict[int, float]:
    """{token id: bias} from entries like '12=-5'. Raises ValueError."""
    biases = {}
    for entry in entries:
        token_id, _, bias = entry.partition("=")
        try:
            biases[int(token_id)] = float(bias)
        except ValueError:
            raise ValueError(f"logit bias {entry!r} is not TOKEN_ID=BIAS, for example 12=-5") from None
    return biases


@dataclass
class SamplingOptions:
    """The fields of `SamplingParams` as flags, with defaults for reading answers: greedy, up to 256 tokens."""

    max_tokens: Annotated[int, _flag(help="Tokens to generate at most.")] = 256
    temperature: Annotated[float, _flag(help="0 is greedy.")] = 0.0
    top_p: Annotated[float, _flag(help="Keep the likeliest tokens that hold this probability.")] = 1.0
    top_k: Annotated[int, _flag(help="Keep this many tokens; 0 keeps all.")] = 0
    min_p: Annotated[float, _flag(help="Drop tokens below this share of the likeliest's probability.")] = 0.0
    presence_penalty: Annotated[float, _flag(help="Subtracted for every token drawn before.")] = 0.0
    frequency_penalty: Annotated[float, _flag(help="Subtracted as often as a token was drawn.")] = 0.0
    repetition_penalty: Annotated[float, _flag(help="Divides the logits of tokens seen; 1 is off.")] = 1.0
    n: Annotated[int, _flag("--n", "-n", help="Continuations a prompt.")] = 1
    min_tokens: Annotated[int, _flag(help="No end of sequence before this many tokens.")] = 0
    stop: Annotated[list[str] | None, _flag(help="Text that ends the answer (may be repeated).")] = None
    stop_token_id: Annotated[list[int] | None, _flag(help="Token id that ends it (may be repeated).")] = None
    ignore_eos: Annotated[bool, _flag("--ignore-eos", help="Go on past the end of sequence.")] = False
    bad_word: Annotated[list[str] | None, _flag(help="Text never to generate (may be repeated).")] = None
    allowed_token_id: Annotated[list[int] | None, _flag(help="Only these tokens (may be repeated).")] = None
    logit_bias: Annotated[list[str] | None, _flag(help="TOKEN_ID=BIAS, added to a logit (may be repeated).")] = None
    logprobs: Annotated[int | None, _flag(help="With --json: this many log-probabilities a token.")] = None
    prompt_logprobs: Annotated[int | None, _flag(help="The same for the prompt's tokens.")] = None
    include_stop_str: Annotated[bool, _flag("--include-stop-str", help="Keep the stop text.")] = False
    keep_special_tokens: Annotated[bool, _flag("--keep-special-tokens", help="Show special tokens.")] = False

    def as_values(self) -> dict[str, Any]:
        """The names and values of `SamplingParams`, without those left at their default of None."""
        values = asdict(self)
        for flag, name in (("stop_token_id", "stop_token_ids"), ("allowed_token_id", "allowed_token_ids")):
            values[name] = values.pop(flag)
        values["bad_words"] = values.pop("bad_word")
        values["include_stop_str_in_output"] = values.pop("include_stop_str")
        values["skip_special_tokens"] = not values.pop("keep_special_tokens")
        values["logit_bias"] = parse_logit_bias(values["logit_bias"]) if values["logit_bias"] else None
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class EngineOptions:
    """The arguments of `LLM` as flags; None leaves a size to the command or to the engine."""

    model: Annotated[str, _flag("--model", "-m", help="A folder, a hub id, 'demo' or 'demo-draft'.")] = "demo"
    dtype: Annotated[str, _flag(help="auto, float32, bfloat16 or float16.")] = "auto"
    seed: Annotated[int, _flag(help="Of all draws: the same command gives the same text.")] = 0
    max_model_len: Annotated[int | None, _flag(help="Longest prompt and answer together, tokens.")] = None
    max_num_seqs: Annotated[int | None, _flag(help="Sequences in a step at most.")] = None
    max_num_batched_tokens: Annotated[int | None, _flag(help="Tokens in a step at most.")] = None
    page_size: Annotated[int | None, _flag(help="Tokens in a page of the KV cache.")] = None
    num_pages: Annotated[int | None, _flag(help="Pages of the KV cache; default: what memory allows.")] = None
    gpu_memory_utilization: Annotated[float, _flag(help="Share of the device's memory to use.")] = 0.9
    load_format: Annotated[str, _flag(help="auto, or dummy: random weights, config.json is enough.")] = "auto"
    revision: Annotated[str | None, _flag(help="Branch, tag or commit of a hub id.")] = None
    deterministic: Annotated[bool, _flag("--deterministic", help="Bitwise the same in any batch.")] = False
    attention_backend: Annotated[str, _flag(help="Which attention kernels.")] = "auto"
    enable_prefix_caching: Annotated[
        bool | None,
        _flag("--enable-prefix-caching/--no-enable-prefix-caching", help="Compute what prompts share once."),
    ] = None
    scheduling_policy: Annotated[str, _flag(help="fcfs, sjf, priority, fair or multi_queue.")] = "fcfs"
    target_itl_ms: Annotated[float | None, _flag(help="Milliseconds from token to token to aim for.")] = None
    kv_offload_bytes: Annotated[int, _flag(help="Of host memory, for evicted pages to come back from.")] = 0

    def open_llm(self, **defaults: Any) -> "LLM":
        """The LLM of these options; imports JAX only now. `defaults` stand for options left at None."""
        from miniinfer_jax.llm import LLM

        given = {name: value for name, value in asdict(self).items() if value is not None}
        return LLM(**{"use_tqdm": sys.stderr.isatty(), **defaults, **given})


def _is_group(parameter: inspect.Parameter) -> bool:
    return is_dataclass(parameter.annotation)


def _group_parameters(group: Any) -> list[inspect.Parameter]:
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=field.type,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
        )
        for field in fields(group)
    ]


def flatten_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer can read it: an argument that is a dataclass becomes one option a field."""
    own = list(inspect.signature(command).parameters.values())
    flat: list[inspect.Parameter] = []
    for parameter in own:
        one = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
        flat += _group_parameters(parameter.annotation) if _is_group(parameter) else one

    def flattened(**values: Any) -> None:
        arguments = {}
        for parameter in own:
            if _is_group(parameter):
                names = [field.name for field in fields(parameter.annotation)]
                arguments[parameter.name] = parameter.annotation(**{name: values[name] for name in names})
            else:
                arguments[parameter.name] = values[parameter.name]
        command(**arguments)

    flattened.__name__, flattened.__doc__ = command.__name__, command.__doc__
    flattened.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    flattened.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return flattened
