"""Flax NNX transformers of the Llama family, and how their weights are described, read, laid out and stored."""
