"""Tasks, batches of answers, and lessons; on a tiny random Llama whose tokenizer knows bytes."""

import functools
import json

import numpy as np
import pytest
from helpers_llama import SPECIAL, TOKENIZER, tiny_llama

import minilora as ml
from minilora.cli import main
from minilora.data.answers import answer_loss, example, pad, shuffled_batches
from minilora.lab import tasks, teach

TWO = [("ab", "x"), ("cdcd", "y")]
SHORT = tasks.Task(TWO * 4, {"same": TWO}, "Say it.")


# ---- Tasks


def test_commands_are_different_and_their_answers_hold_what_was_said():
    task = tasks.commands()
    pairs = [*task.training, *(pair for kind in task.held_out.values() for pair in kind)]
    assert len(task.training) == 150 and len({prompt for prompt, _ in pairs}) == len(pairs) == 198
    for prompt, answer in pairs:
        assert json.dumps(call := json.loads(answer)) == answer
        said = [str(value).lower() for name, value in call.items() if name != "do"]
        assert all(value in prompt.lower() for value in said)
        assert prompt[0].isupper() and prompt[-1] in ".?"
    rooms = [{json.loads(answer).get("room") for _, answer in kind} - {None}
             for kind in (task.training, task.held_out["other rooms"])]
    assert rooms[0] <= set(tasks.ROOMS) and rooms[1] <= set(tasks.OTHER_ROOMS) and rooms[1]
    assert tasks.commands() == task and tasks.commands(seed=1) != task


def test_docstrings_are_of_the_standard_library_and_held_out_lines_are_new():
    task = tasks.docstrings()
    held_out = task.held_out["other functions"]
    assert len(task.training) == 400 and len(held_out) == 48 and not task.exact
    assert not {line for _, line in held_out} & {line for _, line in task.training}
    assert all(prompt.startswith("def ") and line[-1] == "." for prompt, line in held_out)


# ---- Batches of answers


def test_only_the_answer_has_targets():
    ids, targets = example(np.array([1, 2, 3]), np.array([4, 5]))
    assert ids.tolist() == [1, 2, 3, 4] and targets.tolist() == [-100, -100, 4, 5]
    inputs, padded = pad([(ids, targets), example(np.array([1]), np.array([9]))])
    assert inputs.tolist() == [[1, 2, 3, 4], [1, 0, 0, 0]]
    assert padded.tolist() == [[-100, -100, 4, 5], [9, -100, -100, -100]]
    for prompt, answer in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="at least one token"):
            example(np.array(prompt, int), np.array(answer, int))
    assert [array.tolist() for array in pad([([1, 2], [-100, 3])])] == [[[1, 2]], [[-100, 3]]]
    with pytest.raises(ValueError, match="at least one example"):
        pad([])
    with pytest.raises(ValueError, match="example 1 has 2 inputs, but 4 targets"):
        pad([(ids, targets), (ids[:2], targets)])


@pytest.mark.parametrize("ids, targets", [((2, 7), (2, 5)), ((2, 5), (2, 7)), ((2, 7), (7,))])
def test_answers_of_other_shapes_are_not_taken_for_those_of_the_ids(ids, targets):
    with pytest.raises(ValueError, match="inputs and targets must both be"):
        answer_loss(tiny_llama(), np.ones(ids, int), np.ones(targets, int))


def test_the_loss_of_answers_is_that_of_all_logits_at_the_same_places():
    model, rng = tiny_llama(), np.random.default_rng(0)
    ids = rng.integers(0, 258, (3, 9))
    targets = np.where(rng.random((3, 9)) < 0.4, rng.integers(0, 258, (3, 9)), -100)
    targets[:, -2:], targets[0, 0] = -100, 5
    whole, dlogits = ml.cross_entropy(model(ids), targets)
    model.backward(dlogits)
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    loss, dlogits = answer_loss(model, ids, targets)
    assert dlogits.shape == (np.count_nonzero(targets != -100), 258)
    assert loss == pytest.approx(whole, rel=1e-6)
    model.backward(dlogits)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.grad, expected[name], atol=1e-6, err_msg=name)


def test_a_batch_is_its_rows_alone():
    """The loss and gradient of a padded batch are the mean over the answers of its rows."""
    model = tiny_llama().astype(np.float64)
    rows = [example(np.arange(1, n), np.array([n, n + 1])) for n in (3, 6, 10)]
    loss, dlogits = answer_loss(model, *pad(rows))
    model.backward(dlogits)
    together = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    alone = []
    for row in rows:
        value, dlogits = answer_loss(model, *pad([row]))
        model.backward(dlogits / 3)
        alone.append(value)
    assert loss == pytest.approx(np.mean(alone))
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.grad, together[name], atol=1e-12, err_msg=name)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_answers_of_different_lengths(threads):
    model = tiny_llama()
    rows = [example(np.arange(1, n), np.arange(n // 3 + 1)) for n in (3, 6, 10, 4)]
    optimizer = ml.SGD(model.parameters(), lr=0.0)
    history = ml.fit(model, [pad(rows)], optimizer, 1, progress=False, loss=answer_loss,
                     threads=threads, validation=[pad(rows[:2]), pad(rows[2:])])
    expected, _ = answer_loss(model, *pad(rows))
    assert history.losses[0] == pytest.approx(expected, rel=1e-5)
    assert history.validation_losses[0] == pytest.approx(expected, rel=1e-5)


def test_shuffled_batches_use_all_before_any_again():
    rows = [example(np.array([1]), np.array([i])) for i in range(7)]
    batches = shuffled_batches(rows, 3, rng=0)
    for _ in range(3):  # an order has two batches, and leaves one example out
        seen = [t for _ in range(2) for t in next(batches)[1].ravel().tolist()]
        assert len(set(seen)) == 6
    with pytest.raises(ValueError, match="7 examples are too few for batches of 8"):
        next(shuffled_batches(rows, 8))


# ---- Lessons


@pytest.mark.parametrize("upper", [1, 2, 0])
def test_training_from_states_is_training_from_ids(upper):
    lesson = teach.Lesson(rank=2, alpha=4.0, upper=upper, steps=5, batch_size=4)
    model = tiny_llama()
    outcome = teach.teach(model, TOKENIZER, SHORT, lesson, threads=1, progress=False)
    other = tiny_llama()
    first = teach.adapt(other, lesson)
    assert first == (3 - upper if upper else 0)
    adapted = {name.split(".")[2] for name, _ in other.named_parameters() if ".lora." in name}
    assert adapted == {str(i) for i in range(first, 3)}
    rows = teach.examples(TOKENIZER, SHORT.training)
    trained = [p for p in other.parameters() if p.requires_grad]
    history = ml.fit(
        other, shuffled_batches(rows, 4, 0), ml.AdamW(trained, 2e-3, weight_decay=0.0), 5,
        schedule=ml.cosine_schedule(2e-3, 5, warmup=1), clip_norm=1.0, loss=answer_loss,
        progress=False, threads=1)
    np.testing.assert_allclose(outcome.history.losses, history.losses, rtol=1e-4)
    assert outcome.trained == sum(p.size for p in trained)
    assert outcome.history.validation_losses[-1] < outcome.history.validation_losses[0]


@pytest.mark.parametrize("kind", ["nf4", "q4_1", "int8", None])
def test_a_task_is_learned_on_four_bits(kind):
    model = tiny_llama() if kind is None else ml.quantize(tiny_llama(), kind)
    lesson = teach.Lesson(upper=0, steps=120, learning_rate=2e-2)
    outcome = teach.teach(model, TOKENIZER, SHORT, lesson, progress=False)
    assert teach.exact(outcome.answers["same"], SHORT.held_out["same"]) == 2
    record = teach.row("it", lesson, outcome, SHORT)
    assert json.loads(json.dumps(record)) == record | {"lesson": {
        **record["lesson"], "projections": list(lesson.projections)}}
    assert "\n| it " in teach.table([record]) and "2 of 2" in teach.table([record])


def test_exact_ignores_spaces_only():
    pairs = [("", '{"a": 1}')] * 3
    assert teach.exact(['{"a":  1}', '{"a": 2}', '{"a":\n1}'], pairs) == 2


def test_a_lesson_needs_a_language_model_and_that_many_blocks():
    with pytest.raises(TypeError, match="needs a language model, such as smollm2, not a GPT"):
        teach.teach(ml.load_base("small"), TOKENIZER, SHORT, teach.Lesson())
    with pytest.raises(ValueError, match="3 blocks: it has no upper 4"):
        teach.adapt(tiny_llama(), teach.Lesson(upper=4))


def test_ctrl_c_ends_a_lesson(monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(teach, "answer_loss", functools.partial(interrupted))
    with pytest.raises(KeyboardInterrupt):
        teach.teach(tiny_llama(), TOKENIZER, SHORT, teach.Lesson(upper=1), progress=False)


# ---- The command


@pytest.fixture
def folder(tmp_path):
    """A Llama as transformers would save it, with a tokenizer."""
    ml.to_hf_llama(tiny_llama(512), tmp_path / "base")
    letters = {i: chr(i) if 33 <= i < 127 or 161 <= i < 173 or 174 <= i else "" for i in range(256)}
    others = iter(range(256, 400))
    vocab = {letters[i] or chr(next(others)): i for i in range(256)} | SPECIAL
    added = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for text, i in SPECIAL.items()]
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps({
        "added_tokens": added, "normalizer": None, "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
            "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": []}}), encoding="utf-8")
    return tmp_path


def test_teach_writes_an_adapter_a_curve_and_the_answers(folder, capsys, monkeypatch):
    monkeypatch.setattr(teach, "ANSWER", 4)
    base, out = str(folder / "base"), folder / "out"
    arguments = ["teach", "--base", base, "--out", str(out), "--steps", "2", "--upper", "1",
                 "--rank", "2", "--batch-size", "4", "--no-progress"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "before:" in shown and "without the adapter, the answers are those from before" in shown
    assert "\n| commands |" in shown and "of 33" in shown and "of 15" in shown
    assert {path.name for path in out.iterdir()} == {"adapter", "loss.png", "teach.json"}
    record = json.loads((out / "teach.json").read_text())["rows"][0]
    assert record["lesson"]["alpha"] == 4.0 and len(record["answers"]) == 48
    model = ml.load_adapter(ml.from_hf_llama(base), out / "adapter")
    assert record["trained"] == model.num_parameters(trainable_only=True)
    assert main(["generate", "--base", base, "--adapter", str(out / "adapter"), "--prompt", "ab",
                 "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("ab")
    assert main(["generate", "--base", base, "--prompt", "ab" * 300, "--tokens", "3"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "600 tokens is longer than the context of 512" in shown.err
    assert main(["merge", base, str(out / "adapter"), str(folder / "merged")]) == 0
    ids = np.arange(8)[None]
    np.testing.assert_allclose(ml.from_hf_llama(folder / "merged")(ids), model(ids), atol=1e-4)


def test_a_study_has_a_row_for_each_lesson(folder, capsys, monkeypatch):
    monkeypatch.setattr(teach, "ANSWER", 2)
    monkeypatch.setattr(teach, "STUDY", {"one": teach.Lesson(upper=1, steps=1),
                                         "two": teach.Lesson(upper=2, steps=1, rank=1)})
    assert main(["teach", "--study", "--base", str(folder / "base"), "--no-progress",
                 "--out", str(folder / "out")]) == 0
    rows = json.loads((folder / "out" / "teach.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["one", "two"]
    assert teach.table(rows) in capsys.readouterr().out


@pytest.mark.parametrize("end", [KeyboardInterrupt, FloatingPointError("the loss became nan")])
def test_a_study_that_ends_early_keeps_the_lessons_that_are_complete(
    folder, capsys, monkeypatch, end
):
    monkeypatch.setattr(teach, "ANSWER", 2)
    lesson = teach.Lesson(upper=1, steps=1)
    monkeypatch.setattr(teach, "STUDY", {"one": lesson, "two": lesson})
    real, calls = teach.fit, []

    def fit(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise end
        return real(*args, **options)

    monkeypatch.setattr(teach, "fit", fit)
    given = ["teach", "--study", "--base", str(folder / "base"), "--no-progress", "--out"]
    assert main([*given, str(folder / "out")]) == (130 if end is KeyboardInterrupt else 2)
    rows = json.loads((folder / "out" / "teach.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["one"]
    assert teach.table(rows) in capsys.readouterr().out


@pytest.mark.parametrize("study", [[], ["--study"]])
def test_a_folder_that_cannot_be_written_is_found_before_the_training(
    folder, capsys, monkeypatch, study
):
    monkeypatch.setattr(teach, "fit", lambda *args, **options: pytest.fail("it was trained"))
    (folder / "out").write_text("a file")
    given = ["teach", "--base", str(folder / "base"), "--upper", "1", *study]
    assert main([*given, "--out", str(folder / "out")]) == 2
    error = capsys.readouterr().err
    assert str(folder / "out") in error and error.count("\n") == 1


@pytest.mark.parametrize(["arguments", "words"], [
    (["--base", "small"], "small is a GPT"),
    (["--upper", "4"], "the model has 3 blocks: it has no upper 4"),
    (["--upper", "1", "--projections", "q_porj"], "did you mean"),
])
def test_bad_lessons_are_one_sentence(folder, capsys, arguments, words):
    given = ["teach", "--base", str(folder / "base"), "--out", str(folder / "out"), *arguments]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (folder / "out").exists()
