"""Every function in `fast` is the function of the same name in `functional`."""

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.nn import fast, functional

SEEDS = st.integers(0, 99)
SIZES = st.integers(1, 40)
LEADING = st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple)


def arrays(seed, dtype, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def flat(result):
    """Return the arrays of a result of a function, caches left out."""
    return [part for part in (result if isinstance(result, tuple) else (result,))
            if isinstance(part, np.ndarray)]


def agree(name, *arguments):
    """Call both twins; return their results once they agree and nothing given has changed."""
    before = [np.array(a) for a in arguments if isinstance(a, np.ndarray)]
    results = [getattr(module, name)(*arguments) for module in (fast, functional)]
    assert all(np.array_equal(a, b) for a, b in
               zip(before, [a for a in arguments if isinstance(a, np.ndarray)], strict=True))
    for got, expected in zip(*map(flat, results), strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        tolerance = 1e-10 if got.dtype == np.float64 else 2e-5
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=10 * tolerance)
    return results


def test_each_has_a_twin_with_the_same_signature():
    twins = [name for name, f in vars(fast).items()
             if inspect.isfunction(f) and f.__module__ == fast.__name__ and name != "query_blocks"]
    assert len(twins) >= 6
    for name in twins:
        signatures = [inspect.signature(getattr(m, name)) for m in (fast, functional)]
        assert signatures[0] == signatures[1], name


@given(LEADING, SIZES, SIZES, SEEDS, st.sampled_from([np.float32, np.float64]))
@settings(max_examples=60, deadline=None)
def test_products(leading, n, m, seed, dtype):
    x, w, dout = arrays(seed, dtype, (*leading, n), (n, m), (*leading, m))
    agree("matmul", x, w)
    agree("matmul", dout, w.T)
    agree("weight_grad", x, dout)


@given(LEADING, SIZES, SEEDS, st.sampled_from([np.float32, np.float64]))
@settings(max_examples=60, deadline=None)
def test_gelu(leading, width, seed, dtype):
    (x,) = arrays(seed, dtype, (*leading, width))
    agree("gelu", 3 * x)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, fast.BLOCK + 1)])
def test_gelu_of_odd_shapes(rng, shape):
    agree("gelu", rng.standard_normal(shape))


def test_gelu_of_one_number():
    results = fast.gelu(np.array(0.5))
    np.testing.assert_allclose(results, functional.gelu(np.array(0.5)), rtol=1e-12)
    assert [array.shape for array in results] == [(), ()]


@given(LEADING, SIZES, SEEDS, st.booleans(), st.sampled_from([np.float32, np.float64]))
@settings(max_examples=60, deadline=None)
def test_layer_norm(leading, width, seed, has_bias, dtype):
    x, dout, weight, bias = arrays(seed, dtype, (*leading, width), (*leading, width), width, width)
    # eps well above 0: a row of one number has variance 0, where 1/sqrt(eps) would be huge
    results = agree("layer_norm", x, weight, bias if has_bias else None, 0.1)
    grads = [module.layer_norm_backward(dout, result[1], weight)
             for module, result in zip((fast, functional), results, strict=True)]
    tolerance = 1e-9 if dtype is np.float64 else 1e-4
    np.testing.assert_allclose(*grads, rtol=tolerance, atol=tolerance)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3 * fast.QUERY_BLOCK),
       st.integers(1, 9), SEEDS, st.sampled_from([np.float32, np.float64]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_attention(b, h, t, d, seed, dtype, swapped):
    q, k, v, dout = arrays(seed, dtype, *[(b, t, h, d) if swapped else (b, h, t, d)] * 4)
    if swapped:  # as the layer splits its heads
        q, k, v, dout = (a.swapaxes(1, 2) for a in (q, k, v, dout))
    results = agree("causal_attention", q, k, v)
    grads = [module.causal_attention_backward(dout, result[1])
             for module, result in zip((fast, functional), results, strict=True)]
    tolerance = 1e-9 if dtype is np.float64 else 1e-4
    for got, expected in zip(*grads, strict=True):
        assert got.dtype == dtype and got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def test_attention_of_large_scores_does_not_overflow():
    q = np.full((1, 1, fast.QUERY_BLOCK + 3, 2), 40.0, np.float32)
    q[:, :, ::2] *= -1
    agree("causal_attention", q, q, q / 40)
