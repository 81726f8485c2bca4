"""What a model can do: generation, scores on held-out rows, and what fine-tuning has cost.

Read generate.py first, then evaluate.py. sampling.py chooses tokens; general_ability.py tries what was not trained.
"""

from minilora.evaluation.evaluate import Scores, answer_of, compare, difference, evaluate, held_out_loss, mean_nll
from minilora.evaluation.general_ability import general_ability
from minilora.evaluation.generate import generate, generate_tokens, stream

__all__ = [
    "Scores",
    "answer_of",
    "compare",
    "difference",
    "evaluate",
    "general_ability",
    "generate",
    "generate_tokens",
    "held_out_loss",
    "mean_nll",
    "stream",
]
