"""Elementwise stages, row sums and their gradients on Hopper GPUs, as programs of single threads.

`simt` is what a thread can do; `formulas` are the stages as arithmetic; `maps` (no sums), `norms` (sums over a row and over
tokens) and `sums` (leaves of the vocabulary) are the kernels.

Every order is a function of one length: how many rows there are, and which block has them, moves no bit.
"""
