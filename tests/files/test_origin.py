"""An adapter's file knows which base it was made for."""

import json
import warnings

import numpy as np
import pytest
from conftest import tiny_config

import minilora as ml
from minilora.files import origin
from minilora.files.origin import Origin, WrongBase, fingerprint, to_load


def adapted(model, rng=0):
    ml.replace_linear_with_lora(model, 2, 4, target_modules=["q_proj"], rng=rng)
    for name, p in model.named_parameters():
        if name.endswith("lora.B"):
            p.data += 0.1
    return model


def test_a_fingerprint_tells_trained_bases_apart_and_nothing_else():
    small = fingerprint(ml.load_base("small"))
    assert small != fingerprint(ml.load_base("base")) and len(small) == 16
    assert small == fingerprint(ml.load_base("small").astype(np.float64))
    assert small == fingerprint(ml.quantize(ml.load_base("small"), "nf4"))
    assert small == fingerprint(adapted(ml.load_base("small")))
    headed = ml.load_base("small")
    headed.lm_head = ml.Linear(64, 2, rng=0)
    assert small == fingerprint(headed)
    trained = ml.load_base("small")
    trained.h[1].ln_2.weight.data[3] += 1e-3
    assert small != fingerprint(trained)
    assert fingerprint(ml.GPT(tiny_config())) != fingerprint(ml.GPT(tiny_config(n_layers=3)))


@pytest.mark.parametrize("save", [ml.save_adapter, ml.save_peft])
@pytest.mark.parametrize("name", ["small", "base"])
def test_the_shipped_bases_are_recognised(tmp_path, save, name):
    save(adapted(ml.load_base(name)), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == name
    made = origin.origin(settings)
    assert made == Origin(name, fingerprint(ml.load_base(name))) and to_load(made, "x") == name


def test_another_base_is_named_if_it_is_given_and_exists(tmp_path):
    model = adapted(ml.GPT(tiny_config()))
    ml.save_adapter(model, tmp_path / "a", base=str(tmp_path), held_out_loss=1.25)
    ml.save_adapter(model, tmp_path / "b")
    read = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in "ab"]
    assert read[0]["base_model_name_or_path"] == str(tmp_path)
    assert read[1]["base_model_name_or_path"] is None
    assert origin.origin(read[0]).held_out_loss == 1.25
    assert to_load(origin.origin(read[0]), "x") == str(tmp_path)
    assert to_load(origin.origin(read[1]), "x") == "base"
    with pytest.raises(ValueError, match="^x was made for no/such/model, which is not here: add"):
        to_load(Origin("no/such/model"), "x")


def test_the_language_model_has_the_name_that_others_know():
    public = {"base_model_name_or_path": origin.PUBLIC["smollm2"]}
    assert origin.origin(public).base == "smollm2" == to_load(origin.origin(public), "x")
    try:
        model = ml.load_base("smollm2")
    except FileNotFoundError:
        pytest.skip("no SmolLM2")
    assert fingerprint(model) == origin.SMOLLM2
    assert origin.settings_of(model)["base_model_name_or_path"] == public[
        "base_model_name_or_path"]


@pytest.mark.parametrize("save", [ml.save_adapter, ml.save_peft])
def test_the_wrong_base_is_one_sentence(tmp_path, save):
    save(adapted(ml.load_base("small")), tmp_path)
    model = ml.load_base("base")
    with pytest.raises(WrongBase, match=r"^\S+ was made for small, and does not fit this model$"):
        ml.load_adapter(model, tmp_path)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_base_of_the_same_shape_with_other_weights_is_a_warning(tmp_path):
    ml.save_adapter(adapted(ml.load_base("small")), tmp_path)
    other = ml.load_base("small")
    other.ln_f.weight.data += 0.1
    with pytest.warns(UserWarning, match="made for small: the weights of this model") as caught:
        ml.load_adapter(other, tmp_path)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ml.load_adapter(ml.quantize(ml.load_base("small"), "int8"), tmp_path)


def test_a_base_whose_norms_are_trained_leaves_no_fingerprint(tmp_path):
    model = adapted(ml.load_base("small"))
    model.ln_f.weight.requires_grad = True
    assert origin.settings_of(model)["auto_mapping"] == {}


@pytest.mark.parametrize("settings", [
    {}, {"base_model_name_or_path": ["x"], "auto_mapping": 3},
    {"base_model_name_or_path": "x" * 501, "auto_mapping": {"minilora_base": {}}},
    {"base_model_name_or_path": "", "auto_mapping": {"minilora_held_out_loss": float("nan")}},
    {"base_model_name_or_path": None, "auto_mapping": {"minilora_held_out_loss": "1"}}])
def test_what_a_stranger_wrote_is_not_believed(settings):
    assert origin.origin(settings) == Origin()


def test_a_missing_adapter_is_one_sentence(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(FileNotFoundError, match="^there is no adapter at .*re: no such folder"):
        ml.load_adapter(ml.load_base("small"), tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="^there is no adapter in .*run: it has no "):
        ml.load_adapter(ml.load_base("small"), tmp_path / "run")
    ml.save_adapter(adapted(ml.load_base("small")), tmp_path / "run" / "adapter")
    with pytest.raises(FileNotFoundError, match=", but .*run/adapter has one$"):
        ml.load_adapter(ml.load_base("small"), tmp_path / "run")
