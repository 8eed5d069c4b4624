import copy
import pickle

import numpy as np
import pytest
from conftest import randomise, tiny_config

import minilora as ml
from minilora.data.generate import sample_tokens
from minilora.nn.attention import CausalSelfAttention


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients(ids, tie_weights, bias, dropout):
    config = tiny_config(tie_weights=tie_weights, bias=bias, dropout=dropout)
    model = randomise(ml.GPT(config, dtype=np.float64))
    report = ml.gradcheck(model, ids, max_entries=20)
    assert report.passed, f"\n{report}"


@pytest.mark.parametrize("n", [1, 3, 30])
def test_gradients_with_lora(rng, n):
    model = ml.GPT(tiny_config(dropout=0.1), dtype=np.float64)
    randomise(ml.replace_linear_with_lora(model, 2, 4, rng=0))
    report = ml.gradcheck(model, rng.integers(0, 11, (n, 6)), max_entries=20)
    assert report.passed, f"\n{report}"
    assert len(report.entries) == 2 * (6 * 2 + 1), "A and B of every linear, and nothing else"


def test_attention_gradients(rng):
    attention = randomise(CausalSelfAttention(8, 2, dtype=np.float64, rng=0))
    report = ml.gradcheck(attention, rng.standard_normal((2, 5, 8)))
    assert report.passed, f"\n{report}"


def test_attention_weights_reproduce_the_output(rng):
    attention = randomise(CausalSelfAttention(8, 2, dtype=np.float64, rng=0))
    x = rng.standard_normal((2, 5, 8))
    heads = attention.attention_weights(x) @ attention.split_heads(attention.v_proj(x))
    np.testing.assert_allclose(attention(x), attention.o_proj(attention.join_heads(heads)))


def test_initial_values_are_gpt_2_s():
    model = ml.GPT(tiny_config(d_model=64, n_layers=8, vocab_size=500, context_length=200))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.data.any(), name
        elif p.data.ndim == 1:
            assert (p.data == 1.0).all(), name
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / (2 * 8) ** 0.5 if residual else 0.02
            assert p.data.std() == pytest.approx(std, rel=0.05), name
            assert abs(p.data.mean()) < 0.1 * std, name


def test_no_position_sees_the_future(tiny_gpt, ids):
    changed = ids.copy()
    changed[:, 4:] = (changed[:, 4:] + 1) % 11
    np.testing.assert_array_equal(tiny_gpt(ids)[:, :4], tiny_gpt(changed)[:, :4])
    assert not np.allclose(tiny_gpt(ids)[:, 4:], tiny_gpt(changed)[:, 4:])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_stays_through_training(ids, dtype):
    model = ml.GPT(tiny_config(), dtype=dtype)
    loss, dlogits = ml.cross_entropy(model(ids), ids)
    model.backward(dlogits)
    optimizer = ml.AdamW(model.parameters())
    optimizer.step()
    arrays = [dlogits, *(p.grad for p in model.parameters())]
    arrays += [p.data for p in model.parameters()]
    arrays += [array for state in optimizer.state.values() for array in state]
    for _, module in model.named_modules():
        arrays += [a for a in module._cache or () if isinstance(a, np.ndarray)]
    assert {array.dtype for array in arrays} == {np.dtype(dtype)}


def test_backward_stops_below_the_lowest_trainable(ids):
    model = ml.GPT(tiny_config(n_layers=3)).freeze()
    model.h[1].mlp.up_proj.unfreeze()
    _, dlogits = ml.cross_entropy(model(ids), ids)
    model.backward(dlogits)
    left = {name for name, module in model.named_modules() if module._cache is not None}
    used = {"h.2", "h.1.mlp.up_proj", "h.1.mlp.down_proj", "h.2.attn.q_proj", "h.1.attn"}
    unused = {"h.0.mlp.up_proj", "h.0.attn", "h.0.ln_2", "wte", "wpe"}
    assert unused <= left and not used & left
    with_grad = [name for name, p in model.named_parameters() if p.grad is not None]
    assert with_grad == ["h.1.mlp.up_proj.weight", "h.1.mlp.up_proj.bias"]


def test_partial_gradients_equal_the_full_ones(ids):
    """Freezing changes what is computed, never the value of what is left."""
    full = randomise(ml.GPT(tiny_config(), dtype=np.float64))
    _, dlogits = ml.cross_entropy(full(ids), ids)
    full.backward(dlogits)
    expected = {name: p.grad for name, p in full.named_parameters()}
    for name, parameter in full.named_parameters():
        full.freeze()
        parameter.requires_grad = True
        full(ids)
        full.backward(dlogits)
        np.testing.assert_allclose(parameter.grad, expected[name], atol=1e-12, err_msg=name)
        assert sum(p.grad is not None for p in full.parameters()) == 1


def test_a_frozen_model_does_nothing(tiny_gpt, ids):
    logits = tiny_gpt.freeze()(ids)
    assert tiny_gpt.backward(logits) is None
    assert all(p.grad is None for p in tiny_gpt.parameters())


def test_tied_head():
    model = ml.GPT(tiny_config(tie_weights=True))
    assert isinstance(model.lm_head, ml.TiedHead) and model.lm_head.weight is model.wte.weight
    count = model.num_parameters()
    assert count == ml.GPT(tiny_config()).num_parameters() - 8 * 11
    names = [name for name, _ in ml.replace_linear_with_lora(model, 2, 4).named_parameters()]
    assert not any("lm_head" in name for name in names)
    assert model(np.zeros((1, 2), int)).shape == (1, 2, 11)


@pytest.mark.parametrize("tie_weights", [False, True])
def test_replacing_the_head_makes_a_classifier(ids, tie_weights):
    model = ml.GPT(tiny_config(tie_weights=tie_weights))
    model.lm_head = ml.Linear(8, 2, rng=0)
    logits = model(ids)
    assert logits.shape == (3, 6, 2)
    _, dlast = ml.cross_entropy(logits[:, -1], np.array([0, 1, 1]))
    dlogits = np.zeros_like(logits)
    dlogits[:, -1] = dlast
    model.backward(dlogits)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "ids, error, words",
    [
        (np.zeros((1, 7), int), ValueError, "time from 1 to 6"),
        (np.zeros((1, 0), int), ValueError, "time from 1 to 6"),
        (np.zeros(3, int), ValueError, r"\(batch, time\)"),
        (np.full((1, 2), 11), ValueError, "id 11 at"),
        (np.full((1, 2), -1), ValueError, "id -1 at"),
        (np.zeros((1, 2)), TypeError, "integers"),
    ],
)
def test_bad_ids(tiny_gpt, ids, error, words):
    with pytest.raises(error, match=words):
        tiny_gpt(ids)


@pytest.mark.parametrize(
    "change, words",
    [({"n_heads": 3}, "n_heads must divide"), ({"n_layers": 0}, "n_layers"),
     ({"d_model": 8.0}, "d_model"), ({"dropout": 1.0}, "dropout"), ({"n_layers": True}, "n_l"),
     ({"layer_norm_eps": float("nan")}, "layer_norm_eps"), ({"layer_norm_eps": 1.0}, "layer_norm"),
     ({"layer_norm_eps": 0.0}, "layer_norm_eps"), ({"layer_norm_eps": 1}, "layer_norm_eps must be"),
     ({"tie_weights": None}, "tie_weights must be True"), ({"vocab_size": 0}, "GPTConfig: vocab_s"),
     ({"context_length": 0}, "context_length"), ({"bias": 1}, "bias must be True"),
     ({"dropout": "a"}, "dropout must be a number, got 'a'")],
)
def test_bad_configurations(change, words):
    with pytest.raises((ValueError, TypeError), match=words):
        tiny_config(**change)


def test_numpy_numbers_become_python_s_so_that_a_config_can_be_stored():
    config = ml.GPTConfig(*map(np.int64, (11, 6, 8, 2, 2)), dropout=np.float32(0.5),
                          layer_norm_eps=np.float64(1e-5))
    assert config == tiny_config(dropout=0.5)
    kinds = [type(value) for value in vars(config).values()]
    assert kinds == [int] * 5 + [bool] * 2 + [float] * 2


@pytest.mark.parametrize("bias", [False, True])
def test_every_part_is_as_the_config_says(bias):
    config = tiny_config(bias=bias, dropout=0.25, layer_norm_eps=0.125)
    model = ml.GPT(config, dtype=np.float64)
    modules = [module for _, module in model.named_modules()]
    assert {m.p for m in modules if isinstance(m, ml.Dropout)} == {0.25}
    assert sum(isinstance(m, ml.Dropout) for m in modules) == 1 + 2 * 2
    assert {m.eps for m in modules if isinstance(m, ml.LayerNorm)} == {0.125}
    assert {m.n_heads for m in modules if isinstance(m, CausalSelfAttention)} == {2}
    assert {p.data.dtype for p in model.parameters()} == {np.dtype(np.float64)}
    biased = {name.removesuffix(".bias") for name, _ in model.named_parameters() if "bias" in name}
    able = {name for name, m in model.named_modules() if isinstance(m, (ml.Linear, ml.LayerNorm))}
    assert biased == (able - {"lm_head"} if bias else set())


def test_the_seed_decides_weights_and_dropout(ids):
    def logits(*seed):
        return ml.GPT(tiny_config(dropout=0.5), *seed)(ids)

    assert np.array_equal(logits(1), logits(1)) and not np.allclose(logits(1), logits(2))
    assert np.array_equal(logits(), logits(0)), "0 by default"


@pytest.mark.parametrize("tie_weights", [False, True])
def test_backward_of_the_wrong_shape(ids, tie_weights):
    model = ml.GPT(tiny_config(tie_weights=tie_weights))
    for shape in ((3, 6, 12), (2, 6, 11)):
        model(ids)
        with pytest.raises(ValueError, match=r"dout of shape \(3, 6, 11\), got"):
            model.backward(np.zeros(shape))
    with pytest.raises(ValueError, match=r"attention expects input of shape \(B, T, C\)"):
        model.h[0].attn(np.zeros((6, 8)))
    with pytest.raises(ValueError, match=r"T at least 1, got \(2, 0, 8\)"):
        model.h[0].attn(np.zeros((2, 0, 8)))


def test_published_sizes():
    config = ml.GPTConfig.gpt2("xl")
    assert (config.n_layers, config.d_model, config.n_heads) == (48, 1600, 25)
    assert ml.GPTConfig.gpt2(dropout=0.1) == ml.GPTConfig(50257, 1024, 768, 12, 12, True, True, 0.1)
    with pytest.raises(ValueError, match="small, medium, large, xl"):
        ml.GPTConfig.gpt2("tiny")


def test_gpt2_small_builds_with_the_published_count():
    model = ml.GPT(ml.GPTConfig.gpt2("small"))
    assert model.num_parameters() == 124_439_808
    model.lm_head = ml.Linear(768, 2, rng=0)
    assert model.num_parameters() == 124_441_346
    ml.replace_linear_with_lora(model, rank=16, alpha=16)
    assert model.num_parameters(trainable_only=True) == 2_666_528


def test_generate(tiny_gpt):
    prompt = np.array([1, 2, 3])
    out = ml.generate(tiny_gpt, prompt, 20, rng=0)
    assert out.shape == (23,) and out[:3].tolist() == [1, 2, 3]
    assert np.array_equal(out, ml.generate(tiny_gpt, prompt, 20, rng=0))
    assert not np.array_equal(out, ml.generate(tiny_gpt, prompt, 20, rng=1))
    assert ml.generate(tiny_gpt, np.tile(prompt, (2, 1)), 4).shape == (2, 7)
    assert np.array_equal(ml.generate(tiny_gpt, prompt, 0), prompt)
    assert tiny_gpt.training


def test_generate_greedy_is_the_arg_max_and_top_1(tiny_gpt):
    prompt = np.array([1, 2, 3])
    greedy = ml.generate(tiny_gpt, prompt, 5, temperature=0.0)
    assert greedy[3] == tiny_gpt(prompt[None])[0, -1].argmax()
    assert np.array_equal(greedy, ml.generate(tiny_gpt, prompt, 5, top_k=1, rng=7))


def test_generate_reads_as_much_as_the_context_holds(tiny_gpt, rng):
    randomise(tiny_gpt)
    prompts = rng.integers(0, 11, (60, 9))
    seen = tiny_gpt(prompts[:, -6:])[:, -1].argmax(-1)
    assert not np.array_equal(tiny_gpt(prompts[:, -5:])[:, -1].argmax(-1), seen)
    assert np.array_equal(ml.generate(tiny_gpt, prompts, 1, temperature=0.0)[:, -1], seen)


def test_extreme_temperatures_and_nan(tiny_gpt):
    prompt = np.array([1, 2, 3], np.uint64)
    greedy = ml.generate(tiny_gpt, prompt, 5, temperature=0.0)
    assert np.array_equal(greedy, ml.generate(tiny_gpt, prompt, 5, temperature=1e-308))
    tiny_gpt.ln_f.weight.data[0] = np.nan
    with pytest.raises(FloatingPointError, match="logits are nan"):
        ml.generate(tiny_gpt, prompt, 1)


def test_a_tied_head_unfrozen_too_late(ids):
    model = ml.GPT(tiny_config(tie_weights=True)).freeze()
    logits = model(ids)
    model.unfreeze()
    with pytest.raises(RuntimeError, match=r"TiedHead\(8, 11\) was frozen in forward"):
        model.backward(logits)


def test_sampling_follows_the_probabilities(tiny_gpt):
    randomise(tiny_gpt)
    z = tiny_gpt(np.array([[1, 2]]))[0, -1] / 0.7
    expected = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    many = np.tile([1, 2], (20_000, 1))
    token = next(sample_tokens(tiny_gpt, many, 1, temperature=0.7, rng=0))
    observed = np.bincount(token[:, 0], minlength=11) / len(many)
    np.testing.assert_allclose(observed, expected, atol=0.015)
    top = next(sample_tokens(tiny_gpt, many, 1, top_k=3, rng=0))
    assert set(np.unique(top)) == set(np.argsort(z)[-3:])


@pytest.mark.parametrize(
    "arguments, words",
    [({"temperature": -1.0}, "temperature"), ({"temperature": float("inf")}, "finite"),
     ({"temperature": float("nan")}, "temperature"),
     ({"top_k": 0}, "top_k"), ({"max_new_tokens": -1}, "max_new_tokens"),
     ({"ids": np.zeros(0, int)}, "T at least 1"), ({"top_k": 2.5}, "whole number, got 2.5"),
     ({"max_new_tokens": 3.0}, "whole number, got 3.0"), ({"ids": np.zeros(2)}, "integers")],
)
def test_generate_bad_arguments(tiny_gpt, arguments, words):
    defaults = {"ids": np.array([1]), "max_new_tokens": 2}
    with pytest.raises((ValueError, TypeError), match=words):
        ml.generate(tiny_gpt, **(defaults | arguments))


def test_a_classifier_cannot_write(tiny_gpt):
    tiny_gpt.lm_head = ml.Linear(8, 2)
    with pytest.raises(ValueError, match="head has 2 outputs, not one for each of 11 tokens"):
        ml.generate(tiny_gpt, np.array([1, 2]), 3)
    assert tiny_gpt.training


def test_a_tied_head_follows_its_embedding(ids, tmp_path):
    """Whoever replaces wte, or its weight, has not untied the head."""
    def changed(change):
        model = ml.GPT(tiny_config(tie_weights=True), rng=1)
        count = model.num_parameters()
        change(model)
        assert model.num_parameters() == count and model.lm_head.weight is model.wte.weight
        return model

    for change in (
        lambda model: setattr(model, "wte", ml.Embedding(11, 8, rng=5)),
        lambda model: setattr(model.wte, "weight", ml.Parameter(model.wte.weight.data[::-1])),
    ):
        model = changed(change)
        ml.save_checkpoint(model, tmp_path / "m")
        assert np.array_equal(ml.load_checkpoint(tmp_path / "m")(ids), model(ids))
        ml.to_hf_gpt2(model, tmp_path / "hf")
        assert np.array_equal(ml.from_hf_gpt2(tmp_path / "hf")(ids), model(ids))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.lm_head.weight is twin.wte.weight is not model.wte.weight
            assert np.array_equal(twin(ids), model(ids))


def test_the_gradients_of_an_embedding_that_is_saved_whole_and_tied(ids):
    model = ml.GPT(tiny_config(tie_weights=True), dtype=np.float64)
    ml.replace_linear_with_lora(model, 2, 4, "q_proj", modules_to_save="wte", rng=0)
    assert model.lm_head.weight is model.wte.module.weight
    report = ml.gradcheck(randomise(model), ids, max_entries=20)
    assert report.passed and "wte.module.weight" in {e.name for e in report.entries}, report
    ml.remove_lora(model)
    assert model.lm_head.weight is model.wte.weight
    assert not any("lm_head" in name for name in model.state_dict())
