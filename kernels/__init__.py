"""The operations that AFD needs and no library has, each with its eager reference. They need torch and triton alone.

The folder `kernels/` is the package `fastafd.kernels`. An operation has two files: `NAME.py` holds its maths, its eager
reference, the launcher of its kernels and the operation itself; `triton_code/NAME.py` holds the kernels, ordinary
`@triton.jit` functions, which the launcher imports at its first launch. So importing the package imports no Triton and
creates no CUDA context.

Every operation is a `torch.library.custom_op`. It launches the kernels on CUDA, and runs the reference on a CPU, for
float64, without Triton, and inside `operation.references()`. All work under `torch.compile(fullgraph=True)`, and none
waits for the device.
"""

from fastafd.kernels.afd_loss import AFDLoss, afd_loss
from fastafd.kernels.attack_head import attack_head
from fastafd.kernels.augment import augment
from fastafd.kernels.kl_loss import kl_loss
from fastafd.kernels.linf_step import linf_step

__all__ = ["AFDLoss", "afd_loss", "attack_head", "augment", "kl_loss", "linf_step"]
