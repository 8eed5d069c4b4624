import numpy as np
import pytest
from conftest import randomise, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora as ml

LAYERS = {
    "Linear": lambda n, m: ml.Linear(n, m, rng=0, dtype=np.float64),
    "Linear without bias": lambda n, m: ml.Linear(n, m, bias=False, rng=0, dtype=np.float64),
    "LayerNorm": lambda n, m: ml.LayerNorm(n, dtype=np.float64),
    "LayerNorm without bias": lambda n, m: ml.LayerNorm(n, bias=False, dtype=np.float64),
    "GELU": lambda n, m: ml.GELU(),
    "Dropout": lambda n, m: ml.Dropout(0.5, rng=0),
    "LoRALayer": lambda n, m: ml.LoRALayer(n, m, 1, 4.0, dtype=np.float64, rng=0),
    "LinearWithLoRA": lambda n, m: ml.LinearWithLoRA(LAYERS["Linear"](n, m), 1, 4.0, rng=0),
    "LinearWithLoRA with dropout": lambda n, m: ml.LinearWithLoRA(
        LAYERS["Linear"](n, m), 1, 4.0, dropout=0.3, rng=0
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@given(st.lists(st.integers(1, 6), min_size=0, max_size=2), st.integers(2, 6), st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_gradients(name, leading, n, m):
    layer = randomise(LAYERS[name](n, m))
    x = np.random.default_rng(3).standard_normal((*leading, n))
    if name.startswith("LayerNorm"):
        layer.eps = 0.1  # rows of two numbers can be all but equal, where differences are coarse
    report = ml.gradcheck(layer, x)
    assert report.passed, f"\n{report}"


def test_embedding_gradients():
    embedding = ml.Embedding(5, 3, dtype=np.float64, rng=0)
    assert ml.gradcheck(embedding, np.array([[0, 1, 1], [4, 1, 0]])).passed


@pytest.mark.parametrize("name", LAYERS)
def test_backward_leaves_dout_and_x_alone_and_accumulates(name, rng):
    layer = randomise(LAYERS[name](4, 4)).eval()
    x, dout = rng.standard_normal((3, 4)), rng.standard_normal((3, 4))
    x_before, dout_before = x.copy(), dout.copy()
    layer(x)
    layer.backward(dout)
    once = {n: p.grad.copy() for n, p in layer.named_parameters() if p.requires_grad}
    layer(x)
    layer.backward(dout)
    assert np.array_equal(x, x_before) and np.array_equal(dout, dout_before)
    for n, p in layer.named_parameters():
        if p.requires_grad:
            np.testing.assert_allclose(p.grad, 2 * once[n])


def test_frozen_linear_keeps_no_input_but_passes_the_gradient_down(rng):
    linear = ml.Linear(3, 2, rng=0).freeze()
    x, dout = rng.standard_normal((4, 3)), rng.standard_normal((4, 2)).astype(np.float32)
    linear(x)
    assert linear._cache == (None, (4, 2)), "only the shape of the output"
    np.testing.assert_allclose(linear.backward(dout), dout @ linear.weight.data.T, rtol=1e-6)
    assert linear.weight.grad is None and linear.bias.grad is None
    linear(x)
    linear.unfreeze()
    with pytest.raises(RuntimeError, match="frozen in forward"):
        linear.backward(dout)


def test_linear_is_x_w_plus_b_and_kaiming_uniform():
    linear = ml.Linear(400, 300, rng=0)
    x = np.ones((2, 400), np.float32)
    np.testing.assert_allclose(linear(x), x @ linear.weight.data + linear.bias.data, rtol=1e-5)
    bound = 400**-0.5
    for p in (linear.weight, linear.bias):
        assert np.abs(p.data).max() <= bound
        assert p.data.std() == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("layer", [
    ml.Linear(3, 3), ml.LayerNorm(3), ml.LoRALayer(3, 3, 1, 1), ml.TiedHead(ml.GPT(tiny_config())),
    ml.LinearWithLoRA(ml.Linear(3, 3), 1, 1), ml.DoRALinear(ml.Linear(3, 3), 1, 1),
], ids=lambda layer: type(layer).__name__)
def test_inputs_of_another_precision_are_converted(rng, layer):
    width = 8 if isinstance(layer, ml.TiedHead) else 3
    y = layer(rng.standard_normal((4, width)))
    assert y.dtype == np.float32
    assert layer.backward(np.ones(y.shape)).dtype == np.float32
    parameters = [layer.weight] if isinstance(layer, ml.TiedHead) else layer.parameters()
    assert all(p.grad.dtype == np.float32 for p in parameters if p.requires_grad)


@pytest.mark.parametrize(
    "layer",
    [ml.Linear(3, 3), ml.LayerNorm(3), ml.LoRALayer(3, 3, 1, 1),
     ml.LinearWithLoRA(ml.Linear(3, 3), 1, 1), ml.DoRALinear(ml.Linear(3, 3), 1, 1)],
    ids=lambda layer: type(layer).__name__,
)
def test_bad_input(layer):
    for x in (np.zeros((2, 4)), np.zeros(()), np.zeros((3, 0))):
        with pytest.raises(ValueError, match=r"expects input of shape \(\.\.\., 3\)"):
            layer(x)
    for x in (np.zeros((2, 3), int), np.zeros((2, 3), complex), np.array([["a", "b", "c"]])):
        with pytest.raises(TypeError, match="floating-point"):
            layer(x)
    for n_rows in (2, 9):
        for shape in ((n_rows, 5), (n_rows + 1, 3), (3,)):
            layer(np.zeros((n_rows, 3)))
            with pytest.raises(ValueError, match=rf"dout of shape \({n_rows}, 3\), got"):
                layer.backward(np.zeros(shape))


@pytest.mark.parametrize("layer", [ml.GELU(), ml.Dropout(0.5)], ids=["GELU", "Dropout"])
def test_layers_without_parameters_keep_the_precision_of_their_input(layer):
    assert layer(np.ones(3, np.float32)).dtype == np.float32
    assert layer.backward(np.ones(3)).dtype == np.float32


@pytest.mark.parametrize("layer", [ml.GELU(), ml.Dropout(0.5)], ids=["GELU", "Dropout"])
def test_bad_input_to_layers_without_parameters(layer):
    with pytest.raises(TypeError, match="floating-point input, got dtype int"):
        layer([1, 2])
    assert layer([1.0, 2.0]).shape == (2,)
    with pytest.raises(ValueError, match=r"dout of shape \(2,\), got \(3,\)"):
        layer.backward(np.zeros(3))


def test_the_error_names_the_layer(tiny_gpt):
    head = ml.TiedHead(tiny_gpt)
    for layer, name in ((tiny_gpt.ln_f, r"LayerNorm\(8"), (head, r"TiedHead\(8, 11")):
        with pytest.raises(ValueError, match=rf"^{name}.*expects input of shape \(\.\.\., 8\)"):
            layer(np.zeros((2, 4)))
        y = layer(np.zeros((2, 8)))
        with pytest.raises(ValueError, match=rf"^{name}.*expects dout of shape"):
            layer.backward(y[:1])


def test_frozen_linear_refuses_a_dout_of_the_wrong_shape():
    linear = ml.Linear(3, 2).freeze()
    linear(np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"dout of shape \(4, 2\), got \(5, 2\)"):
        linear.backward(np.zeros((5, 2)))


def test_defaults_and_seeds():
    assert ml.LayerNorm(3).eps == 1e-5 and ml.LayerNorm(3).bias is not None
    one, two, other = (ml.CausalSelfAttention(4, 2, rng=seed).state_dict() for seed in (1, 1, 2))
    assert len(one) == 8 and all(np.array_equal(one[name], two[name]) for name in one)
    assert not any(np.array_equal(one[name], other[name]) for name in one)


def test_empty_batches_are_fine():
    for layer in (ml.Linear(3, 2), ml.LinearWithLoRA(ml.Linear(3, 2), 1, 1)):
        assert layer(np.zeros((0, 3))).shape == (0, 2)
        assert layer.backward(np.zeros((0, 2))).shape == (0, 3)
    assert ml.LayerNorm(3)(np.zeros((2, 0, 3))).shape == (2, 0, 3)


@pytest.mark.parametrize("bad", [-1, 5])
def test_embedding_refuses_ids_out_of_range(bad):
    with pytest.raises(ValueError, match=rf"id {bad} at \(0, 1\) is not in 0..4"):
        ml.Embedding(5, 3)(np.array([[0, bad]]))
    with pytest.raises(TypeError, match="integers"):
        ml.Embedding(5, 3)(np.array([0.0]))
    embedding = ml.Embedding(5, 3)
    embedding(np.array([0, 1]))
    with pytest.raises(ValueError, match=r"dout of shape \(2, 3\), got \(3, 3\)"):
        embedding.backward(np.zeros((3, 3)))


@pytest.mark.parametrize("make, words", [
    (lambda: ml.Linear(0, 3), "Linear: in_features"), (lambda: ml.Linear(3, 0), "Linear: out_fea"),
    (lambda: ml.Embedding(0, 3), "Embedding: num_embeddings"), (lambda: ml.LayerNorm(0), "LayerNo"),
    (lambda: ml.Embedding(3, 0), "Embedding: embedding_dim must be 1 or more, got 0$"),
    (lambda: ml.CausalSelfAttention(0, 1), "CausalSelfAttention: d_model must be 1 or more, got 0"),
    (lambda: ml.CausalSelfAttention(4, 0), "CausalSelfAttention: n_heads"),
    (lambda: ml.LoRALayer(0, 3, 1, 1), "LoRALayer: in_dim"),
    (lambda: ml.LoRALayer(3, 0, 1, 1), "LoRALayer: out_dim"),
    (lambda: ml.LoRALayer(3, 3, 0, 1), "LoRA: rank"),
])
def test_sizes_below_one(make, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        make()


def test_dropout(rng):
    dropout = ml.Dropout(0.25, rng=0)
    x = np.ones((200, 200), np.float32)
    y = dropout(x)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (y == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert np.array_equal(dropout.backward(x), y), "backward must use the same mask"
    assert not np.array_equal(dropout(x), y), "each forward draws a new mask"
    assert np.array_equal(dropout.eval()(x), x)
    draws = np.random.default_rng(0).random((200, 200), dtype=np.float32)
    assert np.array_equal(y != 0, draws >= 0.25)
    edge = ml.Dropout(draws[0, 0], rng=0)  # drop what is below p
    assert edge(x)[0, 0] == np.float32(1 / (1 - edge.p))
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="0 <= p < 1"):
            ml.Dropout(p)
