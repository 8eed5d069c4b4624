import warnings

import numpy as np
import pytest
from conftest import randomise, tiny_config

import minilora as ml
from minilora.lora.scaling import lora_scale
from minilora.lora.surgery import inside, lora_layers


def train_steps(model, ids, steps=3, lr=0.05):
    optimizer = ml.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        _, dlogits = ml.cross_entropy(model(ids), ids)
        model.backward(dlogits)
        optimizer.step()
        optimizer.zero_grad()


def adapted(rank=2, alpha=4, dtype=np.float32, **options):
    return ml.replace_linear_with_lora(
        ml.GPT(tiny_config(), dtype=dtype), rank, alpha, rng=0, **options
    )


# The layer


@pytest.mark.parametrize("scaling, scale", [("alpha", 16), ("alpha/r", 4), ("alpha/sqrt(r)", 8)])
def test_forward_and_the_three_scalings(rng, scaling, scale):
    lora = randomise(ml.LoRALayer(6, 5, 4, 16, scaling=scaling, dtype=np.float64))
    x = rng.standard_normal((2, 3, 6))
    assert lora.scale == scale and isinstance(lora.scale, float)
    np.testing.assert_allclose(lora(x), scale * (x @ lora.A.data @ lora.B.data))
    np.testing.assert_allclose(lora(x), x @ lora.delta_weight())


def test_the_seed_decides_a_and_dropout():
    x = np.ones((4, 6), np.float32)

    def output(seed):
        layer = ml.LinearWithLoRA(ml.Linear(6, 5, rng=0), 2, 4, dropout=0.5, rng=seed)
        layer.lora.B.data[...] = 1.0
        return layer(x)

    assert np.array_equal(output(1), output(1)) and not np.allclose(output(1), output(2))
    assert lora_scale(4, 16) == 4.0, "alpha/r by default"


def test_initial_values():
    lora = ml.LoRALayer(768, 64, 16, 16, rng=0)
    assert lora.A.shape == (768, 16) and lora.B.shape == (16, 64) and not lora.B.data.any()
    bound = 768**-0.5
    assert 0.99 * bound < np.abs(lora.A.data).max() <= bound


@pytest.mark.parametrize("n_rows", [2, 40])
def test_gradients_are_the_full_gradient_seen_through_the_factors(rng, n_rows):
    """dA = scale dW Bᵀ and dB = scale Aᵀ dW, with dW the gradient of full fine-tuning."""
    linear = ml.Linear(6, 5, rng=0, dtype=np.float64)
    x, dout = rng.standard_normal((n_rows, 6)), rng.standard_normal((n_rows, 5))
    linear(x)
    dx_full = linear.backward(dout)
    dw = linear.weight.grad
    layer = ml.LinearWithLoRA(linear, 2, 6, rng=0)
    a, b = layer.lora.A, layer.lora.B
    layer(x)
    np.testing.assert_allclose(layer.backward(dout), dx_full)
    assert not a.grad.any(), "with B = 0 the gradient of A is zero at the first step"
    randomise(layer.lora)
    layer.zero_grad()
    layer(x)
    dx = layer.backward(dout)
    np.testing.assert_allclose(a.grad, 3.0 * dw @ b.data.T, atol=1e-12)
    np.testing.assert_allclose(b.grad, 3.0 * a.data.T @ dw, atol=1e-12)
    np.testing.assert_allclose(dx, dout @ (linear.weight.data + layer.lora.delta_weight()).T)
    assert linear.weight.grad is None and linear.bias.grad is None


def test_unfrozen_base_under_lora_gets_its_gradient_too(rng):
    layer = randomise(ml.LinearWithLoRA(ml.Linear(6, 5, rng=0, dtype=np.float64), 2, 6, rng=0))
    layer.unfreeze()
    report = ml.gradcheck(layer, rng.standard_normal((40, 6)))
    assert report.passed and len(report.entries) == 5, f"\n{report}"


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_below_one(rank):
    with pytest.raises(ValueError, match=f"rank must be 1 or more, got {rank}"):
        ml.LoRALayer(4, 3, rank, 1)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"rank": 2.0}, TypeError, "rank must be a whole number, got 2.0"),
        ({"rank": True}, TypeError, "rank"),
        ({"rank": "8"}, TypeError, "rank"),
        ({"alpha": float("nan")}, ValueError, "alpha must be finite"),
        ({"alpha": "16"}, TypeError, "alpha must be a number"),
        ({"scaling": "alpha*r"}, ValueError, "scaling must be one of alpha, alpha/r"),
        ({"in_dim": 0}, ValueError, "in_dim must be 1 or more, got 0"),
        ({"dtype": np.float16}, TypeError, "float32 or float64"),
    ],
)
def test_bad_hyperparameters(arguments, error, words):
    defaults = {"in_dim": 4, "out_dim": 3, "rank": 2, "alpha": 4}
    with pytest.raises(error, match=words):
        ml.LoRALayer(**(defaults | arguments))


def test_a_rank_that_is_too_large_is_warned_of():
    with pytest.warns(UserWarning, match=r"rank 12 is above min\(in, out\) = 8"):
        ml.replace_linear_with_lora(ml.GPT(tiny_config()), 12, 9)
    with pytest.warns(UserWarning, match="rank 9"):
        ml.replace_linear_with_lora(ml.GPT(tiny_config()), 9, 9)
    model = ml.GPT(tiny_config())
    model.lm_head = ml.Linear(8, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ml.replace_linear_with_lora(model, 4, 4)  # only the two-class head is that narrow
        ml.replace_linear_with_lora(ml.GPT(tiny_config()), 8, 8)


def test_a_call_for_another_adapter_says_which_stays():
    model = adapted(2, 4, target_modules="h.0.attn.q_proj")
    ml.replace_linear_with_lora(model, 3, 9, "h.0.attn.v_proj")
    kept = "has an adapter already, of rank 2 and alpha 4, and keeps it"
    for targets, text in (("h.0.attn.q_proj", f"h.0.attn.q_proj {kept}"),
                          ("h.0.attn.[qv]_proj", f"h.0.attn.q_proj (and 1 more) {kept}")):
        with pytest.warns(UserWarning) as found:
            ml.replace_linear_with_lora(model, 5, 1, targets)
        assert str(found[0].message).startswith(text)


def test_warnings_point_at_the_call():
    model, tuned = adapted(target_modules="q_proj"), ml.GPT(tiny_config(), rng=1)
    for call in (lambda: ml.replace_linear_with_lora(ml.GPT(tiny_config()), 12, 9),
                 lambda: ml.replace_linear_with_lora(model, 3, 9, "q_proj"),
                 lambda: ml.extract_lora(ml.GPT(tiny_config()), tuned, 1, "q_proj")):
        with pytest.warns(UserWarning) as found:
            call()
        assert [warning.filename for warning in found] == [__file__]


# Replacing


def test_wrapping_freezes_the_linear_in_any_order(ids):
    linear = ml.Linear(4, 3)
    assert ml.LinearWithLoRA(linear, 2, 4).linear is linear
    assert not linear.weight.requires_grad and not linear.bias.requires_grad
    with pytest.raises(TypeError, match="wraps a Linear, got GELU"):
        ml.LinearWithLoRA(ml.GELU(), 2, 4)


def test_replace_wraps_every_linear_and_freezes_the_rest():
    model = ml.GPT(tiny_config())
    assert ml.replace_linear_with_lora(model, 2, 4) is model
    assert len(list(lora_layers(model))) == 2 * 6 + 1
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith((".lora.A", ".lora.B")) for name in trainable)
    # q, k, v, o: 8 to 8; up and down: 8 to 32 and back; head: 8 to 11
    expected = 2 * (2 * (4 * (8 + 8) + 2 * (8 + 32)) + (8 + 11))
    assert model.num_parameters(trainable_only=True) == expected


def test_replacing_drops_the_gradients_of_the_base(ids):
    model = ml.GPT(tiny_config())
    model.backward(model(ids))
    ml.replace_linear_with_lora(model, 2, 4)
    assert all(p.grad is None for p in model.parameters())


def test_zero_b_leaves_the_output_bit_identical(ids, rng):
    for batch in (ids, rng.integers(0, 11, (40, 6))):
        model = ml.GPT(tiny_config())
        before = model(batch)
        ml.replace_linear_with_lora(model, 2, 4)
        assert np.array_equal(model(batch), before)


def test_a_second_call_changes_nothing():
    model = adapted()
    before, text = model.state_dict(), repr(model)
    ml.replace_linear_with_lora(model, 2, 4, rng=5)
    ml.replace_linear_with_lora(model, 2, 4, target_modules=["q_proj"], rng=5)
    assert repr(model) == text
    assert all(np.array_equal(before[name], array) for name, array in model.state_dict().items())
    assert all(layer.lora.A.requires_grad for _, layer in lora_layers(model))


@pytest.mark.parametrize("other", [dict(rank=3), dict(alpha=9), dict(use_dora=True),
                                   dict(scaling="alpha")])
def test_a_second_call_that_asks_for_something_else_warns(other):
    model = adapted()
    text = repr(model)
    with pytest.warns(UserWarning, match=r"h.0.attn.q_proj \(and 12 more\) has an adapter already, "
                                         "of rank 2 and alpha 4, and keeps it: call remove_lora"):
        ml.replace_linear_with_lora(model, **{"rank": 2, "alpha": 4} | other)
    assert repr(model) == text


def test_a_second_call_freezes_a_base_that_was_unfrozen():
    model = adapted().unfreeze()
    ml.replace_linear_with_lora(model, 2, 4)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(
        ml.lora_state_dict(model))


def test_a_second_call_checks_its_arguments():
    model = adapted()
    for options, words in (({"rank": 0}, "rank"), ({"alpha": np.inf}, "alpha"),
                           ({"scaling": "r"}, "scaling"), ({"dropout": 1.0}, "dropout")):
        with pytest.raises(ValueError, match=words):
            ml.replace_linear_with_lora(model, **({"rank": 2, "alpha": 4} | options))


def test_the_task_of_a_layer_by_itself():
    layer = ml.LinearWithLoRA(ml.Linear(3, 3), 1, 1)
    assert set(ml.lora_state_dict(layer)) == {"lora.A", "lora.B"}


def test_what_is_inside_of_what():
    assert inside("h.0", ["h.1", "h.0"]) and inside("h.0.mlp", ["h.0"]) and inside("h", [""])
    assert not inside("h.01", ["h.0"]) and not inside("h", ["h.0"]) and not inside("h", [])


def test_a_second_call_can_add_other_layers():
    model = ml.replace_linear_with_lora(ml.GPT(tiny_config()), 2, 4, target_modules="q_proj")
    ml.replace_linear_with_lora(model, 1, 4, target_modules="v_proj")
    assert {n.rpartition(".")[2]: m.lora.rank for n, m in lora_layers(model)} == {
        "q_proj": 2, "v_proj": 1,
    }
    assert all(layer.lora.A.requires_grad for _, layer in lora_layers(model))


@pytest.mark.parametrize(
    "targets, count",
    [
        (["q_proj", "v_proj"], 4), ("lm_head", 1), ("h.0.*", 6), ("h.*.attn.?_proj", 8),
        ("attn.q_proj", 2), ("h.1.mlp.up_proj", 1), (["*_proj"], 12), (("q_proj", "q_proj"), 2),
    ],
)
def test_targets(targets, count):
    assert len(list(lora_layers(adapted(target_modules=targets)))) == count


@pytest.mark.parametrize(
    "targets, words",
    [
        (["q_proj", "v_porj"], "'v_porj' fits no Linear layer; did you mean 'v_proj'.*up_proj"),
        ("ln_1", "'ln_1' fits no Linear"),
        ("proj", "'proj' fits no Linear"),
        ("h.0", "'h.0' fits no Linear"),
        ([], "the list is empty: name a Linear layer"),
    ],
)
def test_targets_that_match_nothing_change_nothing(targets, words):
    model = ml.GPT(tiny_config())
    with pytest.raises(ValueError, match=words):
        ml.replace_linear_with_lora(model, 2, 4, target_modules=targets)
    assert all(p.requires_grad for p in model.parameters()) and not list(lora_layers(model))


def test_models_that_cannot_be_adapted():
    with pytest.raises(TypeError, match="bare Linear .* use LinearWithLoRA$"):
        ml.replace_linear_with_lora(ml.Linear(3, 3), 2, 4)
    with pytest.raises(ValueError, match="no Linear layer"):
        ml.replace_linear_with_lora(ml.Sequential(ml.GELU()), 2, 4)
    with pytest.raises(TypeError, match="expected a Module to adapt, got str"):
        ml.replace_linear_with_lora("model", 2, 4)
    model = ml.GPT(tiny_config())
    for targets in (3, ["q_proj", 3]):
        with pytest.raises(TypeError, match="must be a str, got 3"):
            ml.replace_linear_with_lora(model, 2, 4, targets)
    with pytest.raises(ValueError, match="rank must be 1"):
        ml.replace_linear_with_lora(model, 0, 4)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_of_one_s_own(rng):
    class Net(ml.Module):
        def __init__(self):
            self.first, self.second = ml.Linear(4, 5, rng=0), ml.Linear(5, 2, rng=1)

        def forward(self, x):
            return self.second(self.first(x))

        def backward(self, dout):
            return self.first.backward(self.second.backward(dout))

    net = ml.replace_linear_with_lora(Net().astype(np.float64), 1, 2, ["first"])
    assert isinstance(net.first, ml.LinearWithLoRA) and isinstance(net.second, ml.Linear)
    assert ml.gradcheck(randomise(net), rng.standard_normal((3, 4))).passed


# The four promises


def test_base_weights_are_untouched_by_training(ids):
    model = ml.GPT(tiny_config())
    before = model.state_dict()
    ml.replace_linear_with_lora(model, 2, 4, rng=0)
    loss_before = ml.cross_entropy(model(ids), ids)[0]
    train_steps(model, ids)
    assert ml.cross_entropy(model(ids), ids)[0] < loss_before
    for name, array in model.state_dict().items():
        if ".lora." not in name:
            assert np.array_equal(array, before[name.replace(".linear.", ".")]), name
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_task_is_a_and_b_only(ids):
    model = adapted()
    train_steps(model, ids)
    task = ml.lora_state_dict(model)
    assert sum(a.size for a in task.values()) == model.num_parameters(trainable_only=True)
    with_task = model(ids)
    other = adapted()
    other.load_state_dict(task, strict=False)
    assert np.array_equal(other(ids), with_task)
    task["lm_head.lora.A"] += 1
    assert np.array_equal(model(ids), with_task), "the state dict must be a copy"


def test_remove_gives_the_base_back_bit_for_bit(ids):
    model = ml.GPT(tiny_config())
    before, logits = model.state_dict(), model(ids)
    ml.replace_linear_with_lora(model, 2, 4)
    train_steps(model, ids)
    ml.merge_lora(model)
    assert ml.remove_lora(model) is model
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], before[name]) for name in before)
    assert np.array_equal(model(ids), logits)
    with pytest.raises(ValueError, match="no LoRA layers"):
        ml.remove_lora(model)


# Merging


def test_merging_keeps_the_output_and_unmerging_restores_every_bit(ids):
    model = randomise(adapted(dtype=np.float64), 0.1)
    before, state = model(ids), model.state_dict()
    ml.merge_lora(model)
    assert all(layer.merged for _, layer in lora_layers(model))
    np.testing.assert_allclose(model(ids), before, atol=1e-12)
    ml.unmerge_lora(model)
    assert all(np.array_equal(state[name], array) for name, array in model.state_dict().items())
    np.testing.assert_array_equal(model(ids), before)


def test_merging_in_float32_is_good_to_a_millionth(ids):
    model = adapted()
    train_steps(model, ids)
    before = model(ids)
    np.testing.assert_allclose(ml.merge_lora(model)(ids), before, atol=1e-6)


def test_merging_twice_or_training_while_merged_is_an_error(ids):
    model = adapted()
    with pytest.raises(RuntimeError, match="not merged"):
        ml.unmerge_lora(model)
    ml.merge_lora(model)
    weight = model.lm_head.linear.weight.data.copy()
    with pytest.raises(RuntimeError, match="merged already"):
        ml.merge_lora(model)
    with pytest.raises(RuntimeError, match="merged already"):
        model.lm_head.merge()
    assert np.array_equal(model.lm_head.linear.weight.data, weight)
    logits = model(ids)
    with pytest.raises(RuntimeError, match="unmerge it before training"):
        model.backward(logits)
    with pytest.raises(RuntimeError, match="not merged"):
        ml.unmerge_lora(model).lm_head.unmerge()


def test_merging_does_not_write_to_the_base(tmp_path, ids):
    model = randomise(adapted(), 0.1)
    state, bases = model.state_dict(), [layer.linear.weight for _, layer in lora_layers(model)]
    ml.merge_lora(model)
    assert all(np.array_equal(state[name], array) for name, array in model.state_dict().items())
    layers = [layer for _, layer in lora_layers(model)]
    assert all(layer.linear.weight is base for layer, base in zip(layers, bases, strict=True))
    ml.save_adapter(model, tmp_path)
    again = ml.load_adapter(ml.remove_lora(model), tmp_path)
    assert all(np.array_equal(state[name], array) for name, array in again.state_dict().items())


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_task_that_changes_while_merged_is_noticed(ids, use_dora):
    model = randomise(adapted(use_dora=use_dora), 0.1)
    other = randomise(adapted(use_dora=use_dora), 0.1, seed=9)
    task = ml.lora_state_dict(other)
    layer = model.lm_head
    for change in (
        lambda: model.astype(np.float64),
        lambda: setattr(layer.task_parameters()[-1], "data", layer.task_parameters()[-1].data + 1),
        lambda: setattr(layer.linear, "weight", ml.Parameter(layer.linear.weight.data)),
    ):
        ml.merge_lora(model)
        model(ids)
        change()
        with pytest.raises(RuntimeError, match="was changed while it was merged"):
            model(ids)
        ml.unmerge_lora(model)
        assert np.isfinite(model(ids)).all()
    ml.merge_lora(model)
    before = model(ids), model.state_dict()
    for state in (task, before[1]):
        with pytest.raises(ValueError, match="is read-only: unmerge_lora first"):
            model.load_state_dict(state, strict=False)
    for p in (*layer.task_parameters(), layer.linear.weight):
        with pytest.raises(ValueError, match="read-only"):
            p.data[0] = 1.0
    assert np.array_equal(model(ids), before[0])
    ml.unmerge_lora(model).load_state_dict(task, strict=False)
    assert all(p.data.flags.writeable for p in model.parameters())


def test_what_a_layer_becomes_is_frozen_and_shares_the_bias():
    layer = randomise(ml.LinearWithLoRA(ml.Linear(3, 2), 2, 4))
    linear = layer.to_linear()
    assert [p.requires_grad for p in linear.parameters()] == [False, False]
    assert linear.bias is layer.linear.bias and linear.weight is not layer.linear.weight


def test_a_frozen_layer_that_is_merged_passes_gradients_down_and_errors_name_it():
    layer = ml.LinearWithLoRA(ml.Linear(3, 2), 2, 4)
    x, dout = np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)
    randomise(layer).freeze().merge()
    layer(x)
    np.testing.assert_allclose(layer.backward(dout), dout @ layer.to_linear().weight.data.T)
    layer.unmerge()
    title = r"^LinearWithLoRA around Linear\(in_features=3, out_features=2\)"
    with pytest.raises(RuntimeError, match=f"{title} is not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match=f"{title} is merged already"):
        layer.merge()


def test_merging_for_good_leaves_a_plain_model(tmp_path, ids):
    model = randomise(adapted(dtype=np.float64), 0.1)
    before = model(ids)
    ml.merge_lora(model, unload=True)
    assert not list(lora_layers(model))
    np.testing.assert_allclose(model(ids), before, atol=1e-12)
    ml.save_checkpoint(model, tmp_path / "merged")
    again = ml.load_checkpoint(tmp_path / "merged", np.float64)
    np.testing.assert_array_equal(again(ids), model(ids))


@pytest.mark.parametrize("frozen", [False, True])
def test_merging_between_forward_and_backward_is_noticed(rng, frozen):
    layer = randomise(ml.LinearWithLoRA(ml.Linear(6, 5, rng=0), 2, 4, rng=0))
    if frozen:
        layer.freeze()
    x, dout = rng.standard_normal((2, 6)), np.ones((2, 5))
    layer(x)
    layer.merge()
    words = "needs a forward" if frozen else "unmerge it before training"
    with pytest.raises(RuntimeError, match=words):
        layer.backward(dout)
    layer(x)
    layer.unmerge()
    with pytest.raises(RuntimeError, match="needs a forward"):
        layer.backward(dout)


@pytest.mark.parametrize("n_rows", [2, 40])
def test_unfreezing_between_forward_and_backward_is_noticed(rng, n_rows):
    layer = ml.LinearWithLoRA(ml.Linear(6, 5, rng=0), 2, 4, rng=0)
    layer(rng.standard_normal((n_rows, 6)))
    layer.unfreeze()
    with pytest.raises(RuntimeError, match="frozen in forward"):
        layer.backward(np.ones((n_rows, 5)))


def test_a_linear_at_two_places_gets_one_lora_layer(rng):
    shared = ml.Linear(4, 4, rng=0)
    before = shared.weight.data.copy()
    model = ml.replace_linear_with_lora(ml.Sequential(shared, ml.GELU(), shared), 2, 4, rng=0)
    assert model[0] is model[2] and len(list(lora_layers(model))) == 1
    layer = model[0]
    ml.replace_linear_with_lora(model, 2, 4, rng=0)  # again, and by the other name
    ml.replace_linear_with_lora(model, 2, 4, "2", rng=0)
    assert model[0] is model[2] is layer
    x = rng.standard_normal((3, 4))
    randomise(model[0].lora)
    y = model(x)
    np.testing.assert_allclose(ml.merge_lora(model)(x), y, rtol=1e-5, atol=1e-6)
    ml.remove_lora(model)
    assert model[0] is model[2] is shared and np.array_equal(shared.weight.data, before)


def test_a_weight_in_two_layers_comes_back_bit_for_bit():
    model = ml.Sequential(ml.Linear(4, 4, rng=0), ml.Linear(4, 4, rng=1))
    model[1].weight = model[0].weight
    before, x = model[0].weight.data.copy(), np.ones((3, 4), np.float32)
    randomise(ml.replace_linear_with_lora(model, 2, 4, rng=0)[0].lora)
    randomise(model[1].lora)
    y = model(x)
    np.testing.assert_allclose(ml.merge_lora(model)(x), y, rtol=1e-5, atol=1e-5)
    ml.unmerge_lora(model)
    for first, second in ((0, 1), (1, 0)):
        model[first].merge()
        model[second].merge()
        ml.unmerge_lora(model)
        assert np.array_equal(model[0].linear.weight.data, before)
    assert model[0].linear.weight is model[1].linear.weight


def test_a_subclass_of_linear_keeps_its_forward(rng):
    class Twice(ml.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = ml.Sequential(Twice(4, 4, rng=0))
    x = rng.standard_normal((50, 4))
    before = model(x)
    assert np.array_equal(ml.replace_linear_with_lora(model, 2, 4)(x), before)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_stays_in_its_mode(training):
    model = ml.GPT(tiny_config()).train(training)
    ml.replace_linear_with_lora(model, 2, 4, dropout=0.5, modules_to_save="ln_f")
    assert all(module.training is training for _, module in model.named_modules())


def test_bad_dropout_changes_nothing():
    model = ml.GPT(tiny_config())
    with pytest.raises(ValueError, match="dropout needs"):
        ml.replace_linear_with_lora(model, 2, 4, dropout=1.5)
    assert all(p.requires_grad for p in model.parameters())


def test_the_same_call_again_leaves_what_was_unfrozen():
    model = adapted(target_modules="q_proj")
    model.lm_head.unfreeze()
    ml.replace_linear_with_lora(model, 2, 4, target_modules="q_proj")
    assert model.lm_head.weight.requires_grad


def test_unloading_what_is_merged_already(ids):
    model = ml.merge_lora(randomise(adapted(), 0.1))
    before = model(ids)
    ml.merge_lora(model, unload=True)
    assert not list(lora_layers(model)) and np.array_equal(model(ids), before)
    bare = ml.LinearWithLoRA(ml.Linear(3, 3), 1, 1)
    for change in (lambda: ml.merge_lora(bare, unload=True), lambda: ml.remove_lora(bare)):
        with pytest.raises(TypeError, match="use its .linear"):
            change()
    assert not bare.merged


def test_a_half_merged_model_is_left_alone():
    model = adapted()
    model.h[0].attn.q_proj.merge()
    for change in (ml.merge_lora, ml.unmerge_lora):
        with pytest.raises(RuntimeError):
            change(model)
    assert sum(layer.merged for _, layer in lora_layers(model)) == 1
    with pytest.raises(ValueError, match="no LoRA layers"):
        ml.merge_lora(ml.GPT(tiny_config()))


def test_dropout_works_on_the_lora_branch_only(rng):
    linear = ml.Linear(6, 5, rng=0)
    x = rng.standard_normal((40, 6)).astype(np.float32)
    base = linear(x)
    layer = ml.LinearWithLoRA(linear, 2, 4, dropout=0.5, rng=0)
    assert np.array_equal(layer(x), base)
    randomise(layer.lora)
    assert not np.array_equal(layer(x), layer(x))
    layer.eval()
    np.testing.assert_allclose(layer(x), base + layer.lora(x), rtol=1e-5, atol=1e-6)


def test_the_gradient_goes_through_dropout(rng):
    linear = ml.Linear(6, 5, rng=0, dtype=np.float64)
    layer = randomise(ml.LinearWithLoRA(linear, 2, 4, dropout=0.5, rng=0))
    report = ml.gradcheck(layer, rng.standard_normal((4, 6)))
    assert report.passed, report


def test_a_saved_module_is_trained_and_the_base_keeps_its_own(ids):
    model = ml.GPT(tiny_config())
    head = model.lm_head.weight.data.copy()
    expected = model(ids)
    ml.replace_linear_with_lora(model, 2, 4, modules_to_save=["lm_head", "ln_f"], rng=0)
    assert np.array_equal(model(ids), expected)
    names = set(ml.lora_state_dict(model))
    assert {"lm_head.module.weight", "ln_f.module.weight", "ln_f.module.bias"} < names
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("lm_head.lora") for name in names)
    loss, dlogits = ml.cross_entropy(model(ids), ids)
    model.backward(dlogits)
    ml.SGD([p for p in model.parameters() if p.requires_grad], 0.5).step()
    assert not np.allclose(model(ids), expected)
    assert np.array_equal(model.lm_head.original.weight.data, head)
    tree = list(dict(model.named_modules()))
    ml.replace_linear_with_lora(model, 2, 4, modules_to_save="lm_head")
    assert list(dict(model.named_modules())) == tree
    trained = model(ids)
    task = ml.lora_state_dict(model)
    assert np.array_equal(ml.remove_lora(model)(ids), expected)
    assert isinstance(model.lm_head, ml.Linear)
    ml.replace_linear_with_lora(model, 2, 4, modules_to_save=["lm_head", "ln_f"])
    model.load_state_dict(task, strict=False)
    assert np.array_equal(model(ids), trained)
    ml.merge_lora(model, unload=True)
    assert np.allclose(model(ids), trained, atol=1e-5)
    assert not any("module" in name for name, _ in model.named_parameters())


def test_saved_modules_that_cannot_be(tiny_gpt):
    with pytest.raises(ValueError, match="'lm_haed' fits no module.*mean 'lm_head'"):
        ml.replace_linear_with_lora(tiny_gpt, 2, 4, modules_to_save="lm_haed")
    tied = ml.GPT(tiny_config(tie_weights=True))
    with pytest.raises(ValueError, match="lm_head is a tied head and has no matrix of its own"):
        ml.replace_linear_with_lora(tied, 2, 4, modules_to_save="lm_head")
    ml.replace_linear_with_lora(tiny_gpt, 2, 4, "q_proj")
    with pytest.raises(ValueError, match="h.0.attn has LoRA layers"):
        ml.replace_linear_with_lora(tiny_gpt, 2, 4, "up_proj", modules_to_save=["h.0.attn"])
    with pytest.raises(TypeError, match="needs a Module, got NoneType"):
        ml.ModuleToSave(None)
    with pytest.raises(TypeError, match="bare ModuleToSave"):
        ml.remove_lora(ml.ModuleToSave(ml.Linear(2, 2)))


def test_a_module_saved_whole_hides_what_is_in_it(tiny_gpt):
    ml.replace_linear_with_lora(tiny_gpt, 2, 4, modules_to_save=["h.0", "*.mlp"])
    assert isinstance(tiny_gpt.h[0], ml.ModuleToSave)
    assert isinstance(tiny_gpt.h[1].mlp, ml.ModuleToSave)
    assert {n for n, _ in lora_layers(tiny_gpt)} == {
        *(f"h.1.attn.{x}_proj" for x in "qkvo"), "lm_head"
    }
    with pytest.raises(ValueError, match="'h.0.mlp' fits no module"):
        ml.replace_linear_with_lora(tiny_gpt, 2, 4, modules_to_save="h.0.mlp")
    with pytest.raises(ValueError, match="'h.0.mlp.up_proj' fits no Linear"):
        ml.replace_linear_with_lora(tiny_gpt, 2, 4, "h.0.mlp.up_proj")


def test_a_linear_that_keeps_its_output_is_not_written_to(rng):
    class Tanh(ml.Linear):
        def forward(self, x):
            self._out = np.tanh(super().forward(x))
            return self._out

        def backward(self, dout):
            return super().backward(dout * (1 - self._out**2))

        _out = None

    layer = ml.LinearWithLoRA(Tanh(4, 4, dtype=np.float64, rng=0), 2, 4, rng=0)
    report = ml.gradcheck(randomise(layer), rng.standard_normal((3, 4)))
    assert report.passed, report


def test_globs_of_modules_to_save_pass_over_a_tied_head():
    model = ml.GPT(tiny_config(tie_weights=True))
    ml.replace_linear_with_lora(model, 2, 4, "q_proj", modules_to_save="l*")
    assert isinstance(model.ln_f, ml.ModuleToSave) and isinstance(model.lm_head, ml.TiedHead)
    with pytest.raises(TypeError, match="needs a Module, got str"):
        ml.ModuleToSave(ml.Linear(2, 2), "x")
