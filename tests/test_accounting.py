import numpy as np
import pytest
from conftest import tiny_config

import minilora as ml
from minilora import functional
from minilora.accounting import (
    PUBLISHED,
    adapter_h_parameters,
    gpt_architecture,
    linear_flops,
    prefix_parameters,
    training_flops,
)


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"], "*_proj", ["up_proj"]])
def test_counts_are_those_of_a_built_model(tie_weights, bias, targets):
    config = tiny_config(tie_weights=tie_weights, bias=bias)
    architecture, model = gpt_architecture(config), ml.GPT(config)
    assert architecture.num_parameters == model.num_parameters()
    in_blocks = ["h.*"] if targets is None else targets
    ml.replace_linear_with_lora(model, 3, 6, in_blocks)
    expected = model.num_parameters(trainable_only=True)
    assert architecture.lora_parameters(3, targets) == expected


@pytest.mark.parametrize(
    "name, count",
    [
        ("gpt2-small", 124_439_808), ("gpt2-xl", 1_557_611_200), ("gpt3-175b", 174_604_259_328),
        ("roberta-base", 124_645_632), ("roberta-large", 355_359_744),
        ("llama-2-7b", 6_742_609_920 - 4_194_304), ("llama-3.1-8b", 8_030_261_248),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_published_parameter_counts(name, count):
    assert PUBLISHED[name].num_parameters == count


Q_V, ALL_FOUR = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(
    "name, rank, targets, count",
    [
        ("gpt3-175b", 1, Q_V, 4_718_592), ("gpt3-175b", 8, Q_V, 37_748_736),
        ("gpt3-175b", 4, ALL_FOUR, 37_748_736), ("gpt3-175b", 64, Q_V, 301_989_888),
        ("gpt3-175b", 4, Q_V, 18_874_368), ("roberta-base", 8, Q_V, 294_912),
        ("roberta-large", 8, Q_V, 786_432), ("llama-2-7b", 8, Q_V, 4_194_304),
        ("gpt2-medium", 4, Q_V, 393_216), ("gpt2-large", 4, Q_V, 737_280),
    ],
)
def test_lora_counts_of_the_paper(name, rank, targets, count):
    """Hu et al. 2021, tables 2 to 6. The paper prints 0.35M and 0.77M for the last two."""
    assert PUBLISHED[name].lora_parameters(rank, targets) == count


def test_other_methods_of_the_paper():
    assert adapter_h_parameters(192, 12288, 1) == 7_078_080
    assert prefix_parameters(12288, 256 + 8) == 3_244_032
    assert prefix_parameters(12288, 8 + 8, n_layers=96) == 18_874_368


def test_bad_counts():
    with pytest.raises(ValueError, match="did you mean 'q_proj'"):
        PUBLISHED["gpt3-175b"].lora_parameters(8, ["q_porj"])
    with pytest.raises(ValueError, match="rank must be 1 or more, got 0"):
        PUBLISHED["gpt3-175b"].lora_parameters(0)


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
