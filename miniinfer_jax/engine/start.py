"""Makes the runner of an engine, which is where an engine's start takes its time and its memory."""

import logging

import jax

from miniinfer_jax.config import EngineConfig, ModelConfig
from miniinfer_jax.engine.batching import CacheShape
from miniinfer_jax.engine.buckets import choose_buckets
from miniinfer_jax.engine.memory import fewer_pages, is_out_of_memory
from miniinfer_jax.engine.runner import Runner
from miniinfer_jax.engine.steps import LogitsProcessor, StepContext
from miniinfer_jax.models.decoder import DecoderParams
from miniinfer_jax.ops.attention import choose_backend

logger = logging.getLogger(__name__)


def make_runner(
    model: ModelConfig,
    config: EngineConfig,
    params: DecoderParams,
    logits_processors: tuple[LogitsProcessor, ...],
    max_pages: int,
    use_tqdm: bool,
) -> tuple[Runner, int]:
    """(the runner, how often the device ran out of memory): each time the pool gets smaller, down to max_pages."""
    dtype, num_pages, num_failures = params.embedding.dtype.name, config.num_pages, 0
    assert num_pages is not None
    backend = choose_backend(config.attention_backend, model, dtype, config.page_size, jax.devices()[0])
    # On a GPU the host waits at a branch; on a CPU it costs nothing, and fewer programs start sooner.
    with_plain = jax.default_backend() == "gpu" and not logits_processors
    buckets = choose_buckets(config, with_plain=with_plain)
    while True:
        shape = CacheShape(num_pages, config.page_size, config.max_num_seqs, max_pages)
        context = StepContext(model, shape, backend, logits_processors)
        try:
            runner = Runner(context, params, buckets, use_tqdm=use_tqdm)
            runner.warm_up_on_gpu()
            return runner, num_failures
        except jax.errors.JaxRuntimeError as error:
            fewer = fewer_pages(num_pages, max_pages)
            if not is_out_of_memory(error) or fewer == num_pages:
                raise
            logger.warning("the device ran out of memory at the start: %d pages, not %d (%s)", fewer, num_pages, error)
            num_pages, num_failures = fewer, num_failures + 1
