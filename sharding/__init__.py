"""Meshes, sharding rules and parallel schedules by axis names alone: knows no model, nothing of miniinfer_jax."""
