"""What an engine counts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """How busy the engine is, and what it has done so far."""

    num_running: int
    num_waiting: int
    num_free_pages: int  # hold nothing
    num_cached_pages: int  # hold what a prefix may be found in, and are as good as free ones
    num_pages: int
    num_preemptions: int
    num_memory_failures: int  # times that the device ran out of memory, and the engine went on with less
    num_prefix_queries: int  # tokens of the sequences that started
    num_prefix_hits: int  # those of them that were in pages already
    num_evictions: int  # cached pages given away
    num_offloaded_pages: int  # in host memory
    num_page_loads: int  # times that a page came back from there
    num_steps: int
    num_prompt_tokens: int
    num_generated_tokens: int
