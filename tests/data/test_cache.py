"""Generation with kept keys and values writes what generation without them does."""

import types

import numpy as np
import pytest
from conftest import randomise, tiny_config

import minilora as ml
from minilora.data import cache as cache_module
from minilora.data import generate as generate_module
from minilora.data.cache import Cache, Unpacked, can_cache, whole_logits, worth_unpacking
from minilora.data.generate import generate_batch, sample_tokens
from minilora.nn.llama import GroupedQueryAttention
from minilora.nn.quantized import Int8, QuantizedParameter

SIZES = dict(vocab_size=50, d_model=32, d_ff=48, n_layers=2, n_heads=4, n_kv_heads=2)
PROMPTS = [np.array(ids) for ids in ([1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1], [3, 2])]
ADAPTERS = ["plain", "lora", "merged", "dora", "saved", "nf4", "int8", "qlora"]


def gpt(**changes):
    sizes = dict(vocab_size=50, context_length=40, d_model=32, n_heads=4, dropout=0.3)
    return randomise(ml.GPT(tiny_config(**(sizes | changes)), dtype=np.float64))


def llama(**changes):
    return randomise(ml.Llama(ml.LlamaConfig(**(SIZES | changes)), dtype=np.float64))


def tied_llama():
    return llama(tie_weights=True, head_dim=6, rope_scaling=ml.RopeScaling(4.0, 1.0, 4.0, 8))


def adapted(model, kind):
    """Return the model with an adapter that changes what it writes."""
    if kind in ("nf4", "int8", "qlora"):
        ml.quantize(model, "int8" if kind == "int8" else "nf4")
    if kind not in ("plain", "nf4", "int8"):
        head = "wte" if isinstance(model, ml.GPT) else "model.embed_tokens"
        head = head if model.config.tie_weights else "lm_head"
        ml.replace_linear_with_lora(
            model, 4, 8, dropout=0.2, rng=0, use_dora=kind == "dora",
            modules_to_save=[head] if kind == "saved" else None)
        rng = np.random.default_rng(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * rng.standard_normal(parameter.shape)
    return ml.merge_lora(model) if kind == "merged" else model


def without_cache(model, ids, max_new_tokens, temperature=1.0, top_k=None, rng=None):
    """Generate as by reading the whole text for each token: (T,) or (B, T) -> (B, T + n)."""
    model, rng = model.eval(), np.random.default_rng(rng)
    context, new = np.atleast_2d(ids), []
    for _ in range(max_new_tokens):
        logits = model(context[:, -model.config.context_length :])[:, -1]
        if top_k is not None:
            smallest = np.sort(logits, axis=-1)[:, -top_k, None]
            logits = np.where(logits < smallest, -np.inf, logits)
        if temperature:
            logits = logits / temperature + rng.gumbel(size=logits.shape)
        new.append(logits.argmax(axis=-1))
        context = np.concatenate([context, new[-1][:, None]], axis=1)
    model.train()
    return context


@pytest.fixture(params=["gpt", "tied gpt", "llama", "tied llama"])
def model(request):
    return {"gpt": gpt, "tied gpt": lambda: gpt(tie_weights=True, bias=False), "llama": llama,
            "tied llama": tied_llama}[request.param]()


@pytest.fixture
def no_cache(monkeypatch):
    """Let the test see that a model's own forward is not used."""
    def refuse(*_):
        raise AssertionError("the text was read as a whole")
    return lambda: monkeypatch.setattr(generate_module, "whole_logits", refuse)


# ---- The same tokens


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_same_tokens_as_without_a_cache(model, kind, no_cache):
    adapted(model, kind)
    assert can_cache(model)
    no_cache()
    ids = np.random.default_rng(0).integers(0, 50, (3, 5))
    for arguments in ({"temperature": 0.0}, {"rng": 3}, {"temperature": 0.7, "top_k": 5, "rng": 4}):
        expected = without_cache(model, ids, 12, **arguments)
        assert len(np.unique(expected[:, 5:])) > 3  # the models do not just repeat a token
        assert np.array_equal(ml.generate(model, ids, 12, **arguments), expected)
        one = ml.generate(model, ids[0], 12, **arguments)
        assert np.array_equal(one, without_cache(model, ids[0], 12, **arguments)[0])


def test_the_same_tokens_beyond_a_gpt_s_context():
    model = gpt(context_length=9)
    for length in (3, 9, 20):
        ids = np.random.default_rng(length).integers(0, 50, (2, length))
        assert np.array_equal(ml.generate(model, ids, 15, rng=1),
                              without_cache(model, ids, 15, rng=1))


@pytest.mark.parametrize("kind", ["plain", "lora", "qlora"])
def test_prompts_of_different_lengths(model, kind):
    adapted(model, kind)
    together = generate_batch(model, PROMPTS, 20)
    for prompt, new in zip(PROMPTS, together, strict=True):
        expected = without_cache(model, prompt, 20, temperature=0.0)[0, len(prompt):]
        assert new.dtype == np.int64 and np.array_equal(new, expected)
        assert np.array_equal(new, generate_batch(model, [prompt], 20)[0])


def test_prompts_of_different_lengths_beyond_a_gpt_s_context():
    model = gpt(context_length=8)
    prompts = [*PROMPTS, np.arange(15)]
    for prompt, new in zip(prompts, generate_batch(model, prompts, 12), strict=True):
        expected = without_cache(model, prompt, 12, temperature=0.0)[0, len(prompt):]
        assert np.array_equal(new, expected)


def test_prompts_of_one_length_are_drawn_as_by_generate(model):
    ids = np.random.default_rng(0).integers(0, 50, (3, 4))
    new = generate_batch(model, list(ids), 8, temperature=0.9, top_k=7, rng=5)
    assert np.array_equal(new, ml.generate(model, ids, 8, 0.9, 7, rng=5)[:, 4:])


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_the_logits_are_those_of_the_model(model, chunk, monkeypatch):
    """Long prompts are read in pieces; then a token for each text; then some texts end."""
    monkeypatch.setattr(cache_module, "CHUNK", chunk)
    model.eval()
    texts, cache = PROMPTS, Cache(model, len(PROMPTS), 9)
    for _ in range(2):
        logits = cache.next_logits(texts)
        for text, row in zip(texts, logits, strict=True):
            np.testing.assert_allclose(row, model(text[None])[0, -1], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(whole_logits(model, texts), logits, rtol=1e-9, atol=1e-9)
        texts = [np.append(text, 7) for text in texts]
    cache.keep(np.array([False, True, True, False]))
    texts = texts[1:3]
    np.testing.assert_allclose(cache.next_logits(texts), whole_logits(model, texts), rtol=1e-9)
    assert {(len(part), part.shape[2]) for layer in cache.layers for part in layer} == {(2, 9)}


def test_a_token_is_read_once(model, monkeypatch):
    read = []
    original = Cache._read
    monkeypatch.setattr(Cache, "_read", lambda *a: read.append(a[1].shape) or original(*a))
    generate_batch(model, PROMPTS, 5)
    assert read == [(4, 7), (4, 1), (4, 1), (4, 1), (4, 1)]


@pytest.mark.parametrize("make", [gpt, llama])
def test_padding_is_never_another_token(make):
    """Were prompts padded with some token, weights of that token that are nan would spread."""
    model = make()
    table = model.wte if isinstance(model, ml.GPT) else model.model.embed_tokens
    expected = generate_batch(model, PROMPTS, 1)
    table.weight.data[[0, 49]] = np.nan
    assert np.array_equal(generate_batch(model, PROMPTS, 1), expected)


def test_what_replaces_a_dropout_is_called():
    model = gpt()
    model.drop = randomise(ml.LayerNorm(32, dtype=np.float64))
    model.h[1].attn.dropout = ml.Linear(32, 32, dtype=np.float64, rng=0)
    assert can_cache(model)
    ids = PROMPTS[2]
    assert np.array_equal(ml.generate(model, ids, 9, rng=0)[None],
                          without_cache(model, ids, 9, rng=0))


@pytest.mark.parametrize("make", [gpt, llama])
def test_no_more_room_than_the_context(make, monkeypatch):
    rooms = []
    monkeypatch.setattr(generate_module, "Cache",
                        lambda *arguments: rooms.append(arguments[2]) or Cache(*arguments))
    model = make(context_length=20)
    generate_batch(model, PROMPTS, 4)
    generate_batch(model, PROMPTS, 100)
    assert rooms == [11, 20]


# ---- Where texts end


def test_a_text_ends_with_a_stop_token(model):
    free = ml.generate(model, PROMPTS[0], 20, rng=2)[3:]
    stop = int(free[4])
    n = int(np.flatnonzero(free == stop)[0]) + 1
    for given in (stop, np.int64(stop), [stop], {stop}, np.array([stop])):
        assert np.array_equal(ml.generate(model, PROMPTS[0], 20, rng=2, stop=given)[3:], free[:n])
    streamed = list(sample_tokens(model, PROMPTS[0], 20, rng=2, stop=stop))
    assert np.array_equal(np.concatenate(streamed), free[:n])
    (batch,) = generate_batch(model, PROMPTS[:1], 20, temperature=1.0, rng=2, stop=stop)
    assert np.array_equal(batch, free[: n - 1])


def test_texts_that_have_ended_do_not_go_on(model, monkeypatch):
    """Each row is what it is without `stop`, up to there, also where it is drawn."""
    ids = np.random.default_rng(1).integers(0, 50, (4, 3))
    free = ml.generate(model, ids, 30, rng=0)[:, 3:]
    stops = {int(free[0, 2]), int(free[1, 9])}
    rows, original = [], Cache.next_logits
    monkeypatch.setattr(Cache, "next_logits",
                        lambda self, texts: rows.append(len(texts)) or original(self, texts))
    found = ml.generate(model, ids, 30, rng=0, stop=stops)[:, 3:]
    assert rows == sorted(rows, reverse=True) and rows[-1] < 4 and len(rows) == found.shape[1]
    batch = generate_batch(model, list(ids), 30, temperature=1.0, rng=0, stop=stops)
    for expected, row, new in zip(free, found, batch, strict=True):
        ends = np.flatnonzero(np.isin(expected, list(stops)))
        end = ends[0] if len(ends) else 30
        assert np.array_equal(new, expected[:end])
        assert np.array_equal(row[:end], expected[:end][: len(row)])
        assert (row[end:] == expected[min(end, 29)]).all()
    assert {len(new) for new in batch} != {30}


def test_without_stop_tokens(model):
    expected = ml.generate(model, PROMPTS[0], 9, rng=0)
    assert np.array_equal(ml.generate(model, PROMPTS[0], 9, rng=0, stop=[]), expected)
    assert len(expected) == 12


def test_a_llama_s_text_ends_with_its_context():
    model = llama(context_length=8)
    free = ml.generate(randomise(ml.Llama(ml.LlamaConfig(**SIZES), dtype=np.float64)),
                       PROMPTS[2], 20, temperature=0.0)
    text = ml.generate(model, PROMPTS[2], 20, temperature=0.0)
    assert np.array_equal(text, free[:9])  # the ninth follows a full context
    assert [len(new) for new in generate_batch(model, PROMPTS, 20)] == [6, 8, 2, 7]
    assert len(ml.generate(model, np.arange(8), 5)) == 9


def test_a_prompt_longer_than_a_llama_s_context():
    model = llama(context_length=8)
    for call in (lambda: ml.generate(model, np.arange(9), 1),
                 lambda: generate_batch(model, [np.arange(3), np.arange(9)], 1)):
        with pytest.raises(ValueError, match="of 9 tokens is longer than the context of 8"):
            call()


# ---- Models that the cache does not know


class Shifted(ml.Llama):
    """A Llama with a forward of its own."""

    def forward(self, ids, where=None, first=0):
        return np.roll(super().forward(ids, where, first), 1, axis=-1)


class FirstOnly(ml.CausalSelfAttention):
    """Attention that all positions pay to the first only."""

    def forward(self, x):
        return super().forward(x[:, :1]) + 0.0 * x


class Doubled(GroupedQueryAttention):
    def forward(self, x):
        return 2.0 * super().forward(x)


class RunningSum(ml.Module):
    """A module of one's own that looks at other positions."""

    def forward(self, x):
        return np.cumsum(x, axis=1)


def changed(kind):
    if kind == "subclass":
        return randomise(Shifted(ml.LlamaConfig(**SIZES), dtype=np.float64))
    model = llama() if kind in ("llama attention", "a function", "mlp") else gpt()
    if kind == "attention":
        model.h[1].attn = randomise(FirstOnly(32, 4, dtype=np.float64))
    if kind == "llama attention":
        model.model.layers[1].self_attn = Doubled(model.config, np.float64, 1)
    if kind == "block":
        setattr(model.h, "1", RunningSum())
    if kind == "mlp":
        model.model.layers[0].mlp = RunningSum()
    if kind == "misplaced attention":
        model.h[0].mlp = ml.CausalSelfAttention(32, 4, dtype=np.float64, rng=0)
    if kind == "a function":
        head = model.lm_head
        head.forward = lambda x: np.roll(type(head).forward(head, x), 1, axis=-1)
    if kind == "a wrapped attention":
        model.h[0].attn = ml.ModuleToSave(model.h[0].attn)
    return model


@pytest.mark.parametrize("kind", ["subclass", "attention", "llama attention", "block", "mlp",
                                  "misplaced attention", "a function", "a wrapped attention"])
def test_other_models_are_read_as_a_whole(kind):
    model = changed(kind)
    assert not can_cache(model)
    ids = np.random.default_rng(0).integers(0, 50, (2, 4))
    assert np.array_equal(ml.generate(model, ids, 6, rng=0), without_cache(model, ids, 6, rng=0))
    for prompt, new in zip(PROMPTS, generate_batch(model, PROMPTS, 6), strict=True):
        expected = without_cache(model, prompt, 6, temperature=0.0)[0, len(prompt):]
        assert np.array_equal(new, expected)


def test_a_forward_that_was_replaced_for_a_class(monkeypatch):
    model, forward = gpt(), ml.Block.forward
    monkeypatch.setattr(ml.Block, "forward", lambda self, x: 0.5 * forward(self, x))
    assert not can_cache(model)
    monkeypatch.undo()
    assert can_cache(model) and not can_cache(ml.Linear(2, 3))
    model.h[0].forward = types.MethodType(forward, model.h[0])  # it is the same
    assert can_cache(model)


# ---- Quantised weights


@pytest.mark.parametrize("kind", ["nf4", "int8", "qlora"])
def test_a_float_copy_writes_the_same(model, kind):
    adapted(model, kind)
    before = {(id(module), name): value for _, module in model.named_modules()
              for name, value in vars(module).items()}
    texts = [ml.generate(model, PROMPTS[0], 9, 0.8, rng=0, float_copy=copy)
             for copy in (False, True, None)]
    assert np.array_equal(texts[0], texts[1]) and np.array_equal(texts[0], texts[2])
    for _, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (ml.Parameter, ml.Module)):
                assert value is before[id(module), name]


def quantised_embedding():
    """SmolLM2's arrangement: 8 bits in the table that is the head, too."""
    model = ml.quantize(tied_llama(), "q4_1")
    table = Int8.quantize(model.model.embed_tokens.weight.data.T)
    model.model.embed_tokens.weight = Int8(table.parts, table.in_features, True, np.float64)
    return model


def test_a_quantised_table_that_two_modules_use():
    model = quantised_embedding()
    with Unpacked(model):
        assert type(model.lm_head.weight) is ml.Parameter
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not any(isinstance(p, QuantizedParameter) for p in model.parameters())
        assert not any(p.requires_grad for p in [model.lm_head.weight])
    assert isinstance(model.lm_head.weight, QuantizedParameter)
    texts = [generate_batch(model, PROMPTS, 9, float_copy=copy) for copy in (False, True)]
    assert all(np.array_equal(*pair) for pair in zip(*texts, strict=True))


def test_the_weights_return_after_an_error_and_keep_what_was_changed():
    model = ml.quantize(llama())
    layers = [layer.mlp.up_proj for layer in model.model.layers]
    weights = [layer.weight for layer in layers]
    context = Unpacked(model)
    with pytest.raises(KeyError), context:
        raise KeyError
    assert [layer.weight for layer in layers] == weights
    mine = ml.Parameter(np.zeros((32, 48)))
    with context:
        assert type(layers[1].weight) is ml.Parameter
        layers[0].weight = mine
    assert [layer.weight for layer in layers] == [mine, weights[1]]
    with context:
        assert layers[0].weight is mine
    layers[0].weight = weights[1]
    with Unpacked(model):
        assert layers[0].weight is layers[1].weight
    with Unpacked(ml.Linear(2, 3)):  # nothing is quantised
        pass


def test_a_stream_has_the_copy_only_while_it_computes():
    model = ml.quantize(llama())
    weight = model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight
    tokens = sample_tokens(model, PROMPTS[0], 5, float_copy=True)
    next(tokens)
    assert weight == (model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight)
    assert isinstance(weight[1], QuantizedParameter)


def test_when_a_copy_is_made(monkeypatch):
    made = []
    monkeypatch.setattr(generate_module, "Unpacked",
                        lambda model: made.append(model) or Unpacked(model))
    model, memory = ml.quantize(llama()), 10**9
    monkeypatch.setattr(cache_module, "_available_memory", lambda: memory)
    ml.generate(model, PROMPTS[0], 2)
    ml.generate(model, PROMPTS[0], 20, float_copy=False)
    ml.generate(llama(), PROMPTS[0], 20)
    assert not made
    ml.generate(model, PROMPTS[0], 20)
    ml.generate(model, PROMPTS[0], 1, float_copy=True)
    assert len(made) == 2
    needed = sum(p.size * 8 for p in model.parameters() if isinstance(p, QuantizedParameter))
    memory = 2 * needed
    assert worth_unpacking(model)
    memory -= 1
    assert not worth_unpacking(model)
    ml.generate(model, PROMPTS[0], 20)
    assert len(made) == 2
    with pytest.raises(TypeError, match="float_copy must be True or False, got 'no'"):
        ml.generate(model, PROMPTS[0], 20, float_copy="no")


def test_the_memory_that_is_available(monkeypatch):
    assert cache_module._available_memory() > 10**6
    monkeypatch.setattr(cache_module, "Path", lambda _: open("/no/such/file"))
    assert cache_module._available_memory() == 4_000_000_000


def test_the_weights_of_a_merged_layer_stay_as_they_are():
    model = ml.merge_lora(ml.replace_linear_with_lora(ml.quantize(llama()), 2, 4))
    with Unpacked(model):
        layer = model.model.layers[0].self_attn.q_proj
        assert isinstance(layer.linear.weight, QuantizedParameter)


# ---- The model afterwards


@pytest.mark.parametrize("kind", ["plain", "lora", "qlora"])
def test_the_model_is_as_it_was(model, kind):
    adapted(model, kind)
    model.train()
    next(iter(model.named_children()))[1].eval()
    modes = [module.training for _, module in model.named_modules()]
    generate_batch(model, PROMPTS, 4)
    assert [module.training for _, module in model.named_modules()] == modes
    assert all(vars(module).get("_cache") is None for _, module in model.named_modules())
    ids = np.array(PROMPTS[2])[None]
    logits = model(ids)
    generate_batch(model, PROMPTS, 4)
    with pytest.raises(RuntimeError, match="backward needs a forward just before it"):
        model.backward(logits)


def test_a_stream_leaves_the_model_alone_between_tokens(model):
    tokens = sample_tokens(model, PROMPTS[0], 5, rng=1)
    first = next(tokens)
    assert first.shape == (1,)
    assert all(module.training for _, module in model.named_modules())
    ids = PROMPTS[2][None]
    logits = model(ids)
    tokens.close()
    model.backward(logits)
    two = list(sample_tokens(model, np.stack([PROMPTS[0]] * 2), 3))
    assert [token.shape for token in two] == [(2, 1)] * 3


def test_two_streams_in_turn(model):
    pairs = zip(sample_tokens(model, PROMPTS[0], 8, rng=1),
                sample_tokens(model, PROMPTS[2], 8, rng=2), strict=True)
    both = [np.concatenate(tokens) for tokens in zip(*pairs, strict=True)]
    for prompt, seed, new in zip((PROMPTS[0], PROMPTS[2]), (1, 2), both, strict=True):
        assert np.array_equal(ml.generate(model, prompt, 8, rng=seed)[len(prompt):], new)


def test_a_token_that_is_yielded_may_be_changed(model):
    ids = np.stack([PROMPTS[0], PROMPTS[0] + 1])
    expected = ml.generate(model, ids, 6, rng=0)[:, 3:]
    found = []
    for token in sample_tokens(model, ids, 6, rng=0):
        found.append(token.copy())
        token[...] = 0
    assert np.array_equal(np.concatenate(found, axis=1), expected)


# ---- Errors


def test_errors(model):
    one = np.array([1])
    for prompts, error, words in (
        ([one, np.zeros(0, int)], ValueError, r"prompt 1 must be \(T,\) with T at least 1"),
        (one, ValueError, r"prompt 0 must be \(T,\)"),
        ([one, np.array([[1]])], ValueError, r"got \(1, 1\)"),
        ([np.array([3, 50])], ValueError, r"id 50 at \(1,\) is not in 0..49"),
        ([np.array([-1])], ValueError, "id -1"),
        ([np.array([1.0])], TypeError, "integers"),
    ):
        with pytest.raises(error, match=words):
            generate_batch(model, prompts, 2)
    for arguments, error, words in (
        ({"stop": 50}, ValueError, r"stop id 50 at \(\) is not in 0..49"),
        ({"stop": [1.5]}, TypeError, "stop ids must be integers"),
        ({"temperature": -1.0}, ValueError, "temperature"), ({"top_k": 0}, ValueError, "top_k"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, TypeError, "whole number, got 1.5"),
    ):
        with pytest.raises(error, match=words):
            generate_batch(model, **({"prompts": [one], "max_new_tokens": 2} | arguments))
    with pytest.raises(ValueError, match="id 50"):
        ml.generate(model, np.array([50]), 2)


def test_no_prompts_or_no_tokens(model):
    assert generate_batch(model, [], 5) == []
    assert [len(new) for new in generate_batch(model, PROMPTS, 0)] == [0, 0, 0, 0]


def test_a_classifier_and_nan(model):
    model.lm_head = ml.Linear(32, 2, dtype=np.float64)
    with pytest.raises(ValueError, match="head has 2 outputs, not one for each of 50 tokens"):
        generate_batch(model, PROMPTS, 3)
    model.lm_head = ml.Linear(32, 50, dtype=np.float64)
    model.lm_head.weight.data[3, 4] = np.nan
    with pytest.raises(FloatingPointError, match="logits are nan"):
        generate_batch(model, PROMPTS, 3)
    assert all(module.training for _, module in model.named_modules())
