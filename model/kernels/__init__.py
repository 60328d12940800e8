"""Kernels in Triton for a GPU: each does in one pass what the plain path of `model/` does in several.

The plain path says what is right, and a kernel is held to it without a card: Triton's interpreter gives its numbers,
its compiler the shared memory, registers and spills on each kind of GPU (docs/kernels.md, `make test-kernels`). Triton
is imported here and nowhere else, so that a CPU does not need it.
"""
