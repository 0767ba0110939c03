"""fastafd VERB …, the same as python -m fastafd.VERB …"""

from __future__ import annotations

import importlib
import sys

from fastafd import cli
from fastafd.settings import unknown

VERBS = {
    "train": "pre-train or load a natural model, fine-tune it with AFD, evaluate, save",
    "pretrain": "train a natural model",
    "verify": "compare the fast step with plain PyTorch in float64, on this machine",
    "evaluate": "measure clean, PGD-20 and AutoAttack accuracy of a run or of any weights",
    "report": "make the paper's tables and figures, and an HTML page, from run folders",
}


def main() -> None:
    """The console script."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: fastafd VERB [flags]\n\n" + "\n".join(f"  {verb:10} {what}" for verb, what in VERBS.items()))
        sys.exit(0 if argv else 2)

    def dispatch(argv: list[str]) -> None:
        if argv[0] not in VERBS:
            raise unknown("verb", argv[0], VERBS)
        importlib.import_module(f"fastafd.{argv[0]}").main(argv[1:])

    cli.run(dispatch, argv)


if __name__ == "__main__":
    main()
