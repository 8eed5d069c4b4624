import numpy as np
import pytest
from conftest import llama_config, randomise

import minilora as ml
from minilora.data.answers import example, pad
from minilora.nn import large
from minilora.nn.functional import IGNORE_INDEX, causal_attention, causal_mask
from minilora.nn.gradcheck import numerical_gradient
from minilora.nn.large import BlockedHead
from minilora.nn.llama import (
    GroupedQueryAttention,
    LlamaBlock,
    RMSNorm,
    SwiGLU,
    grouped_attention,
    sigmoid,
)
from minilora.nn.rotary import RopeScaling, rope_frequencies, rope_tables, rotate

SCALING = RopeScaling(8.0, 1.0, 4.0, 32)
KINDS = {
    "plain": {}, "tied": {"tie_weights": True}, "one head": {"n_heads": 1, "n_kv_heads": 1},
    "not grouped": {"n_kv_heads": 4}, "one key head": {"n_kv_heads": 1},
    "wide heads": {"head_dim": 6, "tie_weights": True}, "scaled": {"rope_scaling": SCALING},
    "eps": {"rms_norm_eps": 0.1, "rope_theta": 100.0},
}


def llama(dtype=np.float64, **changes):
    return randomise(ml.Llama(llama_config(**changes), dtype=dtype))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(got, expected, tolerance=1e-12):
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-9, atol=tolerance,
                                   err_msg=name)


# ---- Gradients


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(ids, kind):
    model = llama(**KINDS[kind])
    report = ml.gradcheck(model, ids, max_entries=12)
    assert report.passed, f"\n{report}"
    assert len(report.entries) == len(list(model.parameters()))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tie_weights", [False, True])
def test_gradients_with_lora(ids, tie_weights, recompute):
    model = ml.Llama(llama_config(tie_weights=tie_weights), dtype=np.float64)
    randomise(ml.replace_linear_with_lora(model, 2, 4, dropout=0.3, rng=0))
    model.recompute = recompute
    report = ml.gradcheck(model, ids, max_entries=6)
    assert report.passed, f"\n{report}"
    assert len(report.entries) == 2 * (7 * 2 + (not tie_weights))


@pytest.mark.parametrize("layer, width", [
    (lambda: RMSNorm(5, 0.1, np.float64), 5),
    (lambda: GroupedQueryAttention(llama_config(head_dim=6), np.float64), 8),
    (lambda: SwiGLU(llama_config(), np.float64), 8),
    (lambda: LlamaBlock(llama_config(rope_scaling=SCALING), np.float64), 8),
], ids=["RMSNorm", "GroupedQueryAttention", "SwiGLU", "LlamaBlock"])
def test_gradients_of_each_layer_and_of_its_input(rng, layer, width):
    report = ml.gradcheck(randomise(layer()), rng.standard_normal((2, 5, width)))
    assert report.passed and "input" in {e.name for e in report.entries}, f"\n{report}"


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_gradients_of_the_loss_at_some_places(ids, tie_weights, first):
    model = llama(tie_weights=tie_weights)
    targets = np.where(np.random.default_rng(1).random(ids.shape) < 0.4, ids, IGNORE_INDEX)
    given = model.states(ids, first) if first else ids

    def loss():
        return ml.answer_loss(model, given, targets, first)

    model.backward(loss()[1])
    checked = gradients(model)
    below = {name for name, _ in model.named_parameters()
             if name.startswith("model.layers.0.") or "embed" in name and not tie_weights}
    assert checked.keys() == dict(model.named_parameters()).keys() - (below if first else set())
    parameters = dict(model.named_parameters())
    for name, gradient in checked.items():
        indices = [np.unravel_index(np.abs(gradient).argmax(), gradient.shape)]
        (slope,) = numerical_gradient(lambda: loss()[0], parameters[name].data, indices)
        assert gradient[indices[0]] == pytest.approx(slope, rel=1e-6), name


@pytest.mark.parametrize("adapted", [False, True])
def test_running_a_forward_again_changes_no_gradient(ids, adapted):
    """Not even with dropout, and one generator for all layers."""
    def run(recompute):
        model = llama(n_layers=3)
        if adapted:
            randomise(ml.replace_linear_with_lora(model, 2, 4, dropout=0.5, rng=7))
        model.recompute = recompute
        for seed in range(2):  # the second draws other masks
            logits = model((ids + seed) % 11)
            kept = [module._cache for _, module in model.model.layers.named_modules()]
            assert recompute == all(cache is None for cache in kept)
            _, dlogits = ml.cross_entropy(logits, ids)
            model.backward(dlogits)
        return gradients(model) | {"logits": logits}

    same(run(True), run(False), 0.0)


def test_a_forward_is_run_again_in_the_mode_that_it_had(ids):
    def run(recompute):
        model = llama()
        randomise(ml.replace_linear_with_lora(model, 2, 4, dropout=0.5, rng=7))
        model.recompute = recompute
        logits = model(ids)
        model.eval().backward(logits)  # with the masks of the forward, which was in training
        assert not any(module.training for _, module in model.named_modules())
        return gradients(model)

    same(run(True), run(False), 0.0)


def test_a_forward_is_not_run_again_with_other_numbers(ids):
    model = randomise(ml.replace_linear_with_lora(llama(), 2, 4, rng=7))
    model.recompute = True
    logits = model(ids)
    model.model.layers[0].self_attn.q_proj.lora.A.data *= 2.0
    with pytest.raises(RuntimeError, match="of LlamaBlock was changed in place between forward"):
        model.backward(logits)
    states = model.states(ids, 1)
    logits = model(states, None, 1)
    states += 1.0
    with pytest.raises(RuntimeError, match="of LlamaBlock was changed in place between forward"):
        model.backward(logits)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_batch_may_be_empty(recompute):
    model = llama()
    model.recompute = recompute
    logits = model(np.zeros((0, 5), int))
    assert logits.shape == (0, 5, 11) and model.states(np.zeros((0, 5), int), 1).shape[0] == 0
    logits = model(model.states(np.zeros((0, 5), int), 1), None, 1)
    model.backward(logits)
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_evaluation_keeps_everything_for_a_backward_in_evaluation(ids):
    expected, model = llama(), llama().eval()
    model.recompute = True
    for m in (expected, model):
        logits = m(ids)
        assert m.model.layers[0].mlp._cache is not None
        m.backward(logits)
    same(gradients(model), gradients(expected), 0.0)


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_stops_at_the_lowest_trainable_layer(ids, recompute):
    model = llama(n_layers=3).freeze()
    model.model.layers[1].mlp.up_proj.unfreeze()
    model.recompute = recompute
    logits = model(ids)
    calls = []
    for i, layer in enumerate(model.model.layers):
        vars(layer)["backward"] = lambda dout, i=i, b=layer.backward: calls.append(i) or b(dout)
        vars(layer)["forward"] = lambda x, i=i, f=layer.forward: calls.append(f"again {i}") or f(x)
    model.backward(logits)
    assert calls == (["again 2", 2, "again 1", 1] if recompute else [2, 1])
    assert list(gradients(model)) == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("tie_weights", [False, True])
def test_partial_gradients_equal_the_full_ones(ids, tie_weights):
    full = llama(tie_weights=tie_weights)
    dlogits = ml.cross_entropy(full(ids), ids)[1]
    full.backward(dlogits)
    expected = gradients(full)
    for name, parameter in full.named_parameters():
        full.freeze()
        parameter.requires_grad = True
        full(ids)
        full.backward(dlogits)
        same(gradients(full), {name: expected[name]})


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_stays_through_training(ids, dtype, adapted):
    model = ml.Llama(llama_config(rope_scaling=SCALING, tie_weights=adapted), dtype=dtype)
    if adapted:
        ml.replace_linear_with_lora(model, 2, 4, dropout=0.1, rng=0)
    where = ids > 4
    logits = model.forward(ids, where)
    arrays = [logits]
    for _, module in model.named_modules():
        waiting = list(module._cache or ())
        while waiting:
            thing = waiting.pop()
            waiting += thing if isinstance(thing, tuple) else []
            arrays += [thing] if isinstance(thing, np.ndarray) and thing.dtype.kind == "f" else []
    assert len(arrays) > 40
    _, dlogits = ml.cross_entropy(logits, ids[where])
    seen = {}
    for name, module in model.named_modules():
        if name and type(module).backward is not ml.Module.backward:
            def backward(dout, name=name, b=module.backward):
                seen[name] = b(dout)
                return seen[name]
            vars(module)["backward"] = backward
    model.backward(dlogits)
    assert len(seen) > 20
    arrays += [*gradients(model).values(), *(a for a in seen.values() if a is not None)]
    assert {array.dtype for array in arrays} == {np.dtype(dtype)}


# ---- The whole and its parts


@pytest.mark.parametrize("tie_weights", [False, True])
def test_logits_at_some_places_and_from_a_layer_on(ids, tie_weights):
    model = llama(n_layers=3, tie_weights=tie_weights)
    whole, where = model(ids), ids % 3 == 0
    np.testing.assert_allclose(model.forward(ids, where), whole[where], rtol=1e-12)
    for first in range(1, 4):
        states = model.states(ids, first)
        np.testing.assert_array_equal(model.forward(states, None, first), whole)
        np.testing.assert_allclose(model.forward(states, where, first), whole[where], rtol=1e-12)
    np.testing.assert_array_equal(model.states(ids, 0), model.model.embed_tokens(ids))
    assert model.forward(ids, np.zeros(ids.shape, bool)).shape == (0, 11)


def test_states_leave_nothing_for_a_backward(ids):
    model = llama()
    model.states(ids, 2)
    assert all(module._cache is None for _, module in model.model.layers.named_modules())


def test_no_position_sees_the_future_so_padding_changes_nothing(ids):
    model = llama()
    logits = model(ids)
    for end in range(1, 6):
        padded = ids.copy()
        padded[:, end:] = 0
        np.testing.assert_array_equal(model(padded)[:, :end], logits[:, :end])
        np.testing.assert_allclose(model(ids[:, :end]), logits[:, :end], rtol=1e-10)
    changed = ids.copy()
    changed[:, 0] = (changed[:, 0] + 1) % 11
    assert (np.abs(model(changed) - logits).max(axis=-1) > 1e-6).all(), "every position sees it"


def test_rows_of_a_padded_batch_have_the_gradients_that_they_have_alone(rng):
    pairs = [example(rng.integers(0, 11, p), rng.integers(0, 11, a))
             for p, a in ((1, 1), (2, 4), (3, 2))]
    together, alone = llama(), llama()
    together.backward(ml.answer_loss(together, *pad(pairs))[1])
    total = sum((t != IGNORE_INDEX).sum() for _, t in pairs)
    for ids, targets in pairs:
        _, dlogits = ml.answer_loss(alone, ids[None], targets[None])
        alone.backward(dlogits * (len(dlogits) / total))
    same(gradients(together), gradients(alone))


def test_only_distances_between_positions_count(rng):
    q, k = rng.standard_normal((2, 3, 4, 6))
    frequencies = rope_frequencies(6, 100.0, SCALING)

    def scores(shift):
        cos, sin = rope_tables(np.arange(4) + shift, frequencies, np.float64)
        return rotate(q, cos, sin) @ rotate(k, cos, sin).swapaxes(-1, -2)

    np.testing.assert_allclose(scores(1000), scores(0), rtol=1e-9, atol=1e-9)
    assert not np.allclose(scores(0), q @ k.swapaxes(-1, -2))


def test_rotations_are_orthogonal(rng):
    x, y = rng.standard_normal((2, 3, 5, 8))
    cos, sin = rope_tables(np.arange(5), rope_frequencies(8), np.float64)
    np.testing.assert_allclose(rotate(rotate(x, cos, sin), cos, -sin), x, atol=1e-14)
    np.testing.assert_allclose((rotate(x, cos, sin) * rotate(y, cos, sin)).sum(-1), (x * y).sum(-1))
    np.testing.assert_allclose((rotate(x, cos, sin) * y).sum(), (x * rotate(y, cos, -sin)).sum())
    np.testing.assert_array_equal(rotate(x, cos, sin)[:, 0], x[:, 0])


def test_a_pair_of_channels_is_turned_by_position_times_frequency():
    x = np.zeros((7, 8))
    x[:, 1] = 1.0  # the pair is 1 and 1 + 4
    turned = rotate(x, *rope_tables(np.arange(7), rope_frequencies(8, 50.0), np.float64))
    angle = np.arange(7) * 50.0 ** (-2 / 8)
    np.testing.assert_allclose(turned[:, 1], np.cos(angle))
    np.testing.assert_allclose(turned[:, 5], np.sin(angle), atol=1e-15)
    assert not turned[:, [0, 2, 3, 4, 6, 7]].any()


def test_llama_3_slows_down_what_turns_slowly():
    plain, scaled = rope_frequencies(64, 5e5), rope_frequencies(64, 5e5, SCALING)
    turns = 32 * plain / (2 * np.pi)
    ratio = scaled / plain
    np.testing.assert_allclose(ratio[turns >= 4.0], 1.0)
    np.testing.assert_allclose(ratio[turns <= 1.0], 1 / 8)
    between = (turns > 1.0) & (turns < 4.0)
    share = (turns[between] - 1.0) / 3.0
    np.testing.assert_allclose(ratio[between], share + (1 - share) / 8)
    assert between.any() and (turns >= 4.0).any() and (turns <= 1.0).any()


def test_rms_norm(rng):
    x = rng.standard_normal((2, 3, 6))
    norm = randomise(RMSNorm(6, 0.25, np.float64))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.25) * norm.weight.data
    np.testing.assert_allclose(norm(x), expected, rtol=1e-14)
    exact = RMSNorm(6, 0.0, np.float64)
    np.testing.assert_allclose(exact(x), exact(1000 * x), rtol=1e-12)
    np.testing.assert_allclose((exact(x) ** 2).mean(-1), 1.0)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_grouped_attention_is_attention_with_repeated_keys_and_values(rng, key_heads):
    q = rng.standard_normal((2, 4, 5, 6))
    k, v = rng.standard_normal((2, 2, key_heads, 5, 6))
    repeated = [np.repeat(a, 4 // key_heads, axis=1) for a in (k, v)]
    expected, _ = causal_attention(q, *repeated)
    got, _ = grouped_attention(q, k, v, causal_mask(5, np.float64))
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_grouped_attention_with_a_mask_for_each_row(rng):
    """Queries at the last 2 of 5 positions, as when a text is continued."""
    q, k, v = (rng.standard_normal((3, h, 5, 6)) for h in (4, 2, 2))
    whole, _ = grouped_attention(q, k, v, causal_mask(5, np.float64))
    mask = np.broadcast_to(causal_mask(5, np.float64)[3:], (3, 1, 1, 2, 5))
    last, _ = grouped_attention(q[:, :, 3:], k, v, mask)
    np.testing.assert_allclose(last, whole[:, :, 3:], rtol=1e-12)


def test_extreme_gates_overflow_nowhere():
    x = np.array([-1e4, -100.0, 0.0, 100.0, 1e4], np.float32)
    np.testing.assert_allclose(sigmoid(x), [0, 0, 0.5, 1, 1], atol=1e-30)
    assert sigmoid(x).dtype == np.float32


# ---- The head


@pytest.mark.parametrize("words", [11, large.HEAD_BLOCK - 1, 2 * large.HEAD_BLOCK + 3])
def test_a_head_in_blocks_is_a_tied_head(rng, words):
    class Owner(ml.Module):
        def __init__(self):
            self.wte = ml.Embedding(words, 4, np.float64, 0)

    owner = Owner().freeze()
    x, dout = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 3, words))
    tied, blocked = ml.TiedHead(owner), BlockedHead(owner)
    np.testing.assert_allclose(blocked(x), tied(x), rtol=1e-12)
    np.testing.assert_allclose(blocked.backward(dout), tied.backward(dout), atol=1e-9)
    owner.unfreeze()
    for head in (tied, blocked):
        owner.zero_grad()
        np.testing.assert_allclose(head(x), x @ owner.wte.weight.data.T, rtol=1e-12)
        np.testing.assert_allclose(head.backward(dout), dout @ owner.wte.weight.data, atol=1e-9)
        np.testing.assert_allclose(owner.wte.weight.grad, np.einsum("btv,btc->vc", dout, x),
                                   atol=1e-12)
    with pytest.raises(ValueError, match=r"BlockedHead\(4, \d+\) expects input of shape"):
        owner.freeze()
        blocked(x[..., :3])
    blocked(x)
    with pytest.raises(ValueError, match="expects dout of shape"):
        blocked.backward(dout[:, :2])


def test_a_frozen_head_keeps_no_matrix(rng):
    model = llama(tie_weights=True).freeze()
    x = rng.standard_normal((2, 3, 8))
    model.lm_head(x)
    assert not any(isinstance(kept, np.ndarray) for kept in model.lm_head._cache)
    model.unfreeze()
    with pytest.raises(RuntimeError, match="frozen in forward"):
        model.backward(model.lm_head.backward(np.zeros((2, 3, 11))))


def test_tied_weights_are_one_parameter():
    model, untied = llama(tie_weights=True), llama()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == untied.num_parameters() - 8 * 11
    names = [name for name, _ in ml.replace_linear_with_lora(model, 2, 4).named_parameters()]
    assert not any("lm_head" in name for name in names)


def test_initial_values_are_those_of_transformers():
    model = ml.Llama(llama_config(vocab_size=500, d_model=64, d_ff=100))
    for name, p in model.named_parameters():
        if p.data.ndim == 1:
            assert (p.data == 1.0).all(), name
        else:
            assert p.data.std() == pytest.approx(0.02, rel=0.05), name
    assert np.array_equal(model.lm_head.weight.data, ml.Llama(model.config, 0).lm_head.weight.data)
    assert not np.allclose(model.lm_head.weight.data, ml.Llama(model.config, 1).lm_head.weight.data)


# ---- Bad input


@pytest.mark.parametrize("ids, error, words", [
    (np.zeros((1, 7), int), ValueError, "time from 1 to 6"),
    (np.zeros((1, 0), int), ValueError, "time from 1 to 6"),
    (np.zeros(3, int), ValueError, r"\(batch, time\)"),
    (np.zeros((1, 2, 3), int), ValueError, r"\(batch, time\)"),
    (np.full((1, 2), 11), ValueError, "id 11 at"), (np.full((1, 2), -1), ValueError, "id -1 at"),
    (np.zeros((1, 2)), TypeError, "integers"),
])
def test_bad_ids(ids, error, words):
    for call in (llama(), lambda ids: llama().states(ids, 1)):
        with pytest.raises(error, match=words):
            call(ids)


def test_bad_shapes(ids):
    model = llama()
    model(ids)
    with pytest.raises(ValueError, match=r"expects dout of shape \(3, 6, 11\), got"):
        model.backward(np.zeros((3, 6, 10)))
    with pytest.raises(RuntimeError, match="backward needs a forward just before it"):
        model.backward(np.zeros((3, 6, 11)))


@pytest.mark.parametrize("arguments, words", [
    ((np.zeros((3, 6, 7)), None, 1), r"states must have shape \(B, T, 8\), got \(3, 6, 7\)"),
    ((np.zeros((6, 8)), None, 1), r"states must have shape \(B, T, 8\), got \(6, 8\)"),
    ((np.zeros((3, 0, 8)), None, 1), r"states must have shape"),
    ((np.zeros((3, 6, 8)), None, 9), "so none can be layer 9"),
    ((np.zeros((3, 6, 8)), None, -1), "so none can be layer -1"),
    ((np.zeros((3, 6), int), np.ones((3, 5), bool)), r"shape \(3, 6\), got bool \(3, 5"),
    ((np.zeros((3, 6), int), np.ones((3, 6), int)), r"booleans of shape \(3, 6\), got int64"),
])
def test_bad_parts_of_a_model(arguments, words):
    with pytest.raises(ValueError, match=words):
        llama().forward(*arguments)


def test_unfreezing_a_quantised_model_changes_nothing():
    model = ml.quantize(llama().freeze(), "int8")
    with pytest.raises(TypeError, match="cannot be trained: dequantize"):
        model.unfreeze()
    assert not model.is_trainable()


@pytest.mark.parametrize("change, words", [
    ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads"), ({"head_dim": 3}, "head_dim be even"),
    ({"d_model": 4}, "head_dim be even, got 2, 4 and 1"), ({"head_dim": -2}, "head_dim must be 1"),
    ({"d_model": 2}, "head_dim must be 1 or more, got 0"), ({"n_layers": 0}, "n_layers must be 1"),
    ({"d_ff": 2.0}, "d_ff must be a whole number, got 2.0"), ({"vocab_size": True}, "vocab_size"),
    ({"context_length": "x"}, "context_length must be a whole number, got 'x'"),
    ({"tie_weights": None}, "tie_weights must be True"), ({"n_heads": 0}, "n_heads must be 1"),
    ({"rms_norm_eps": 0}, "rms_norm_eps must be between 0 and 1, got 0"),
    ({"rms_norm_eps": float("nan")}, "got nan"), ({"rms_norm_eps": "x"}, "be a number, got 'x'"),
    ({"rope_theta": 1.0}, r"rope_theta must be between 1 and 1e\+30, got 1"),
    ({"rope_theta": 10**400}, "rope_theta must be between"), ({"rope_theta": True}, "be a number"),
    ({"rope_scaling": {"factor": 8.0}}, "rope_scaling must be a RopeScaling, got {'factor'"),
])
def test_bad_configurations(change, words):
    with pytest.raises((ValueError, TypeError), match=words) as error:
        llama_config(**change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, words", [
    ({"factor": 0.0}, "factor must be between 0"), ({"factor": "8"}, "be a number, got '8'"),
    ({"factor": 10**400}, "factor must be"), ({"high_freq_factor": float("inf")}, "high_freq"),
    ({"low_freq_factor": 4.0}, "low_freq_factor must be below high_freq_factor, got 4.0 and 4.0"),
    ({"original_context_length": 1.5}, "whole number"),
    ({"original_context_length": 0}, "1 or more"),
    ({"original_context_length": 10**400}, "original_context_length must be between"),
])
def test_bad_scalings(change, words):
    with pytest.raises((ValueError, TypeError), match=words):
        RopeScaling(**(vars(SCALING) | change))


def test_numpy_numbers_become_python_s_so_that_a_config_can_be_stored():
    sizes = map(np.int64, (11, 8, 12, 2, 4, 2, 6, 2))
    scaling = RopeScaling(np.float32(8), np.int64(1), 4, np.int32(32))
    config = ml.LlamaConfig(*sizes, rope_theta=np.float32(500), rms_norm_eps=np.float64(0.1),
                            rope_scaling=scaling)
    kinds = [type(value) for value in [*vars(config).values(), *vars(scaling).values()]]
    assert kinds == [int] * 8 + [bool, float, RopeScaling, float] + [float] * 3 + [int]
    assert config == llama_config(rope_theta=500.0, rms_norm_eps=0.1, rope_scaling=SCALING)
