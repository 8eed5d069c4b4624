import json

import numpy as np
import pytest
from conftest import tiny_config

import minilora as ml
from minilora.files.checkpoint import load_base, load_checkpoint, save_checkpoint
from minilora.files.safetensors import save_safetensors
from minilora.nn.validate import CheckpointError


@pytest.mark.parametrize("tie_weights", [False, True])
def test_checkpoint_round_trip(tmp_path, ids, tie_weights):
    model = ml.GPT(tiny_config(tie_weights=tie_weights, layer_norm_eps=1e-4), rng=3)
    save_checkpoint(model, tmp_path / "m")
    loaded = load_checkpoint(tmp_path / "m")
    assert loaded.config == model.config and np.array_equal(loaded(ids), model(ids))
    save_checkpoint(model, tmp_path / "half", np.float16)
    assert (tmp_path / "half").stat().st_size < 0.75 * (tmp_path / "m").stat().st_size
    np.testing.assert_allclose(load_checkpoint(tmp_path / "half")(ids), model(ids), atol=1e-3)


def test_what_a_checkpoint_will_not_hold(tmp_path, tiny_gpt):
    tiny_gpt.wte.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match="wte.weight has numbers that do not fit float16"):
        save_checkpoint(tiny_gpt, tmp_path / "m", np.float16)
    with pytest.raises(IsADirectoryError, match="is a directory"):
        save_checkpoint(tiny_gpt, tmp_path)
    classifier = ml.GPT(tiny_config())
    classifier.lm_head = ml.Linear(8, 2)
    with pytest.raises(ValueError, match="head of the model was replaced"):
        save_checkpoint(classifier, tmp_path / "m")
    shorter = ml.GPT(tiny_config())
    shorter.h = ml.ModuleList(list(shorter.h)[:1])
    with pytest.raises(ValueError, match="has 1 blocks, its config says 2"):
        save_checkpoint(shorter, tmp_path / "m")
    with pytest.raises(TypeError, match="floating-point numbers, not int8"):
        save_checkpoint(ml.GPT(tiny_config()), tmp_path / "m", np.int8)
    with pytest.raises(TypeError, match="float32 or float64"):
        load_base("small", np.float16)
    with pytest.raises(ValueError, match="LoRA layers"):
        save_checkpoint(ml.replace_linear_with_lora(tiny_gpt, 1, 1), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_checkpoint(tmp_path, tiny_gpt):
    path = tmp_path / "m"
    save_safetensors(path, tiny_gpt.state_dict())
    with pytest.raises(CheckpointError, match="not a minilora checkpoint: it has no config"):
        load_checkpoint(path)
    config = json.dumps(vars(tiny_gpt.config))
    tensors = tiny_gpt.state_dict()
    save_safetensors(path, {n: a for n, a in tensors.items() if n != "ln_f.bias"},
                     {"config": config})
    with pytest.raises(CheckpointError, match="missing: ln_f.bias"):
        load_checkpoint(path)
    for change in ('"n_layers": 2', '"n_layers": 9000000'), ('"d_model": 8', '"d_model": 900000'):
        save_safetensors(path, tensors, {"config": config.replace(*change)})
        with pytest.raises(CheckpointError, match="should have shape"):
            load_checkpoint(path)
    eps = config.replace("1e-05", "NaN"), config.replace("1e-05", "1" + "0" * 400)
    for bad in ("[]", "{", '{"vocab": 3}', "null", "[" * 200_000, *eps):
        save_safetensors(path, tensors, {"config": bad})
        with pytest.raises(CheckpointError, match="not a minilora checkpoint"):
            load_checkpoint(path)


@pytest.mark.parametrize("name, count", [("base", 822_016), ("small", 110_336)])
def test_the_shipped_models(name, count):
    assert load_base(name).num_parameters() == count


def test_a_model_that_is_not_shipped():
    with pytest.raises(ValueError, match="base, small; got 'large'"):
        load_base("large")


@pytest.mark.parametrize("change, words", [
    (lambda model: setattr(model.ln_f, "eps", 1e-3), "ln_f.eps is 0.001, the config says 1e-05"),
    (lambda model: setattr(model.h[1].attn, "n_heads", 4), "h.1.attn.n_heads is 4, the config"),
])
def test_what_a_file_could_not_hold_is_refused(tmp_path, tiny_gpt, change, words):
    change(tiny_gpt)
    for save in (save_checkpoint, ml.to_hf_gpt2):
        with pytest.raises(ValueError, match=words):
            save(tiny_gpt, tmp_path / "x")
    assert not list(tmp_path.iterdir())
