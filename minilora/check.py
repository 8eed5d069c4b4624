"""Checks for the exercises that name the mistake: `check.linear_backward(my_function)`.

Each check runs the learner's code on inputs of many shapes and compares it with a reference. For
a correct answer it returns `Passed`, which a notebook prints. For a wrong one it raises
`CheckFailed`, an AssertionError, which a notebook shows without a stack trace. A check does not
change the learner's objects.
"""

from minilora.exercises.e01_linear import linear_backward, linear_forward
from minilora.exercises.e02_cross_entropy import cross_entropy
from minilora.exercises.e03_lora_forward import lora_forward
from minilora.exercises.e04_lora_backward import lora_backward
from minilora.exercises.e05_replace_linear import replace_linear
from minilora.exercises.e06_adamw import adamw
from minilora.exercises.e07_layer_norm import layer_norm_backward
from minilora.exercises.e08_attention import attention_backward
from minilora.exercises.e09_merging import merge
from minilora.exercises.e10_counting import TABLE, find_errors, gpt_parameters, lora_parameters
from minilora.exercises.e11_training import BUDGET, BUDGET_GAIN, train, train_with
from minilora.exercises.e12_diagnosis import diagnosis
from minilora.exercises.outcome import CheckFailed, Passed

__all__ = [
    "BUDGET", "BUDGET_GAIN", "TABLE", "CheckFailed", "Passed", "adamw", "attention_backward",
    "cross_entropy", "diagnosis", "find_errors", "gpt_parameters", "layer_norm_backward",
    "linear_backward", "linear_forward", "lora_backward", "lora_forward", "lora_parameters",
    "merge", "replace_linear", "train", "train_with",
]
