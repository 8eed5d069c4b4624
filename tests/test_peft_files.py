import json

import numpy as np
import pytest
from conftest import randomise, tiny_config

import minilora as ml
from minilora.files.checkpoint import CheckpointError, load_safetensors, save_safetensors
from minilora.files.peft_read import describe_adapter, load_adapter, save_adapter, save_peft


def task(seed=3, targets=None, **options):
    model = ml.replace_linear_with_lora(ml.GPT(tiny_config()), 2, 8, targets, rng=0, **options)
    for _, layer in model.named_modules():
        if isinstance(layer, ml.LoRALayer):
            randomise(layer, seed=seed)
    return model


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
    model = task(targets="q_proj")
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 8)
    tensors = load_safetensors(tmp_path / "adapter_model.safetensors")
    a = tensors["base_model.model.h.1.attn.q_proj.lora_A.weight"]
    assert np.array_equal(a, model.h[1].attn.q_proj.lora.A.data.T)
    assert len(tensors) == 4


def test_hyperparameters_may_be_numpy_numbers(tmp_path):
    model = ml.GPT(tiny_config())
    ml.replace_linear_with_lora(model, np.int64(2), np.float32(4))
    save_adapter(model, tmp_path)
    assert load_adapter(ml.GPT(tiny_config()), tmp_path).lm_head.lora.scale == 2.0


def test_a_task_replaces_the_one_before(tmp_path, ids):
    one, two = task(1), task(2)
    save_adapter(one, tmp_path / "one")
    save_adapter(two, tmp_path / "two")
    model = load_adapter(ml.GPT(tiny_config()), tmp_path / "one")
    load_adapter(model, tmp_path / "two" / "adapter_model.safetensors")
    assert np.array_equal(model(ids), two(ids))
    assert np.array_equal(ml.remove_lora(model)(ids), ml.GPT(tiny_config())(ids))


def test_a_linear_at_two_places_round_trips(tmp_path):
    shared = ml.Linear(4, 4, rng=0)
    model = ml.replace_linear_with_lora(ml.Sequential(shared, ml.GELU(), shared), 2, 4, rng=0)
    randomise(model[0].lora)
    x = np.ones((3, 4), np.float32)
    y = model(x)
    save_adapter(model, tmp_path)
    load_adapter(ml.remove_lora(model), tmp_path)
    assert model[0] is model[2] and np.array_equal(model(x), y)


def test_an_optimizer_is_made_after_loading(tmp_path, ids):
    """What is loaded has parameters of its own, and the old ones keep their numbers."""
    save_adapter(task(1), tmp_path)
    model = task(2)
    old = model.lm_head.lora.B
    optimizer = ml.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    load_adapter(model, tmp_path)
    assert np.array_equal(old.data, task(2).lm_head.lora.B.data)
    with pytest.raises(ValueError, match="the optimizer holds none"):
        ml.fit(model, [(ids, ids)] * 9, optimizer, 9, progress=False)
    optimizer = ml.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    history = ml.fit(model, [(ids, ids)] * 9, optimizer, 9, progress=False)
    assert history.losses[-1] < 0.9 * history.losses[0]


def test_loaded_layers_drop_different_things(tmp_path):
    save_adapter(task(dropout=0.5), tmp_path)
    model = load_adapter(ml.GPT(tiny_config()), tmp_path)
    assert not model.h[0].attn.q_proj.dropout.training
    model.train()
    attn, x = model.h[0].attn, np.ones((9, 8), np.float32)
    assert not np.array_equal(attn.q_proj.dropout(x), attn.k_proj.dropout(x))


def test_bare_layers_have_no_adapter_files(tmp_path):
    save_adapter(task(), tmp_path / "task")
    for use, bare in ((save_adapter, ml.LinearWithLoRA(ml.Linear(8, 8), 2, 4)),
                      (load_adapter, ml.Linear(8, 8))):
        with pytest.raises(TypeError, match="not to a bare Linear"):
            use(bare, tmp_path / "task")


def test_what_does_not_fit_changes_nothing(tmp_path):
    save_adapter(task(), tmp_path)
    other = ml.GPT(tiny_config(d_model=12, n_layers=1))
    text = repr(other)
    with pytest.raises(CheckpointError) as error:
        load_adapter(other, tmp_path)
    for part in ("no linear layer 'h.1.attn.q_proj'", "h.0.attn.q_proj is (12, 12) in the model",
                 "(8, 8) in the adapter"):
        assert part in str(error.value)
    assert repr(other) == text and all(p.requires_grad for p in other.parameters())
    with pytest.raises(CheckpointError, match="is merged"):
        load_adapter(ml.merge_lora(task()), tmp_path)


def test_what_was_adapted_before_and_is_not_now_is_the_base_again(tmp_path):
    save_adapter(task(targets="q_proj"), tmp_path)
    model = load_adapter(task(seed=9), tmp_path)
    assert type(model.lm_head) is ml.Linear and not model.lm_head.weight.requires_grad
    assert set(ml.lora_state_dict(model)) == set(ml.lora_state_dict(task(targets="q_proj")))


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


@pytest.mark.parametrize(
    "change, words",
    [
        ({"peft_type": "IA3"}, "does not describe a LoRA"), ({"r": 0}, "r must be"),
        ({"r": 3}, "rank 2 and 2, the configuration says 3"), ({"r": True}, "r must be"),
        ({"lora_alpha": "8"}, "lora_alpha must be"), ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_dropout": 1.5}, "lora_dropout"), ({"use_dora": True}, "no lora_magnitude_vector"),
        ({"bias": "all"}, "there are h.0.ln_1.bias"), ({"bias": "some"}, "bias = 'some'"),
        ({"modules_to_save": ["x"]}, "none of modules_to_save"),
        ({"lora_alpha": 10**400}, "lora_alpha"), ({"use_rslora": "false"}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 4}}, "rank 2 and 2, the configuration says 4"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern must be"),
        ({"rank_pattern": [4]}, "rank_pattern must be"),
        ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern must be"),
        ({"target_modules": "("}, "target_modules must be"),
        ({"target_modules": None}, "target_modules must be given"),
        ({"target_modules": ["q_proj"]}, "does not fit h.0.attn.k_proj"),
        ({"exclude_modules": ["k_proj"]}, "does not fit h.0.attn.k_proj"),
        ({"layers_to_transform": "0"}, "layers_to_transform must be"),
        ({"layers_to_transform": 1, "layers_pattern": "h", "target_modules": [
            "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"]},
         "does not fit h.0.attn.q_proj"),
        ({"layers_to_transform": 1, "target_modules": ".*"}, "needs a list as target_modules"),
        ({"layers_to_transform": 1, "layers_pattern": "(?i)h"}, "layers_pattern must be"),
        ({"rank_pattern": {"(?i)q_proj": 2}}, "rank_pattern must be"),
        ({"rank_pattern": {"([a-z_.0-9]+)+!": 2}}, "rank_pattern must be"),
        ({"target_modules": "(.*)*x"}, "target_modules must be"),
        ({"lora_alpha": 1e299}, "lora_alpha must be"),
        ({"modules_to_save": "x"}, "modules_to_save must be"),
        ({"lora_bias": True}, "lora_bias = True is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"use_quantum": True}, "use_quantum = True is not supported"),
    ],
)
def test_configurations_that_cannot_be_honoured(tmp_path, change, words):
    save_adapter(task(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=words):
        load_adapter(ml.GPT(tiny_config()), tmp_path)


def test_damaged_files(tmp_path):
    model = ml.GPT(tiny_config())
    with pytest.raises(FileNotFoundError):
        load_adapter(model, tmp_path / "nothing")
    save_adapter(task(), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_safetensors(weights)
    a, b = list(tensors)[:2]
    for bad, words in [
        ({a: tensors[a]}, "has no lora_B"), ({}, "holds no LoRA factors"),
        (tensors | {a.removeprefix("base_model.model."): tensors[a]}, "stands twice"),
        (tensors | {"extra": np.zeros(2)}, "extra is neither lora_A"),
        (tensors | {a: np.zeros(2)}, "must be a matrix"),
        (tensors | {b: np.zeros((8, 2), int)}, "floating-point"),
    ]:
        save_safetensors(weights, bad)
        with pytest.raises(CheckpointError, match=words):
            load_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_adapter(model, tmp_path)
    assert all(p.requires_grad for p in model.parameters())




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
        ml.replace_linear_with_lora(model, rank, 3 * rank, targets, scaling, rng=rank)
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
    assert np.array_equal(again(ids), model(ids)) and again.lm_head is None
    tensors = load_safetensors(tmp_path / "adapter_model.safetensors")
    tensors.pop("base_model.model.lm_head.weight")
    save_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(CheckpointError, match="says that there are lm_head.weight"):
        load_adapter(ml.GPT(tiny_config(tie_weights=True)), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": ["wte"]}))
    apart = load_adapter(ml.GPT(tiny_config(tie_weights=True)), tmp_path)
    old = ml.GPT(tiny_config(tie_weights=True)).wte.weight.data
    assert np.array_equal(apart.lm_head.weight.data, old.T)
    assert not apart.lm_head.is_trainable() and apart.wte.is_trainable()
    assert not np.allclose(apart(ids), model(ids))


def test_config_and_factors_that_disagree_with_the_model(tmp_path):
    model = task(targets=["q_proj", "v_proj"])
    save_peft(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"target_modules": ["c_attn", "c_fc"]}))
    with pytest.raises(CheckpointError, match="no factors for the targets transformer.h.0.mlp.c_f"):
        load_adapter(ml.GPT(tiny_config()), tmp_path)
    path.write_text(json.dumps(config))
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_safetensors(weights)
    b = next(name for name in tensors if "lora_B" in name)
    save_safetensors(weights, tensors | {b: tensors[b][:-1]})
    with pytest.raises(CheckpointError, match="23 outputs, not 3d"):
        load_adapter(ml.GPT(tiny_config()), tmp_path)
    save_safetensors(weights, tensors | {b: tensors[b][:-3]})
    with pytest.raises(CheckpointError, match=r"\(8, 8\) in the model, \(8, 7\) in the adapter"):
        load_adapter(ml.GPT(tiny_config()), tmp_path)
    with pytest.raises(CheckpointError, match="no linear layer 'transformer.h.0.attn.c_attn'"):
        load_adapter(ml.Sequential(ml.Linear(8, 8)), tmp_path)


def test_several_adapters_in_one_file(tmp_path):
    save_adapter(task(), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_safetensors(weights)
    twice = {name.replace("lora_A.", "lora_A.other."): array for name, array in tensors.items()}
    save_safetensors(weights, tensors | twice)
    with pytest.raises(CheckpointError, match="holds several adapters"):
        load_adapter(ml.GPT(tiny_config()), tmp_path)
    a, b = list(tensors)[:2]
    save_safetensors(weights, {a.replace("lora_A", "lora_A.x"): tensors[a], b: tensors[b]})
    with pytest.raises(CheckpointError, match="holds several adapters"):
        load_adapter(ml.GPT(tiny_config()), tmp_path)


def test_what_peft_stores_of_the_base_must_be_the_bases(tmp_path, ids):
    """PEFT adds lm_head.base_layer.weight where the head is a target."""
    save_adapter(task(targets="lm_head"), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    name = "base_model.model.lm_head.base_layer.weight"
    base = ml.GPT(tiny_config())
    head = base.lm_head.weight.data.T
    save_safetensors(weights, load_safetensors(weights) | {name: head})
    assert np.array_equal(load_adapter(base, tmp_path)(ids), task(targets="lm_head")(ids))
    save_safetensors(weights, load_safetensors(weights) | {name: head + 1})
    with pytest.raises(CheckpointError, match="the base's own lm_head.weight as well"):
        load_adapter(ml.GPT(tiny_config()), tmp_path)


@pytest.mark.parametrize("change, words", [
    (lambda t: {"h.0.attn.c_attn.lora_A.weight": 2 * t["transformer.h.0.attn.c_attn.lora_A.weight"],
                "h.0.attn.c_attn.lora_B.weight": t["transformer.h.0.attn.c_attn.lora_B.weight"]},
     "two entries of the file are for h.0.attn.q_proj"),
    (lambda t: {"transformer.foo.0.attn.c_attn.lora_A.weight": np.ones((2, 8)),
                "transformer.foo.0.attn.c_attn.lora_B.weight": np.ones((24, 2))},
     "no linear layer 'foo.0.attn.c_attn'"),
    (lambda t: {"transformer.wte.lora_embedding_A": np.ones((2, 11))}, "LoRA on an embedding"),
    (lambda t: {"x" * 600 + ".lora_A.weight": np.ones((2, 8))}, "is too long"),
    (lambda t: {"transformer.h.0.attn.c_attn.lora_A.weight": np.full((4, 8), np.nan)},
     "has factors with nan or inf"),
])
def test_tensors_that_are_not_where_they_should_be(tmp_path, change, words):
    save_peft(task(targets=["q_proj", "v_proj"]), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = {k.removeprefix("base_model.model."): a for k, a in load_safetensors(weights).items()}
    save_safetensors(weights, tensors | change(tensors))
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {
        "target_modules": ["c_attn"], "rank_pattern": {"foo.0.attn.c_attn": 2}}))
    model = ml.GPT(tiny_config())
    text = repr(model)
    with pytest.raises(CheckpointError, match=words):
        load_adapter(model, tmp_path)
    assert repr(model) == text


def test_what_peft_writes_twice_is_one_thing(tmp_path, ids):
    """With bias "all", a module to save has its bias under three names."""
    model = task(targets="q_proj", modules_to_save=["ln_f"])
    model.ln_f.module.bias.data += 0.5
    save_adapter(model, tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = load_safetensors(weights)
    fresh = ml.GPT(tiny_config())
    for name, p in fresh.named_parameters():
        if name.endswith(".bias") and name != "ln_f.bias":
            inner = ".base_layer" if "q_proj" in name else ""
            tensors[name.removesuffix(".bias") + f"{inner}.bias"] = p.data
    tensors["ln_f.original_module.bias"] = fresh.ln_f.bias.data
    tensors["ln_f.modules_to_save.bias"] = model.ln_f.module.bias.data
    save_safetensors(weights, tensors)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bias": "all"}))
    assert np.allclose(load_adapter(fresh, tmp_path)(ids), model(ids), atol=1e-6)
    tensors["ln_f.modules_to_save.bias"] = np.zeros(8)
    save_safetensors(weights, tensors)
    with pytest.raises(CheckpointError, match="stands twice, with different numbers"):
        load_adapter(ml.GPT(tiny_config()), tmp_path)


def test_a_pickle_is_not_read(tmp_path):
    save_adapter(task(), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="a pickle, which can run code"):
        load_adapter(ml.GPT(tiny_config()), tmp_path)
