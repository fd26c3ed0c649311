"""Meshes, sharding rules and parallel schedules by axis names alone: knows no model, imports nothing of miniinfer_jax."""
