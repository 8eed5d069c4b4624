import json

import numpy as np
import pytest
from conftest import randomise, tiny_config

import minilora as ml
from minilora.files.gpt2 import from_hf_gpt2, to_hf_gpt2
from minilora.files.safetensors import load_safetensors, save_safetensors
from minilora.nn.validate import CheckpointError


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
    outside = (
        "x", "..", "../x.safetensors", "sub/x.safetensors", "/x.safetensors", "x\n.safetensors",
    )
    for bad, words in [({}, "weight_map must"),
                       *(({"weight_map": {"a": name}}, "weight_map must") for name in outside),
                       ({"weight_map": shards | {"a": "model-0.safetensors"}}, "disagree on a")]:
        index.write_text(json.dumps(bad))
        with pytest.raises(CheckpointError, match=words):
            from_hf_gpt2(tmp_path)


def test_the_config_is_one_of_transformers(tmp_path):
    to_hf_gpt2(ml.GPT(tiny_config(tie_weights=True, dropout=0.1, layer_norm_eps=1e-4)), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["auto_mapping"]  # our fingerprint
    assert settings == {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 11,
        "n_positions": 6, "n_embd": 8, "n_layer": 2, "n_head": 2, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-4, "tie_word_embeddings": True, "resid_pdrop": 0.1,
        "embd_pdrop": 0.1, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None,
    }


def test_a_classifier_of_transformers(tmp_path, ids):
    model = randomise(ml.GPT(tiny_config(tie_weights=True), rng=0))
    to_hf_gpt2(model, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors, score = load_safetensors(path), np.arange(24.0, dtype=np.float32).reshape(3, 8)
    save_safetensors(path, tensors | {"score.weight": score})
    model.lm_head = ml.Linear(8, 3, bias=False)
    model.lm_head.weight.data[...] = score.T
    again = from_hf_gpt2(tmp_path)
    np.testing.assert_array_equal(again(ids), model(ids))
    assert again.lm_head.weight.data.dtype == np.float32 and again.lm_head.bias is None
    assert from_hf_gpt2(tmp_path, np.float64)(ids).dtype == np.float64
    for bad in (score[:, :7], score[0]):
        save_safetensors(path, tensors | {"score.weight": bad})
        with pytest.raises(CheckpointError, match=r"score.weight has shape .*, not \(classes, d\)"):
            from_hf_gpt2(tmp_path)


def test_the_stored_head_decides_whether_it_is_tied(tmp_path, ids):
    model = randomise(ml.GPT(tiny_config(tie_weights=True), rng=0))
    to_hf_gpt2(model, tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    settings, tensors = json.loads(config.read_text()), load_safetensors(path)
    wte = tensors["transformer.wte.weight"]
    for head, setting, tied in ((wte, {}, True), (2 * wte, {}, False),
                                (wte, {"tie_word_embeddings": False}, False)):
        save_safetensors(path, {"lm_head.weight": head} | tensors)
        config.write_text(json.dumps(settings | setting))
        again = from_hf_gpt2(tmp_path)
        assert again.config.tie_weights is tied
        factor = 1 if head is wte else 2
        np.testing.assert_allclose(again(ids), factor * model(ids), rtol=1e-5, atol=1e-5)


def test_settings_of_transformers_that_are_missing_have_its_defaults(tmp_path):
    config = tiny_config(tie_weights=True)
    to_hf_gpt2(ml.GPT(config), tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text()) | {"n_inner": 32}
    for key in ("tie_word_embeddings", "layer_norm_epsilon", "activation_function"):
        del settings[key]
    path.write_text(json.dumps(settings))
    assert from_hf_gpt2(tmp_path).config == config


@pytest.mark.parametrize(
    "change, words",
    [
        ({"scale_attn_weights": False}, "scale_attn_weights = False is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"n_inner": 8}, "n_inner = 8"), ({"n_inner": 7}, "n_inner = 7"),
        ({"model_type": "llama"}, "model_type = 'llama'"),
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
        to_hf_gpt2(ml.replace_linear_with_lora(ml.GPT(tiny_config()), 2, 8), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("setting", [
    {"quantization_config": {"load_in_4bit": True}}, {"pruned_heads": {"0": [1]}}])
def test_settings_that_change_the_weights_are_refused(tmp_path, tiny_gpt, setting):
    ml.to_hf_gpt2(tiny_gpt, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(CheckpointError, match=next(iter(setting))):
        ml.from_hf_gpt2(tmp_path)


def test_integer_weights_and_tensors_in_two_shards_are_refused(tmp_path, tiny_gpt):
    ml.to_hf_gpt2(tiny_gpt, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = ml.load_safetensors(path)
    name = "transformer.ln_f.weight"
    ml.save_safetensors(path, tensors | {name: tensors[name].astype(np.int8)})
    with pytest.raises(CheckpointError, match=f"{name} must be floating-point, got int8"):
        ml.from_hf_gpt2(tmp_path)
    path.unlink()
    ml.save_safetensors(tmp_path / "a.safetensors", tensors)
    ml.save_safetensors(tmp_path / "b.safetensors", {name: tensors[name] + 1})
    shards = {key: "a.safetensors" for key in tensors} | {name: "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(CheckpointError, match=f"{name} is in two shards"):
        ml.from_hf_gpt2(tmp_path)
