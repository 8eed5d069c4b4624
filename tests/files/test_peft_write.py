import json

import numpy as np
import pytest
from conftest import randomise, tiny_config
from helpers_adapters import task

import minilora as ml
from minilora.files.peft_read import describe_adapter, load_adapter
from minilora.files.peft_write import save_adapter, save_peft
from minilora.files.safetensors import load_metadata, load_safetensors, save_safetensors
from minilora.nn.validate import CheckpointError


@pytest.mark.parametrize("scaling", ["alpha", "alpha/r", "alpha/sqrt(r)"])
def test_round_trip_onto_a_fresh_base(tmp_path, ids, scaling):
    model = task(scaling=scaling, targets=["q_proj", "lm_head"])
    save_adapter(model, tmp_path / "task")
    base = ml.GPT(tiny_config())
    assert load_adapter(base, tmp_path / "task") is base
    np.testing.assert_allclose(base(ids), model(ids), rtol=1e-6)
    trainable = {name for name, p in base.named_parameters() if p.requires_grad}
    assert trainable == ml.lora_state_dict(model).keys()


def test_the_layout_is_pefts(tmp_path):
    model = task(targets="q_proj", alpha=8)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 8)
    tensors = load_safetensors(tmp_path / "adapter_model.safetensors")
    a = tensors["base_model.model.h.1.attn.q_proj.lora_A.weight"]
    assert np.array_equal(a, model.h[1].attn.q_proj.lora.A.data.T)
    assert len(tensors) == 4


def test_alpha_is_written_as_it_is(tmp_path):
    assert 0.9 / 3 * 3 != 0.9
    save_adapter(task(rank=3, alpha=0.9, targets="q_proj"), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 0.9


def test_hyperparameters_may_be_numpy_numbers(tmp_path):
    model = ml.GPT(tiny_config())
    ml.replace_linear_with_lora(model, np.int64(2), np.float32(4))
    save_adapter(model, tmp_path)
    assert load_adapter(ml.GPT(tiny_config()), tmp_path).lm_head.lora.scale == 2.0


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="no LoRA layers to save"):
        save_adapter(ml.GPT(tiny_config()), tmp_path / "x")
    model = ml.replace_linear_with_lora(ml.GPT(tiny_config()), 2, 4, "q_proj")
    ml.replace_linear_with_lora(model, 1, 4, "v_proj", use_dora=True)
    with pytest.raises(ValueError, match="DoRA and plain LoRA are mixed"):
        save_adapter(model, tmp_path / "x")
    both = task(targets="q_proj")
    both.h[0].attn.q_proj.linear.weight.requires_grad = True
    with pytest.raises(ValueError, match="no LoRA on a module stored whole"):
        save_adapter(both, tmp_path / "x")
    with pytest.raises(TypeError, match="is for a GPT"):
        save_peft(ml.Sequential(ml.Linear(2, 2)), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("save", [save_adapter, save_peft, lambda model, path: ml.to_hf_gpt2(
    ml.remove_lora(model), path)], ids=["save_adapter", "save_peft", "to_hf_gpt2"])
def test_a_folder_with_a_config_has_weights_too(tmp_path, save):
    """The config is written last, so that a run that is killed leaves no config without weights."""
    for weights in ("adapter_model.safetensors", "model.safetensors"):
        (tmp_path / weights).mkdir()
    with pytest.raises(IsADirectoryError):
        save(task(), tmp_path)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("save", [save_adapter, save_peft])
@pytest.mark.parametrize("options", [
    {}, {"use_dora": True}, {"scaling": "alpha/sqrt(r)", "targets": ["q_proj", "v_proj"]},
    {"scaling": "alpha", "targets": ["k_proj", "down_proj"]}, {"dropout": 0.25},
    {"targets": "q_proj", "modules_to_save": ["ln_f", "h.1.mlp"], "use_dora": True},
])
def test_every_form_round_trips_under_both_names(tmp_path, ids, save, options):
    model = task(**options)
    expected, before = model.eval()(ids), ml.GPT(tiny_config()).state_dict()
    save(model, tmp_path)
    again = load_adapter(ml.GPT(tiny_config()), tmp_path)
    assert np.allclose(again(ids), expected, atol=1e-5)
    if save is save_adapter:
        assert np.array_equal(again(ids), expected)
        assert again.num_parameters(True) == model.num_parameters(True)
    state = ml.remove_lora(again).state_dict()
    assert all(np.array_equal(state[name], array) for name, array in before.items())


@pytest.mark.parametrize("scalings", [("alpha/r", "alpha/sqrt(r)"), ("alpha", "alpha/r")])
def test_layers_may_differ_in_rank_alpha_and_scaling(tmp_path, ids, scalings):
    model = ml.GPT(tiny_config())
    for rank, targets, scaling in ((1, ["q_proj", "up_proj"], scalings[0]), (3, "*.1.*", "alpha/r"),
                                   (4, ["v_proj", "lm_head"], scalings[1])):
        ml.replace_linear_with_lora(model, rank, 3 * rank, targets, scaling=scaling, rng=rank)
    for _, layer in model.named_modules():
        if isinstance(layer, ml.LoRALayer):
            randomise(layer)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] and config["alpha_pattern"]
    assert np.allclose(load_adapter(ml.GPT(tiny_config()), tmp_path)(ids), model(ids), atol=1e-6)


def test_a_name_that_is_the_end_of_another(tmp_path):
    """Patterns and targets fit the ends of names: "0" must not take "1.0" along."""
    def sequential():
        return ml.Sequential(ml.Linear(4, 4, rng=0), ml.Sequential(ml.Linear(4, 4, rng=1)))

    model = ml.replace_linear_with_lora(sequential(), 2, 4, "1.0", rng=0)
    ml.replace_linear_with_lora(model, 3, 4, rng=0)
    randomise(model[0].lora)
    x = np.ones((2, 4), np.float32)
    save_adapter(model, tmp_path)
    assert np.array_equal(load_adapter(sequential(), tmp_path)(x), model(x))
    three = ml.Sequential(*(ml.Sequential(ml.Linear(4, 4, rng=i)) for i in range(3)))
    setattr(three, "0", three[0][0])
    ml.replace_linear_with_lora(three, 3, 8, "1.0", rng=0)
    ml.replace_linear_with_lora(three, 2, 4, "2.0", rng=0)
    ml.replace_linear_with_lora(three, 2, 8, rng=0)
    for i, layer in enumerate((three[0], three[1][0], three[2][0])):
        randomise(layer.lora, seed=i)
    save_adapter(three, tmp_path)
    expected = three(x)
    assert np.array_equal(load_adapter(ml.remove_lora(three), tmp_path)(x), expected)
    top = sequential().freeze()
    setattr(top, "0", ml.LinearWithLoRA(top[0], 2, 4, rng=0))
    randomise(top[0].lora)
    save_adapter(top, tmp_path)
    again = load_adapter(sequential(), tmp_path)
    assert np.array_equal(again(x), top(x)) and isinstance(again[1][0], ml.Linear)


@pytest.mark.parametrize("save", [save_adapter, save_peft])
@pytest.mark.parametrize("tied", [True, False])
def test_a_new_head_is_stored(tmp_path, ids, save, tied):
    model = ml.GPT(tiny_config(tie_weights=tied))
    model.lm_head = ml.Linear(8, 2, bias=False, rng=7)
    ml.replace_linear_with_lora(model, 2, 8, modules_to_save="lm_head", rng=0)
    randomise(model.lm_head)
    expected = model(ids)
    save(model, tmp_path)
    again = load_adapter(ml.GPT(tiny_config(tie_weights=tied)), tmp_path)
    assert np.array_equal(again(ids), expected)
    name = "lm_head" if save is save_adapter else "score"
    assert load_safetensors(tmp_path / "adapter_model.safetensors")[
        f"base_model.model.{name}.weight"].shape == (2, 8)
    assert f"stored whole, 16 parameters: {name}.weight (2, 8)" in describe_adapter(tmp_path)
    biased = ml.GPT(tiny_config(tie_weights=tied))
    biased.lm_head = ml.Linear(8, 2)
    ml.replace_linear_with_lora(biased, 2, 8, "q_proj")
    with pytest.raises(ValueError, match="head has no bias"):
        save_peft(biased, tmp_path / "biased")
    save_adapter(biased, tmp_path / "biased")


@pytest.mark.parametrize("save", [save_adapter, save_peft])
def test_embeddings_that_are_tied_to_the_head(tmp_path, ids, save):
    model = ml.GPT(tiny_config(tie_weights=True))
    ml.replace_linear_with_lora(model, 2, 8, "q_proj", modules_to_save=["wte"], rng=0)
    model.wte.module.weight.data += 0.5
    save(model, tmp_path)
    again = load_adapter(ml.GPT(tiny_config(tie_weights=True)), tmp_path)
    assert np.array_equal(again(ids), model(ids)) and isinstance(again.lm_head, ml.TiedHead)
    config = tmp_path / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"modules_to_save": ["wte"]}))
    with pytest.raises(CheckpointError, match="lm_head.weight is neither lora_A.weight nor"):
        load_adapter(ml.GPT(tiny_config(tie_weights=True)), tmp_path)
    config.write_text(json.dumps(
        settings | {"modules_to_save": ["wte"], "ensure_weight_tying": True}))
    again = load_adapter(ml.GPT(tiny_config(tie_weights=True)), tmp_path)
    assert np.array_equal(again(ids), model(ids))
    config.write_text(json.dumps(settings))
    tensors = load_safetensors(tmp_path / "adapter_model.safetensors")
    tensors.pop("base_model.model.lm_head.weight")
    save_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(CheckpointError, match="says that there are lm_head.weight"):
        load_adapter(ml.GPT(tiny_config(tie_weights=True)), tmp_path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": ["wte"]}))
    apart = load_adapter(ml.GPT(tiny_config(tie_weights=True)), tmp_path)
    old = ml.GPT(tiny_config(tie_weights=True)).wte.weight.data
    assert np.array_equal(apart.lm_head.weight.data, old.T)
    assert not apart.lm_head.is_trainable() and apart.wte.is_trainable()
    assert not np.allclose(apart(ids), model(ids))


@pytest.mark.parametrize("save, names, fan_in_fan_out, task_type", [
    (save_adapter, ["h.0.attn.q_proj", "h.0.mlp.up_proj"], False, None),
    (save_peft, ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"], True, "CAUSAL_LM"),
])
def test_all_that_is_written(tmp_path, save, names, fan_in_fan_out, task_type):
    model = task(model=ml.GPT(tiny_config(n_layers=1)), targets=["q_proj", "up_proj"], alpha=8,
                 dropout=0.25, modules_to_save=["ln_f"])
    save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["auto_mapping"]  # our fingerprint
    assert '\n  "r": 2,\n' in (tmp_path / "adapter_config.json").read_text(), "people read it"
    assert load_metadata(tmp_path / "adapter_model.safetensors")["format"] == "pt"
    norm = "transformer.ln_f" if save is save_peft else "ln_f"
    assert config == {
        "peft_type": "LORA", "base_model_name_or_path": None, "inference_mode": True, "r": 2,
        "lora_alpha": 8.0, "use_rslora": False, "use_dora": False, "rank_pattern": {},
        "alpha_pattern": {}, "lora_dropout": 0.25, "target_modules": names,
        "modules_to_save": [norm], "bias": "none", "fan_in_fan_out": fan_in_fan_out,
        "task_type": task_type,
    }
    tensors = load_safetensors(tmp_path / "adapter_model.safetensors")
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float32)}
    outputs = 8 if save is save_adapter else 24
    assert {n.removeprefix("base_model.model."): a.shape for n, a in tensors.items()} == {
        f"{names[0]}.lora_A.weight": (2, 8), f"{names[0]}.lora_B.weight": (outputs, 2),
        f"{names[1]}.lora_A.weight": (2, 8), f"{names[1]}.lora_B.weight": (32, 2),
        f"{norm}.weight": (8,), f"{norm}.bias": (8,),
    }


@pytest.mark.parametrize("elsewhere, setting", [(False, "lora_only"), (True, "all")])
def test_biases_have_pefts_names(tmp_path, elsewhere, setting):
    model = task(targets="q_proj")
    model.h[0].attn.q_proj.linear.bias.requires_grad = True
    model.h[0].ln_1.bias.requires_grad = elsewhere
    save_adapter(model, tmp_path)
    names = load_safetensors(tmp_path / "adapter_model.safetensors")
    biases = {name for name in names if name.endswith(".bias")}
    assert biases >= {f"base_model.model.h.{i}.attn.q_proj.base_layer.bias" for i in range(2)}
    assert len(biases) == (2 * 8 + 1 if elsewhere else 2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["bias"], config["modules_to_save"]) == (setting, None)


def test_a_classifier_and_an_alpha_of_zero_can_be_fused(tmp_path, ids):
    model = ml.replace_linear_with_lora(ml.GPT(tiny_config()), 2, 0, "q_proj", rng=0)
    model.lm_head = ml.Linear(8, 3, bias=False, rng=1)
    task(model=model, targets="v_proj")
    save_peft(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    again = load_adapter(ml.GPT(tiny_config()), tmp_path)
    np.testing.assert_allclose(again(ids), model(ids), atol=1e-6)


def test_a_fused_dora_layer_has_the_magnitudes_of_the_base_where_it_has_no_adapter(tmp_path):
    model = task(targets=["q_proj", "v_proj"], use_dora=True)
    attn = model.h[0].attn
    attn.q_proj.magnitude.data *= 2.0
    save_peft(model, tmp_path)
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_magnitude_vector"
    magnitude = load_safetensors(tmp_path / "adapter_model.safetensors")[name]
    parts = (attn.q_proj.magnitude.data, np.linalg.norm(attn.k_proj.weight.data, axis=0),
             attn.v_proj.magnitude.data)
    np.testing.assert_allclose(magnitude, np.concatenate(parts), rtol=1e-6)


def test_an_adapter_described(tmp_path):
    linears = ml.Linear(4, 3, rng=0), ml.Linear(3, 2, rng=1), ml.Linear(2, 2, bias=False, rng=2)
    model = ml.Sequential(*linears)
    ml.replace_linear_with_lora(model, 1, 2, "0", dropout=0.25, modules_to_save="2", rng=0)
    ml.replace_linear_with_lora(model, 2, 2, "1", dropout=0.25, rng=0)
    for i in range(2):  # so that the updates are full of ones
        model[i].lora.A.data[...], model[i].lora.B.data[...] = 1.0, 0.5
    save_adapter(model, tmp_path)
    assert describe_adapter(tmp_path / "adapter_config.json").splitlines() == [
        "LoRA adapter: rank 1, 2, alpha 2, scaling alpha/r = 1, 2, dropout 0.25",
        "targets: 0, 1",
        "2 layers, 17 parameters, 68 bytes",
        "stored whole, 4 parameters: 2.weight (2, 2)",
        "norm of the update, scale * A B, by layer:",
        "  0: 3.464  (4, 3), rank 1",
        "  1: 2.449  (3, 2), rank 2",
    ]
    dora = ml.Sequential(ml.Linear(4, 3, rng=0))
    ml.replace_linear_with_lora(dora, 2, 4, scaling="alpha/sqrt(r)", use_dora=True, rng=0)
    save_adapter(dora, tmp_path)
    assert describe_adapter(tmp_path).splitlines() == [
        "DoRA adapter: rank 2, alpha 4, scaling alpha/sqrt(r) = 2.82843, dropout 0",
        "targets: 0",
        "1 layers, 17 parameters, 68 bytes",
        "norm of the update, scale * A B, by layer:",
        "  0: 0  (4, 3)",
    ]


@pytest.mark.parametrize("save", [save_adapter, save_peft])
@pytest.mark.parametrize("tied, saved", [(True, None), (False, "wte")])
def test_a_head_is_stored_only_where_it_is_a_trained_embedding(tmp_path, ids, save, tied, saved):
    config = tiny_config(tie_weights=tied)
    model = task(model=ml.GPT(config), targets="q_proj", modules_to_save=saved)
    if saved:
        model.wte.module.weight.data += 0.5
    save(model, tmp_path)
    assert not any("lm_head" in n for n in load_safetensors(tmp_path / "adapter_model.safetensors"))
    np.testing.assert_allclose(load_adapter(ml.GPT(config), tmp_path)(ids), model(ids), atol=1e-6)


@pytest.mark.parametrize("first, second", [("q_proj", "v_proj"), ("v_proj", "q_proj")])
def test_dora_and_plain_layers_inside_one_fused_layer_are_refused(tmp_path, first, second):
    model = ml.replace_linear_with_lora(ml.GPT(tiny_config()), 2, 4, first, use_dora=True)
    ml.replace_linear_with_lora(model, 2, 4, second)
    for save in (save_adapter, save_peft):
        with pytest.raises(ValueError, match="DoRA and plain LoRA are mixed"):
            save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
