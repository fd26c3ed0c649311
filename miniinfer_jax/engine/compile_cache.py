"""Where compiled programs are kept between processes: JAX's persistent compilation cache in the user's own folder."""

import logging
import os
from pathlib import Path

import jax

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """$MINIINFER_CACHE_ROOT, or miniinfer in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    named = os.environ.get("MINIINFER_CACHE_ROOT")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miniinfer"


def enable_compile_cache() -> None:
    """Programs compiled from here on are kept under `cache_root()`, unless the user has set JAX's cache already.

    The folder's mode is 0700: who can write a compiled program there can run code as the user.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = cache_root() / "xla"
    try:
        cache_root().mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        logger.warning("programs are compiled anew at every start: no compile cache in %s (%s)", folder, error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Small programs are kept as well: a start compiles about twenty of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
