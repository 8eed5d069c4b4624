import json

import numpy as np
import pytest
from conftest import randomise, tiny_config

import minilora as ml
from minilora.checkpoint import CheckpointError, load_safetensors, save_safetensors
from minilora.interop import from_hf_gpt2, load_adapter, save_adapter, to_hf_gpt2


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


def test_an_optimizer_keeps_training_what_was_loaded(tmp_path, ids):
    save_adapter(task(1), tmp_path)
    model = task(2)
    optimizer = ml.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    load_adapter(model, tmp_path)
    history = ml.fit(model, [(ids, ids)] * 9, optimizer, 9, progress=False)
    assert history.losses[-1] < 0.9 * history.losses[0]


def test_loaded_layers_drop_different_things(tmp_path):
    save_adapter(task(dropout=0.5), tmp_path)
    model = load_adapter(ml.GPT(tiny_config()), tmp_path)
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
    extra = ml.replace_linear_with_lora(ml.GPT(tiny_config()), 2, 8)
    save_adapter(task(targets="q_proj"), tmp_path)
    with pytest.raises(CheckpointError, match="remove_lora first"):
        load_adapter(extra, tmp_path)
    with pytest.raises(CheckpointError, match="is merged"):
        load_adapter(ml.merge_lora(extra), tmp_path)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="no LoRA layers to save"):
        save_adapter(ml.GPT(tiny_config()), tmp_path / "x")
    model = ml.replace_linear_with_lora(ml.GPT(tiny_config()), 2, 4, "q_proj")
    ml.replace_linear_with_lora(model, 1, 4, "v_proj")
    with pytest.raises(ValueError, match="one rank"):
        save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"peft_type": "IA3"}, "does not describe a LoRA"), ({"r": 0}, "r must be"),
        ({"r": 3}, "rank 2 and 2, the configuration says 3"), ({"r": True}, "r must be"),
        ({"lora_alpha": "8"}, "lora_alpha must be"), ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_dropout": 1.5}, "lora_dropout"), ({"use_dora": True}, "use_dora = True"),
        ({"bias": "all"}, "bias = 'all'"), ({"modules_to_save": ["x"]}, "modules_to_save"),
        ({"lora_alpha": 10**400}, "lora_alpha"), ({"use_rslora": "false"}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
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
        ({a: tensors[a]}, "has only lora_A"), ({}, "holds no LoRA factors"),
        (tensors | {a.removeprefix("base_model.model."): tensors[a]}, "stands twice"),
        (tensors | {"extra": np.zeros(2)}, "extra is not a lora_A"),
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


@pytest.mark.parametrize("changes", [{}, {"tie_weights": True}, {"bias": False}])
def test_hugging_face_gpt2_round_trip(tmp_path, ids, changes):
    model = randomise(ml.GPT(tiny_config(**changes), rng=0))
    to_hf_gpt2(model, tmp_path)
    again = from_hf_gpt2(tmp_path)
    np.testing.assert_array_equal(again(ids), model(ids))
    assert again.config.tie_weights == model.config.tie_weights


def test_hugging_face_files_of_other_kinds(tmp_path, ids):
    model = randomise(ml.GPT(tiny_config(tie_weights=True), rng=0))
    to_hf_gpt2(model, tmp_path)
    path = tmp_path / "model.safetensors"
    bare = {k.removeprefix("transformer."): a for k, a in load_safetensors(path).items()}
    mask = {"h.0.attn.bias": np.ones((1, 1, 6, 6)), "h.0.attn.masked_bias": np.float32(-1e4)}
    save_safetensors(path, bare | mask | {"lm_head.weight": bare["wte.weight"]})
    np.testing.assert_array_equal(from_hf_gpt2(tmp_path)(ids), model(ids))

    path.unlink()
    names = sorted(bare)
    shards = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in set(shards.values()):
        save_safetensors(tmp_path / shard, {n: bare[n] for n in names if shards[n] == shard})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    np.testing.assert_array_equal(from_hf_gpt2(tmp_path)(ids), model(ids))
    for bad, words in [({}, "weight_map must"), ({"weight_map": {"a": "../x"}}, "weight_map must"),
                       ({"weight_map": {"a": ".."}}, "weight_map must"),
                       ({"weight_map": shards | {"a": "model-0.safetensors"}}, "disagree on a")]:
        index.write_text(json.dumps(bad))
        with pytest.raises(CheckpointError, match=words):
            from_hf_gpt2(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "llama"}, "model_type = 'llama'"), ({"n_inner": 7}, "n_inner = 7"),
        ({"activation_function": "relu"}, "activation_function = 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx"),
        ({"n_head": 3}, "n_heads must divide"), ({"vocab_size": "x"}, "vocab_size"),
        ({"n_embd": None}, "d_model must be a whole number, got None"),
        ({"n_layer": 3}, "h.2.mlp.up_proj.weight"), ({"n_embd": 10**9}, "not supported|shape"),
    ],
)
def test_hugging_face_configurations_that_cannot_be_honoured(tmp_path, change, words):
    to_hf_gpt2(ml.GPT(tiny_config()), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=words):
        from_hf_gpt2(tmp_path)


def test_what_is_no_plain_gpt2(tmp_path):
    with pytest.raises(ValueError, match="LoRA layers"):
        to_hf_gpt2(task(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
