import contextlib
import dataclasses
import io
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import tiny_config

import minilora as ml
from minilora.train import loop as training
from minilora.train import parallel, progress
from minilora.train.loop import evaluate, fit
from minilora.train.parallel import DataParallel, replicate


def batches_of(ids, n=1000):
    return [(ids, np.roll(ids, -1, axis=1))] * n


def test_fit_lowers_the_loss_and_records_it(tiny_gpt, ids):
    batches = batches_of(ids)
    optimizer = ml.AdamW(tiny_gpt.parameters(), lr=1e-2)
    history = fit(tiny_gpt, batches, optimizer, 50, validation=batches[:1], validate_every=20,
                  progress=False)
    assert history.steps == list(range(50)) and len(history.losses) == len(history.seconds) == 50
    assert history.losses[-1] < 0.5 * history.losses[0]
    assert history.validation_steps == [0, 20, 40, 50]
    assert history.validation_losses[0] == pytest.approx(history.losses[0], rel=1e-5)
    assert history.validation_losses[-1] == pytest.approx(evaluate(tiny_gpt, batches[:1]), rel=1e-6)
    n = tiny_gpt.num_parameters()
    assert history.bytes == {"gradients": 4 * n, "optimizer": 8 * n}
    assert all(p.grad is None for p in tiny_gpt.parameters())
    assert all(np.diff(history.seconds) > 0)


def test_bytes_of_lora_are_those_of_a_and_b(tiny_gpt, ids):
    ml.replace_linear_with_lora(tiny_gpt, 2, 4)
    optimizer = ml.AdamW(tiny_gpt.parameters())
    history = fit(tiny_gpt, batches_of(ids), optimizer, 2, progress=False)
    n = tiny_gpt.num_parameters(trainable_only=True)
    assert history.bytes == {"gradients": 4 * n, "optimizer": 8 * n}


def test_clipping_bounds_the_step_of_all_parameters_together(ids):
    model = ml.GPT(tiny_config(), dtype=np.float64)
    before = model.state_dict()
    fit(model, batches_of(ids), ml.SGD(model.parameters(), lr=1.0), 1, clip_norm=0.01,
        progress=False)
    moved = [model.state_dict()[name] - before[name] for name in before]
    assert np.linalg.norm([np.linalg.norm(m) for m in moved]) == pytest.approx(0.01, rel=1e-12)


def test_fit_switches_dropout_on_and_evaluation_switches_it_off(ids):
    model = ml.GPT(tiny_config(dropout=0.5)).eval()
    batches = batches_of(ids, 3)
    plain = evaluate(model, batches)
    history = fit(model, batches, ml.SGD(model.parameters(), lr=0.0), 3, validation=batches,
                  validate_every=1, progress=False)
    assert history.validation_losses == pytest.approx([plain] * 4, rel=1e-6)
    assert len(set(history.losses)) == 3 and plain not in history.losses
    assert all(module.training for _, module in model.named_modules())


def test_schedule_and_end_of_the_batches(tiny_gpt, ids):
    optimizer = ml.SGD(tiny_gpt.parameters(), lr=9.0)
    history = fit(tiny_gpt, batches_of(ids, 3), optimizer, 10, progress=False,
                  schedule=lambda step: 0.1 / (1 + step))
    assert history.learning_rates == pytest.approx([0.1, 0.05, 0.1 / 3])


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_give_the_gradients_of_one(ids, threads):
    model = ml.GPT(tiny_config(), dtype=np.float64)
    targets = np.roll(ids, -1, axis=1)
    loss, dlogits = ml.cross_entropy(model(ids), targets)
    model.backward(dlogits)
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with DataParallel(model, threads) as twins:
        for _ in range(2):
            model.zero_grad()
            assert twins.loss_and_gradients(ids, targets) == pytest.approx(loss, rel=1e-12)
            for name, p in model.named_parameters():
                np.testing.assert_allclose(p.grad, expected[name], atol=1e-12)
        assert twins.mean_loss([(ids, targets)] * 3) == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("ignored", [[0, 1, 2, 3, 9], range(6), range(12), range(17)])
def test_threads_and_ignored_targets(ids, ignored):
    model = ml.GPT(tiny_config(), dtype=np.float64)
    targets = np.roll(ids, -1, axis=1)
    targets.flat[list(ignored)] = -100
    loss, dlogits = ml.cross_entropy(model(ids), targets)
    model.backward(dlogits)
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with DataParallel(model, 3) as twins:
        assert twins.loss_and_gradients(ids, targets) == pytest.approx(loss, rel=1e-12)
        for name, p in model.named_parameters():
            np.testing.assert_allclose(p.grad, expected[name], atol=1e-12)
        assert twins.mean_loss([(ids, targets)]) == pytest.approx(loss, rel=1e-12)
        with pytest.raises(ValueError, match="not ignore_index"):
            twins.loss_and_gradients(ids, np.full_like(targets, -100))


def test_batches_may_be_lists(tiny_gpt, ids):
    expected = evaluate(tiny_gpt, [(ids, ids), (ids[:1], ids[:1])])
    lists = [(ids.tolist(), ids.tolist()), (ids[:1].tolist(), ids[:1].tolist())]
    assert evaluate(tiny_gpt, lists, threads=2) == pytest.approx(expected, rel=1e-6)
    optimizer = ml.SGD(tiny_gpt.parameters(), lr=0.0)
    history = fit(tiny_gpt, lists[:1], optimizer, 1, threads=2, progress=False)
    assert history.losses[0] == pytest.approx(evaluate(tiny_gpt, lists[:1]), rel=1e-6)


def test_replicas_drop_different_things():
    model = ml.GPT(tiny_config(dropout=0.5))
    masks = [replicate(model).drop(np.ones((9, 9))) for _ in range(3)]
    assert not np.array_equal(masks[0], masks[1]) and not np.array_equal(masks[1], masks[2])


@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_loss_returns_is_not_changed(tiny_gpt, ids, threads):
    """It may be an array that the loss keeps and returns again, or that cannot be written to."""
    kept = np.ones((1, ids.shape[1], tiny_gpt.config.vocab_size), np.float32)

    def constant(model, ids, targets):
        model(ids)
        return np.float32(1.0), kept if threads == 2 else np.broadcast_to(kept, kept.shape)

    def own(model, ids, targets):
        return 1.0, np.ones_like(model(ids))

    changes = []
    for loss in (constant, own):
        model = replicate(tiny_gpt)
        with DataParallel(model, threads, loss) as both:
            for _ in range(3):
                model.zero_grad()
                assert both.loss_and_gradients(ids[:threads], ids[:threads]) == 1.0
        changes.append([p.grad for p in model.parameters()])
    assert (kept == 1.0).all()
    for got, expected in zip(*changes, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("returned, words", [
    (None, "NoneType"), (1.0, "float"), (("x", np.ones(1)), r"\(str, ndarray\)"),
    ((np.ones(2), np.ones(1)), r"\(ndarray, ndarray\)"), ((1.0, None), "array, got NoneType"),
    ((1.0,), r"\(float\)"),
])
def test_a_loss_must_return_a_number_and_its_gradient(tiny_gpt, ids, returned, words):
    optimizer = ml.SGD(tiny_gpt.parameters())
    with pytest.raises(TypeError, match=words) as error:
        fit(tiny_gpt, batches_of(ids), optimizer, 1, progress=False,
            loss=lambda model, ids, targets: returned)
    assert "loss" in str(error.value)
    if words != "array, got NoneType":  # an evaluation needs no gradient
        with pytest.raises(TypeError, match=words):
            evaluate(tiny_gpt, batches_of(ids, 1), loss=lambda model, ids, targets: returned)


def test_threads_share_the_batches_of_an_evaluation():
    used = set()

    class Spy(ml.Linear):
        def forward(self, x):
            used.add(threading.current_thread().name)
            return super().forward(x)

    x, targets = np.ones((2, 4, 3), np.float32), np.zeros((2, 4), int)
    for threads, count in ((1, 1), (2, 2)):
        used.clear()
        evaluate(Spy(3, 2, rng=0), [(x, targets)] * 4, threads)
        assert (threading.current_thread().name in used) == (threads == 1)
        assert 1 <= len(used) <= count


def test_threads_are_reproducible(ids):
    def run():
        model = ml.replace_linear_with_lora(ml.GPT(tiny_config(dropout=0.1)), 2, 4, rng=0)
        fit(model, batches_of(ids), ml.AdamW(model.parameters()), 5, threads=2, progress=False)
        return ml.lora_state_dict(model)

    one, two = run(), run()
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_replicas_share_weights_and_nothing_else(ids):
    model = ml.GPT(tiny_config(dropout=0.5))
    model.backward(model(ids))
    model(ids)
    twin = replicate(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.data is q.data and p is not q and q.grad is None
    assert all(module._cache is None for _, module in twin.named_modules())
    assert model.h[0].attn._cache is not None
    model.zero_grad()
    assert not np.array_equal(twin.drop(np.ones((9, 9))), model.drop(np.ones((9, 9))))
    twin.backward(twin(ids))
    assert all(p.grad is None for p in model.parameters())


def test_nan_stops_with_step_and_learning_rate(tiny_gpt, ids):
    tiny_gpt.wte.weight.data[0, 0] = np.nan
    before = tiny_gpt.state_dict()
    with pytest.raises(FloatingPointError, match="nan at step 0 with learning rate 0.001"):
        fit(tiny_gpt, batches_of(np.zeros_like(ids)), ml.AdamW(tiny_gpt.parameters()), 5,
            progress=False)
    assert all(np.array_equal(a, before[n], equal_nan=True)
               for n, a in tiny_gpt.state_dict().items())


def test_ctrl_c_returns_what_was_done(tiny_gpt, ids):
    def batches():
        yield from batches_of(ids, 4)
        raise KeyboardInterrupt

    history = fit(tiny_gpt, batches(), ml.AdamW(tiny_gpt.parameters()), 10, progress=False)
    assert history.interrupted and history.steps == [0, 1, 2, 3]


@pytest.mark.parametrize("steps", [0, -3])
def test_bad_steps(tiny_gpt, ids, steps):
    with pytest.raises(ValueError, match=f"^fit: steps must be 1 or more, got {steps}"):
        fit(tiny_gpt, batches_of(ids), ml.AdamW(tiny_gpt.parameters()), steps)


def test_a_frozen_model_cannot_be_trained(tiny_gpt, ids):
    optimizer = ml.AdamW(tiny_gpt.parameters())
    with pytest.raises(ValueError, match="every parameter of the model is frozen"):
        fit(tiny_gpt.freeze(), batches_of(ids), optimizer, 5)


def test_an_optimizer_that_would_train_nothing(tiny_gpt, ids):
    too_early = ml.AdamW(tiny_gpt.parameters())
    ml.replace_linear_with_lora(tiny_gpt, 2, 4)
    with pytest.raises(ValueError, match="make it after replace_linear_with_lora"):
        fit(tiny_gpt, batches_of(ids), too_early, 5)


def test_what_the_optimizer_does_not_hold_gathers_no_gradient(tiny_gpt, ids):
    head_only = ml.SGD(tiny_gpt.lm_head.parameters(), lr=1e-9)
    norms = []
    real = training.clip_grad_norm

    def spy(parameters, max_norm):
        norms.append(real(parameters, max_norm))

    training.clip_grad_norm, kept = spy, training.clip_grad_norm
    try:
        fit(tiny_gpt, batches_of(ids), head_only, 4, clip_norm=1e9, progress=False)
    finally:
        training.clip_grad_norm = kept
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-3)
    assert all(p.grad is None for p in tiny_gpt.parameters())


def test_ids_and_targets_of_different_batches(tiny_gpt, ids):
    optimizer = ml.SGD(tiny_gpt.parameters())
    for threads in (1, 2):
        with pytest.raises(ValueError, match="differ in batch size"):
            fit(tiny_gpt, [(ids, ids[:2])], optimizer, 1, threads=threads, progress=False)


def test_the_loss_is_validated_every_100_steps_by_default():
    x, targets = np.ones((4, 3), np.float32), np.zeros(4, int)
    model = ml.Linear(3, 2, rng=0)
    history = fit(model, [(x, targets)] * 101, ml.SGD(model.parameters()), 101,
                  validation=[(x, targets)], progress=False)
    assert history.validation_steps == [0, 100, 101]


def test_validate_every_below_one(tiny_gpt, ids):
    with pytest.raises(ValueError, match="validate_every must be 1 or more, got 0"):
        fit(tiny_gpt, batches_of(ids), ml.AdamW(tiny_gpt.parameters()), 5, validate_every=0)


def test_evaluate_weighs_batches_by_size_and_needs_one(tiny_gpt, ids):
    one, two = batches_of(ids)[0], batches_of(ids[:1])[0]
    expected = (3 * evaluate(tiny_gpt, [one]) + evaluate(tiny_gpt, [two])) / 4
    assert evaluate(tiny_gpt, [one, two]) == pytest.approx(expected)
    assert tiny_gpt.training
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate(tiny_gpt, [])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_progress_bar_is_for_terminals_and_can_be_switched_off(tiny_gpt, ids, monkeypatch):
    def shown(stream, **given):
        monkeypatch.setattr(sys, "stderr", stream)
        fit(tiny_gpt, batches_of(ids), ml.AdamW(tiny_gpt.parameters()), 3, **given)
        return stream.getvalue()

    assert not shown(Terminal(), progress=False) and not shown(io.StringIO())
    text = shown(Terminal(), description="a run")
    assert "a run:   0%" in text and "0/3 [" in text and "?step/s" in text
    assert "\n" not in text, "the bar vanishes when it is done"
    monkeypatch.setitem(sys.modules, "ipykernel", None)
    assert "0/3 [" in shown(io.StringIO()), "in a notebook, stderr is no terminal"
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    fit(tiny_gpt, batches_of(ids), ml.AdamW(tiny_gpt.parameters()), 1)


def test_the_progress_bar_has_one_step_for_each_of_the_run_and_its_loss(tiny_gpt, ids, monkeypatch):
    calls = []

    class Bar(contextlib.nullcontext):
        def update(self, loss, tokens):
            calls.append((loss, tokens))

        def __enter__(self):
            return self

    monkeypatch.setattr(training, "Bar", lambda *given: calls.append(given) or Bar())
    history = fit(tiny_gpt, batches_of(ids), ml.AdamW(tiny_gpt.parameters()), 2)
    assert calls[0] == (0, 2, "", True)
    assert calls[1:] == [(loss, ids.size) for loss in history.losses]
    fit(tiny_gpt, batches_of(ids), ml.AdamW(tiny_gpt.parameters()), 3, history=history)
    assert calls[3] == (2, 3, "", True) and len(calls) == 5


def test_the_bar_shows_loss_and_tokens_a_second(monkeypatch):
    clock = iter([100.0, 102.0])
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.Bar(4, 10, "x", True) as bar, monkeypatch.context() as patch:
        patch.setattr(progress.time, "perf_counter", lambda: next(clock))
        bar._start = next(clock)
        bar.update(1.5, 3000)
        assert "loss 1.500, 1,500 tokens/s" in bar._bar.postfix and bar._bar.n == 5


def test_a_run_in_parts_is_bit_for_bit_the_run_in_one(ids):
    """Dropout included, if the states of model, optimizer and random generators are put back."""
    def made():
        model = ml.replace_linear_with_lora(ml.GPT(tiny_config(dropout=0.2)), 2, 4, rng=1)
        return model, ml.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)

    given = {"schedule": ml.cosine_schedule(1e-2, 7), "threads": 2, "progress": False,
             "validation": batches_of(ids, 1), "validate_every": 2}
    model, optimizer = made()
    whole = fit(model, batches_of(ids) * 7, optimizer, 7, **given)

    model2, optimizer2 = made()

    def stop(history):
        if len(history.steps) == 3:
            raise KeyboardInterrupt

    part = fit(model2, batches_of(ids) * 7, optimizer2, 7, after_step=stop, **given)
    assert part.interrupted and len(part.steps) == 3 and part.validation_steps == [0, 2]
    model3, optimizer3 = made()
    model3.load_state_dict(model2.state_dict())
    optimizer3.load_state_dict(optimizer2.state_dict())
    for (_, old), (_, new) in zip(model2.named_modules(), model3.named_modules(), strict=True):
        if isinstance(old, ml.Dropout):
            new.rng.bit_generator.state = old.rng.bit_generator.state
    rest = fit(model3, batches_of(ids) * 4, optimizer3, 7, history=part, **given)
    assert rest is part and not rest.interrupted
    for name in ("steps", "losses", "learning_rates", "validation_steps", "validation_losses"):
        assert getattr(rest, name) == getattr(whole, name), name
    for (name, p), (_, q) in zip(model.named_parameters(), model3.named_parameters(), strict=True):
        assert np.array_equal(p.data, q.data), name


def test_a_record_that_has_all_steps_is_left_as_it_is(tiny_gpt, ids):
    optimizer = ml.AdamW(tiny_gpt.parameters())
    given = {"validation": batches_of(ids, 1), "progress": False}
    history = fit(tiny_gpt, batches_of(ids), optimizer, 1, **given)
    before = dataclasses.asdict(history)
    again = fit(tiny_gpt, batches_of(ids), optimizer, 1, history=history, **given)
    assert dataclasses.asdict(again) | {"bytes": 0} == before | {"bytes": 0}


def test_seconds_count_from_the_start(monkeypatch):
    clock = iter([100.0, 102.5, 103.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    history = ml.History()
    history.add(0, 2.0, 0.1)
    history.add(1, 1.0, 0.1)
    assert history.seconds == [2.5, 3.0]
    clock = iter([200.0, 201.0])
    later = ml.History(seconds=history.seconds)
    later.add(2, 1.0, 0.1)
    assert later.seconds == [2.5, 3.0, 4.0]


def test_threads_below_one(tiny_gpt):
    for use in (lambda: DataParallel(tiny_gpt, 0), lambda: evaluate(tiny_gpt, [], threads=0),
                lambda: fit(tiny_gpt, [], ml.SGD(tiny_gpt.parameters()), 1, threads=0)):
        with pytest.raises(ValueError, match="^DataParallel: threads must be 1 or more, got 0"):
            use()


def test_blas_keeps_to_one_thread_while_there_are_others(monkeypatch):
    asked = []
    monkeypatch.setattr(parallel, "blas_threads",
                        lambda n: asked.append(n) or contextlib.nullcontext())
    monkeypatch.setattr(parallel, "ThreadPoolExecutor",
                        lambda n: asked.append(f"pool of {n}") or ThreadPoolExecutor(n))
    x, targets = np.ones((6, 3), np.float32), np.zeros(6, int)
    for threads, expected in ((1, []), (2, [1, "pool of 4"]), (6, [1, "pool of 6"])):
        asked.clear()
        with DataParallel(ml.Linear(3, 2, rng=0), threads) as twins:
            for _ in range(2):
                twins.loss_and_gradients(x, targets)
            assert len(twins.models) == threads and asked == expected


def test_glibc_is_told_to_keep_memory_on_linux_only(monkeypatch):
    told = []

    class Glibc:
        def mallopt(self, *setting):
            told.append(setting)

    def missing(name):
        raise OSError

    monkeypatch.setattr(parallel.sys, "platform", "linux")
    for library in (missing, lambda name: object(), lambda name: [Glibc(), None][name is not None]):
        monkeypatch.setattr(parallel.ctypes, "CDLL", library)
        parallel.keep_freed_memory()
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    assert told == [(M_TRIM_THRESHOLD, 2**30), (M_MMAP_THRESHOLD, 2**25)]
    monkeypatch.setattr(parallel.sys, "platform", "win32")
    parallel.keep_freed_memory()
    assert len(told) == 2


class Rebinding(ml.AdamW):
    """Puts a new array into a Parameter instead of changing the old one."""

    def update(self, p, g, group):
        p.data = p.data - group["lr"] * g


def test_an_optimizer_may_put_new_arrays_into_parameters(rng):
    batches = [(rng.integers(0, 11, (4, 6)), rng.integers(0, 11, (4, 6))) for _ in range(6)]
    losses = []
    for threads in (1, 2, 3):
        model = ml.GPT(tiny_config())
        history = ml.fit(model, batches, Rebinding(model.parameters(), 0.5), 6, threads=threads,
                         validation=batches[:2], validate_every=2, progress=False)
        losses.append(history.losses + history.validation_losses)
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-5)
    assert len(set(losses[0])) == len(losses[0])


def test_a_model_is_trained_by_one_fit_at_a_time(rng):
    model = ml.GPT(tiny_config())
    batch = rng.integers(0, 11, (2, 6)), rng.integers(0, 11, (2, 6))

    def nested():
        for _ in range(2):
            yield batch
            ml.fit(model, [batch], ml.SGD(model.parameters()), 1, progress=False)

    with pytest.raises(RuntimeError, match="is being trained already"):
        ml.fit(model, nested(), ml.SGD(model.parameters()), 2, progress=False)
    started, end = threading.Event(), threading.Event()

    def waiting():
        started.set()
        end.wait()
        yield batch

    thread = threading.Thread(target=ml.fit, args=(
        model, waiting(), ml.SGD(model.parameters()), 1), kwargs={"progress": False})
    thread.start()
    started.wait()
    with pytest.raises(RuntimeError, match="is being trained already"):
        ml.fit(model, [batch], ml.SGD(model.parameters()), 1, progress=False)
    end.set()
    thread.join()
    assert ml.fit(model, [batch], ml.SGD(model.parameters()), 1, progress=False).steps == [0]


def merged(model):
    ml.merge_lora(ml.replace_linear_with_lora(model, 2, 4, "k_proj", rng=0)).freeze()
    model.h[0].ln_1.unfreeze()


@pytest.mark.parametrize("change", [
    lambda model: model.unfreeze(),
    lambda model: (model.freeze(), model.h[1].unfreeze()),
    lambda model: setattr(model.h[1].ln_1, "eps", 0.5),
    lambda model: setattr(model.h[1].mlp, "up_proj", ml.Linear(8, 32, rng=5)),
    lambda model: setattr(model.h[0].attn.q_proj, "bias", None),
    lambda model: merged(model),
])
def test_a_model_that_is_changed_during_a_run(rng, change):
    """Replicas follow: two threads give what one gives."""
    ids, targets = rng.integers(0, 11, (2, 4, 6))
    found = []
    for threads in (1, 2):
        model = ml.GPT(tiny_config())
        model.wte.freeze(), model.h[0].freeze()
        with DataParallel(model, threads) as parallel:
            parallel.loss_and_gradients(ids, targets)
            model.zero_grad()
            change(model)
            loss = parallel.loss_and_gradients(ids, targets)
            evaluated = parallel.mean_loss([(ids, targets)] * 2)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                     | {"loss": loss, "evaluated": evaluated})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        np.testing.assert_allclose(found[1][name], expected, atol=1e-6, err_msg=name)
