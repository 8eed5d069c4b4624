"""GPTs with random adapters, and comparisons of adapters."""

import numpy as np
from conftest import randomise, tiny_config

import minilora as ml
from minilora.lora.surgery import lora_layers


def base(**changes):
    return ml.GPT(tiny_config(**changes), rng=0)


def task(seed=3, targets=None, rank=2, alpha=4, model=None, **options):
    model = ml.replace_linear_with_lora(model or base(), rank, alpha, targets, rng=seed, **options)
    for _, layer in lora_layers(model):
        randomise(layer.lora, seed=seed)
    return model


def updates(adapter):
    return {name: f.delta_weight() for name, f in adapter.layers.items()}


def close(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys()
    for name in got:
        assert np.abs(got[name] - expected[name]).max() <= tolerance * np.abs(expected[name]).max()
