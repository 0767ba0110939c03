"""fastafd: adversarial fine-tuning via disentanglement (AFD), fast. Importing it touches neither CUDA nor triton."""

from fastafd.attacks import PGD
from fastafd.checkpoint import load_model
from fastafd.evaluation import evaluate
from fastafd.models import Disentangled, disentangle
from fastafd.training.afd_step import AFDStep
from fastafd.training.optim import make_sgd

__all__ = ["PGD", "AFDStep", "Disentangled", "disentangle", "evaluate", "load_model", "make_sgd"]
