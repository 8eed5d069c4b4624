"""Checks for the exercises, which say what is wrong: `check.linear_backward(my_function)`.

Each runs the learner's code on inputs of many shapes and compares it with a reference. A right
answer is returned as `Passed` and printed by the notebook; a wrong one raises `CheckFailed`, an
AssertionError, which a notebook shows without a stack trace. Nothing of the learner's is changed.
"""

from minilora.exercises import functions as _functions
from minilora.exercises.engine import CheckFailed, Passed
from minilora.exercises.engine import check as _check
from minilora.exercises.objects import (
    BUDGET,
    BUDGET_GAIN,
    TABLE,
    diagnosis,
    find_errors,
    lora_forward,
    merge,
    replace_linear,
    train,
    train_with,
)

__all__ = [
    "BUDGET", "BUDGET_GAIN", "TABLE", "CheckFailed", "Passed", "adamw", "attention_backward",
    "cross_entropy", "diagnosis", "find_errors", "gpt_parameters", "layer_norm_backward",
    "linear_backward", "linear_forward", "lora_backward", "lora_forward", "lora_parameters",
    "merge", "replace_linear", "train", "train_with",
]


def linear_forward(function):
    """Exercise 1: y = linear_forward(x, W, b)."""
    return _check(_functions.LINEAR_FORWARD, function)


def linear_backward(function):
    """Exercise 1: dx, dW, db = linear_backward(dout, x, W)."""
    return _check(_functions.LINEAR_BACKWARD, function)


def cross_entropy(function):
    """Exercise 2: loss, dlogits = cross_entropy(logits, targets)."""
    return _check(_functions.CROSS_ENTROPY, function)


def lora_backward(function):
    """Exercise 4: dx, dA, dB = lora_backward(dout, x, A, B, scale)."""
    return _check(_functions.LORA_BACKWARD, function)


def adamw(function):
    """Exercise 6: p, m, v = adamw_step(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay)."""
    return _check(_functions.ADAMW, function)


def layer_norm_backward(function):
    """Exercise 7: dx, dweight, dbias = layer_norm_backward(dout, x, weight, bias, eps)."""
    return _check(_functions.LAYER_NORM_BACKWARD, function)


def attention_backward(function):
    """Exercise 8: dq, dk, dv = attention_backward(dout, q, k, v), each (T, D)."""
    return _check(_functions.ATTENTION_BACKWARD, function)


def lora_parameters(function):
    """Exercise 10: count = lora_parameters(shapes, rank)."""
    return _check(_functions.LORA_PARAMETERS, function)


def gpt_parameters(function):
    """Exercise 10: count = gpt_parameters(vocab_size, context_length, d_model, n_layers)."""
    return _check(_functions.GPT_PARAMETERS, function)
