"""What changes between forward and backward is noticed, not computed with."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import randomise, tiny_config

import minilora as ml
from minilora.data.generate import sample_tokens
from minilora.lab.classify import predict
from minilora.nn.validate import last_numbers
from minilora.train.mode import evaluating


@pytest.fixture
def forward(tiny_gpt, ids):
    """A model after its forward, and the gradient for its backward."""
    model = ml.replace_linear_with_lora(tiny_gpt, 2, 4, rng=0)
    _, dlogits = ml.cross_entropy(model(ids), ids)
    return model, dlogits


def by_hand(model, ids):
    model.eval()
    model(ids)
    model.train()


@pytest.mark.parametrize("evaluate", [
    lambda model, ids: ml.evaluate(model, [(ids, ids)]),
    lambda model, ids: ml.evaluate(model, [(ids, ids), (ids, ids)], threads=2),
    lambda model, ids: ml.generate(model, ids, 1),
    lambda model, ids: predict(model, (ids, np.where(np.arange(6) == 5, ids, -100))),
    by_hand,
])
@pytest.mark.parametrize("mode", [True, False])
def test_evaluating_between_forward_and_backward(forward, ids, evaluate, mode):
    model, dlogits = forward
    if evaluate is not by_hand:
        model.train(mode)
        model(ids)
    evaluate(model, ids[::-1])
    with pytest.raises(RuntimeError, match="backward needs a forward|was in evaluation mode"):
        model.backward(dlogits)
    model(ids)
    model.backward(dlogits)


def test_evaluation_restores_the_mode_of_every_module(tiny_gpt, ids):
    tiny_gpt.h[0].eval()
    before = [module.training for _, module in tiny_gpt.named_modules()]
    with pytest.raises(ZeroDivisionError), evaluating(tiny_gpt):
        assert not any(module.training for _, module in tiny_gpt.named_modules())
        raise ZeroDivisionError
    ml.evaluate(tiny_gpt, [(ids, ids)])
    assert [module.training for _, module in tiny_gpt.named_modules()] == before


LAYERS = {
    "Linear": lambda: ml.Linear(4, 4, rng=0), "LoRALayer": lambda: ml.LoRALayer(4, 4, 2, 4, rng=0),
    "LinearWithLoRA": lambda: ml.LinearWithLoRA(ml.Linear(4, 4, rng=0), 2, 4, rng=0),
    "DoRALinear": lambda: ml.DoRALinear(ml.Linear(4, 4, rng=0), 2, 4, rng=0),
}


def test_of_a_large_array_the_last_numbers_are_sampled():
    for shape, count in (((3, 4), 12), ((3000,), 1024), ((3, 2000), 1024), ((2000, 3), 3)):
        array = np.arange(float(np.prod(shape))).reshape(shape)
        sample = last_numbers(array)
        assert np.array_equal(sample.ravel(), array.ravel()[-count:])
        assert np.shares_memory(sample, array)


@pytest.mark.parametrize("size", [3, 3000])
@pytest.mark.parametrize("name", LAYERS)
def test_an_input_that_is_changed_in_place(name, size):
    layer = LAYERS[name]()
    x = np.ones((size, 4), np.float32)
    y = layer(x)
    x *= 2
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        layer.backward(y)


@pytest.mark.parametrize("name", LAYERS)
def test_a_parameter_that_is_changed_in_place(name):
    layer = LAYERS[name]()
    x = np.ones((3, 4), np.float32)
    for which, parameter in layer.named_parameters():
        y = layer(x)
        parameter.data[-1] += 0.5  # one number of a bias, one row of a matrix
        with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
            layer.backward(y)
        layer(x)
        layer.backward(y)
        assert which in dict(layer.named_parameters())


@pytest.mark.parametrize("change", [
    lambda model, ids: ids.__setitem__((0, 0), (ids[0, 0] + 1) % 11),
    lambda model, ids: ml.SGD(model.parameters(), 0.1).step(),
    lambda model, ids: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}),
    lambda model, ids: model.h[1].mlp.up_proj.linear.weight.data.fill(0.0),
])
def test_ids_or_weights_of_a_model_that_are_changed(forward, ids, change):
    model, dlogits = forward
    model.unfreeze()
    ids = ids.copy()
    _, dlogits = ml.cross_entropy(model(ids), ids)
    for parameter in model.parameters():
        parameter.grad = np.ones_like(parameter.data)
    change(model, ids)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        model.backward(dlogits)


def test_numbers_that_are_not_finite_are_no_change(tiny_gpt, ids):
    tiny_gpt.wte.weight.data[:] = np.nan
    with np.errstate(all="ignore"):
        logits = tiny_gpt(ids)
        tiny_gpt.backward(logits)
    assert np.isnan(tiny_gpt.h[0].attn.q_proj.weight.grad).all()


def in_a_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_a_model_that_two_threads_use_at_once(forward, ids):
    model, dlogits = forward
    in_a_thread(lambda: model(ids[::-1]))
    with pytest.raises(RuntimeError, match="its last forward was in another thread, but two"):
        model.backward(dlogits)


def test_two_texts_that_are_written_in_turn(forward, ids):
    model, dlogits = forward
    list(zip(sample_tokens(model, ids, 3), sample_tokens(model, ids, 3), strict=True))
    assert all(module.training for _, module in model.named_modules())
    tokens = sample_tokens(model, ids, 3)
    next(tokens)
    model(ids)
    tokens.close()
    model.backward(dlogits)


def test_tasks_that_are_switched_between_forward_and_backward(ids):
    tasks = ml.AdapterSet(ml.GPT(tiny_config()))
    for name in "ab":
        tasks.add(name, rank=2, alpha=4)
    tasks.set_active("a")
    _, dlogits = ml.cross_entropy(tasks.model(ids), ids)
    tasks.set_active("b")
    tasks.model(ids[::-1])
    tasks.set_active("a")
    with pytest.raises(RuntimeError, match="backward needs a forward just before it"):
        tasks.model.backward(dlogits)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy,
                                    lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_a_merged_layer_is_read_only_too(copied):
    layer = ml.LinearWithLoRA(ml.Linear(3, 3, rng=0), 2, 4, rng=0)
    layer.merge()
    twin, x = copied(layer), np.ones((2, 3), np.float32)
    assert np.array_equal(twin(x), layer(x))
    for name in ("linear.weight", "lora.A", "lora.B"):
        with pytest.raises(ValueError, match="read-only"):
            dict(twin.named_parameters())[name].data[...] = 0
    if copied is not copy.copy:  # which shares them
        twin.unmerge()
        twin.lora.B.data[...] = 1
        assert not np.array_equal(twin(x), layer(x))


def test_the_first_gradient_is_a_copy():
    p, grad = ml.Parameter(np.zeros(3)), np.ones(3)
    p.accumulate(grad)
    p.accumulate(grad)
    assert np.array_equal(grad, np.ones(3)) and np.array_equal(p.grad, [2, 2, 2])
    p.grad, other = None, np.ones(3, np.float32)
    p.accumulate(other)
    assert p.grad.dtype == np.float64 and not np.shares_memory(p.grad, other)


@pytest.mark.parametrize("hidden", [
    lambda m: [[m]], lambda m: ({"a": [m]},), lambda m: {m}, lambda m: {"a": {"b": (m,)}},
    lambda m: {m: 1}, lambda m: frozenset([m]),
])
def test_modules_in_containers_are_noticed_however_deep(hidden):
    class Net(ml.Module):
        def __init__(self):
            self.layers = hidden(ml.Linear(2, 2))

    with pytest.raises(TypeError, match="Net.layers hides modules or parameters in a"):
        Net()


def test_what_is_known_anyway_may_be_in_a_container_too():
    class Net(ml.Module):
        def __init__(self):
            self.fc = ml.Linear(2, 2)
            self.order = [self.fc, {"again": self.fc}]
            self.words = [str(i) for i in range(100_000)]
            self.words.append(self.words)
            self.itself = {}
            self.itself["itself"] = self.itself

    assert [name for name, _ in Net().named_parameters()] == ["fc.weight", "fc.bias"]


def test_modules_in_a_list_that_is_filled_later():
    class Net(ml.Module):
        def __init__(self):
            self.layers = []

    net = Net()
    assert list(net.parameters()) == []
    net.layers.append([ml.Parameter(np.ones(2))])
    for use in (lambda: list(net.parameters()), net.train, net.zero_grad, net.state_dict):
        with pytest.raises(TypeError, match="Net.layers hides modules or parameters in a list"):
            use()


def test_gradcheck_believes_right_gradients_of_narrow_models():
    """Layer norm over two numbers bends so sharply that plain differences are too coarse."""
    for seed in (0, 1, 9):
        rng = np.random.default_rng(seed)
        model = ml.GPT(tiny_config(d_model=2, n_heads=1, vocab_size=5), rng=seed, dtype=np.float64)
        randomise(model, seed=seed)
        report = ml.gradcheck(model, rng.integers(0, 5, (2, 4)))
        assert report.passed, f"seed {seed}\n{report}"


def test_gradcheck_still_notices_wrong_gradients_of_narrow_models():
    model = randomise(ml.GPT(tiny_config(d_model=2, n_heads=1), dtype=np.float64))
    right = model.h[1].mlp.down_proj.backward
    vars(model.h[1].mlp.down_proj)["backward"] = lambda dout: right(1.001 * dout)
    assert not ml.gradcheck(model, np.zeros((2, 4), int)).passed


@pytest.mark.parametrize("call, words", [
    (lambda: ml.replace_linear_with_lora(ml.GPT(tiny_config()), 2, 4, use_dora="no"), "use_dora"),
    (lambda: ml.DoRALinear(ml.Linear(2, 2), 1, 1, detach_norm=0), "detach_norm"),
    (lambda: ml.merge_lora(ml.GPT(tiny_config()), unload="no"), "unload"),
    (lambda: ml.Linear(2, 2, bias="no"), "bias"),
    (lambda: tiny_config(tie_weights="no"), "tie_weights"),
])
def test_a_switch_is_true_or_false(call, words):
    with pytest.raises(TypeError, match=f"{words} must be True or False, got"):
        call()


@pytest.mark.parametrize("alpha", [10**400, float("inf"), np.float32("nan"), -10**400])
def test_alpha_must_be_finite(alpha):
    with pytest.raises(ValueError, match="alpha must be finite"):
        ml.LoRALayer(2, 2, 1, alpha)


def test_a_float16_alpha_loses_no_digits():
    layer = ml.LoRALayer(4, 4, 3, np.float16(16.1))
    assert layer.scale == float(np.float16(16.1)) / 3
