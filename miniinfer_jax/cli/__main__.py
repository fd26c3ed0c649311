"""`python -m miniinfer_jax.cli`: the command `miniinfer` where no console script is installed."""

from miniinfer_jax.cli import main

main()
