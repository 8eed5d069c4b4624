import json

import numpy as np
import pytest
from conftest import randomise, tiny_config
from helpers_adapters import task

import minilora as ml
from minilora.files.peft_read import load_adapter
from minilora.files.peft_write import save_adapter, save_peft
from minilora.files.safetensors import load_safetensors, save_safetensors
from minilora.nn.validate import CheckpointError


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
        with pytest.raises(TypeError, match="a bare Linear(WithLoRA)? cannot be replaced in place"):
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


def test_loading_onto_a_merged_model_replaces_what_was_merged(tmp_path, ids):
    save_adapter(task(1), tmp_path)
    model = ml.merge_lora(task(2))
    load_adapter(model, tmp_path)
    assert np.array_equal(model(ids), task(1)(ids))
    assert np.array_equal(ml.remove_lora(model)(ids), ml.GPT(tiny_config())(ids))


def test_what_was_adapted_before_and_is_not_now_is_the_base_again(tmp_path):
    save_adapter(task(targets="q_proj"), tmp_path)
    model = load_adapter(task(seed=9), tmp_path)
    assert type(model.lm_head) is ml.Linear and not model.lm_head.weight.requires_grad
    assert set(ml.lora_state_dict(model)) == set(ml.lora_state_dict(task(targets="q_proj")))


def test_a_tied_head_cannot_be_adapted(tmp_path):
    save_adapter(task(targets="lm_head"), tmp_path)
    model = ml.GPT(tiny_config(tie_weights=True))
    with pytest.raises(CheckpointError, match="lm_head is a target, but the head of this model is"):
        load_adapter(model, tmp_path)
    model.lm_head = ml.Linear(8, 11, bias=False)
    assert isinstance(load_adapter(model, tmp_path).lm_head, ml.LinearWithLoRA)


def test_damaged_files(tmp_path):
    model = ml.GPT(tiny_config())
    with pytest.raises(FileNotFoundError):
        load_adapter(model, tmp_path / "nothing")
    save_adapter(task(), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_safetensors(weights)
    a, b = list(tensors)[:2]
    for bad, words in [
        ({a: tensors[a]}, "has no lora_B$"), ({}, "holds no LoRA factors"),
        (tensors | {a.removeprefix("base_model.model."): tensors[a]}, "appears twice"),
        (tensors | {"extra": np.zeros(2)}, "extra is neither lora_A"),
        (tensors | {a: np.zeros(2)}, "must be a matrix of floating-point numbers, got"),
        (tensors | {"extra": np.zeros((2, 2, 2))}, "extra must be a matrix or a vector of fl"),
        (tensors | {"h.0.ln_1.base_layer.weight": np.zeros(8)}, "base_layer.weight is neither"),
        (tensors | {b: np.zeros((8, 2), int)}, "floating-point"),
    ]:
        save_safetensors(weights, bad)
        with pytest.raises(CheckpointError, match=words):
            load_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_adapter(model, tmp_path)
    assert all(p.requires_grad for p in model.parameters())


def test_several_adapters_in_one_file(tmp_path):
    save_adapter(task(), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_safetensors(weights)
    twice = {name.replace("lora_A.", "lora_A.other."): array for name, array in tensors.items()}
    save_safetensors(weights, tensors | twice)
    with pytest.raises(CheckpointError, match="holds several adapters: None, other$"):
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
    (lambda t: {"transformer.wte.base_layer.weight": np.ones((11, 8)),  # as PEFT writes them
                "transformer.wte.lora_embedding_A": np.ones((2, 11))}, "LoRA on an embedding"),
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
    with pytest.raises(CheckpointError, match="appears twice, with different numbers"):
        load_adapter(ml.GPT(tiny_config()), tmp_path)


def test_a_pickle_is_not_read(tmp_path):
    save_adapter(task(), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="a pickle, which can run code"):
        load_adapter(ml.GPT(tiny_config()), tmp_path)


def test_a_module_called_score_in_a_model_of_one_s_own(tmp_path):
    class Scorer(ml.Module):
        def __init__(self):
            self.body, self.score = ml.Linear(4, 4, rng=0), ml.Linear(4, 2, rng=1)

        def forward(self, x):
            return self.score(self.body(x))

    x = np.ones((3, 4), np.float32)
    model = ml.replace_linear_with_lora(Scorer(), 1, 2, "body", modules_to_save="score", rng=0)
    randomise(model.score.module)
    save_adapter(model, tmp_path)
    assert np.array_equal(load_adapter(Scorer(), tmp_path)(x), model(x))
