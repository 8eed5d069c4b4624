import numpy as np
import pytest
from conftest import tiny_config

import minilora as ml
from minilora import functional
from minilora.accounting import linear_flops, training_flops


@pytest.mark.parametrize("width, ratio", [(768, 0.69), (64, 0.92), (32, 1.17)])
def test_two_thirds_and_a_little(width, ratio):
    assert linear_flops(width, width, 10, 8) / linear_flops(width, width, 10) == pytest.approx(
        ratio, abs=0.005
    )


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
def test_the_formula_counts_the_products_of_a_real_step(monkeypatch, tie_weights, rank):
    """Count multiply-adds where they happen. With LoRA nothing is folded here, and one thing
    differs from the formula: the lowest layers need no input gradient."""
    config = tiny_config(tie_weights=tie_weights)
    model = ml.GPT(config)
    if rank:
        ml.replace_linear_with_lora(model, rank, 4)
    counted = 0

    def count(function, multiply_adds):
        def counting(*arrays):
            nonlocal counted
            counted += multiply_adds(*arrays)
            return function(*arrays)

        return counting

    def of_matmul(x, w):
        return x.size * w.shape[-1]

    def of_weight_grad(x, dout):
        return x.size * dout.shape[-1]

    from minilora import gpt, layers, lora
    monkeypatch.setattr(lora.LinearWithLoRA, "_folding_pays", lambda self, x: False)
    for module in (gpt, layers, lora):
        monkeypatch.setattr(module, "matmul", count(functional.matmul, of_matmul))
        monkeypatch.setattr(module, "weight_grad", count(functional.weight_grad, of_weight_grad))
    ids = np.zeros((3, config.context_length), int)
    _, dlogits = ml.cross_entropy(model(ids), ids)
    model.backward(dlogits)
    n, d, t = ids.size, config.d_model, config.context_length
    attention = config.n_layers * 6 * n * t * d
    expected = training_flops(config, 3, rank)
    got = 2 * (counted + attention)
    if rank is None:
        assert got == expected
    else:
        spared = 3 * 2 * n * (d * d + rank * d)  # q, k, v of the first block: no dx
        assert got == expected - spared
