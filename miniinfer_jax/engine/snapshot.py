"""`Snapshot`: the state of an engine as a value, and what must agree between it and the engine that takes it up."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from miniinfer_jax.config import ModelConfig
from miniinfer_jax.engine import snapshot_folder
from miniinfer_jax.engine.request_state import RequestState, SequenceState, request_from_json, request_to_json
from miniinfer_jax.engine.snapshot_folder import SnapshotError
from miniinfer_jax.kv_cache import layer_shape
from miniinfer_jax.models.decoder import DecoderParams


@dataclass(frozen=True)
class Snapshot:
    """The requests of an engine in order of arrival, and the keys and values of their tokens.

    model: what must agree for the same tokens to follow. num_requests: how many requests the engine has had, from which
    the seed of the next one follows. Raises SnapshotError, when it is made, for pages that are missing.
    """

    model: dict[str, Any]
    page_size: int
    num_requests: int
    requests: tuple[RequestState, ...]
    pages: tuple[np.ndarray, ...]  # one a layer: [live pages, S, K, 2, H]; of the pool only what a sequence holds

    def __post_init__(self) -> None:
        for request in self.requests:
            for sequence in request.sequences:
                num_known = len(request.prompt_token_ids) + len(sequence.output_token_ids)
                if not 0 <= sequence.num_computed < num_known:
                    raise SnapshotError(
                        f"the snapshot is damaged: request {request.request_id!r} has {sequence.num_computed} computed "
                        f"of {num_known} tokens; all but the newest can be"
                    )
                needed = -(-sequence.num_computed // self.page_size)
                missing = [page for page in sequence.page_table if not 0 <= page < self.num_pages]
                if missing or len(sequence.page_table) != needed:
                    raise SnapshotError(
                        f"the snapshot is cut short: request {request.request_id!r} needs {needed} pages and names "
                        f"{len(sequence.page_table)}, of which {missing} are missing from the {self.num_pages} it holds"
                    )

    @property
    def num_pages(self) -> int:
        return min((len(layer) for layer in self.pages), default=0)

    def save(self, folder: str | PathLike[str]) -> None:
        """Writes the snapshot into a new folder, whole or not at all. Raises SnapshotError if there is one already."""
        requests = [request_to_json(state) for state in self.requests]
        counts = {"page_size": self.page_size, "num_requests": self.num_requests}
        snapshot_folder.write(folder, {"model": self.model, **counts, "requests": requests}, self.pages)

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "Snapshot":
        """The snapshot that `save` wrote. Raises SnapshotError, naming what is missing, for one that is cut short."""
        document, pages = snapshot_folder.read(folder)
        try:
            requests = tuple(map(request_from_json, document["requests"]))
            return cls(document["model"], document["page_size"], document["num_requests"], requests, pages)
        except KeyError as error:
            raise SnapshotError(f"the snapshot in {folder} is cut short: {error} is missing; take it again") from None
        except (TypeError, AttributeError) as error:
            raise SnapshotError(f"the snapshot in {folder} is damaged ({error}); take it again") from None

    def check_pages(self, config: ModelConfig) -> None:
        """Raises SnapshotError unless the pages, if there are any, are those of such a model."""
        shape = layer_shape(config, self.num_pages, self.page_size)
        found = [layer.shape for layer in self.pages]
        if self.num_pages and found != [shape] * config.num_layers:
            raise SnapshotError(
                f"the snapshot is damaged: it holds pages of the shapes {found}, and {config.num_layers} layers of "
                f"{shape} are needed"
            )

    def pages_of(self, sequence: SequenceState, page_size: int) -> tuple[np.ndarray, ...]:
        """The keys and values of a sequence in pages of `page_size` tokens, one array a layer."""
        table = np.array(sequence.page_table, np.int64)
        if page_size == self.page_size:
            return tuple(layer[table] for layer in self.pages)
        num_pages = -(-sequence.num_computed // page_size)
        positions = np.arange(num_pages * page_size) % max(1, sequence.num_computed)  # behind the last: anything
        slots = (table[positions // self.page_size], positions % self.page_size)
        return tuple(layer[slots].reshape(num_pages, page_size, *layer.shape[2:]) for layer in self.pages)


def describe_model(config: ModelConfig, params: DecoderParams) -> dict[str, Any]:
    """What decides which tokens follow: every field of the configuration, the dtype, and a checksum of the weights."""
    return {**_flat(asdict(config)), "dtype": params.embedding.dtype.name, "weights": _checksum(params)}


def check_model(theirs: dict[str, Any], ours: dict[str, Any], what: str = "the snapshot") -> None:
    """Raises SnapshotError, naming each field with both values, for a snapshot (or a log) of another model."""
    absent = object()
    names = [name for name in {**ours, **theirs} if theirs.get(name, absent) != ours.get(name, absent)]
    if names:
        differences = "; ".join(f"{name} is {theirs.get(name)!r}, here {ours.get(name)!r}" for name in names)
        raise SnapshotError(f"{what} is of another model: {differences}. Load that model to continue")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names, and tuples as lists, as JSON has them."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


@jax.jit
def _sum_of_bits(array: jax.Array) -> jax.Array:
    """The wrapping sum of an array's words, each times its place's odd number: weights that changed change it."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    places = jax.lax.broadcasted_iota(jnp.uint32, words.shape, words.ndim - 1)
    return jnp.sum(words * (2 * places + 1), dtype=jnp.uint32)


def _checksum(params: DecoderParams) -> str:
    sums = [_sum_of_bits(leaf) for leaf in jax.tree.leaves(params)]
    return hashlib.sha256(np.array(jax.device_get(sums), np.uint32).tobytes()).hexdigest()[:16]


def live_pages(page_tables: Iterable[Sequence[int]]) -> dict[int, int]:
    """Every page that some sequence holds, in order, and the row of the snapshot that it goes to."""
    return {page: row for row, page in enumerate(sorted({page for table in page_tables for page in table}))}
