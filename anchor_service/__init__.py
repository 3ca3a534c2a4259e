"""Frozen anchors: the models that read latents, their Ray actors and the pool that calls them."""
