import json

import pytest
from conftest import tiny_config
from helpers_adapters import task

import minilora as ml
from minilora.files.peft_config import stored_whole, targeted
from minilora.files.peft_read import load_adapter
from minilora.files.peft_write import save_adapter, save_peft
from minilora.files.safetensors import load_safetensors, save_safetensors
from minilora.nn.validate import CheckpointError


@pytest.mark.parametrize(
    "change, words",
    [
        ({"peft_type": "IA3"}, "does not describe a LoRA"),
        ({"r": 0}, "r must be a whole number of 1 or more, got 0$"),
        ({"r": 3}, "rank 2 and 2, the configuration says 3"), ({"r": True}, "r must be"),
        ({"lora_alpha": "8"}, "lora_alpha must be a finite number, got 8$"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_dropout": 1.5}, "lora_dropout must be in 0..1, got 1.5$"),
        ({"use_dora": True}, r"no lora_magnitude_vector \(use_dora is set\)"),
        ({"bias": "lora_only"}, "there are h.0.attn.q_proj.bias, h.0.attn.k_proj.bias"),
        ({"bias": "all"}, "there are h.0.ln_1.bias"), ({"bias": "some"}, "bias = 'some'"),
        ({"modules_to_save": ["x"]}, "none of modules_to_save"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"use_rslora": "false"}, "use_rslora must be true or false"),
        ({"use_dora": "false"}, "use_dora must be true or false, got false$"),
        ({"lora_dropout": 1}, "lora_dropout must"), ({"lora_dropout": -0.1}, "lora_dropout"),
        ({"rank_pattern": {"q_proj": 4}}, "rank 2 and 2, the configuration says 4"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern must be"),
        ({"rank_pattern": [4]}, "rank_pattern must be regular expressions with their numbers, got"),
        ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern must be regular expressions with th"),
        ({"target_modules": "("}, "target_modules must be names or a regular expression, got \\($"),
        ({"exclude_modules": [3]}, "exclude_modules must be names or a regular expression, got"),
        ({"target_modules": None}, "target_modules must be given"),
        ({"target_modules": ["q_proj"]}, "does not fit h.0.attn.k_proj"),
        ({"exclude_modules": ["k_proj"]}, "does not fit h.0.attn.k_proj"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform must be"),
        ({"layers_to_transform": "0"},
         "layers_to_transform must be a number or a list of numbers, got 0$"),
        ({"layers_to_transform": 1, "layers_pattern": "h", "target_modules": [
            "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"]},
         "does not fit h.0.attn.q_proj"),
        ({"layers_to_transform": 1, "target_modules": ".*"}, "needs a list as target_modules"),
        ({"layers_to_transform": 1, "layers_pattern": "(?i)h"}, "layers_pattern must be names, go"),
        ({"rank_pattern": {"(?i)q_proj": 2}}, "rank_pattern must be"),
        ({"rank_pattern": {"q_proj++": 2}}, "rank_pattern must be"),
        ({"target_modules": "(.*)*x"}, "target_modules does not fit"),
        ({"lora_alpha": 1e299}, "lora_alpha must be"),
        ({"modules_to_save": "x"}, "modules_to_save must be a list of names, got x$"),
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
    with pytest.raises(CheckpointError, match=words) as error:
        load_adapter(ml.GPT(tiny_config()), tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_pattern_has_at_most_20000_characters(tmp_path):
    save_adapter(task(), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rank_pattern": {"x" * 20_000: 5}}))
    load_adapter(ml.GPT(tiny_config()), tmp_path)
    path.write_text(json.dumps(config | {"rank_pattern": {"x" * 20_001: 5}}))
    with pytest.raises(CheckpointError, match="rank_pattern must be regular expressions"):
        load_adapter(ml.GPT(tiny_config()), tmp_path)


NAMES = ["t.h.0.q", "t.h.0.xq", "t.h.1.q", "t.e.1.h.2.q", "lm_head", "score", "t.lm_head"]


@pytest.mark.parametrize("settings, chosen", [
    ({"target_modules": ["q"]}, ["t.h.0.q", "t.h.1.q", "t.e.1.h.2.q"]),
    ({"target_modules": ["0.q", "t.h.1.q"]}, ["t.h.0.q", "t.h.1.q"]),
    ({"target_modules": r"t\.h\.\d.*"}, ["t.h.0.q", "t.h.0.xq", "t.h.1.q"]),
    ({"target_modules": "ALL-linear"}, [n for n in NAMES if n not in ("lm_head", "score")]),
    ({"target_modules": "all-linear", "exclude_modules": ["q"]}, ["t.h.0.xq", "t.lm_head"]),
    ({"target_modules": "all-linear", "exclude_modules": ".*q"}, ["t.lm_head"]),
    ({"target_modules": "all-linear", "modules_to_save": ["h.0", "head"]}, [
        "t.h.1.q", "t.e.1.h.2.q"]),
    ({"target_modules": ["q"], "layers_to_transform": 1}, ["t.h.1.q", "t.e.1.h.2.q"]),
    ({"target_modules": ["q"], "layers_to_transform": [0, 2]}, ["t.h.0.q"]),
    ({"target_modules": ["q"], "layers_to_transform": []}, ["t.h.0.q", "t.h.1.q", "t.e.1.h.2.q"]),
    ({"target_modules": ["q"], "layers_to_transform": [0, 2], "layers_pattern": "h"}, [
        "t.h.0.q", "t.e.1.h.2.q"]),
    ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": ["e", "h"]}, [
        "t.h.1.q", "t.e.1.h.2.q"]),
    ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": ["x"]}, []),
    ({"target_modules": ["t.h.0.q"], "layers_to_transform": 1}, ["t.h.0.q"]),
])
def test_the_layers_that_peft_would_adapt(settings, chosen):
    assert [name for name in NAMES if targeted(settings, name)] == chosen


@pytest.mark.parametrize("bias, module, kind, adapted, stored", [
    ("none", "h.0", "bias", True, False), ("all", "h.0", "bias", False, True),
    ("all", "h.0", "weight", True, False), ("lora_only", "h.0", "bias", True, True),
    ("lora_only", "h.0", "bias", False, False), ("lora_only", "h.0", "weight", True, False),
    ("none", "head", "weight", False, True), ("none", "head.inner", "bias", False, True),
    ("none", "a.head", "weight", False, True), ("none", "head_2", "weight", False, False),
])
def test_the_parameters_that_peft_would_store_whole(bias, module, kind, adapted, stored):
    config = {"bias": bias, "modules_to_save": ["head"]}
    assert stored_whole(config, module, kind, adapted) is stored


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
