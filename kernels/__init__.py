"""The operations that AFD needs and no library has, each with its eager reference. Needs torch alone.

The folder `kernels/` is the package `fastafd.kernels`; importing it touches neither CUDA nor triton.
"""

from fastafd.kernels.afd_loss import AFDLoss, afd_loss

__all__ = ["AFDLoss", "afd_loss"]
