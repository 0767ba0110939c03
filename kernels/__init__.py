"""The operations that AFD needs and no library has, each with its eager reference; torch and triton alone.

The folder `kernels/` is the package `fastafd.kernels`; importing it touches neither CUDA nor triton. Every operation is
a `torch.library.custom_op`: Triton on CUDA, the reference on a CPU, for float64, where Triton is missing and inside
`lazy.references()`; all work under `torch.compile(fullgraph=True)`, and none reads anything back from the device.
"""

from fastafd.kernels.afd_loss import AFDLoss, afd_loss
from fastafd.kernels.attack_head import attack_head
from fastafd.kernels.augment import augment
from fastafd.kernels.kl_loss import kl_loss
from fastafd.kernels.linf_step import linf_step

__all__ = ["AFDLoss", "afd_loss", "attack_head", "augment", "kl_loss", "linf_step"]
