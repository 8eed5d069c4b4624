import copy
import dataclasses
import inspect

import numpy as np
import pytest
from conftest import tiny_config

import minilora as ml


def test_parameter_keeps_float64_and_makes_everything_else_float32():
    assert ml.Parameter(np.zeros(2)).data.dtype == np.float64
    for data in ([1, 2], np.zeros(2, np.float16), np.arange(3), True):
        assert ml.Parameter(data).data.dtype == np.float32


def test_parameter_copies_its_data():
    source = np.zeros(3, np.float32)
    parameter = ml.Parameter(source)
    source += 1
    assert not parameter.data.any()


@pytest.mark.parametrize("data", [np.zeros(2, complex), np.array(["a"]), np.array([None])])
def test_parameter_refuses_what_is_not_real(data):
    with pytest.raises(TypeError, match="real numbers"):
        ml.Parameter(data)


def test_typos_raise():
    linear = ml.Linear(2, 3)
    with pytest.raises(AttributeError):
        linear.weight.gard = None
    with pytest.raises(AttributeError, match="did you mean 'weight'"):
        linear.wieght = linear.weight
    with pytest.raises(AttributeError):
        _ = linear.wieght


def test_a_parameter_or_child_is_replaced_only_by_its_kind(tiny_gpt):
    with pytest.raises(TypeError, match=r"data\[\.\.\.\]"):
        tiny_gpt.wte.weight = np.zeros((11, 8))
    with pytest.raises(TypeError, match="must be a Module"):
        tiny_gpt.lm_head = "head"
    head = ml.Linear(8, 2)
    tiny_gpt.lm_head = head
    assert dict(tiny_gpt.named_children())["lm_head"] is head


def test_names_follow_the_tree(tiny_gpt):
    names = [name for name, _ in tiny_gpt.named_parameters()]
    assert names[:4] == ["wte.weight", "wpe.weight", "h.0.ln_1.weight", "h.0.ln_1.bias"]
    for name in ("h.1.attn.o_proj.bias", "h.0.mlp.up_proj.weight", "ln_f.bias", "lm_head.weight"):
        assert name in names
    modules = dict(tiny_gpt.named_modules())
    assert modules[""] is tiny_gpt
    assert modules["h.1"] is tiny_gpt.h[1] and len(tiny_gpt.h) == 2


def test_a_shared_parameter_is_counted_once():
    linear = ml.Linear(3, 3)
    twice = ml.Sequential(linear, linear)
    assert twice.num_parameters() == 12


def test_num_parameters_and_freezing():
    model = ml.Sequential(ml.Linear(4, 5), ml.GELU(), ml.Linear(5, 2, bias=False))
    assert model.num_parameters() == 4 * 5 + 5 + 5 * 2
    model[0].freeze()
    assert model.num_parameters(trainable_only=True) == 10
    assert model.is_trainable() and not model[0].is_trainable() and not model[1].is_trainable()
    assert model.freeze().num_parameters(trainable_only=True) == 0
    assert model.unfreeze().num_parameters(trainable_only=True) == 35


def test_freezing_drops_gradients(rng):
    linear = ml.Linear(3, 2)
    linear(rng.standard_normal((4, 3)))
    linear.backward(np.ones((4, 2)))
    assert linear.weight.grad is not None
    linear.freeze()
    assert linear.weight.grad is None and linear.bias.grad is None


def test_backward_needs_one_forward_each(rng):
    linear = ml.Linear(3, 2)
    dout = np.ones((4, 2), np.float32)
    with pytest.raises(RuntimeError, match=r"Linear\(in_features=3.*forward"):
        linear.backward(dout)
    linear(rng.standard_normal((4, 3)))
    linear.backward(dout)
    with pytest.raises(RuntimeError, match="once for each forward"):
        linear.backward(dout)


def test_gpt_backward_twice_raises(tiny_gpt, ids):
    logits = tiny_gpt(ids)
    tiny_gpt.backward(logits)
    with pytest.raises(RuntimeError, match="GPT"):
        tiny_gpt.backward(logits)


def test_state_dict_is_a_copy_and_loads_back(tiny_gpt, ids):
    state = tiny_gpt.state_dict()
    other = ml.GPT(tiny_config(), rng=5)
    assert not np.array_equal(other(ids), tiny_gpt(ids))
    other.load_state_dict(state)
    assert np.array_equal(other(ids), tiny_gpt(ids))
    before = tiny_gpt(ids)
    for array in state.values():
        array += 1
    assert np.array_equal(tiny_gpt(ids), before)


def test_load_state_dict_lists_all_faults_and_changes_nothing(tiny_gpt):
    before = tiny_gpt.state_dict()
    state = tiny_gpt.state_dict()
    del state["wte.weight"]
    state["wte.wieght"] = np.zeros((11, 8))
    state["ln_f.bias"] = np.zeros(3)
    with pytest.raises(KeyError) as error:
        tiny_gpt.load_state_dict(state)
    message = error.value.args[0]
    for part in ("missing: wte.weight", "unexpected: wte.wieght", "ln_f.bias", "(8,)", "(3,)"):
        assert part in message
    with pytest.raises(ValueError, match="ln_f.bias"):
        tiny_gpt.load_state_dict(before | {"ln_f.bias": np.zeros(3)})
    with pytest.raises(TypeError, match="ln_f.bias"):
        tiny_gpt.load_state_dict(before | {"ln_f.bias": np.array(["x"] * 8)})
    with pytest.raises(TypeError, match="must be a dict, got list"):
        tiny_gpt.load_state_dict([])
    for name, array in tiny_gpt.state_dict().items():
        assert np.array_equal(array, before[name])


def test_load_state_dict_not_strict_returns_what_it_did_not_use(tiny_gpt):
    keys = tiny_gpt.load_state_dict({"ln_f.bias": np.ones(8), "extra": np.ones(1)}, strict=False)
    assert keys.unexpected == ["extra"] and "wte.weight" in keys.missing
    assert tiny_gpt.ln_f.bias.data.sum() == 8


def test_astype_and_bad_dtypes(tiny_gpt):
    for dtype in (np.float64, np.float32):
        assert all(p.data.dtype == dtype for p in tiny_gpt.astype(dtype).parameters())
    for dtype in (np.float16, np.int32, complex):
        with pytest.raises(TypeError, match="float32 or float64"):
            tiny_gpt.astype(dtype)
        with pytest.raises(TypeError, match="float32 or float64"):
            ml.Linear(2, 2, dtype=dtype)


def test_train_and_eval_reach_every_module(tiny_gpt):
    assert all(module.training is False for _, module in tiny_gpt.eval().named_modules())
    assert all(module.training is True for _, module in tiny_gpt.train().named_modules())


def test_printing_shows_the_tree(tiny_gpt):
    text = repr(tiny_gpt)
    assert "  (wte): Embedding(11, 8)\n" in text
    assert "        (q_proj): Linear(in_features=8, out_features=8)\n" in text
    assert text.count("(") == text.count(")")
    assert text.startswith("GPT(\n  context_length=6\n  (wte): ") and text.endswith("\n)")


@pytest.mark.parametrize("thing, text", [
    (ml.Linear(3, 2), "Linear(in_features=3, out_features=2)"),
    (ml.Linear(3, 2, bias=False), "Linear(in_features=3, out_features=2, bias=False)"),
    (ml.Embedding(3, 2), "Embedding(3, 2)"), (ml.LayerNorm(3), "LayerNorm(3, eps=1e-05)"),
    (ml.GELU(), "GELU()"), (ml.Dropout(0.5), "Dropout(p=0.5)"),
    (ml.LoRALayer(3, 2, 2, 3), "LoRALayer(rank=2, alpha=3, scale=1.5)"),
    (ml.CausalSelfAttention(4, 2).title(), "'CausalSelfAttention(n_heads=2)'"),
    (ml.Parameter([1, 2]), "Parameter(shape=(2,), dtype=float32)"),
    (ml.Parameter(np.zeros(()), False), "Parameter(shape=(), dtype=float64, frozen)"),
    (ml.Sequential(ml.GELU()), "Sequential(\n  (0): GELU()\n)"),
])
def test_each_thing_prints_what_it_is(thing, text):
    assert repr(thing) == text


def test_counts_are_printed_as_peft_does(capsys):
    model = ml.Sequential(ml.Linear(4, 5).freeze(), ml.Linear(5, 2, bias=False))
    model.print_trainable_parameters()
    expected = "trainable params: 10 || all params: 35 || trainable%: 28.5714\n"
    assert capsys.readouterr().out == expected
    ml.Sequential().print_trainable_parameters()
    ml.LayerNorm(1, bias=False).print_trainable_parameters()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("all params: 0 || trainable%: 0.0000")
    assert lines[1].endswith("all params: 1 || trainable%: 100.0000")


def test_summary_lists_every_parameter(capsys):
    ml.replace_linear_with_lora(ml.Sequential(ml.Linear(400, 5)), 2, 4).summary()
    assert capsys.readouterr().out.splitlines() == [
        "parameter        shape     numbers",
        "0.linear.weight  (400, 5)    2,000  frozen",
        "0.linear.bias    (5,)            5  frozen",
        "0.lora.A         (400, 2)      800",
        "0.lora.B         (2, 5)         10",
        "total                        2,815  810 trainable",
    ]


def test_deepcopy_is_independent(tiny_gpt, ids):
    twin = copy.deepcopy(tiny_gpt)
    twin.wte.weight.data += 1
    assert not np.array_equal(twin(ids), tiny_gpt(ids))


def test_sequential_goes_back_through_all(rng):
    model = ml.Sequential(ml.Linear(3, 3), ml.Linear(3, 3), ml.Linear(3, 2)).astype(np.float64)
    model[0].freeze()
    report = ml.gradcheck(model, rng.standard_normal((4, 3)))
    assert report.passed and len(report.entries) == 5, report


def test_modules_hidden_in_a_list_are_an_error():
    class Net(ml.Module):
        def __init__(self, layers):
            self.layers = layers

    for hidden in ([ml.Linear(2, 2)], (ml.GELU(),), {"a": ml.Parameter([1.0])}):
        with pytest.raises(TypeError, match=r"Net.layers hides modules.*use a ModuleList"):
            Net(hidden)
    assert Net(ml.ModuleList([ml.Linear(2, 2)])).num_parameters() == 6
    assert Net([1, 2]).num_parameters() == 0


@pytest.mark.parametrize("bad", [np.tanh, ml.GELU, None, [ml.GELU()]])
def test_lists_of_modules_hold_modules_only(bad):
    with pytest.raises(TypeError, match="module 1 must be a Module"):
        ml.Sequential(ml.GELU(), bad)


def test_rng_of_the_wrong_type():
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        ml.Linear(2, 2, rng=-1)
    with pytest.raises(TypeError, match="rng must be"):
        ml.Linear(2, 2, rng="seed")


@pytest.mark.parametrize("make", [lambda s: ml.GPT(tiny_config(), rng=s),
                                  lambda s: ml.LoRALayer(4, 3, 2, 4, rng=s)])
def test_same_seed_same_bits(make):
    one, two, three = make(3).state_dict(), make(3).state_dict(), make(4).state_dict()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not all(np.array_equal(one[name], three[name]) for name in one)


def test_constructors_show_their_signatures():
    assert list(inspect.signature(ml.Linear).parameters) == [
        "in_features", "out_features", "bias", "dtype", "rng"]
    assert not inspect.signature(ml.GELU).parameters
    parameters = inspect.signature(ml.DoRALinear).parameters
    assert list(parameters)[:3] == ["linear", "rank", "alpha"]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[3:])
    for cls in (ml.Linear, ml.GPT, ml.LinearWithLoRA):
        assert cls.__init__.__qualname__ == f"{cls.__name__}.__init__"


def test_a_subclass_may_add_attributes_after_its_parent_s_constructor():
    class Scaled(ml.Linear):
        def __init__(self, n, factor):
            super().__init__(n, n)
            self.factor = factor

        def forward(self, x):
            return self.factor * super().forward(x)

    layer = Scaled(3, 2.0)
    assert layer(np.ones((1, 3))).shape == (1, 3)
    layer.factor = 3.0
    with pytest.raises(AttributeError, match="did you mean 'factor'"):
        layer.facotr = 4.0
    with pytest.raises(AttributeError, match="no attribute 'anything' to set$"):
        ml.GELU().anything = 1


def test_a_dataclass_may_be_a_module():
    @dataclasses.dataclass
    class Scale(ml.Module):
        factor: float
        inner: ml.Module = dataclasses.field(default_factory=lambda: ml.Linear(2, 2))

        def forward(self, x):
            return self.factor * self.inner(x)

    assert Scale(2.0).num_parameters() == 6 and Scale(2.0).factor == 2.0
    with pytest.raises(TypeError, match="factor"):
        Scale()


def test_gradients_add_up_in_place_and_leave_what_is_added():
    p, first = ml.Parameter(np.zeros(3)), np.array([1.0, 2.0, 3.0])
    p.accumulate(first)
    grad = p.grad
    p.accumulate(np.ones(3))
    assert p.grad is grad and grad.tolist() == [2.0, 3.0, 4.0] and first.tolist() == [1.0, 2.0, 3.0]


def test_a_gradient_of_another_shape_is_refused():
    p = ml.Parameter(np.zeros((2, 3)))
    for wrong in (np.ones(3), np.ones((3, 2)), 1.0):
        with pytest.raises(ValueError, match=r"gradient of shape .* is not one of Parameter"):
            p.accumulate(wrong)
    assert p.grad is None
