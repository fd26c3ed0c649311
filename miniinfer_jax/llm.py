"""`LLM`: the door for Python users. Loads a model, answers prompts, scores tokens, streams."""

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from tqdm import tqdm

from miniinfer_jax.config import EngineConfig
from miniinfer_jax.engine.compile_cache import enable_compile_cache
from miniinfer_jax.engine.llm_engine import LLMEngine
from miniinfer_jax.engine.memory import choose_dtype, default_device, default_page_size, default_token_budget, size_pool
from miniinfer_jax.engine.policies import make_policy
from miniinfer_jax.engine.replay import Recorder, check_new
from miniinfer_jax.engine.snapshot import Snapshot
from miniinfer_jax.engine.validation import RequestError
from miniinfer_jax.models.decoder import param_specs
from miniinfer_jax.outputs import CompletionOutput, RequestOutput, Score, TextDelta
from miniinfer_jax.prompts import (
    Message,
    Prompt,
    TokenizedPrompt,
    apply_chat_template,
    as_list,
    params_for,
    scheduling_for,
    tokenize,
)
from miniinfer_jax.sampling_params import SamplingParams
from miniinfer_jax.tokenizer import load_tokenizer
from miniinfer_jax.weights import load_params, read_model_config, resolve

logger = logging.getLogger(__name__)

DEFAULT_MAX_NUM_SEQS = 256
REQUEST_PREFIX = "llm-"  # so that ids never meet those of a user who drives `LLM.engine` as well


class LLM:
    """A loaded model that answers prompts; names and meanings are vLLM's.

    model: a folder in Hugging Face layout, a hub id, or "demo" (the small model that ships). dtype "auto" is the
    checkpoint's own, float32 on a CPU. None leaves the choice to the engine: max_num_seqs is 256;
    max_num_batched_tokens, the tokens that a step may carry, 512 on a CPU and 8,192 elsewhere, both less where the
    device is small; page_size 16 and 64; max_model_len the model's own; num_pages what `gpu_memory_utilization` leaves.
    load_format "dummy" makes random weights from config.json alone.
    deterministic: a request's tokens and log-probabilities are bitwise the same whatever runs beside it.
    enable_prefix_caching: a prompt that begins like one before it is computed from where they differ.
    kv_offload_bytes: of host memory, for evicted pages to come back from instead of being computed anew.
    logits_processors: pure functions (logits [B, V], SamplingInputs) -> logits, traced into the step.
    scheduling_policy: who is served first, one of `engine.policies.POLICIES`, with `policy_options` of its own, such as
    the weights of tenants. target_itl_ms: prompts are computed in parts so small that a request gets a token about
    every so many milliseconds.
    record: a new file for a log of all that happens, which `miniinfer replay` runs again.
    Raises ValueError (ConfigError, CheckpointError, ...) for what it cannot load or run.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        seed: int = 0,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        gpu_memory_utilization: float = 0.9,
        page_size: int | None = None,
        num_pages: int | None = None,
        load_format: str = "auto",
        revision: str | None = None,
        skip_tokenizer_init: bool = False,
        deterministic: bool = False,
        attention_backend: str = "auto",
        enable_prefix_caching: bool = True,
        scheduling_policy: str = "fcfs",
        policy_options: Mapping[str, Any] | None = None,
        target_itl_ms: float | None = None,
        kv_offload_bytes: int = 0,
        logits_processors: Sequence[Any] = (),
        record: str | os.PathLike[str] | None = None,
        use_tqdm: bool = True,
    ) -> None:
        if record is not None:
            check_new(record)
            if target_itl_ms is not None:
                raise RequestError(
                    f"record with target_itl_ms={target_itl_ms}: steps that follow the clock can't be replayed; "
                    "leave one of them out"
                )
        folder = resolve(os.fspath(model), revision)
        self.model_config = read_model_config(folder)
        device = default_device(gpu_memory_utilization)
        engine_config = EngineConfig(
            max_num_seqs=DEFAULT_MAX_NUM_SEQS if max_num_seqs is None else max_num_seqs,
            max_num_batched_tokens=default_token_budget(device)
            if max_num_batched_tokens is None
            else max_num_batched_tokens,
            max_model_len=max_model_len,
            page_size=default_page_size(device) if page_size is None else page_size,
            num_pages=num_pages,
            gpu_memory_utilization=gpu_memory_utilization,
            dtype=choose_dtype(dtype, self.model_config, device),
            seed=seed,
            deterministic=deterministic,
            attention_backend=attention_backend,
            enable_prefix_caching=enable_prefix_caching,
            scheduling_policy=scheduling_policy,
            policy_options={} if policy_options is None else policy_options,
            target_itl_ms=target_itl_ms,
            kv_offload_bytes=kv_offload_bytes,
        )
        make_policy(scheduling_policy, policy_options)  # the engine makes its own; a wrong one is said before loading
        enable_compile_cache()
        self.tokenizer = None if skip_tokenizer_init else load_tokenizer(folder)
        limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
        specs = param_specs(self.model_config, engine_config.dtype)
        params = load_params(folder, self.model_config, specs, load_format, seed)
        self.engine = LLMEngine(
            self.model_config,
            params,
            size_pool(
                self.model_config,
                engine_config,
                device,
                defaults=[name for name, value in limits.items() if value is None],
            ),
            self.tokenizer,
            tuple(logits_processors),
            use_tqdm=use_tqdm,
        )
        if record is not None:
            processors = [getattr(one, "__qualname__", repr(one)) for one in logits_processors]
            ways = {"load_format": load_format, "revision": revision, "skip_tokenizer_init": skip_tokenizer_init}
            header = {
                "arguments": {"model": _lasting_name(model), **ways, **asdict(self.engine.engine_config)},
                "logits_processors": processors,
                "description": self.engine.describe_model(),
                "device": device.device_kind,
                "jax": version("jax"),
            }
            self.engine.record = Recorder(record, header).take
        self._request_ids = itertools.count()
        self._calling: set[str] = set()  # requests that a call waits for
        self._kept: dict[str, list[RequestOutput]] = {}  # by open request: outputs that its call has not taken yet

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] = 0,
        tenant: str | Sequence[str] = "",
        expected_output_len: int | Sequence[int | None] | None = None,
    ) -> list[RequestOutput]:
        """Continues each prompt; outputs in the order of the prompts.

        A prompt is a text, {"prompt": text}, {"prompt_token_ids": ids}, {"messages": [...]} or a list of token ids; a
        "cache_salt" beside it keeps its pages from requests with another one. A
        request that cannot be served raises ValueError when it is the only one; among others it comes back alone with
        `error` set and finish_reason "error", and the others finish. priority, tenant and expected_output_len are for
        the scheduling policy, as in `LLMEngine.add_request`: one for all prompts, or a list with one a prompt.
        """
        prompts = as_list(prompts)
        params = params_for(prompts, sampling_params)
        scheduling = scheduling_for(len(prompts), priority, tenant, expected_output_len)
        outputs: dict[str, RequestOutput] = {}
        request_ids = []
        try:
            for prompt, one, hints in zip(prompts, params, scheduling, strict=True):
                request_ids.append(self._add_or_refuse(prompt, one, hints, outputs, raises=len(prompts) == 1))
            self._finish(request_ids, outputs, use_tqdm)
        finally:
            self._drop(request_ids)
        return [outputs[request_id] for request_id in request_ids]

    def restore(self, snapshot: Snapshot, use_tqdm: bool = True) -> list[RequestOutput]:
        """Continues the requests of a snapshot to their end; outputs in their order of arrival.

        `engine.restore` takes them up without running them. Raises ValueError as it does, with nothing changed.
        """
        request_ids = self.engine.restore(snapshot)
        self._calling.update(request_ids)
        outputs: dict[str, RequestOutput] = {}
        try:
            self._finish(request_ids, outputs, use_tqdm)
        finally:
            self._drop(request_ids)
        return [outputs[request_id] for request_id in request_ids]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **scheduling: Any,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of several, of {"role", "content"} messages in the model's chat template.

        scheduling: as in `generate`.
        """
        if not isinstance(messages, Sequence) or not messages:
            raise RequestError(f"messages is {messages!r:.80}; it must be a list of messages, or of such lists")
        conversations: Any = [messages] if isinstance(messages[0], Mapping) else messages
        return self.generate([{"messages": one} for one in conversations], sampling_params, use_tqdm, **scheduling)

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation, ready for the assistant's turn. Raises ValueError without a template."""
        return apply_chat_template(self.tokenizer, messages)

    def score(self, prompts: Prompt | Sequence[Prompt], use_tqdm: bool = True) -> list[Score]:
        """How likely the model finds the tokens of each prompt, by the forward that serves. Errors as in `generate`."""
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self.generate(prompts, params, use_tqdm)
        return [_score(output) for output in outputs]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        tenant: str | Sequence[str] = "",
        expected_output_len: int | Sequence[int | None] | None = None,
    ) -> Iterator[TextDelta]:
        """The continuations of all prompts piece by piece, as they come. Leaving the iterator early aborts the rest.

        Every request is checked before the first piece: ValueError if one cannot be served.
        """
        prompts = as_list(prompts)
        params = params_for(prompts, sampling_params)
        scheduling = scheduling_for(len(prompts), priority, tenant, expected_output_len)
        tokenized = [tokenize(self.tokenizer, prompt) for prompt in prompts]
        for prompt, one in zip(tokenized, params, strict=True):
            self.engine.check_request(prompt.token_ids, one, prompt.cache_salt)
        return self._deltas(list(zip(tokenized, params, scheduling, strict=True)))

    def sleep(self, *, keep_cache: bool = False) -> None:
        """`LLMEngine.sleep`: the weights wait in host memory, and the device's memory is free for others."""
        self.engine.sleep(keep_cache=keep_cache)

    def wake_up(self) -> None:
        """`LLMEngine.wake_up`."""
        self.engine.wake_up()

    def fork(self, request_id: str, new_request_id: str | None = None, *, seed: int | None = None) -> str:
        """`LLMEngine.fork` of a request of `LLM.engine`; gives the new request's id, made up if it is not given."""
        if new_request_id is None:
            new_request_id = f"{request_id}-fork-{next(self._request_ids)}"
        self.engine.fork(request_id, new_request_id, seed=seed)
        return new_request_id

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached pages; False, with nothing changed, while requests run."""
        return self.engine.reset_prefix_cache()

    def _deltas(self, requests: list[tuple[TokenizedPrompt, SamplingParams, dict[str, Any]]]) -> Iterator[TextDelta]:
        indices: dict[str, int] = {}
        shown: dict[tuple[str, int], CompletionOutput] = {}
        try:
            for index, (prompt, params, hints) in enumerate(requests):
                indices[self._add(prompt, params, hints, streams=True)] = index
            unfinished = set(indices)
            while unfinished:
                for output in self._step(unfinished):
                    if output.finished:
                        unfinished.discard(output.request_id)
                    for completion in output.outputs:
                        before = shown.get((output.request_id, completion.index))
                        delta = _delta(indices[output.request_id], before, completion)
                        shown[output.request_id, completion.index] = completion
                        if delta is not None:
                            yield delta
        finally:
            self._drop(indices)

    def _finish(self, request_ids: list[str], outputs: dict[str, RequestOutput], use_tqdm: bool) -> None:
        """Runs steps until every request has its last output among `outputs`."""
        with tqdm(total=len(request_ids), desc="Requests", unit="req", disable=not use_tqdm) as progress:
            progress.update(len(outputs))
            num_tokens = 0
            waiting = set(request_ids) - set(outputs)
            while waiting:
                for output in self._step(waiting):
                    if not output.finished:
                        continue
                    waiting.discard(output.request_id)
                    outputs[output.request_id] = output
                    num_tokens += sum(len(completion.token_ids) for completion in output.outputs)
                    elapsed = progress.format_dict["elapsed"]
                    progress.set_postfix_str(f"{num_tokens / max(elapsed, 1e-9):.0f} tokens/s", refresh=False)
                    progress.update()

    def _step(self, request_ids: set[str]) -> list[RequestOutput]:
        """The next outputs of these requests. What a step has for other open calls is kept for them."""
        if not self._kept.keys() & request_ids:
            for output in self.engine.step(self._calling):
                self._kept.setdefault(output.request_id, []).append(output)
        return [output for request_id in self._kept.keys() & request_ids for output in self._kept.pop(request_id)]

    def _new_id(self) -> str:
        """An id that no request has; those of a restored snapshot may be of this form too."""
        ids = (f"{REQUEST_PREFIX}{number}" for number in self._request_ids)
        return next(request_id for request_id in ids if not self.engine.knows(request_id))

    def _add(self, prompt: TokenizedPrompt, params: SamplingParams, hints: dict[str, Any], streams: bool) -> str:
        request_id = self._new_id()
        self.engine.add_request(
            request_id, prompt.token_ids, params, prompt.text, cache_salt=prompt.cache_salt, streams=streams, **hints
        )
        self._calling.add(request_id)
        return request_id

    def _add_or_refuse(
        self,
        prompt: Prompt,
        params: SamplingParams,
        hints: dict[str, Any],
        outputs: dict[str, RequestOutput],
        raises: bool,
    ) -> str:
        """Queues a request; one that is refused is put among the outputs, so that the others can go on."""
        try:
            return self._add(tokenize(self.tokenizer, prompt), params, hints, streams=False)
        except ValueError as error:
            if raises:
                raise
            request_id = self._new_id()
            logger.warning("request %s is refused: %s", request_id, error)
            text = prompt if isinstance(prompt, str) else None
            refused = CompletionOutput(index=0, text="", token_ids=[], finish_reason="error")
            outputs[request_id] = RequestOutput(request_id, text, [], [refused], finished=True, error=str(error))
            return request_id

    def _drop(self, request_ids: Iterable[str]) -> None:
        """Aborts what is still running of these requests, and lets the step in flight end."""
        for request_id in request_ids:
            self.engine.abort(request_id)
            self._kept.pop(request_id, None)
            self._calling.discard(request_id)
        while not self.engine.has_requests() and self.engine.has_unfinished_requests():
            self.engine.step()


def _lasting_name(model: str | os.PathLike[str]) -> str:
    """The model's name, a folder's as seen from anywhere."""
    name = os.fspath(model)
    return os.path.abspath(name) if os.path.isdir(name) else name


def _score(output: RequestOutput) -> Score:
    if output.error is not None:
        return Score(output.prompt_token_ids, [], error=output.error)
    token_ids, entries = output.prompt_token_ids, output.prompt_logprobs or []
    logprobs = [
        None if entry is None else entry[token_id].logprob for token_id, entry in zip(token_ids, entries, strict=True)
    ]
    return Score(token_ids, logprobs)


def _delta(prompt_index: int, before: CompletionOutput | None, now: CompletionOutput) -> TextDelta | None:
    """What `now` has that `before` had not; None for nothing."""
    text, token_ids = now.text, now.token_ids
    if before is not None:
        if before.finish_reason is not None:
            return None
        text, token_ids = text[len(before.text) :], token_ids[len(before.token_ids) :]
    if not text and not token_ids and now.finish_reason is None:
        return None
    return TextDelta(prompt_index, now.index, text, token_ids, now.finish_reason)
