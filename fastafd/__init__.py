"""fastafd: adversarial fine-tuning via disentanglement (AFD), fast. Importing it touches neither CUDA nor triton."""

from fastafd.afd_step import AFDStep
from fastafd.attacks import PGD
from fastafd.checkpoint import load_model
from fastafd.evaluation import evaluate
from fastafd.models import Disentangled, disentangle

__all__ = ["PGD", "AFDStep", "Disentangled", "disentangle", "evaluate", "load_model"]
