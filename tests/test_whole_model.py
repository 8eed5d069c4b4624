"""What holds for every model: architectures, adapters and ways to use them, drawn at random.

A new architecture joins with a strategy of `Recipe`s in ARCHITECTURES, a new promise with a check.
"""

import copy
import fnmatch
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import examples
from helpers_recipes import (
    GLOBS,
    HEADS,
    Recipe,
    base_of,
    build,
    calls,
    inputs,
    logits,
    rarely,
    some,
)
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.lora.surgery import lora_layers, wrappers
from minilora.nn.functional import IGNORE_INDEX
from minilora.nn.gradcheck import numerical_gradient
from minilora.nn.rotary import RopeScaling
from minilora.train.parallel import DataParallel

# ---- Drawing a model


@st.composite
def gpts(draw):
    n_heads = draw(st.integers(1, 3))
    config = ml.GPTConfig(
        vocab_size=draw(st.integers(2, 11)), context_length=draw(st.integers(1, 6)),
        d_model=n_heads * draw(st.sampled_from([2, 1, 4])), n_layers=draw(st.integers(1, 3)),
        n_heads=n_heads, bias=draw(st.booleans()), tie_weights=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.3])),
        layer_norm_eps=draw(st.sampled_from([1e-5, 1e-2])),
    )
    recipe = Recipe(config, draw(st.sampled_from([np.float32, np.float64])),
                    head=draw(rarely(st.sampled_from(HEADS), "")), head_first=draw(st.booleans()))
    base = base_of(recipe)
    return replace(
        recipe, calls=tuple(draw(st.lists(calls(base, odd=False), min_size=1, max_size=2))),
        trained=draw(st.one_of(st.just(()), some(GLOBS, 2), some(list(base.state_dict())))),
        frozen=draw(rarely(some(["A", "B", "magnitude"], 1), ())),
    )


@st.composite
def llamas(draw):
    n_kv_heads = draw(st.integers(1, 2))
    n_heads = n_kv_heads * draw(st.integers(1, 2))
    config = ml.LlamaConfig(
        vocab_size=draw(st.integers(2, 11)), d_model=draw(st.sampled_from([4, 8])),
        d_ff=draw(st.integers(1, 9)), n_layers=draw(st.integers(1, 3)), n_heads=n_heads,
        n_kv_heads=n_kv_heads, context_length=draw(st.integers(1, 6)),
        head_dim=draw(st.sampled_from([2, 4])), tie_weights=draw(st.booleans()),
        rope_scaling=draw(st.sampled_from([None, RopeScaling(8.0, 1.0, 4.0, 32)])),
        rope_theta=draw(st.sampled_from([1e4, 50.0])),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-2])),
    )
    recipe = Recipe(config, draw(st.sampled_from([np.float32, np.float64])),
                    quantized=draw(st.sampled_from(["", "nf4", "int8", "q4_1"])),
                    recompute=draw(st.booleans()))
    base = base_of(recipe)
    globs = ["*_layernorm.weight", "*.up_proj.weight", "model.embed*", "lm_head.*", "*"]
    return replace(
        recipe, calls=tuple(draw(st.lists(calls(base, odd=False), min_size=1, max_size=2))),
        trained=draw(st.one_of(st.just(()), some(globs, 2), some(list(base.state_dict())))),
        frozen=draw(rarely(some(["A", "B", "magnitude"], 1), ())),
    )


ARCHITECTURES = {"GPT": gpts(), "Llama": llamas()}


# ---- Checks


def batch(recipe, model, rows=3, seed=0):
    """Return ids and targets, about a third of which are to be ignored."""
    rng = np.random.default_rng(seed)
    ids = np.resize(inputs(recipe), (rows, recipe.config.context_length))
    targets = rng.integers(0, model(ids).shape[-1], ids.shape)
    ignored = rng.random(ids.shape) < 0.3
    ignored.flat[rng.integers(ignored.size)] = False
    return ids, np.where(ignored, IGNORE_INDEX, targets)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients_are_the_slopes_of_the_loss(recipe):
    """With dropout, whose masks are drawn again for each loss."""
    recipe = replace(recipe, dtype=np.float64)
    model = build(recipe).train()
    for _, layer in lora_layers(model):
        if isinstance(layer, ml.DoRALinear):
            layer.detach_norm = False  # by default its gradient is not that of the loss
    ids, targets = batch(recipe, model)
    generators = [(m.rng, m.rng.bit_generator.state) for _, m in model.named_modules()
                  if isinstance(m, ml.Dropout)]

    def loss():
        for generator, state in generators:
            generator.bit_generator.state = state
        return ml.cross_entropy(model(ids), targets)

    _, dlogits = loss()
    model.backward(dlogits)
    rng = np.random.default_rng(1)
    compared = []
    for name, p in trainable(model).items():
        indices = [tuple(rng.integers(n) for n in p.shape)]
        indices.append(np.unravel_index(np.abs(p.grad).argmax(), p.shape))
        coarse, fine = (numerical_gradient(lambda: loss()[0], p.data, indices, h)
                        for h in (2e-5, 1e-5))
        slopes = (4.0 * fine - coarse) / 3.0  # Richardson: the errors of order h² cancel
        got = np.array([p.grad[i] for i in indices])
        compared.append((name, np.abs(slopes - got), np.abs(got).max(), np.abs(fine - coarse)))
    most = max((np.abs(p.grad).max() for p in trainable(model).values()), default=0.0)
    for name, errors, largest, bends in compared:  # where a loss bends, differences tell less
        assert (errors <= 1e-6 * largest + 1e-8 * max(most, 1.0) + bends).all(), name
    for _, p in model.named_parameters():
        assert (p.grad is None) != p.requires_grad


def merging_changes_nothing_and_can_be_undone(recipe):
    model = build(recipe)
    if not list(lora_layers(model)):
        return
    before, task = logits(model, recipe), ml.lora_state_dict(model)
    ml.merge_lora(model)
    close(logits(model, recipe), before)
    ml.unmerge_lora(model)
    assert np.array_equal(logits(model, recipe), before)
    for name, array in ml.lora_state_dict(model).items():
        assert np.array_equal(array, task[name])
    unloaded = ml.merge_lora(copy.deepcopy(model), unload=True)
    assert not list(lora_layers(unloaded))
    close(logits(unloaded, recipe), before)


def removing_gives_the_base_back(recipe):
    model = build(recipe)
    if not wrappers(model):  # a new head has replaced the only one
        return
    state = ml.remove_lora(model).state_dict()
    for name, array in base_of(recipe).state_dict().items():
        of_head = recipe.head and name.startswith("lm_head.")
        if not of_head and not any(fnmatch.fnmatchcase(name, p) for p in recipe.trained):
            assert np.array_equal(state[name], array)
    if not recipe.head and not recipe.trained:
        assert np.array_equal(logits(model, recipe), logits(base_of(recipe), recipe))


def saved(save, model, path):
    """Return whether the model was saved; if it was refused, nothing has been written."""
    try:
        save(model, path)
    except ValueError:
        assert not path.exists()
        return False
    return True


def files_hold_the_model(recipe):
    """Or nothing is written: see files/test_save_load_property.py."""
    model = build(recipe)
    expected = logits(model, recipe)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task"
        if saved(ml.save_adapter, model, path):
            close(logits(ml.load_adapter(base_of(recipe), path), recipe), expected)
        if list(lora_layers(model)):
            ml.merge_lora(model, unload=True)
        path = Path(folder) / "model"
        save, load = ((ml.to_hf_llama, ml.from_hf_llama) if isinstance(model, ml.Llama) else
                      (ml.save_checkpoint, ml.load_checkpoint))
        if saved(save, model, path):
            loaded = load(path, recipe.dtype).eval()
            assert np.array_equal(logits(loaded, recipe), logits(model, recipe))


def threads_share_the_work(recipe):
    """Also with fewer rows than threads."""
    model = build(recipe)  # in evaluation mode: each thread has its own dropout
    batches = [batch(recipe, model, rows) for rows in (1, 2, 4)]
    trained, results = trainable(model), []
    for threads in (1, 2, 3):
        with DataParallel(model, threads) as parallel:
            for ids, targets in batches:
                model.zero_grad()
                loss = parallel.loss_and_gradients(ids, targets)
                results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    for i, (loss, gradients) in enumerate(results):
        expected_loss, expected = results[i % len(batches)]  # those of one thread
        assert loss == pytest.approx(expected_loss, rel=1e-4)
        most = max([1.0, *(np.abs(g).max() for g in expected.values() if g is not None)])
        for name, g in gradients.items():
            assert (g is None) == (expected[name] is None) == (name not in trained)
            if g is not None:
                assert np.abs(g - expected[name]).max() <= precision(recipe.dtype) * most


def training_moves_the_task_and_nothing_else(recipe):
    model = build(recipe)
    trained = trainable(model)
    if not trained:
        return
    before = model.state_dict()
    optimizer = ml.AdamW(model.parameters(), lr=0.01)
    ml.fit(model, [batch(recipe, model, seed=i) for i in range(3)], optimizer, 3, progress=False)
    for name, array in model.state_dict().items():
        assert np.array_equal(array, before[name]) == (name not in trained)
    assert optimizer.state.keys() == set(trained.values())


def precision(dtype):
    """How well two ways of computing agree: layer norms of width 2 magnify what is rounded."""
    return 1e-8 if dtype == np.float64 else 1e-2


def close(got, expected):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert np.abs(got - expected).max() <= precision(expected.dtype) * np.abs(expected).max()


CHECKS = [
    gradients_are_the_slopes_of_the_loss, merging_changes_nothing_and_can_be_undone,
    removing_gives_the_base_back, files_hold_the_model, threads_share_the_work,
    training_moves_the_task_and_nothing_else,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_holds(name, check):
    @examples(25)
    @given(ARCHITECTURES[name])
    def holds(recipe):
        check(recipe)

    holds()
