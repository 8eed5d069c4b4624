"""Every wrong answer fails, most with a diagnosis; every right one passes."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from wrong_answers import RIGHT, WRONG, answers

from minilora import check
from minilora.exercises import engine
from minilora.exercises.grade import MODULES
from minilora.exercises.outcome import CheckFailed, run
from minilora.exercises.task import Mistake

WRONG_ONES = [(name, *pair) for name, pairs in WRONG.items() for pair in pairs]
RIGHT_ONES = [(name, *pair) for name, pairs in RIGHT.items() for pair in pairs]
TASKS = {thing.name: thing for module in MODULES for thing in vars(module).values()
         if isinstance(thing, engine.Task)}


def labels(rows):
    return [f"{name}-{words or 'unknown'}" for name, words, _ in rows]


@pytest.mark.parametrize("name, words, answer", WRONG_ONES, ids=labels(WRONG_ONES))
def test_wrong_answers_fail_with_the_diagnosis(name, words, answer):
    with pytest.raises(CheckFailed) as failure:
        getattr(check, name)(answer)
    text = str(failure.value)
    assert "not yet" in text and "Traceback" not in text
    assert words is None or words in text, text


@pytest.mark.parametrize("name, words, answer", RIGHT_ONES, ids=labels(RIGHT_ONES))
def test_right_answers_pass_whatever_their_style(name, words, answer):
    result = getattr(check, name)(answer)
    assert result.passed and "correct" in repr(result)


def test_there_are_enough_of_them():
    for name, pairs in WRONG.items():
        assert len(pairs) >= 8, name
        assert sum(words is not None for words, _ in pairs) >= 0.75 * len(pairs), name
        assert RIGHT[name], name
    assert set(WRONG) | {"train"} == set(check.__all__) - {
        "BUDGET", "BUDGET_GAIN", "TABLE", "CheckFailed", "Passed", "train_with"}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_no_known_mistake_is_right_and_each_is_told_from_the_others(task):
    """Each mistake of the catalogue fails as a whole answer, with a diagnosis of that output."""
    for i, output in enumerate(task.outputs):
        for mistake in task.mistakes[output]:
            def answer(*args, mistake=mistake, i=i):
                case = dict(zip(task.cases[0], args, strict=True))
                right = task.reference(**case)
                results = list(right) if isinstance(right, tuple) else [right]
                results[i] = mistake.makes(**case)
                return tuple(results) if len(results) > 1 else results[0]

            with pytest.raises(CheckFailed) as failure:
                engine.check(task, answer)
            assert f"{output} is wrong" in str(failure.value), mistake.says


def test_every_exercise_is_registered():
    names = [module.__name__.rpartition(".")[2] for module in MODULES]
    assert names == sorted(path.stem for path in Path(engine.__file__).parent.glob("e[0-9]*.py"))
    for name, module in zip(names, MODULES, strict=True):
        assert name.startswith(f"e{module.NUMBER:02d}_")
        assert set(module.DEFINED) <= set(check.__all__)


def test_the_tasks_are_those_of_the_exercises():
    assert set(TASKS) == {
        "linear_forward", "linear_backward", "cross_entropy", "lora_backward", "adamw_step",
        "layer_norm_backward", "attention_backward", "lora_parameters", "gpt_parameters"}


def test_the_reference_of_every_task_agrees_with_central_differences():
    for task in TASKS.values():
        result = engine.check(task, task.reference)
        assert result.passed
        if task.forward is not None:
            assert any(name.removeprefix("d") in task.cases[0] for name in task.outputs)


@pytest.mark.parametrize("name", [*WRONG, "train"])
def test_stubs_are_not_implemented_yet(name):
    def stub(*args):
        raise NotImplementedError

    class Stub:
        def __init__(self, *args):
            raise NotImplementedError

    given = Stub if name in ("lora_forward", "merge") else {} if name == "train" else stub
    with pytest.raises(CheckFailed, match="[Nn]ot implemented yet"):
        getattr(check, name)(given)


@pytest.mark.parametrize("name", [*WRONG, "train"])
@pytest.mark.parametrize("thing", [None, 3, "text", np.zeros(3)], ids=str)
def test_things_that_are_not_an_answer(name, thing):
    with pytest.raises(CheckFailed):
        getattr(check, name)(thing)


def test_an_error_is_shown_with_the_learners_line():
    (_, answer), = answers("x\ndef f(dout, x, W):\n    z = 1\n    return dout @ W.T, missing, z")
    with pytest.raises(CheckFailed, match="raised NameError: name 'missing'.*\nin line 3, in f"):
        check.linear_backward(answer)


def test_an_unknown_mistake_is_shown_on_the_smallest_shape():
    def answer(dout, x, W):
        db = dout.sum(0)
        db[0] += 0.5
        return dout @ W.T, x.T @ dout, db

    with pytest.raises(CheckFailed) as failure:
        check.linear_backward(answer)
    text = str(failure.value)
    assert "For dout (2, 2), x (2, 3), W (3, 2):" in text
    assert "expected db" in text and "1 of 2 entries differ: (0,)." in text


@pytest.mark.parametrize("page", ["README.md", "notebooks/README.md"])
def test_the_message_that_the_pages_quote(page):
    with pytest.raises(CheckFailed) as failure:
        check.lora_backward(lambda dout, x, A, B, scale: (
            scale * dout @ B.T @ A.T, x.T @ (dout @ B.T), scale * (x @ A).T @ dout))
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    assert f"```\n{failure.value}\n```" in text


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_shape_mistake_says_its_cause_first(task):
    def answer(*args):
        right = task.reference(*args)
        first, *rest = right if isinstance(right, tuple) else (right,)
        first = np.expand_dims(first, 0).repeat(2, axis=0)
        return (first, *rest) if rest else first

    with pytest.raises(CheckFailed) as failure:
        engine.check(task, answer)
    assert "its shape is (2, " in str(failure.value).split("\n")[1].replace("(2,)", "(2, )")


def test_an_error_on_other_shapes_is_said_before_numbers():
    with pytest.raises(CheckFailed) as failure:
        check.linear_forward(lambda x, W, b: x @ W + x.mean(axis=-1) + b)
    lines = str(failure.value).split("\n")
    assert "on other shapes your code fails" in lines[1] and "could not be broadcast" in lines[2]
    assert "keepdims=True" in lines[3] and len(lines) <= 9


def test_causes_that_the_outputs_do_not_tell_apart_are_all_said():
    task = TASKS["gpt_parameters"]
    two = {"count": [engine_mistake("it is one.", 1), engine_mistake("it is two.", 1)]}
    with pytest.raises(CheckFailed, match="it is one. Or: it is two."):
        engine.check(replace(task, mistakes=two), lambda *sizes: task.reference(*sizes) + 1)


def engine_mistake(says, more):
    return Mistake(says, lambda **case: TASKS["gpt_parameters"].reference(**case) + more)


def test_a_failure_is_shown_without_a_stack_trace_in_a_notebook():
    with pytest.raises(CheckFailed) as failure:
        check.linear_forward(lambda x, W, b: x @ W)
    assert failure.value._render_traceback_() == str(failure.value).split("\n")


def test_endless_recursion_is_one_sentence():
    def f(*args):
        return f(*args)

    with pytest.raises(CheckFailed, match="endlessly"):
        run("f", f)


# ---- 11


def test_training_within_the_budget():
    good = dict(rank=2, alpha=4, learning_rate=2e-2, target_modules=None)
    assert check.train(good).passed
    assert check.train(good | {"learning_rate": np.float32(0.01)}).passed
    for change, words in [
        ({"rank": 8}, "Over the budget: 18,432"), ({"learning_rate": 1e-3}, "full fine-tuning"),
        ({"learning_rate": 0.5}, "too high"), ({"learning_rate": -1}, "between 0 and 10"),
        ({"rank": 0}, "rank must be 1 or more"), ({"alpha": 0}, "alpha is 0"),
        ({"rank": 10**9}, "Over the budget"), ({"alpha": 1000}, "alpha / rank, is too high"),
        ({"target_modules": ["q_porj"]}, "q_proj"),
        ({"lr": 1}, "Unknown settings: lr"), ({"target_modules": ["q_proj"]}, "parameters"),
        ({"alpha": 0.1}, "alpha / rank is only 0.05"),
    ]:
        with pytest.raises(CheckFailed, match=words):
            check.train(good | change)
    with pytest.raises(CheckFailed, match="Missing in the settings: alpha"):
        check.train({"rank": 2, "learning_rate": 1})


def test_a_check_leaves_everything_as_it_was():
    tracemalloc.start()
    with np.errstate(all="raise"):
        for task in TASKS.values():
            engine.check(task, task.reference)
        assert np.geterr()["under"] == "raise"
    assert tracemalloc.is_tracing()
    tracemalloc.stop()
