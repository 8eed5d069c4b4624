"""Mistakes that a type checker must see, each on its line (see test_types.py)."""

import numpy as np

import minilora as ml

ml.Linear(1, "x")  # wrong
ml.Linear(1, 2, nonsense=3)  # wrong
ml.LinearWithLoRA(ml.GELU(), 2, 4)  # wrong
ml.LoRALayer(4, 4, 2, 4, "alpha")  # wrong
layer = ml.Linear(2, 2)
layer.wieght = ml.Parameter(np.zeros((2, 2)))  # wrong
layer.weight.gard = None  # wrong
ml.GPTConfig(10, 8, 16, 2)  # wrong
