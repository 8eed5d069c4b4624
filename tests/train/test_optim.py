import copy
import math

import numpy as np
import pytest

import minilora as ml


def parameter(values, grad=None):
    p = ml.Parameter(np.array(values, dtype=np.float64))
    p.grad = None if grad is None else np.array(grad, dtype=np.float64)
    return p


def test_adamw_first_steps_by_hand():
    p = parameter([1.0, -2.0], [0.5, -4.0])
    optimizer = ml.AdamW([p], lr=0.1, weight_decay=0.5, eps=0.0)
    optimizer.step()
    # After one step m/(1-b1) = g and v/(1-b2) = g², so the update is lr * sign(g).
    np.testing.assert_allclose(p.data, [1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1], rtol=1e-12)
    p.grad = np.array([1.0, 0.0])
    optimizer.step()
    m = [0.9 * 0.05 + 0.1 * 1.0, 0.9 * -0.4]
    v = [0.999 * 0.00025 + 0.001, 0.999 * 0.016]
    update = [0.1 * mi / 0.19 / math.sqrt(vi / 0.001999) for mi, vi in zip(m, v, strict=True)]
    expected = [0.85 * 0.95 - update[0], -1.8 * 0.95 - update[1]]
    np.testing.assert_allclose(p.data, expected, rtol=1e-12)


def test_adamw_counts_the_updates_of_each_parameter_and_adds_eps_to_the_root():
    early, late = parameter([1.0], [2.0]), parameter([1.0])
    optimizer = ml.AdamW([early, late], lr=0.1, eps=3.0, weight_decay=0.0)
    optimizer.step()
    assert early.data[0] == pytest.approx(1.0 - 0.1 * 2.0 / (2.0 + 3.0), rel=1e-12)
    assert late.data[0] == 1.0
    late.grad = np.array([2.0])
    optimizer.step()
    assert late.data[0] == pytest.approx(1.0 - 0.1 * 2.0 / (2.0 + 3.0), rel=1e-12)
    assert early.data[0] == pytest.approx(1.0 - 2 * 0.1 * 2.0 / (2.0 + 3.0), rel=1e-12)


def test_sgd_with_momentum_by_hand():
    p = parameter([1.0], [2.0])
    optimizer = ml.SGD([p], lr=0.1, momentum=0.5, weight_decay=1.0)
    optimizer.step()  # g = 2 + 1, v = 3
    assert p.data[0] == pytest.approx(0.7)
    optimizer.step()  # g = 2 + 0.7, v = 1.5 + 2.7
    assert p.data[0] == pytest.approx(0.7 - 0.42)
    plain = parameter([1.0], [2.0])
    ml.SGD([plain], lr=0.1).step()
    assert plain.data[0] == pytest.approx(0.8)


def test_default_settings():
    p = parameter([1.0])
    assert ml.SGD([p]).param_groups == [
        {"params": [p], "lr": 0.01, "momentum": 0.0, "weight_decay": 0.0}]
    assert ml.AdamW([p]).param_groups == [
        {"params": [p], "lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}]


@pytest.mark.parametrize("kind", [ml.SGD, ml.AdamW])
def test_minimises_a_square(kind):
    p = parameter([3.0, -2.0])
    optimizer = kind([p], lr=0.1)
    for _ in range(200):
        p.grad = 2 * p.data
        optimizer.step()
        optimizer.zero_grad()
    assert p.grad is None and np.abs(p.data).max() < 0.01


@pytest.mark.parametrize("kind", [ml.SGD, ml.AdamW])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (3,), (200, 200)])
def test_any_memory_layout_is_updated(kind, order, shape):
    p = ml.Parameter(np.ones(shape))
    p.data = np.array(p.data, order=order)
    p.accumulate(np.ones(shape))
    assert ml.clip_grad_norm([p], 0.5) == pytest.approx(np.prod(shape) ** 0.5)
    assert np.linalg.norm(p.grad) == pytest.approx(0.5)
    kind([p], lr=0.1).step()
    assert (p.data < 1).all()


def test_nothing_is_allocated_for_the_frozen():
    trained, frozen = parameter([1.0], [1.0]), parameter([1.0] * 100)
    frozen.requires_grad = False
    optimizer = ml.AdamW([trained, frozen])
    assert optimizer.state_bytes == 0
    optimizer.step()
    assert optimizer.state_bytes == 2 * 8 and frozen.data.tolist() == [1.0] * 100


def test_a_copy_goes_on_as_the_original_does():
    p = parameter([1.0, 2.0])
    optimizer = ml.AdamW([p], lr=0.1)

    def train(p, optimizer):
        for _ in range(3):
            p.grad = 3 * p.data
            optimizer.step()

    train(p, optimizer)
    q, twin = copy.deepcopy((p, optimizer))
    train(p, optimizer)
    train(q, twin)
    assert np.array_equal(q.data, p.data) and twin.state_bytes == optimizer.state_bytes


def test_parameter_groups():
    a, b = parameter([1.0], [1.0]), parameter([1.0], [1.0])
    optimizer = ml.AdamW([{"params": [a], "lr": 0.5}, {"params": [b], "weight_decay": 0.0}], lr=0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.1]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0]
    optimizer.step()
    assert a.data[0] == pytest.approx(1 - 0.005 - 0.5) and b.data[0] == pytest.approx(0.9)


@pytest.mark.parametrize(
    "parameters, options, error, words",
    [
        ([], {}, ValueError, "at least one"),
        (ml.Parameter([1]), {}, TypeError, "iterable of Parameters, got one"),
        ([np.zeros(2)], {}, TypeError, "takes Parameters, got ndarray"),
        ([{"params": [], "learning_rate": 1}], {}, ValueError, "unknown settings.*learning_rate"),
        ([ml.Parameter([1])] * 2, {}, ValueError, "twice"),
        ([ml.Parameter([1])], {"lr": -1.0}, ValueError, "lr must be 0 or more"),
        ([ml.Parameter([1])], {"lr": math.nan}, ValueError, "lr must be"),
        ([ml.Parameter([1])], {"weight_decay": -1.0}, ValueError, "weight_decay"),
        ([{"lr": 1.0}], {}, TypeError, 'iterable of "params"'),
        (ml.Linear(2, 2), {}, TypeError, "iterable of Parameters, got one Linear"),
        ([{"params": [ml.Parameter([1])], "betas": (0.9, 1.5)}], {}, ValueError, "got 1.5"),
        ([ml.Parameter([1])], {"eps": -1.0}, ValueError, "eps must be"),
        ([ml.Parameter([1])], {"lr": math.inf}, ValueError, "lr must be"),
        ([ml.Parameter([1])], {"betas": (0.9, 1.0)}, ValueError, "betas"),
    ],
)
def test_bad_arguments(parameters, options, error, words):
    with pytest.raises(error, match=words):
        ml.AdamW(parameters, **options)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan])
def test_bad_momentum(momentum):
    with pytest.raises(ValueError, match="momentum must be 0 or more and less than 1"):
        ml.SGD([ml.Parameter([1])], momentum=momentum)


def test_clipping():
    a, b = parameter([0.0], [3.0]), parameter([0.0], [4.0])
    assert ml.clip_grad_norm([a, b, parameter([0.0])], 10.0) == pytest.approx(5.0)
    assert a.grad[0] == 3.0
    assert ml.clip_grad_norm([a, b], 1.0) == pytest.approx(5.0)
    assert (a.grad[0], b.grad[0]) == pytest.approx((0.6, 0.8))
    a.grad[0] = math.inf
    assert ml.clip_grad_norm([a, b], 1.0) == math.inf and b.grad[0] == pytest.approx(0.8)
    with pytest.raises(ValueError, match="max_norm"):
        ml.clip_grad_norm([a], 0.0)


def test_cosine_schedule():
    at = ml.cosine_schedule(1.0, steps=101, warmup=4, final=0.1)
    assert [at(i) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert at(4) == 1.0 and at(100) == pytest.approx(0.1) and at(500) == pytest.approx(0.1)
    assert at(52) == pytest.approx(0.55)
    assert all(at(i) >= at(i + 1) for i in range(4, 100))
    assert ml.cosine_schedule(1.0, steps=1)(0) == 1.0
    assert ml.cosine_schedule(1.0, steps=2)(1) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="0 <= warmup < steps"):
        ml.cosine_schedule(1.0, steps=5, warmup=5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_clipping_of_very_large_and_very_small_gradients(dtype, scale):
    a, b = ml.Parameter(np.zeros(2, dtype)), ml.Parameter(np.zeros(1, dtype))
    a.grad, b.grad = (np.array(v, dtype) * dtype(scale) for v in ([2.0, 1.0], [2.0]))
    assert ml.clip_grad_norm([a, b], 0.3 * scale) == pytest.approx(3.0 * scale, rel=1e-5)
    np.testing.assert_allclose(a.grad / dtype(scale), [0.2, 0.1], rtol=1e-5)
    np.testing.assert_allclose(b.grad / dtype(scale), [0.2], rtol=1e-5)


def test_clipping_of_gradients_without_a_norm():
    zero, empty = parameter([1.0], [0.0]), ml.Parameter(np.zeros((0, 3)))
    empty.grad = np.zeros((0, 3))
    assert ml.clip_grad_norm([zero, empty], 1.0) == 0.0 and zero.grad.tolist() == [0.0]
    tiny = parameter([1.0, 1.0], [3e-200, 4e-200])
    assert ml.clip_grad_norm([tiny], 1e-200) == pytest.approx(5e-200, rel=1e-12)
    np.testing.assert_allclose(tiny.grad, [0.6e-200, 0.8e-200], rtol=1e-12)


@pytest.mark.parametrize("one", [ml.Parameter([1.0]), ml.Linear(2, 2)])
def test_clipping_takes_an_iterable_of_parameters(one):
    with pytest.raises(TypeError, match="takes an iterable of Parameters, got one"):
        ml.clip_grad_norm(one, 1.0)


@pytest.mark.parametrize("setting, error, words", [
    (dict(betas=0.9), TypeError, r"betas must be two numbers, such as \(0.9, 0.999\), got 0.9"),
    (dict(betas=(0.9,)), TypeError, "betas must be two numbers"),
    (dict(betas=(0.9, "0.99")), TypeError, r"betas\[1\] must be a number, got '0.99'"),
    (dict(betas=(1.0, 0.9)), ValueError, r"betas\[0\] must be 0 or more and less than 1, got 1.0"),
    (dict(lr="0.1"), TypeError, "lr must be a number, got '0.1'"),
    (dict(lr=None), TypeError, "lr must be a number, got None"),
    (dict(lr=np.nan), ValueError, "lr must be 0 or more and finite, got nan"),
    (dict(eps=-1.0), ValueError, "eps must be 0 or more and finite, got -1.0"),
    (dict(weight_decay=True), TypeError, "weight_decay must be a number, got True"),
])
def test_settings_that_are_wrong_are_named(setting, error, words):
    with pytest.raises(error, match=words):
        ml.AdamW([ml.Parameter(np.zeros(2))], **setting)


@pytest.mark.parametrize("make", [
    lambda ps: ml.AdamW([{"params": ps[:1], "lr": 0.1}, {"params": ps[1:]}], betas=(0.8, 0.9)),
    lambda ps: ml.SGD(ps, momentum=0.9, weight_decay=0.1), ml.SGD])
def test_a_state_that_is_put_back_goes_on_in_the_same_bits(make):
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((6, 2, 3)).astype(np.float32)

    def run(parameters, optimizer, steps):
        for g in steps:
            for i, p in enumerate(parameters[:2]):  # the third never has a gradient
                p.grad = g[i]
            optimizer.step()

    def fresh():
        return [ml.Parameter(np.arange(3, dtype=np.float32) + i) for i in range(3)]

    whole = fresh()
    run(whole, make(whole), gradients)
    first = fresh()
    optimizer = make(first)
    run(first, optimizer, gradients[:3])
    state = optimizer.state_dict()
    kept = [np.array(p.data) for p in first]
    run(first, optimizer, gradients[3:])  # the state is a copy
    second = [ml.Parameter(a) for a in kept]
    other = make(second)
    other.load_state_dict(state)
    assert other.state_dict()["param_groups"] == state["param_groups"]
    run(second, other, gradients[3:])
    for p, q, r in zip(whole, first, second, strict=True):
        assert np.array_equal(p.data, q.data) and np.array_equal(p.data, r.data)
    assert set(state["state"]) <= {0, 1}


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    parameters = [ml.Parameter(np.ones(3)), ml.Parameter(np.ones((2, 2)))]
    optimizer = ml.AdamW(parameters)
    for p in parameters:
        p.grad = np.ones(p.shape)
    optimizer.step()
    state = optimizer.state_dict()
    entry = state["state"][0]
    groups = state["param_groups"]
    for wrong, words in (
        (ml.SGD(parameters).state_dict(), "momentum.*; |SGD|here there are 2 parameters"),
        (ml.AdamW(parameters[:1]).state_dict(), "it has 1 parameters .*here there are 2"),
        (state | {"state": {0: entry | {"moments": [np.ones(2)] * 2}}}, r"shapes \[\(2,\)"),
        (state | {"state": {7: entry}}, "not the state of an optimizer: 7"),
        (state | {"param_groups": [groups[0] | {"lr": -1.0}]}, "lr must be 0 or more"),
        ({"state": {}}, "not the state of an optimizer: 'param_groups'"),
        ({"param_groups": [3], "state": {}}, "not the state|not subscriptable"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            optimizer.load_state_dict(wrong)
        now = optimizer.state_dict()
        assert now["param_groups"] == groups
        assert all(np.array_equal(a, b) for i in (0, 1) for a, b in zip(
            now["state"][i]["moments"], state["state"][i]["moments"], strict=True))
