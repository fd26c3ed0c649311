"""The engine: what decides (plain Python) and what runs (the only place that calls `jax.jit`)."""
