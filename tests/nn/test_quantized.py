import copy
import pickle

import numpy as np
import pytest
from conftest import llama_config, randomise, tiny_config

import minilora as ml
from minilora.lora.surgery import base_modules, lora_layers
from minilora.nn import quantized
from minilora.nn.gradcheck import numerical_gradient
from minilora.nn.normal_float import NF4, NF4_VALUES
from minilora.nn.quantized import Q4_1, Int8, QuantizedParameter
from minilora.train.parallel import DataParallel, replicate

# QLoRA, arXiv:2305.14314, appendix E
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]
KINDS = ["nf4", "int8", "q4_1"]
FORMATS = [NF4, Int8, Q4_1]


def blocks_of(array, block):
    """Cut (in, out) into blocks of rows: a list of (block or fewer, out)."""
    return [array[i : i + block] for i in range(0, len(array), block)]


def half_error(x):
    """Return how far float16 may be from x."""
    return np.spacing(np.abs(x).astype(np.float16)).astype(np.float32) / 2


def quantized_model(kind="nf4", dtype=np.float32, lora=True, **changes):
    model = randomise(ml.Llama(llama_config(**changes), dtype=dtype))
    ml.quantize(model, kind)
    if lora:
        ml.replace_linear_with_lora(model, 2, 4, ["q_proj", "down_proj"], rng=0)
        for _, layer in lora_layers(model):
            randomise(layer.lora)
    return model


def codes(model):
    """Return {name: its parts} of every quantised weight of the base."""
    return {f"{path}.{name}": p.parts for path, m in base_modules(model).items()
            for name, p in vars(m).items() if isinstance(p, QuantizedParameter)}


def same_objects(got, expected):
    assert got.keys() == expected.keys() and got
    for name in got:
        assert all(got[name][key] is expected[name][key] for key in expected[name])


# ---- The formats


def test_the_values_of_nf4_are_those_of_the_paper():
    np.testing.assert_array_equal(NF4_VALUES, np.float32(PUBLISHED))
    assert NF4_VALUES.dtype == np.float32


@pytest.mark.parametrize("scale", [1e-3, 0.02, 1.0, 1e3])
@pytest.mark.parametrize("n", [1, 31, 64, 100, 256])
def test_no_weight_moves_further_than_half_a_step(rng, n, scale):
    w = np.float32(scale) * rng.standard_normal((n, 7)).astype(np.float32)
    w[:, 0] = np.abs(w[:, 0]) + 3 * scale  # far from zero
    for i, (a, b) in enumerate(zip(blocks_of(w, 32), blocks_of(Int8.quantize(w).data, 32),
                                   strict=True)):
        d = np.abs(a).max(axis=0) / 127
        assert (np.abs(a - b) <= d / 2 + 127 * half_error(d) + 1e-7 * scale).all(), i
    for i, (a, b) in enumerate(zip(blocks_of(w, 32), blocks_of(Q4_1.quantize(w).data, 32),
                                   strict=True)):
        d, m = (a.max(axis=0) - a.min(axis=0)) / 15, a.min(axis=0)
        assert (np.abs(a - b) <= d / 2 + 15 * half_error(d) + half_error(m) + 1e-6 * scale).all(), i
    steps = np.diff(NF4_VALUES).max() / 2
    exact = blocks_of(NF4.quantize(w, double=False).data, 64)
    for i, (a, b) in enumerate(zip(blocks_of(w, 64), exact, strict=True)):
        s = np.abs(a).max(axis=0)
        nearest = s * NF4_VALUES[np.abs(a[..., None] / s[:, None] - NF4_VALUES).argmin(-1)]
        np.testing.assert_allclose(b, nearest, rtol=1e-6, err_msg=str(i))
        assert (np.abs(a - b) <= s * steps * (1 + 1e-6)).all(), i
        assert np.array_equal(np.abs(b).max(axis=0), s), "the largest is exact"
    scales = np.stack([np.abs(a).max(axis=0) for a in blocks_of(w, 64)])
    most = np.abs(scales - scales.mean()).max() / 127 / 2
    error = np.abs(NF4.quantize(w).data - np.concatenate(exact))
    assert (error <= most * (1 + 1e-3)).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_edge_of_a_matrix_that_is_no_multiple_of_the_block(rng, fmt):
    """The rows that fill up the last block change neither its range nor the result."""
    w = rng.standard_normal((fmt.block + 3, 5)).astype(np.float32)
    options = {"double": False} if fmt is NF4 else {}
    p = fmt.quantize(w, **options)
    last = fmt.quantize(np.concatenate([w[fmt.block :], w[[-1] * (fmt.block - 3)]]), **options)
    assert p.data.shape == p.shape == w.shape and p.size == w.size
    assert len(p.parts["q"]) == 2
    np.testing.assert_array_equal(p.data[fmt.block :], last.data[:3])
    np.testing.assert_array_equal(p.data[: fmt.block], fmt.quantize(w[: fmt.block], **options).data)


@pytest.mark.parametrize("fmt", FORMATS)
def test_zeros_and_columns_of_one_value_are_exact(fmt):
    w = np.zeros((70, 3), np.float32)
    w[:, 1] = 0.5
    w[:, 2] = -0.5
    options = {"double": False} if fmt is NF4 else {}
    np.testing.assert_allclose(fmt.quantize(w, **options).data, w, rtol=2**-11)
    assert not fmt.quantize(w).data[:, 0].any()
    assert not fmt.quantize(np.zeros((3, 2), np.float32)).data.any()


@pytest.mark.parametrize("fmt", FORMATS)
def test_numbers_that_are_computed_in_pieces(rng, fmt, monkeypatch):
    w = rng.standard_normal((500, 7)).astype(np.float32)
    p = fmt.quantize(w)
    whole = p.data
    for piece in (1, 64 * 7 * 3, 10**9):
        monkeypatch.setattr(quantized, "PIECE", piece)
        np.testing.assert_array_equal(p.data, whole)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tables_and_some_of_their_rows(rng, fmt, dtype, monkeypatch):
    w = rng.standard_normal((70, 9)).astype(np.float32)
    straight = fmt.quantize(w)
    table = fmt(straight.parts, 70, True, dtype)
    assert table.shape == (9, 70) and table.size == 630 and table.data.dtype == dtype
    np.testing.assert_allclose(table.data, straight.data.T, rtol=1e-6)
    ids, columns = rng.integers(0, 9, (2, 3)), QuantizedParameter._columns
    for index in (slice(2, 7), slice(None), slice(3, 3), ids, ids[0], 4, -1, np.int64(2)):
        expected = table.data[index]
        with monkeypatch.context() as patch:
            patch.setattr(QuantizedParameter, "_columns", lambda self, which, asked=index: (
                columns(self, which) if which is asked else pytest.fail("computes other rows")))
            got = table.at(index)
        assert got.shape == expected.shape and got.dtype == dtype
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(straight.at(index), straight.data[index])


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_cannot_be_quantised(fmt):
    for bad in (np.nan, np.inf):
        w = np.ones((40, 2), np.float32)
        w[3, 1] = bad
        with pytest.raises(ValueError, match=f"{fmt.__name__} needs finite weights"):
            fmt.quantize(w)
    for shape in ((3,), (2, 3, 4), (0, 3), ()):
        with pytest.raises(ValueError, match="only a matrix can be quantised, got shape"):
            fmt.quantize(np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="needs finite weights"):
        fmt.quantize(np.full((2, 2), 1e300))
    with pytest.raises(TypeError, match="float32 or float64"):
        fmt(fmt.quantize(np.ones((2, 2), np.float32)).parts, 2, dtype=np.float16)


@pytest.mark.parametrize("fmt", [Int8, Q4_1])
def test_scales_that_overflow_float16_are_refused(fmt):
    w = np.array([[0.0], [1e9]], np.float32)
    with pytest.raises(ValueError, match="whose scales fit its parts"):
        fmt.quantize(w)


@pytest.mark.parametrize("kind, bits", [("nf4", 4 + 8 / 64 + 32 / (64 * 256)), ("int8", 8.5),
                                        ("q8_0", 8.5), ("q4_1", 5.0)])
def test_stored_bytes(kind, bits):
    model = ml.Sequential(ml.Linear(512, 256, bias=False), ml.Linear(512, 256))
    assert ml.stored_bytes(model) == 4 * (2 * 512 * 256 + 256)
    ml.quantize(model, kind)
    extra = 8 if kind == "nf4" else 0  # the mean of the scales of each
    assert ml.stored_bytes(model) == 2 * 512 * 256 * bits / 8 + extra + 4 * 256
    if kind == "nf4":
        exact = ml.quantize(ml.Sequential(ml.Linear(512, 256, False)), kind, double=False)
        assert ml.stored_bytes(exact) == 512 * 256 * 4.5 / 8


# ---- A parameter that does not change


@pytest.mark.parametrize("kind", KINDS)
def test_data_can_be_read_only(kind):
    p = quantized_model(kind).model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match="read-only"):
        p.data[0] = 1.0
    with pytest.raises(TypeError, match="cannot be changed: dequantize it first"):
        p.data = np.zeros(p.shape)
    with pytest.raises(TypeError, match="cannot be trained: dequantize it"):
        p.requires_grad = True
    p.requires_grad = False
    assert not p.requires_grad and repr(p).endswith("(shape=(8, 12), dtype=float32, frozen)")


def test_what_would_train_it_says_no():
    model = quantized_model(lora=False)
    with pytest.raises(TypeError, match="a weight in NF4 cannot be trained: dequantize it"):
        model.unfreeze()
    with pytest.raises(TypeError, match="a weight in NF4 cannot be trained"):
        model.model.layers[0].mlp.up_proj.unfreeze()
    assert not any(p.requires_grad for p in model.model.layers[0].mlp.parameters())


def test_an_optimizer_leaves_it_alone(ids):
    model = quantized_model()
    before, parts = model.state_dict(), codes(model)
    optimizer = ml.AdamW(model.parameters(), lr=0.1)
    ml.fit(model, [(ids, ids)], optimizer, 2, progress=False)
    for name, array in model.state_dict().items():
        assert np.array_equal(array, before[name]) == ("lora" not in name)
    same_objects(codes(model), parts)
    assert len(optimizer.state) == 2 * 4


def test_a_state_dict_is_in_floats_but_cannot_be_loaded():
    model, plain = quantized_model(lora=False), ml.Llama(llama_config())
    state = model.state_dict()
    assert all(a.dtype == np.float32 and a.flags.writeable for a in state.values())
    plain.load_state_dict(state)
    name = "model.layers.0.mlp.up_proj.weight"
    changed = {key: array + 1 for key, array in state.items()}
    for given, strict in ((changed, True), ({name: changed[name]}, False)):
        with pytest.raises(ValueError, match=f"{name} is read-only: dequantize first"):
            model.load_state_dict(given, strict)
    for key, array in model.state_dict().items():
        assert np.array_equal(array, state[key]), key
    model.load_state_dict({"model.norm.weight": np.full(8, 2.0)}, strict=False)
    assert (model.model.norm.weight.data == 2).all()


@pytest.mark.parametrize("kind", KINDS)
def test_astype_keeps_the_codes(ids, kind):
    model = quantized_model(kind)
    parts, logits = codes(model), model(ids)
    assert model.astype(np.float64)(ids).dtype == np.float64
    np.testing.assert_allclose(model(ids), logits, rtol=1e-3, atol=1e-4)
    assert all(p.dtype == p.data.dtype == np.float64 for p in model.parameters())
    same_objects(codes(model), parts)
    np.testing.assert_array_equal(model.astype(np.float32)(ids), logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, replicate])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_share_the_codes_and_nothing_else(ids, copied, merged, monkeypatch):
    model = quantized_model()
    logits = model(ids)
    if merged:
        ml.merge_lora(model)
    parts = codes(model)
    with monkeypatch.context() as patch:
        patch.setattr(QuantizedParameter, "_columns", lambda *_: pytest.fail("decoded"))
        twin = copied(model)
    same_objects(codes(twin), parts)
    np.testing.assert_allclose(twin(ids), logits, atol=1e-5)
    if merged:
        ml.unmerge_lora(twin)
    twin.astype(np.float64)
    assert twin(ids).dtype == np.float64 and model(ids).dtype == np.float32
    np.testing.assert_allclose(model(ids), logits, atol=1e-5)
    assert {p.dtype for p in model.parameters()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("merged", [False, True])
def test_pickle(ids, merged):
    model = quantized_model("q4_1", np.float64)
    if merged:
        ml.merge_lora(model)
    twin = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(twin(ids), model(ids))
    for name, parts in codes(model).items():
        for key, part in codes(twin)[name].items():
            np.testing.assert_array_equal(part, parts[key])


@pytest.mark.parametrize("merged", [False, True])
def test_threads(ids, merged):
    model = quantized_model(dtype=np.float64)
    if merged:
        ml.merge_lora(model)
        assert ml.evaluate(model, [(ids, ids), (ids[::-1], ids)], threads=2) == pytest.approx(
            ml.evaluate(model, [(ids, ids), (ids[::-1], ids)], threads=1))
        return
    results = []
    for threads in (1, 3):
        with DataParallel(model, threads) as parallel:
            for _ in range(2):  # the second time, the replicas follow the model
                model.zero_grad()
                loss = parallel.loss_and_gradients(ids, ids)
                results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
            for twin in parallel.models:
                same_objects(codes(twin), codes(model))
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-12)


def test_replicas_follow_a_model_that_is_quantised_anew_or_not_any_more(ids):
    model = quantized_model(dtype=np.float64)
    with DataParallel(model, 2) as parallel:
        for change in (
            lambda: ml.quantize(model, double=False), lambda: model.astype(np.float32),
            lambda: ml.quantize(model, "int8"), lambda: ml.dequantize(model),
        ):
            parallel.loss_and_gradients(ids, ids)
            change()
            model.zero_grad()
            loss = parallel.loss_and_gradients(ids, ids)
            assert loss == pytest.approx(ml.cross_entropy(model(ids), ids)[0], rel=1e-6)
            for twin in parallel.models:
                found = zip(twin.parameters(), model.parameters(), strict=True)
                assert all(type(p) is type(q) and p.dtype == q.dtype for p, q in found)
                assert {k: list(v) for k, v in codes(twin).items()} == {
                    k: list(v) for k, v in codes(model).items()}


# ---- quantize and dequantize


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_before_and_after_adding_lora(ids, kind):
    def model():
        return randomise(ml.Llama(llama_config()))

    def adapt(model):
        return ml.replace_linear_with_lora(model, 2, 4, rng=0)

    before, after = adapt(ml.quantize(model(), kind)), ml.quantize(adapt(model()), kind)
    for m in (before, after):
        assert not m.lm_head.linear.weight.requires_grad
    names = [name for name in before.state_dict() if name.endswith("weight")]
    assert names == [name for name in after.state_dict() if name.endswith("weight")]
    np.testing.assert_array_equal(before(ids), after(ids))
    assert set(codes(before)) == set(codes(after)) and len(codes(before)) == 14


def test_what_is_quantised():
    model = ml.quantize(ml.Llama(llama_config()))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in codes(model)} == {
        f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down")}
    ml.quantize(model, "int8", "lm_head")
    assert type(model.lm_head.weight) is Int8
    assert type(model.model.layers[0].mlp.up_proj.weight) is NF4
    some = ml.quantize(ml.GPT(tiny_config()), "q4_1", ["h.0.*.q_proj", "up_proj"])
    assert list(codes(some)) == ["h.0.attn.q_proj.weight", "h.0.mlp.up_proj.weight",
                                 "h.1.mlp.up_proj.weight"]
    assert some.h[0].attn.q_proj.bias.requires_grad


def test_quantising_twice_loses_nothing_more(ids):
    for kind in ("int8", "q4_1"):
        model = quantized_model(kind, lora=False)
        once = model.state_dict()
        for name, array in ml.quantize(model, kind).state_dict().items():
            np.testing.assert_allclose(array, once[name], rtol=2e-3, atol=1e-3)
    model = ml.quantize(quantized_model("int8"), "nf4")
    assert {type(p) for p in model.parameters()} == {NF4, ml.Parameter}


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_changes_no_value_and_trains_nothing(ids, kind):
    model = quantized_model(kind)
    logits, state, trained = model(ids), model.state_dict(), model.num_parameters(True)
    assert ml.dequantize(model) is model
    np.testing.assert_array_equal(model(ids), logits)
    assert not codes(model) and {type(p) for p in model.parameters()} == {ml.Parameter}
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, state[name])
    assert model.num_parameters(trainable_only=True) == trained
    assert ml.dequantize(model).unfreeze().num_parameters(True) == model.num_parameters()


def test_layers_that_share_a_weight_share_it_afterwards(rng):
    first, second, other = (ml.Linear(8, 8, rng=i) for i in range(3))
    second.weight = first.weight
    model = ml.Sequential(first, second, other)
    ml.quantize(model, target_modules="0")
    assert type(second.weight) is NF4 and second.weight is first.weight
    assert type(other.weight) is ml.Parameter
    twin = copy.deepcopy(model)
    assert twin[0].weight is twin[1].weight
    ml.dequantize(model)
    assert second.weight is first.weight and type(first.weight) is ml.Parameter


@pytest.mark.parametrize("call, error, words", [
    (lambda m: ml.quantize(m, "nf5"), ValueError, "got 'nf5'; did you mean 'nf4'"),
    (lambda m: ml.quantize(m, None), ValueError, "kind must be one of nf4, int8, q4_1, q8_0"),
    (lambda m: ml.quantize(m, target_modules="q_pro"), ValueError, "did you mean 'q_proj'"),
    (lambda m: ml.quantize(m, target_modules=[]), ValueError, "the list is empty"),
    (lambda m: ml.quantize(m, "int8", double=False), ValueError, "only nf4 has scales that"),
    (lambda m: ml.quantize(m, double="no"), TypeError, "double must be True or False, got 'no'"),
    (lambda m: ml.quantize(ml.Linear(2, 2)), TypeError, "a bare Linear cannot be replaced"),
    (lambda m: ml.dequantize(ml.Linear(2, 2)), TypeError, "a bare Linear cannot be replaced"),
    (lambda m: ml.quantize("m"), TypeError, "expected a Module"),
    (lambda m: ml.quantize(ml.merge_lora(m)), RuntimeError, "merged: unmerge_lora first"),
    (lambda m: ml.dequantize(ml.merge_lora(m)), RuntimeError, "merged: unmerge_lora first"),
])
def test_errors_change_nothing(call, error, words):
    model = ml.replace_linear_with_lora(ml.Llama(llama_config()), 2, 4)
    kinds = [type(p) for p in model.parameters()]
    with pytest.raises(error, match=words):
        call(model)
    assert [type(p) for p in model.parameters()] == kinds


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_changed():
    model = ml.Llama(llama_config())
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = np.nan
    with pytest.raises(ValueError, match=r"^model.layers.1.mlp.up_proj: NF4 needs finite weights"):
        ml.quantize(model)
    assert not codes(model)


# ---- QLoRA


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_on_the_dequantised_base(ids, kind, use_dora):
    def run(change):
        model = quantized_model(kind, np.float64, lora=False)
        change(ml.replace_linear_with_lora(model, 2, 4, dropout=0.2, rng=0, use_dora=use_dora))
        for _, layer in lora_layers(model):
            randomise(layer.lora)
        loss, dlogits = ml.cross_entropy(model(ids), ids)
        model.backward(dlogits)
        return loss, {name: p.grad for name, p in model.named_parameters()}

    (loss, got), (expected_loss, expected) = run(lambda model: None), run(ml.dequantize)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for name, gradient in expected.items():
        assert (gradient is None) == (got[name] is None)
        if gradient is not None:
            np.testing.assert_allclose(got[name], gradient, rtol=1e-9, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie_weights", [False, True])
def test_gradients_are_the_slopes(ids, kind, tie_weights):
    model = quantized_model(kind, np.float64, tie_weights=tie_weights)
    report = ml.gradcheck(model, ids, max_entries=8)
    assert report.passed and len(report.entries) == 2 * 4, f"\n{report}"


def quantise_embeddings(model, fmt=Int8):
    """As load_gguf does it."""
    table = model.model.embed_tokens.weight
    parts = fmt.quantize(np.ascontiguousarray(table.data.T)).parts
    model.model.embed_tokens.weight = fmt(parts, table.shape[1], True, table.dtype)
    return model


@pytest.mark.parametrize("fmt", FORMATS)
def test_quantised_embeddings(ids, fmt):
    model = quantise_embeddings(quantized_model("q4_1", np.float64, tie_weights=True), fmt)
    report = ml.gradcheck(model, ids, max_entries=8)
    assert report.passed, f"\n{report}"
    plain = ml.dequantize(copy.deepcopy(model))
    assert type(plain.lm_head.weight) is ml.Parameter
    np.testing.assert_allclose(model(ids), plain(ids), rtol=1e-12)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merging(ids, kind, use_dora):
    model = quantized_model(kind, lora=False)
    ml.replace_linear_with_lora(model, 2, 4, rng=0, use_dora=use_dora)
    for _, layer in lora_layers(model):
        randomise(layer.lora)
    parts, logits = codes(model), model(ids)
    twin = copy.deepcopy(model)
    np.testing.assert_allclose(ml.merge_lora(model)(ids), logits, rtol=1e-4, atol=1e-4)
    assert type(model.lm_head._merged[0].weight) is ml.Parameter
    np.testing.assert_array_equal(ml.unmerge_lora(model)(ids), logits)
    same_objects(codes(model), parts)
    unloaded = ml.merge_lora(twin, unload=True)
    assert not codes(unloaded) and {type(p) for p in unloaded.parameters()} == {ml.Parameter}
    np.testing.assert_allclose(unloaded(ids), logits, rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_replaced_while_merged_is_noticed(ids):
    model = quantized_model()
    layer = next(layer for _, layer in lora_layers(model))
    for weight in (NF4.quantize(layer.linear.weight.data), ml.Parameter(layer.linear.weight.data)):
        ml.merge_lora(model)
        layer.linear.weight = weight
        with pytest.raises(RuntimeError, match="was changed while it was merged"):
            model(ids)
        ml.unmerge_lora(model)


@pytest.mark.parametrize("merged", [False, True])
def test_removing_lora_gives_the_same_codes_back(ids, merged):
    model = quantized_model(lora=False)
    parts, logits = codes(model), model(ids)
    ml.replace_linear_with_lora(model, 2, 4, rng=0, modules_to_save="k_proj")
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1
    assert not np.allclose(model(ids), logits)
    if merged:
        ml.merge_lora(model)
    ml.remove_lora(model)
    same_objects(codes(model), parts)
    np.testing.assert_array_equal(model(ids), logits)


@pytest.mark.parametrize("saved, tie_weights", [
    ("down_proj", False), ("mlp", True), ("lm_head", False), ("embed_tokens", False),
    ("embed_tokens", True),
])
def test_modules_that_are_saved_whole_are_trained_in_floats(ids, saved, tie_weights, tmp_path):
    def base():
        model = quantized_model("int8", np.float64, lora=False, tie_weights=tie_weights)
        return quantise_embeddings(model if tie_weights else ml.quantize(model, "int8", "lm_head"))

    model = base()
    logits = model(ids)
    ml.replace_linear_with_lora(model, 2, 4, "q_proj", rng=0, modules_to_save=saved)
    np.testing.assert_allclose(model(ids), logits, rtol=1e-9)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(saved in name for name in trained)
    report = ml.gradcheck(model, ids, max_entries=8)
    assert report.passed and {e.name for e in report.entries} == trained, f"\n{report}"
    for name, p in model.named_parameters():
        if name in trained:
            p.data += 0.1
    ml.save_adapter(model, tmp_path)
    again = ml.load_adapter(base(), tmp_path)
    np.testing.assert_allclose(again(ids), model(ids), rtol=1e-5)
    assert set(codes(again)) == set(codes(base()))
    np.testing.assert_array_equal(ml.remove_lora(model)(ids), logits)


def test_quantize_leaves_what_is_saved_whole(ids):
    model = ml.Llama(llama_config())
    ml.replace_linear_with_lora(model, 2, 4, "q_proj", modules_to_save="down_proj")
    ml.quantize(model)
    whole = model.model.layers[0].mlp.down_proj
    assert type(whole.weight) is type(whole.original.weight) is ml.Parameter
    assert type(model.model.layers[0].mlp.up_proj.weight) is NF4


def test_one_adapter_serves_several_tasks_on_quantised_weights(ids):
    tasks = ml.AdapterSet(quantized_model(lora=False))
    parts, base = codes(tasks.model), tasks.model(ids)
    for name in "ab":
        tasks.add(name, rank=2, alpha=4)
        tasks.set_active(name)
        for _, layer in lora_layers(tasks.model):
            randomise(layer.lora, seed=ord(name))
    tasks.set_active("a")
    assert not np.allclose(tasks.model(ids), base)
    same_objects(codes(tasks.model), parts)


def test_quantised_weights_are_counted():
    model = quantized_model()
    plain = ml.replace_linear_with_lora(ml.Llama(llama_config()), 2, 4, ["q_proj", "down_proj"])
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(trainable_only=True) == plain.num_parameters(trainable_only=True)


def test_a_layer_quantised_between_forward_and_backward_is_noticed(ids):
    model = ml.replace_linear_with_lora(ml.Llama(llama_config()), 2, 4, "q_proj", rng=0)
    logits = model(ids)
    ml.quantize(model)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        model.backward(logits)


def test_differences_of_the_loss_on_a_quantised_gpt(ids):
    model = randomise(ml.GPT(tiny_config(), dtype=np.float64))
    randomise(ml.replace_linear_with_lora(ml.quantize(model), 2, 4, rng=0))
    _, dlogits = ml.cross_entropy(model(ids), ids)
    model.backward(dlogits)
    for name, p in model.named_parameters():
        if p.requires_grad:
            index = np.unravel_index(np.abs(p.grad).argmax(), p.shape)
            (slope,) = numerical_gradient(
                lambda: ml.cross_entropy(model(ids), ids)[0], p.data, [index])
            assert p.grad[index] == pytest.approx(slope, rel=1e-5), name
