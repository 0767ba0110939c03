"""The Triton code of the operations, a file an operation. `fastafd.kernels.NAME` imports it at its first launch.

A kernel's name begins with an underscore, because only the launcher in `fastafd.kernels.NAME` calls it. Integers in
`do_not_specialize` share one compilation for all their values. For every other integer, and for addresses, Triton
compiles variants (1, a multiple of 16, any). Launchers pass tensors whose addresses are multiples of 16.
"""
