"""BLAS keeps to one thread unless somebody says otherwise; our own threads when they pay."""

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import tiny_config

import minilora as ml
from minilora.train import blas, parallel
from minilora.train.parallel import DataParallel, can_start_threads, threads_that_pay

THREADS = """
import os{first}
before = dict(os.environ)
import minilora as ml
from threadpoolctl import threadpool_info
assert dict(os.environ) == before
{more}
print([pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"])
"""


def blas_threads_in_a_new_process(first="", more="", **variables):
    environment = {k: v for k, v in os.environ.items() if k not in blas.VARIABLES} | variables
    run = subprocess.run([sys.executable, "-c", THREADS.format(first=first, more=more)],
                         capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.skipif(blas._controller() is None, reason="no BLAS library that can be told")
@pytest.mark.parametrize("first", ["", ", numpy"])
def test_importing_minilora_leaves_blas_one_thread(first):
    assert blas_threads_in_a_new_process(first) == "[1]"


@pytest.mark.skipif(blas._controller() is None, reason="no BLAS library that can be told")
def test_whoever_wants_more_can_say_so():
    assert blas_threads_in_a_new_process(more="ml.set_blas_threads(2)") == "[2]"
    assert blas_threads_in_a_new_process(OPENBLAS_NUM_THREADS="2", OMP_NUM_THREADS="2") in (
        "[2]", "[1]")  # 1 on a machine with one core
    more = "with ml.blas_threads(2):\n    assert threadpool_info()[0]['num_threads'] == 2"
    assert blas_threads_in_a_new_process(more=more) == "[1]"


@pytest.mark.parametrize("bad, error, words", [
    (0, ValueError, "1 or more, got 0"), (-1, ValueError, "1 or more, got -1"),
    (1.5, TypeError, "whole number, got 1.5"), ("2", TypeError, "whole number, got '2'"),
    (None, TypeError, "whole number"), (True, TypeError, "whole number"),
])
def test_numbers_of_threads_that_are_none(bad, error, words):
    with pytest.raises(error, match=words):
        ml.set_blas_threads(bad)
    with pytest.raises(error, match=words), ml.blas_threads(bad):
        pass


def test_only_blas_is_told(monkeypatch):
    told = []

    class Controller:
        def limit(self, **limits):
            told.append(limits)
            return contextlib.nullcontext()

    monkeypatch.setattr(blas, "_controller", Controller)
    ml.set_blas_threads(np.int64(2))
    with ml.blas_threads(3):
        pass
    assert told == [{"limits": 2, "user_api": "blas"}, {"limits": 3, "user_api": "blas"}]


def test_without_threadpoolctl_nothing_happens(monkeypatch):
    monkeypatch.setattr(blas, "_controller", lambda: None)
    ml.set_blas_threads(2)
    with ml.blas_threads(2):
        pass


def test_threads_are_used_when_they_pay(monkeypatch):
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    small, base = ml.load_base("small"), ml.load_base()
    few, many = (np.zeros((b, 64), int) for b in (1, 64))
    assert threads_that_pay(ml.GPT(tiny_config()), [(few[:, :6], few[:, :6])]) == 1
    assert threads_that_pay(small, [(few, few)]) == 1
    assert threads_that_pay(base, [(many, many)]) == parallel.MOST_THREADS
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert threads_that_pay(base, [(many, many)]) == 1
    monkeypatch.delattr(parallel.os, "sched_getaffinity", raising=False)
    for cores, threads in ((3, 3), (None, 1)):
        monkeypatch.setattr(parallel.os, "cpu_count", lambda cores=cores: cores)
        assert threads_that_pay(base, [(many, many)]) == threads


def test_a_thread_pays_for_5e8_flops_of_6_for_each_parameter_and_token(monkeypatch):
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    model = ml.Linear(1000, 1000, bias=False)
    for tokens, threads in ((166, 1), (167, 2), (249, 2), (250, 3), (9999, 4)):
        batches = [(None, np.zeros((1, n))) for n in (100, tokens - 100)]
        assert threads_that_pay(model, batches) == threads, tokens


def test_xs_of_the_bench_stays_on_one_thread():
    from minilora.lab.bench import config_and_batch

    for size, pays in (("XS", False), ("S", True), ("M", True)):
        config, batch = config_and_batch(size)
        ids = np.zeros((batch, config.context_length), int)
        work = 6.0 * ml.GPT(config).num_parameters() * ids.size
        assert (work >= 2 * parallel.FLOPS_FOR_A_THREAD) == pays, size


def test_where_threads_cannot_be_had_there_is_one(monkeypatch, ids):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    model = ml.GPT(tiny_config())
    expected = ml.evaluate(model, [(ids, ids)] * 3, threads=1)
    can_start_threads.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(parallel.threading.Thread, "start", refuse)
            assert ml.evaluate(model, [(ids, ids)] * 3, threads=2) == expected
            with DataParallel(model, 3) as twins:
                twins.loss_and_gradients(ids, ids)
                assert len(twins.models) == 1
    finally:
        can_start_threads.cache_clear()
    assert can_start_threads()
