import numpy as np
import pytest
from conftest import randomise, tiny_config

import minilora as ml
from minilora.nn.gradcheck import numerical_gradient


def dora(n_in=5, n_out=4, rank=2, dtype=np.float64, **options):
    linear = ml.Linear(n_in, n_out, dtype=dtype, rng=0)
    layer = ml.DoRALinear(linear, rank, 4, rng=1, **options)
    randomise(layer.lora)
    layer.magnitude.data *= 1.3
    return layer


def test_it_starts_as_the_linear(rng):
    linear = ml.Linear(5, 4, rng=0)
    x = rng.standard_normal((3, 5)).astype(np.float32)
    layer = ml.DoRALinear(linear, 2, 4)
    assert np.allclose(layer(x), linear(x), atol=1e-6)
    assert np.allclose(layer.magnitude.data, np.linalg.norm(linear.weight.data, axis=0))


def test_forward_is_the_equation(rng):
    layer, x = dora(), rng.standard_normal((2, 3, 5))
    v = layer.linear.weight.data + 2 * layer.lora.A.data @ layer.lora.B.data
    weight = layer.magnitude.data * v / np.linalg.norm(v, axis=0)
    assert np.allclose(layer(x), x @ weight + layer.linear.bias.data)
    assert np.allclose(np.linalg.norm(layer.linear.weight.data + layer.delta_weight(), axis=0),
                       layer.magnitude.data)


@pytest.mark.parametrize("n_in, n_out, rank", [(5, 4, 2), (1, 3, 1), (3, 1, 1), (6, 7, 5)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_full_gradient(rng, n_in, n_out, rank, dropout):
    layer = dora(n_in, n_out, rank, detach_norm=False, dropout=dropout)
    report = ml.gradcheck(layer, rng.standard_normal((2, 3, n_in)))
    assert report.passed, report
    assert {"magnitude", "lora.A", "lora.B"} <= {entry.name for entry in report.entries}


def test_the_detached_gradient_is_that_of_a_fixed_norm(rng):
    """Central differences of a forward in which the norm is held where it is."""
    layer, x = dora(), rng.standard_normal((6, 5))
    dout = rng.standard_normal((6, 4))
    w, b = layer.linear.weight.data, layer.linear.bias.data
    a_, b_, m = layer.lora.A.data, layer.lora.B.data, layer.magnitude.data
    norm = np.linalg.norm(w + 2 * a_ @ b_, axis=0)

    def value():
        return ((x @ (m / norm * (w + 2 * a_ @ b_)) + b) * dout).sum()

    layer(x)
    layer.backward(dout)
    for parameter in (layer.lora.A, layer.lora.B, layer.magnitude):
        numeric = numerical_gradient(value, parameter.data, list(np.ndindex(parameter.shape)))
        assert np.allclose(parameter.grad.ravel(), numeric, rtol=1e-6, atol=1e-8)


def test_the_two_gradients_differ_only_along_the_directions(rng):
    x, dout = rng.standard_normal((6, 5)), rng.standard_normal((6, 4))
    grads = []
    for detach in (True, False):
        layer = dora(detach_norm=detach)
        layer(x)
        layer.backward(dout)
        grads.append((layer.lora.B.grad, layer.magnitude.grad))
    assert not np.allclose(grads[0][0], grads[1][0])
    assert np.allclose(grads[0][1], grads[1][1])


def test_frozen_parts_get_no_gradient_and_dropout_is_on_the_update_only(rng):
    layer = ml.DoRALinear(ml.Linear(50, 4, rng=0), 2, 4, dropout=0.5, rng=1)
    x = rng.standard_normal((40, 50)).astype(np.float32)
    assert np.allclose(layer(x), layer.linear(x), atol=1e-5)  # B = 0 and m = ||W||: W' - W = 0
    randomise(layer.lora)
    assert not np.allclose(layer(x), layer(x))
    layer.lora.A.requires_grad = False
    y = layer(x)
    assert layer.backward(np.ones_like(y)).shape == x.shape
    assert layer.lora.A.grad is None and layer.linear.weight.grad is None
    assert layer.lora.B.grad.dtype == layer.magnitude.grad.dtype == np.float32


def test_merging(rng):
    layer, x = dora(), rng.standard_normal((6, 5))
    weight = layer.linear.weight.data.copy()
    y = layer(x)
    layer.merge()
    assert np.allclose(layer(x), y) and np.array_equal(layer.linear.weight.data, weight)
    assert np.allclose(layer.delta_weight(), layer.to_linear().weight.data - weight)
    with pytest.raises(RuntimeError, match="merged: unmerge it"):
        layer.backward(y)
    layer(x)
    layer.unmerge()
    with pytest.raises(RuntimeError, match="needs a forward"):
        layer.backward(y)
    layer.freeze()
    layer(x)
    layer.merge()
    with pytest.raises(RuntimeError, match="needs a forward"):
        layer.backward(y)
    layer(x)
    assert np.allclose(layer.backward(y), y @ layer.to_linear().weight.data.T)
    layer.unmerge()
    assert np.array_equal(layer.linear.weight.data, weight)


def test_a_column_of_zeros_stays_zero_without_a_warning(rng):
    linear = ml.Linear(3, 2, bias=False, rng=0)
    linear.weight.data[:, 0] = 0.0
    layer = ml.DoRALinear(linear, 1, 1)
    x = rng.standard_normal((4, 3)).astype(np.float32)
    y = layer(x)
    assert not y[:, 0].any() and np.isfinite(layer.backward(y)).all()


def test_in_a_whole_model(ids):
    model = ml.GPT(tiny_config())
    expected = model(ids)
    ml.replace_linear_with_lora(model, 2, 4, use_dora=True, rng=0)
    assert isinstance(model.lm_head, ml.DoRALinear)
    assert np.allclose(model(ids), expected, atol=1e-6)
    randomise(model.h[0].attn.q_proj.lora)
    loss, dlogits = ml.cross_entropy(model(ids), ids)
    model.backward(dlogits)
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == np.float32 for g in grads)
    assert "h.0.attn.q_proj.magnitude" in ml.lora_state_dict(model)
    merged = ml.merge_lora(model)(ids)
    assert np.allclose(ml.unmerge_lora(model)(ids), merged, atol=1e-5)
    assert np.array_equal(ml.remove_lora(model)(ids), expected)
