"""Kernels: operations of one device, which know no mesh. Each says in its docstring what its bits are."""
