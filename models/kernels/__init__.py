"""Pallas kernels. Each runs on one device's arrays: models place them inside `jax.shard_map`."""
