import numpy as np
import pytest
from conftest import randomise, tiny_config
from helpers_adapters import base, close, task, updates

import minilora as ml
from minilora.lora.surgery import base_modules
from minilora.nn.validate import CheckpointError


def test_off_one_model_and_onto_another(ids):
    model = task(scaling="alpha/sqrt(r)", targets=["q_proj", "lm_head"])
    adapter = ml.get_adapter(model)
    assert adapter.nbytes == sum(a.nbytes for a in ml.lora_state_dict(model).values())
    other = base()
    before = other.state_dict()
    assert ml.attach(other, adapter) is other
    assert np.array_equal(other(ids), model(ids))
    other.h[0].attn.q_proj.lora.B.data += 1.0
    assert not np.array_equal(adapter.layers["h.0.attn.q_proj"].B, other.h[0].attn.q_proj.lora.B)
    ml.remove_lora(other)
    assert all(np.array_equal(a, before[n]) for n, a in other.state_dict().items())


def test_all_that_is_trained_goes_along(ids):
    """A saved module, a bias that was unfrozen beside LoRA, and one elsewhere."""
    model = task(targets="q_proj", modules_to_save=["lm_head"])
    model.h[0].attn.q_proj.linear.bias.requires_grad = True
    model.h[1].ln_1.bias.requires_grad = True
    randomise(model.lm_head.module)
    for p in (model.h[0].attn.q_proj.linear.bias, model.h[1].ln_1.bias):
        p.data += 0.5
    adapter = ml.get_adapter(model)
    assert set(adapter.saved) == {"lm_head.weight", "h.0.attn.q_proj.bias", "h.1.ln_1.bias"}
    other = base()
    before = other(ids), other.state_dict()
    ml.attach(other, adapter)
    assert np.array_equal(other(ids), model(ids))
    shapes = {n: p.shape for n, p in other.named_parameters() if p.requires_grad}
    assert {n: s for n, s in shapes.items() if "lora" not in n} == {
        "h.0.attn.q_proj.module.linear.bias": (8,), "h.1.ln_1.module.bias": (8,),
        "lm_head.module.weight": (8, 11),
    }
    again = ml.get_adapter(other)
    assert again.saved.keys() == adapter.saved.keys() and again.layers.keys() == {
        "h.0.attn.q_proj", "h.1.attn.q_proj"}
    loss, dlogits = ml.cross_entropy(other(ids), ids)
    other.backward(dlogits)
    assert all(p.grad is not None for p in other.parameters() if p.requires_grad)
    ml.SGD([p for p in other.parameters() if p.requires_grad], 0.1).step()
    ml.remove_lora(other)
    assert np.array_equal(other(ids), before[0])
    assert all(np.array_equal(a, before[1][n]) for n, a in other.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["wrapped", "frozen", "trained", "saved", "merged"])
def test_the_head_of_a_classifier_is_never_lost(ids, tied, how):
    model = base(tie_weights=tied)
    model.lm_head = ml.Linear(8, 2, rng=5)
    options = {"wrapped": {}, "merged": {}, "saved": {"modules_to_save": ["lm_head"]}}
    task(model=model, **options.get(how, {"targets": "q_proj"}))
    if how == "trained":
        model.lm_head.unfreeze()
    if how == "merged":
        ml.merge_lora(model)
    expected = model(ids)
    adapter = ml.get_adapter(model)
    assert adapter.saved["lm_head.weight"].shape == (8, 2)
    other = base(tie_weights=tied)
    plain = other(ids)
    ml.attach(other, adapter)
    assert np.allclose(other(ids), expected, atol=1e-5)
    assert np.array_equal(ml.remove_lora(other)(ids), plain)
    assert isinstance(other.lm_head, ml.TiedHead) == tied
    classifier = base(tie_weights=tied)
    classifier.lm_head = ml.Linear(8, 2, rng=6)
    assert np.allclose(ml.attach(classifier, adapter)(ids), expected, atol=1e-5)


def test_what_does_not_fit_is_listed_and_changes_nothing():
    adapter = ml.get_adapter(task(modules_to_save=["lm_head", "ln_f"]))
    other = base(d_model=12, n_layers=1)
    text = repr(other)
    with pytest.raises(CheckpointError) as error:
        ml.attach(other, adapter)
    for part in ("no linear layer 'h.1.attn.q_proj'", "(12, 12) in the model, (8, 8) in the ad",
                 "lm_head should be a matrix of 12 rows, got (8, 11)",
                 "ln_f.weight is (12,) in the model, (8,) in the adapter"):
        assert part in str(error.value)
    assert repr(other) == text
    assert "lm_head" not in adapter.layers
    odd = ml.Adapter(adapter.layers, {"lm_head.weight": np.ones((8, 2)),
                                      "h.0.ln_1.wieght": np.ones(8), "x.y": np.ones(8)})
    with pytest.raises(CheckpointError, match="no parameter h.0.ln_1.wieght; .* no parameter x.y"):
        ml.attach(base(), odd)
    head = {"lm_head.weight": np.ones((8, 2)), "lm_head.bias": np.ones(3)}
    odd = ml.Adapter(adapter.layers, head)
    with pytest.raises(CheckpointError, match="comes with other parameters"):
        ml.attach(base(), odd)
    for odd, shape in (({"bias": np.ones(2)}, "None"), ({"weight": np.ones(8)}, r"\(8,\)"),
                       ({"weight": np.ones((8, 2, 2))}, r"\(8, 2, 2\)")):
        head = {f"lm_head.{name}": array for name, array in odd.items()}
        with pytest.raises(CheckpointError, match=f"lm_head should be .* 8 rows, got {shape}"):
            ml.attach(base(), ml.Adapter(adapter.layers, head))
    with pytest.raises(TypeError, match="bare Linear"):
        ml.attach(ml.Linear(8, 8), adapter)


@pytest.mark.parametrize("dtypes", [(np.float32, np.float64), (np.float64, np.float32)])
def test_what_is_attached_has_the_precision_of_the_model(dtypes):
    first, second = dtypes
    one = task(model=ml.GPT(tiny_config(), dtype=first), use_dora=True, modules_to_save="ln_f")
    model = ml.attach(ml.GPT(tiny_config(), dtype=second), ml.get_adapter(one))
    assert {p.data.dtype for p in model.parameters()} == {np.dtype(second)}


def test_attaching_twice_gives_the_same_dropout(ids):
    adapter = ml.get_adapter(task(dropout=0.5))
    one, two = (ml.attach(base(), adapter).train()(ids) for _ in range(2))
    assert np.array_equal(one, two) and not np.allclose(one, ml.attach(base(), adapter).eval()(ids))


def test_a_layer_in_two_places_has_one_adapter_in_both():
    shared = ml.Linear(4, 4, rng=0)
    model = ml.replace_linear_with_lora(ml.Sequential(shared, ml.GELU(), shared), 2, 4, rng=0)
    assert set(ml.get_adapter(model).layers) == {"0"}
    setattr(model, "2", shared)
    with pytest.raises(ValueError, match="2 and 0 are one layer of the base"):
        ml.get_adapter(model)


def test_base_modules_see_through_every_wrapper():
    model = task(modules_to_save=["h.1.mlp", "lm_head"])
    names = list(base_modules(model))
    assert names == [name for name, _ in base().named_modules()]


# ---- Combining


def test_the_exact_sum_is_exact(ids):
    one, two = ml.get_adapter(task(1, rank=2)), ml.get_adapter(task(2, ["q_proj", "up_proj"], 3))
    both = ml.weighted_sum([one, two], [0.7, -0.4])
    expected = {name: 0.7 * delta for name, delta in updates(one).items()}
    for name, delta in updates(two).items():
        expected[name] = expected[name] - 0.4 * delta
    close(updates(both), expected)
    assert both.layers["h.0.attn.q_proj"].rank == 5 and both.layers["lm_head"].rank == 2
    assert both.layers["h.0.attn.q_proj"].A.dtype == np.float32
    merged = base()
    for name, delta in expected.items():
        dict(merged.named_modules())[name].weight.data += delta
    assert np.allclose(ml.attach(base(), both)(ids), merged(ids), atol=1e-5)


def test_the_factor_wise_sum_has_cross_terms():
    one, two = ml.get_adapter(task(1)), ml.get_adapter(task(2))
    got = updates(ml.weighted_sum([one, two], [0.5, 2.0], "linear"))
    expected = {}
    for name in got:
        f, g = one.layers[name], two.layers[name]
        c, d = (0.5 * f.scale) ** 0.5, (2.0 * g.scale) ** 0.5
        expected[name] = (c * c * f.A @ f.B + d * d * g.A @ g.B) + c * d * (f.A @ g.B + g.A @ f.B)
    close(got, expected)
    mixed = ml.weighted_sum([one, two], [0.5, -2.0], "linear").layers["lm_head"]
    f, g = one.layers["lm_head"], two.layers["lm_head"]
    c, d = (0.5 * f.scale) ** 0.5, (2.0 * g.scale) ** 0.5
    np.testing.assert_allclose(mixed.A, c * f.A - d * g.A, rtol=1e-6)
    np.testing.assert_allclose(mixed.B, c * f.B + d * g.B, rtol=1e-6)
    alone = updates(ml.weighted_sum([one], [-0.5], "linear"))
    close(alone, {name: -0.5 * delta for name, delta in updates(one).items()})


@pytest.mark.parametrize("rank", [1, 2, 4, 50])
def test_compression_is_the_best_there_is(rank):
    both = ml.weighted_sum([ml.get_adapter(task(s)) for s in (1, 2)], [1.0, 1.0])
    small, errors = ml.compress(both, rank)
    for name, delta in updates(both).items():
        s = np.linalg.svd(delta, compute_uv=False)
        best = np.sqrt((s[rank:] ** 2).sum()) / np.linalg.norm(s)
        off = np.linalg.norm(small.layers[name].delta_weight() - delta) / np.linalg.norm(delta)
        assert off == pytest.approx(best, abs=1e-6)
        assert errors[name] == pytest.approx(best, abs=1e-6)
        assert small.layers[name].rank == min(rank, 4)


def test_what_a_combination_keeps():
    one = task(1, dropout=0.1, modules_to_save="ln_f")
    one.ln_f.module.bias.data += 1.0
    small, _ = ml.compress(ml.get_adapter(one), 1)
    assert small.dropout == 0.1 and set(small.saved) == {"ln_f.weight", "ln_f.bias"}
    assert np.array_equal(small.saved["ln_f.bias"], one.ln_f.module.bias.data)
    parts = [ml.get_adapter(task(seed, dropout=p)) for seed, p in ((1, 0.1), (2, 0.3), (3, 0.2))]
    both = ml.weighted_sum(parts, [1, 1, 1])
    assert both.dropout == 0.3 and both.saved == {}
    for factors in (*small.layers.values(), *both.layers.values()):
        assert factors.A.dtype == factors.B.dtype == np.float32 and factors.scale == 1.0


def test_extraction_from_two_checkpoints(ids):
    tuned = ml.merge_lora(task(), unload=True)
    adapter, errors = ml.extract_lora(base(), tuned, 2)
    assert max(errors.values()) < 1e-4
    assert np.allclose(ml.attach(base(), adapter)(ids), tuned(ids), atol=1e-5)
    with pytest.warns(UserWarning, match="differ and are not in the adapter"):
        smaller, errors = ml.extract_lora(base(), tuned, 1, ["q_proj", "lm_head"])
    delta = tuned.lm_head.weight.data - base().lm_head.weight.data
    s = np.linalg.svd(delta, compute_uv=False)
    assert errors["lm_head"] == pytest.approx(np.linalg.norm(s[1:]) / np.linalg.norm(s), abs=1e-5)
    same, errors = ml.extract_lora(base(), base(), 1)
    assert set(errors.values()) == {0.0} and not any(d.any() for d in updates(same).values())


def test_extraction_says_what_it_leaves_out():
    tuned = ml.merge_lora(task(targets="q_proj"), unload=True)
    tuned.wte.weight.data += 1.0
    with pytest.warns(UserWarning, match="1 parameters differ and are not in the adapter: wte"):
        ml.extract_lora(base(), tuned, 1, "q_proj")
    tuned, names = base(), ["wte.weight", "h.0.ln_1.bias", "h.0.ln_2.bias", "ln_f.weight"]
    for name, more in (("h.0.attn.k_proj.bias", ""), ("ln_f.bias", ", ...")):
        for changed in (*names, name):
            dict(tuned.named_parameters())[changed].data += 1.0
        with pytest.warns(UserWarning, match=r"wte.weight, .*, ln_f.weight") as found:
            ml.extract_lora(base(), tuned, 1, "q_proj")
        assert str(found[0].message).endswith(f"ln_f.weight{more}")
    with pytest.raises(ValueError, match="two plain models"):
        ml.extract_lora(base(), task(), 1)
    with pytest.raises(ValueError, match="differ in their parameters"):
        ml.extract_lora(base(), base(n_layers=1), 1)
    with pytest.raises(ValueError, match="^extract_lora: rank must be 1 or more"):
        ml.extract_lora(base(), base(), 0)
    odd = base()
    odd.lm_head.weight.data[0, 0] = np.nan
    for models in ((base(), odd), (odd, base())):
        with pytest.raises(ValueError, match="lm_head.weight has nan or inf in one of the models"):
            ml.extract_lora(*models, 1)


def test_what_cannot_be_combined():
    one, two = ml.get_adapter(task(1)), ml.get_adapter(task(2, rank=3))
    dora = ml.get_adapter(task(1, use_dora=True))
    headed = ml.get_adapter(task(1, modules_to_save="lm_head"))
    for call, words in [
        (lambda: ml.weighted_sum([one, two], [1.0]), "2 adapters need as many weights"),
        (lambda: ml.weighted_sum([], []), "0 adapters"),
        (lambda: ml.weighted_sum([one], [float("nan")]), "weights must be finite"),
        (lambda: ml.weighted_sum([one, two], [1, 1], "linear"), "h.0.attn.q_proj: fac"),
        (lambda: ml.weighted_sum([one], [1], "svd"), "must be cat or linear"),
        (lambda: ml.weighted_sum([dora], [1]), "cannot be added up"),
        (lambda: ml.weighted_sum([headed], [1]), "cannot be added up"),
        (lambda: ml.compress(dora, 1), "cannot be compressed"),
        (lambda: ml.compress(one, 0), "^compress: rank must be 1 or more"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_factors_that_do_not_fit_each_other_change_nothing(ids):
    model = task()
    before = model(ids)
    good = ml.get_adapter(model).layers["h.0.attn.q_proj"]
    for bad, words in [
        (ml.Factors(good.A, np.ones((3, 8)), 1), "factors of shapes"),
        (ml.Factors(good.A, good.B, 1, magnitude=np.ones(1)), "magnitude of shape"),
        (ml.Factors(good.A, np.full((2, 8), 1e300), 1), "nan or inf"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            ml.attach(model, ml.Adapter({"h.0.attn.q_proj": bad}))
        assert np.array_equal(model(ids), before)
    with pytest.raises(ValueError, match="different sizes in the adapters"):
        ml.weighted_sum([ml.get_adapter(task()),
                         ml.get_adapter(task(model=base(d_model=12)))], [1, 1])
    with pytest.raises(ValueError, match="nan or inf"):
        ml.compress(ml.Adapter({"x": ml.Factors(np.full((2, 1), np.nan), np.ones((1, 2)), 1)}), 1)
    with pytest.raises(TypeError, match="expected a Module"):
        ml.get_adapter("x")
