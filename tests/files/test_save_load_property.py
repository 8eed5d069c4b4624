"""What is saved comes back with the same logits, or is refused before anything is written."""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import examples, tiny_config
from helpers_recipes import (
    CHANGES,
    ODD_NUMBERS,
    Call,
    Recipe,
    base_of,
    build,
    calls,
    configs,
    logits,
    rarely,
    recipes,
)
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.lora.surgery import lora_layers


def save_or_refuse(save, model, target):
    """Return whether the model was saved; a refusal is a sentence, and leaves the folder alone."""
    before = contents(target.parent)
    try:
        with np.errstate(all="ignore"):
            save(model, target)
        return True
    except (ValueError, TypeError) as error:
        assert len(str(error).split()) >= 4
        assert contents(target.parent) == before
        return False


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_same(got, expected, tolerance):
    """Compare two arrays of logits, which may hold nan; with a tolerance of 0, bit for bit."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if tolerance and np.isfinite(expected).all():
        assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()
    elif tolerance:  # rounding may turn one infinity into another
        assert not np.isfinite(got).all()
    else:
        assert np.array_equal(got, expected, equal_nan=True)


# ---- Adapters


def adapter_round_trip(recipe, save, exact):
    model = build(recipe)
    before = logits(model, recipe)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "task"
        saved = save_or_refuse(save, model, target)
        assert np.array_equal(logits(model, recipe), before, equal_nan=True)
        assert saved or not must_be_saved(recipe, model, save)
        if not saved:
            return
        if recipe.merged:  # the file has A and B, so it is as exact as the model that is not merged
            before = logits(ml.unmerge_lora(model), recipe)
        fresh = base_of(recipe)
        with np.errstate(all="ignore"):
            assert ml.load_adapter(fresh, target) is fresh
        assert_same(logits(fresh, recipe), before, 0 if exact(recipe, model) else 1e-5)
        base, state = base_of(recipe), ml.remove_lora(fresh).state_dict()
        assert state.keys() == base.state_dict().keys()
        for name, array in base.state_dict().items():
            assert np.array_equal(state[name], array)


def must_be_saved(recipe, model, save):
    """Return whether a GPT is so ordinary that there is no reason to refuse it."""
    layers = dict(lora_layers(model))
    heads = ["", "narrow"] + ["narrow, bias"] * (save is ml.save_adapter)
    odd = (recipe.changed or recipe.trained or recipe.odd_number or recipe.head not in heads
           or any(abs(call.alpha) > 100 for call in recipe.calls)
           or save is ml.save_peft and any(call.modules_to_save for call in recipe.calls))
    return (isinstance(recipe.config, ml.GPTConfig) and not odd
            and len({type(layer) for layer in layers.values()}) == 1  # DoRA and LoRA do not mix
            and layers.keys() != {"lm_head"})  # which is stored with its update merged


def nothing_is_converted(recipe, model):
    """Return whether a file holds the very numbers; PEFT has one rule for the scales of all."""
    scalings = {layer.lora.scaling for _, layer in lora_layers(model)}
    merges_head = recipe.head and isinstance(model.lm_head, ml.LinearWithLoRA)
    return scalings in ({"alpha/r"}, {"alpha/sqrt(r)"}) and not merges_head


ONCE_WRONG = [  # by what was lost, or could not be read
    Recipe(tiny_config(), calls=(Call(),), trained=("*.ln_1.bias",)),
    Recipe(tiny_config(), calls=(Call(),), trained=("h.0.ln_1.weight",)),
    Recipe(tiny_config(), calls=(Call(targets=("q_proj",)),), trained=("h.0.attn.q_proj.bias",)),
    Recipe(tiny_config(), calls=(Call(alpha=1e30),)),
    Recipe(tiny_config(), calls=(Call(),), odd_number=(float("nan"), 0)),
    Recipe(tiny_config(), head="same", calls=(Call(targets=("q_proj",)),)),
    Recipe(tiny_config(), head="tied", calls=(Call(targets=("q_proj",)),)),
    Recipe(tiny_config(), head="two layers", calls=(Call(),)),
    Recipe(tiny_config(), changed="one q_proj", calls=(Call(),)),
    Recipe(tiny_config(), changed="one q_proj", calls=(Call(),), trained=("*.q_proj.bias",)),
    Recipe(tiny_config(bias=False), changed="bias", calls=(Call(targets=("o_proj",)),),
           trained=("*.q_proj.bias",)),
    Recipe(tiny_config(), changed="bias", calls=(Call(targets=("o_proj",)),),
           trained=("h.0.ln_2.bias",)),
    Recipe("twice", calls=(Call(targets=("0",)),)),
    Recipe("twice", calls=(Call(),), trained=("0.bias",)),
    Recipe("deep", calls=(Call(modules_to_save=("6",)),)),
]


@pytest.mark.parametrize("recipe", ONCE_WRONG)
@pytest.mark.parametrize("save, exact", [(ml.save_adapter, True), (ml.save_peft, False)])
def test_adapters_that_were_wrong_once(recipe, save, exact):
    if save is ml.save_adapter or isinstance(recipe.config, ml.GPTConfig):
        adapter_round_trip(recipe, save, lambda recipe, model: exact)


@examples(50)
@given(recipes())
def test_adapters(recipe):
    adapter_round_trip(recipe, ml.save_adapter, nothing_is_converted)


@examples(50)
@given(recipes(kinds="GPT"))
def test_adapters_under_the_names_of_transformers(recipe):
    adapter_round_trip(recipe, ml.save_peft, lambda recipe, model: False)


# ---- Whole models


@st.composite
def whole_models(draw):
    """Draw a recipe for a GPT, perhaps with an adapter, which is perhaps merged for good."""
    recipe = Recipe(
        draw(configs()), draw(st.sampled_from([np.float32, np.float64])),
        changed=draw(st.one_of(st.just(""), st.sampled_from(CHANGES))),
        head=draw(rarely(st.sampled_from(["same", "narrow, bias", "tied", "two layers"]), "")),
        trained=("*",),
        odd_number=draw(rarely(st.tuples(st.sampled_from(ODD_NUMBERS), st.integers(0, 20)), None)),
    )
    drawn = draw(st.lists(calls(base_of(recipe)), max_size=2))
    return replace(recipe, calls=tuple(drawn), merged=draw(st.sampled_from(["unloaded", ""])))


def whole_round_trip(recipe, save, load, dtype=None):
    model = build(recipe)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        if not save_or_refuse(save, model, target):
            plain = not (recipe.changed or recipe.head or recipe.odd_number or recipe.calls)
            assert not plain
            return
        loaded = load(target, recipe.dtype)
        expected = converted(model, dtype) if dtype else model
        assert_same(logits(loaded.eval(), recipe), logits(expected, recipe), 0)


def converted(model, dtype):
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data[...] = parameter.data.astype(dtype)
    return model


@examples(50)
@given(whole_models(), st.sampled_from([None, np.float16, np.float32]))
def test_checkpoints(recipe, dtype):
    with np.errstate(all="ignore"):
        whole_round_trip(recipe, lambda model, path: ml.save_checkpoint(model, path, dtype),
                         ml.load_checkpoint, dtype)


@examples(50)
@given(whole_models())
def test_folders_of_transformers(recipe):
    whole_round_trip(recipe, ml.to_hf_gpt2, ml.from_hf_gpt2)
