"""Adapters of real PEFT on transformers' GPT-2, in every form that its files have, both ways."""

import importlib.util
import json

import numpy as np
import pytest

import minilora as ml
from minilora.lora.surgery import lora_layers

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
NEEDED = ("torch", "transformers", "peft", "safetensors")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if MISSING:
    reason = f"the extra 'peers' is not installed: no {', '.join(MISSING)}"
    pytest.skip(reason, allow_module_level=True)

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

CASES = {
    "list": dict(target_modules=["c_attn"]),
    "every kind of layer": dict(target_modules=["c_attn", "c_proj", "c_fc"]),
    "full names": dict(target_modules=["transformer.h.1.attn.c_attn", "transformer.h.0.mlp.c_fc"]),
    "regex": dict(target_modules=r".*\.h\.[02]\.(attn\.c_attn|mlp\.c_proj)"),
    "all-linear": dict(target_modules="all-linear"),
    "head": dict(target_modules=["c_attn", "lm_head"]),
    "rslora": dict(target_modules=["c_attn", "c_fc"], use_rslora=True),
    "dora": dict(target_modules=["c_attn", "c_proj"], use_dora=True),
    "dora rslora": dict(target_modules="all-linear", use_dora=True, use_rslora=True),
    "rank pattern": dict(target_modules=["c_attn", "c_proj", "c_fc"],
                         rank_pattern={"attn.c_proj": 1, r"h\.0\.mlp\.c_proj": 5, "c_attn": 2}),
    "alpha pattern": dict(target_modules="all-linear", rank_pattern={"c_fc": 4},
                          alpha_pattern={"c_fc": 1, r"1\.attn\.c_attn": 32}),
    "patterns rslora": dict(target_modules="all-linear", rank_pattern={"c_fc": 4},
                            alpha_pattern={"c_fc": 1}, use_rslora=True),
    "exclude": dict(target_modules=["c_attn", "c_proj"], exclude_modules=["mlp.c_proj"]),
    "exclude regex": dict(target_modules="all-linear", exclude_modules=r".*\.0\..*"),
    "layers": dict(target_modules=["c_attn"], layers_to_transform=[0, 2]),
    "layers pattern": dict(target_modules=["c_fc"], layers_to_transform=1, layers_pattern="h"),
    "bias lora_only": dict(target_modules=["c_attn", "c_proj"], bias="lora_only"),
    "bias all": dict(target_modules=["c_attn"], bias="all"),
    "bias all dora": dict(target_modules=["c_fc"], bias="all", use_dora=True),
    "saved head": dict(target_modules=["c_attn"], modules_to_save=["lm_head"]),
    "saved norms": dict(target_modules=["c_attn"], modules_to_save=["ln_1", "ln_f"]),
    "saved embeddings": dict(target_modules=["c_attn"], modules_to_save=["wte", "wpe"]),
    "saved mlp": dict(target_modules=["c_attn"], modules_to_save=["h.1.mlp"]),
    "not fan_in_fan_out": dict(target_modules=["c_attn"], fan_in_fan_out=False),
    "dropout": dict(target_modules=["c_attn"], lora_dropout=0.1),
    "bias all, saved norm": dict(target_modules=["c_attn"], bias="all", modules_to_save=["ln_f"]),
    "only the head": dict(target_modules=["lm_head"], bias="lora_only"),
    "layers, but a full name": dict(target_modules=["c_fc", "transformer.h.0.attn.c_attn"],
                                    layers_to_transform=[1]),
    "saved by the end of its name": dict(target_modules=["c_attn"], modules_to_save=["head"]),
    "float alpha": dict(target_modules=["c_attn"], lora_alpha=7.3),
}


def shake(model, scale=0.1):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))
    return model.eval()


def gpt2(tied=False, kind="GPT2LMHeadModel", **more):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=24, n_layer=3, n_head=4, tie_word_embeddings=tied,
        **more,
    )
    return shake(getattr(transformers, kind)(config))


def close(ours, theirs, tolerance=1e-5):
    theirs = theirs.detach().numpy()
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(1, 50, (2, 16))


def adapted(options, **kinds):
    model = peft.get_peft_model(gpt2(**kinds), peft.LoraConfig(**{
        "r": 3, "lora_alpha": 6, "fan_in_fan_out": True, **options
    }))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def there_and_back(tmp_path, theirs, base, tokens, read, fresh):
    """Their files here: logits with the adapter and merged; then ours there, likewise."""
    ids = torch.from_numpy(tokens)
    theirs.save_pretrained(tmp_path / "theirs")
    plain, before = base(tokens), base.state_dict()
    model = ml.load_adapter(base, tmp_path / "theirs")
    expected = theirs(ids).logits
    close(read(model(tokens)), expected)
    ml.save_peft(model, tmp_path / "ours")
    ml.save_adapter(model, tmp_path / "own")
    close(read(ml.merge_lora(model)(tokens)), theirs.merge_and_unload()(ids).logits)
    ml.remove_lora(model)
    assert np.array_equal(model(tokens), plain)
    assert all(np.array_equal(a, before[n]) for n, a in model.state_dict().items())
    close(read(ml.load_adapter(model, tmp_path / "own")(tokens)), expected)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    close(read(model(tokens)), again(ids).logits)
    close(read(model(tokens)), again.merge_and_unload()(ids).logits)


@pytest.mark.parametrize("case", CASES)
def test_the_forms_that_adapter_files_have(tmp_path, tokens, case):
    theirs = adapted(CASES[case])
    gpt2().save_pretrained(tmp_path / "base")
    base = ml.from_hf_gpt2(tmp_path / "base")
    there_and_back(tmp_path, theirs, base, tokens, lambda logits: logits, gpt2())


@pytest.mark.parametrize("options", [
    {}, dict(use_dora=True), dict(modules_to_save=["wte"]), dict(modules_to_save=["lm_head"]),
    dict(modules_to_save=["wte"], ensure_weight_tying=True),
    dict(modules_to_save=["lm_head"], ensure_weight_tying=True),
])
def test_a_tied_model(tmp_path, tokens, options):
    theirs = adapted({"target_modules": ["c_attn"], **options}, tied=True)
    gpt2(tied=True).save_pretrained(tmp_path / "base")
    base = ml.from_hf_gpt2(tmp_path / "base")
    there_and_back(tmp_path, theirs, base, tokens, lambda logits: logits, gpt2(tied=True))


@pytest.mark.parametrize("options", [dict(target_modules=["c_attn"]),
                                     dict(target_modules="all-linear", use_dora=True)])
def test_a_classifier(tmp_path, tokens, options):
    kinds = dict(kind="GPT2ForSequenceClassification", num_labels=2, pad_token_id=0, tied=True)
    theirs = adapted({"task_type": "SEQ_CLS", **options}, **kinds)
    torch.manual_seed(0)
    lm = gpt2(tied=True)
    lm.transformer.load_state_dict(gpt2(**kinds).transformer.state_dict())
    lm.save_pretrained(tmp_path / "base")
    base = ml.from_hf_gpt2(tmp_path / "base")
    there_and_back(tmp_path, theirs, base, tokens, lambda logits: logits[:, -1], gpt2(**kinds))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves(tmp_path, tokens, dtype):
    theirs = adapted(CASES["every kind of layer"]).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs")
    base = gpt2().to(getattr(torch, dtype))
    base.save_pretrained(tmp_path / "base")
    model = ml.load_adapter(ml.from_hf_gpt2(tmp_path / "base"), tmp_path / "theirs")
    close(model(tokens), theirs.float()(torch.from_numpy(tokens)).logits)


@pytest.mark.parametrize("case", ["list", "dora", "saved norms", "bias lora_only"])
def test_the_name_of_the_adapter_in_the_keys(tmp_path, tokens, case):
    theirs = adapted(CASES[case])
    theirs.save_pretrained(tmp_path)
    gpt2().save_pretrained(tmp_path / "base")
    path = tmp_path / "adapter_model.safetensors"

    def renamed(key):
        for part in ("lora_A", "lora_B"):
            key = key.replace(f".{part}.weight", f".{part}.default.weight")
        if key.endswith("lora_magnitude_vector"):
            key += ".default.weight"
        for norm in ("ln_1", "ln_f"):
            key = key.replace(f".{norm}.", f".{norm}.modules_to_save.default.")
        return key

    tensors = {renamed(key): array for key, array in ml.load_safetensors(path).items()}
    ml.save_safetensors(path, tensors)
    model = ml.load_adapter(ml.from_hf_gpt2(tmp_path / "base"), tmp_path)
    close(model(tokens), theirs(torch.from_numpy(tokens)).logits)


def test_a_fused_layer_is_stored_with_the_rank_it_needs(tmp_path, tokens):
    gpt2().save_pretrained(tmp_path / "base")
    adapted(CASES["list"]).save_pretrained(tmp_path / "theirs")
    shared = ml.load_adapter(ml.from_hf_gpt2(tmp_path / "base"), tmp_path / "theirs")
    attn = shared.h[0].attn
    assert attn.q_proj.lora.A is attn.k_proj.lora.A is attn.v_proj.lora.A
    assert shared.num_parameters(trainable_only=True) == 3 * (3 * 24 + 3 * 72)
    ml.save_peft(shared, tmp_path / "shared")
    separate = ml.replace_linear_with_lora(
        ml.from_hf_gpt2(tmp_path / "base"), 3, 6, ["q_proj", "v_proj"], rng=0)
    ml.replace_linear_with_lora(separate, 2, 8, ["k_proj"], scaling="alpha", rng=1)
    rng = np.random.default_rng(0)
    for _, layer in lora_layers(separate):
        layer.lora.B.data[...] = 0.1 * rng.standard_normal(layer.lora.B.shape)
    ml.save_peft(separate, tmp_path / "separate")
    for model, name, rank in ((shared, "shared", 3), (separate, "separate", 3 + 3 + 2)):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["r"] == rank and config["target_modules"][0] == "transformer.h.0.attn.c_attn"
        again = peft.PeftModel.from_pretrained(gpt2(), tmp_path / name).eval()
        close(model(tokens), again(torch.from_numpy(tokens)).logits)
        mine = ml.load_adapter(ml.from_hf_gpt2(tmp_path / "base"), tmp_path / name)
        np.testing.assert_allclose(mine(tokens), model(tokens), rtol=1e-4, atol=1e-4)


def test_training_goes_on_as_in_peft(tmp_path, tokens):
    """One step of SGD on an adapter of PEFT, plain and DoRA: the same logits afterwards."""
    for case in ("every kind of layer", "dora", "bias all", "saved norms", "tied wte"):
        options = CASES.get(case, dict(target_modules=["c_attn"], modules_to_save=["wte"]))
        theirs = adapted(options, tied=case == "tied wte")
        theirs.save_pretrained(tmp_path / case)
        gpt2(tied=case == "tied wte").save_pretrained(tmp_path / "base")
        model = ml.load_adapter(ml.from_hf_gpt2(tmp_path / "base"), tmp_path / case)
        ids = torch.from_numpy(tokens)
        loss = torch.nn.functional.cross_entropy(theirs(ids).logits.flatten(0, 1), ids.flatten())
        loss.backward()
        trained = [p for p in theirs.parameters() if p.requires_grad]
        torch.optim.SGD(trained, 0.1).step()
        ours, dlogits = ml.cross_entropy(model(tokens), tokens)
        assert ours == pytest.approx(loss.item(), rel=1e-5)
        model.backward(dlogits)
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.size for p in trainable) == sum(p.numel() for p in trained)
        ml.SGD(trainable, 0.1).step()
        close(model(tokens), theirs(ids).logits)


def test_a_stored_head_counts_in_a_model_that_is_called_tied(tmp_path, tokens):
    model = gpt2(tied=False)
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    close(ml.from_hf_gpt2(tmp_path)(tokens), theirs(torch.from_numpy(tokens)).logits)


def test_a_tied_head_as_target_is_refused_in_words(tmp_path):
    theirs = adapted(dict(target_modules=["c_attn", "lm_head"]), tied=True)
    theirs.save_pretrained(tmp_path / "theirs")
    gpt2(tied=True).save_pretrained(tmp_path / "base")
    with pytest.raises(ml.CheckpointError, match="tied to wte: it has no matrix of its own"):
        ml.load_adapter(ml.from_hf_gpt2(tmp_path / "base"), tmp_path / "theirs")


def test_a_classifier_of_transformers_as_it_is(tmp_path, tokens):
    kinds = dict(kind="GPT2ForSequenceClassification", num_labels=3, pad_token_id=0, tied=True)
    theirs = gpt2(**kinds)
    theirs.save_pretrained(tmp_path / "base")
    ours = ml.from_hf_gpt2(tmp_path / "base")
    close(ours(tokens)[:, -1], theirs(torch.from_numpy(tokens)).logits)
    adapter = adapted(dict(target_modules=["c_attn"], task_type="SEQ_CLS"), **kinds)
    there_and_back(tmp_path, adapter, ours, tokens, lambda logits: logits[:, -1], gpt2(**kinds))
