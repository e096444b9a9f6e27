"""Bitwise-identical Flax transformers on any device mesh."""
