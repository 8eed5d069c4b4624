import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.nn import fast
from minilora.nn import functional as F
from minilora.nn.gradcheck import numerical_gradient

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


def slopes(f, x, dout):
    indices = list(np.ndindex(x.shape))
    return numerical_gradient(lambda: float((f(x) * dout).sum()), x, indices).reshape(x.shape)


def test_gelu_values():
    # By hand from the definition, x/2 (1 + tanh(sqrt(2/pi)(x + 0.044715 x^3))).
    x = np.array([-3.0, -1.0, 0.0, 0.5, 2.0])
    expected = [v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x]
    np.testing.assert_allclose(F.gelu(x)[0], expected, rtol=1e-14)


@pytest.mark.parametrize("gelu", [F.gelu, fast.gelu], ids=["functional", "fast"])
def test_gelu_far_out_is_exact_and_silent(gelu):
    x = np.array([-1e30, -1e19, -1e4, -60.0, 60.0, 1e4, 1e19, 1e30], dtype=np.float32)
    y, slope = gelu(x)
    assert y.tolist() == [0.0] * 4 + x[4:].tolist() and slope.tolist() == [0.0] * 4 + [1.0] * 4


@given(SHAPES, st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_gradients_of_pure_functions(shape, seed):
    rng = np.random.default_rng(seed)
    x, dout = 2 * rng.standard_normal(shape), rng.standard_normal(shape)
    expected = slopes(lambda x: F.gelu(x)[0], x, dout)
    np.testing.assert_allclose(dout * F.gelu(x)[1], expected, atol=1e-8)
    dx = F.softmax_backward(dout, F.softmax(x))
    np.testing.assert_allclose(dx, slopes(F.softmax, x, dout), atol=1e-8)
    weight, bias = rng.standard_normal(shape[-1]), rng.standard_normal(shape[-1])
    # eps well above 0: a row of one number has variance 0, where 1/sqrt(eps) would be huge
    _, cache = F.layer_norm(x, weight, bias, 0.1)
    expected = slopes(lambda x: F.layer_norm(x, weight, bias, 0.1)[0], x, dout)
    np.testing.assert_allclose(F.layer_norm_backward(dout, cache, weight), expected, atol=1e-7)


def test_layer_norm_matches_its_definition(rng):
    x, w, b = rng.standard_normal((3, 700, 96)), rng.standard_normal(96), rng.standard_normal(96)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w + b
    np.testing.assert_allclose(F.layer_norm(x, w, b)[0], expected, atol=1e-12)


def test_softmax_does_not_overflow():
    p = F.softmax(np.array([[1e4, 1e4, -1e4], [-1e5, -1e5, -1e6]], dtype=np.float32))
    assert p.tolist() == [[0.5, 0.5, 0.0]] * 2


def test_cross_entropy_against_its_definition(rng):
    logits, targets = rng.standard_normal((2, 3, 5)), rng.integers(0, 5, (2, 3))
    p = F.softmax(logits)
    expected = np.mean([-math.log(p[i, j, targets[i, j]]) for i in range(2) for j in range(3)])
    loss, dlogits = F.cross_entropy(logits, targets)
    assert isinstance(loss, float) and loss == pytest.approx(expected, rel=1e-14)
    indices = list(np.ndindex(logits.shape))
    numeric = numerical_gradient(lambda: F.cross_entropy(logits, targets)[0], logits, indices)
    np.testing.assert_allclose(dlogits.ravel(), numeric, atol=1e-9)


def test_cross_entropy_ignores_what_it_is_told_to(rng):
    logits, targets = rng.standard_normal((6, 5)), rng.integers(0, 5, 6)
    masked = targets.copy()
    masked[[1, 4]] = -100
    kept = [0, 2, 3, 5]
    loss, dlogits = F.cross_entropy(logits, masked)
    expected, dkept = F.cross_entropy(logits[kept], targets[kept])
    assert loss == pytest.approx(expected, rel=1e-14)
    np.testing.assert_allclose(dlogits[kept], dkept)
    assert not dlogits[[1, 4]].any()
    assert F.cross_entropy(logits, np.where(masked < 0, 2, masked), ignore_index=2)[0] > 0


def test_cross_entropy_of_a_certain_mistake_is_finite():
    loss, dlogits = F.cross_entropy(np.array([[0.0, 1000.0]], np.float32), np.array([0]))
    assert loss == 1000.0 and dlogits.tolist() == [[-1.0, 1.0]]


def test_cross_entropy_of_rows_that_are_far_apart():
    logits = np.array([[0.0, 1000.0], [-1e5, -1e5]], np.float32)
    loss, dlogits = F.cross_entropy(logits, np.array([1, 0]))
    assert loss == pytest.approx(math.log(2) / 2)
    assert dlogits.tolist() == [[0.0, 0.0], [-0.25, 0.25]]


def test_cross_entropy_of_one_row():
    loss, dlogits = F.cross_entropy(np.zeros(4), np.array(2))
    assert loss == pytest.approx(math.log(4)) and dlogits.tolist() == [0.25, 0.25, -0.75, 0.25]
    for logits in (np.float64(3.0), np.zeros((2, 0))):
        with pytest.raises(ValueError, match="V at least 1"):
            F.cross_entropy(logits, np.zeros(logits.shape[:-1], int))


@pytest.mark.parametrize(
    "targets, error, words",
    [
        (np.array([0, 5]), ValueError, r"target 5 at \(1,\) is not in 0..4"),
        (np.array([0, -1]), ValueError, r"target -1 at \(1,\)"),
        (np.array([0, 1, 2]), ValueError, r"shape \(2,\)"),
        (np.array([0.0, 1.0]), TypeError, "integers"),
        (np.array([-100, -100]), ValueError, "not ignore_index"),
    ],
)
def test_cross_entropy_bad_targets(targets, error, words):
    with pytest.raises(error, match=words):
        F.cross_entropy(np.zeros((2, 5)), targets)


def test_cross_entropy_of_integers():
    with pytest.raises(TypeError, match="logits must be floating-point"):
        F.cross_entropy(np.zeros((2, 5), int), np.zeros(2, int))


def test_cross_entropy_of_nothing():
    with pytest.raises(ValueError, match="not ignore_index"):
        F.cross_entropy(np.zeros((0, 5)), np.zeros(0, int))


def test_attention_weights_are_causal_and_sum_to_one(rng):
    q, k = rng.standard_normal((2, 2, 4, 9, 5))
    weights = F.attention_weights(q, k)
    np.testing.assert_allclose(weights.sum(-1), 1.0)
    assert not np.triu(weights, k=1).any()


def test_no_score_is_high_enough_to_let_a_position_see_the_future(rng):
    k = np.array([1.0, 1e3, 1e6]).reshape(1, 1, 3, 1)
    q, v = np.ones_like(k), rng.standard_normal((1, 1, 3, 1))
    assert F.attention_weights(q, k).tolist() == [[[[1, 0, 0], [0, 1, 0], [0, 0, 1]]]]
    for module in (F, fast):
        assert np.array_equal(module.causal_attention(q, k, v)[0], v)


def test_attention_gradients(rng):
    tensors = list(rng.standard_normal((3, 1, 2, 4, 3)))
    dout = rng.standard_normal((1, 2, 4, 3))
    gradients = F.causal_attention_backward(dout, F.causal_attention(*tensors)[1])
    for i, gradient in enumerate(gradients):
        def f(x, i=i):
            return F.causal_attention(*tensors[:i], x, *tensors[i + 1 :])[0]

        np.testing.assert_allclose(gradient, slopes(f, tensors[i], dout), atol=1e-8)


@pytest.mark.parametrize("module", [F, fast], ids=["functional", "fast"])
def test_attention_of_one_head_needs_no_batch(rng, module):
    tensors = rng.standard_normal((4, 2, 3, 5, 4))
    q, k, v, dout = tensors[:, 1, 2]
    out, cache = module.causal_attention(q, k, v)
    expected, whole = module.causal_attention(*tensors[:3])
    np.testing.assert_allclose(out, expected[1, 2])
    for got, all_of_them in zip(module.causal_attention_backward(dout, cache),
                                module.causal_attention_backward(tensors[3], whole), strict=True):
        np.testing.assert_allclose(got, all_of_them[1, 2], atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtypes_stay(rng, dtype):
    x = rng.standard_normal((2, 3, 4)).astype(dtype)
    w = np.ones(4, dtype)
    q = rng.standard_normal((1, 2, 5, 4)).astype(dtype)
    out, cache = F.causal_attention(q, q, q)
    norm, norm_cache = F.layer_norm(x, w, w)
    results = [
        *F.gelu(x), F.softmax(x), F.softmax_backward(x, x), norm,
        F.layer_norm_backward(x, norm_cache, w), F.attention_weights(q, q), out,
        *F.causal_attention_backward(q, cache), F.cross_entropy(x, np.zeros((2, 3), int))[1],
    ]
    assert {array.dtype for array in results} == {np.dtype(dtype)}
