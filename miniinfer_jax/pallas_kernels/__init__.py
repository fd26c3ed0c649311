"""GPU kernels: arrays in, arrays out. Imports only jax; each one has its plain-XLA reference in `ops`."""
