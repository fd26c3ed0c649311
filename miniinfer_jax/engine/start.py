"""Makes the runner of an engine, which is where an engine's start takes its time and its memory."""

import logging

import jax

from miniinfer_jax.config import ConfigError, EngineConfig, ModelConfig
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
            offloads = config.kv_offload_bytes > 0
            runner = Runner(context, params, buckets, use_tqdm=use_tqdm, offloads=offloads)
            runner.warm_up_on_gpu()
            return runner, num_failures
        except jax.errors.JaxRuntimeError as error:
            fewer = fewer_pages(num_pages, max_pages)
            if not is_out_of_memory(error) or fewer == num_pages:
                raise
            logger.warning("the device ran out of memory at the start: %d pages, not %d (%s)", fewer, num_pages, error)
            num_pages, num_failures = fewer, num_failures + 1


def num_host_pages(config: EngineConfig, runner: Runner) -> int:
    """How many pages are kept in host memory: none if it is quicker here to compute a page anew than to bring it back.

    Raises ConfigError for fewer bytes than one page takes.
    """
    if config.kv_offload_bytes == 0:
        return 0
    page_bytes = runner.page_bytes
    if config.kv_offload_bytes < page_bytes:
        raise ConfigError(
            f"kv_offload_bytes is {config.kv_offload_bytes}, and a page takes {page_bytes}: raise it, or set 0"
        )
    back, anew = runner.measure_pages()
    worth = back < anew
    logger.info(
        "a page comes back from host memory in %.3f ms and is computed anew in %.3f ms: %s",
        *(1e3 * back, 1e3 * anew, "evicted pages are offloaded" if worth else "nothing is offloaded"),
    )
    return config.kv_offload_bytes // page_bytes if worth else 0
