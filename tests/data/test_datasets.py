"""One's own data, from files and from Python values, to batches of ids."""

import json
import os
import warnings

import numpy as np
import pytest
from helpers_llama import TOKENIZER

import minilora as ml
from minilora.data.answers import conversation_example
from minilora.data.chat import END, START
from minilora.data.datasets import as_dataset, load_data, to_evaluate
from minilora.data.encoded import Examples, Text
from minilora.data.tokenizer import plain, plain_with_warning

HI, YO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
BE = {"role": "system", "content": "Be brief."}


def write(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n\n" for row in rows), encoding="utf-8")
    return path


def test_a_text_file_is_read_as_it_is_but_for_line_ends_and_byte_order_mark(tmp_path):
    path = tmp_path / "notes.md"
    path.write_bytes("\ufeffÜber\r\nuns\rhier\n".encode())
    assert load_data(path) == ["Über\nuns\nhier\n"] == load_data(str(path))


def test_the_layouts_of_jsonl_are_all_read(tmp_path):
    rows = [{"prompt": "hi", "completion": "yo"}, {"prompt": [HI], "completion": [YO]},
            {"messages": [HI, YO], "id": 7}, {"messages": [BE, HI, YO, HI, YO]}]
    path = write(tmp_path / "a.jsonl", *rows)
    assert load_data(path) == [[HI, YO]] * 3 + [[BE, HI, YO, HI, YO]]
    assert load_data(write(tmp_path / "b.jsonl", {"text": "one"}, {"text": "é"})) == ["one", "é"]


def test_python_values_are_read_like_files():
    assert as_dataset("a text") == ["a text"] and as_dataset(["a", "b"]) == ["a", "b"]
    assert as_dataset([("hi", "yo"), ["hi", "yo"], [HI, YO], {"messages": [HI, YO]}]) == [
        [HI, YO]] * 4


def test_a_folder_is_read_in_order_without_hidden_files_and_with_a_warning_for_others(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.py").write_text("first = 1")
    (tmp_path / "a" / ".hidden").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "c.txt").write_text("no")
    (tmp_path / "empty.txt").write_text(" \n")
    assert load_data(tmp_path) == ["first = 1", "second"]
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "zeros").write_bytes(b"a\0b")
    with pytest.warns(UserWarning) as caught:
        assert load_data(tmp_path) == ["first = 1", "second"]
    assert [str(w.message).rpartition("/")[2] for w in caught] == [
        "picture.png is not text in UTF-8 (byte 0)", "zeros is not text: it has a zero byte"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with warnings.catch_warnings(), pytest.raises(ValueError, match="pipe is not a regular"):
            warnings.simplefilter("ignore")
            load_data(tmp_path / "pipe")
        with pytest.warns(UserWarning):
            assert len(load_data(tmp_path)) == 2


def test_a_folder_of_parts_has_a_training_and_a_test_part(tmp_path):
    write(tmp_path / "train.jsonl", {"text": "training"})
    (tmp_path / "notes.txt").write_text("not this")
    assert load_data(tmp_path) == ["training"] and to_evaluate(tmp_path) == tmp_path
    write(tmp_path / "valid.jsonl", {"text": "validation"})
    assert load_data(to_evaluate(tmp_path)) == ["validation"]
    write(tmp_path / "test.jsonl", {"text": "test"})
    assert load_data(to_evaluate(str(tmp_path))) == ["test"]
    assert to_evaluate(tmp_path / "notes.txt") == tmp_path / "notes.txt"


@pytest.mark.parametrize("line, words", [
    ("{", "line 3 is not JSON"), ("[1]", "line 3 must be a JSON object"),
    ("[" * 100_000, "line 3 is not JSON"), ('"text"', "must be a JSON object"),
    ('{"instruction": "a", "output": "b"}', "with 'instruction', 'output'; it needs \"prompt\""),
    ('{"prompt": "a", "completion": " "}', "line 3 has an empty answer"),
    ('{"prompt": "a", "completion": 3}', "role of system, user, assistant and a content that is"),
    ('{"prompt": 3, "completion": "b"}', "a content that is text, got"),
    ('{"messages": []}', "must be a list that is not empty"),
    ('{"messages": {"role": "user"}}', "must be a list that is not empty"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "line 3 has no answer"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "an answer must follow"),
    ('{"messages": [{"role": "tool", "content": "a"}]}', "'role': 'tool'"),
    ('{"messages": ["a"]}', "a message needs a role"),
    ('{"text": 3}', "line 3 is dict with 'text'"),
    ('{"text": "\\ud800"}', "line 3: '\\\\ud800' is a lone surrogate"),
    ('{"text": ""}', "has an empty text"), ('{"prompt": "a", "completion": "b"}', "1 texts and 1"),
])
def test_a_wrong_line_is_named(tmp_path, line, words):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=words) as error:
        load_data(path)
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < 400


@pytest.mark.parametrize("rows, words", [
    ([], "the data has no text"), ("", "an empty text"), ([1], "row 0 is int"),
    ([("a", "b", "c")], "row 0: a message needs"), (7, "must be a text or a list, got int"),
    (b"bytes", "got bytes"), (["a", [HI, YO]], "cannot be mixed"), ([None], "row 0 is NoneType")])
def test_wrong_values_are_named(rows, words):
    with pytest.raises(ValueError, match=words):
        as_dataset(rows)


def test_missing_and_empty_files_are_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="^there is no file or folder .*nowhere$"):
        load_data(tmp_path / "nowhere")
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).write_text("\n")
        with pytest.raises(ValueError, match=f"{name} has no text"):
            load_data(tmp_path / name)
    (tmp_path / "a.txt").write_bytes(b"abc\xe9")
    with pytest.raises(ValueError, match=r"a.txt is not text in UTF-8 \(byte 3\)"):
        load_data(tmp_path / "a.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder has no text"):
        load_data(tmp_path / "folder")


# ---- Characters


def test_characters_without_a_token_are_counted_and_named():
    with pytest.warns(UserWarning, match=(
            r"^2 of 23 characters \(8.70%\) are not among the 96 of this model, and are left out: "
            r"'Ü' 1, 'ß' 1; the language model smollm2 has tokens for all of them$")):
        assert plain_with_warning("Über die Straße, “so”\n\t") == plain("ber die Strae, \"so\"\n\t")
    with pytest.warns(UserWarning, match=r"^7 of .* \(0.70%\) .*: 'a\u0300'.*|, \.\.\.$") as caught:
        plain_with_warning("x" * 993 + "äöüßéèê")
    assert "smollm2" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plain_with_warning("plain “text”\t–") == plain("plain “text”\t–")


# ---- Conversations


def test_every_answer_of_a_conversation_is_a_target_and_nothing_else_is():
    ids, targets = conversation_example(TOKENIZER, [BE, HI, YO, HI, {**YO, "content": "bye"}])
    text = (f"{START}system\nBe brief.{END}\n{START}user\nhi{END}\n{START}assistant\nyo{END}\n"
            f"{START}user\nhi{END}\n{START}assistant\nbye{END}")
    assert TOKENIZER.decode(np.append(ids, TOKENIZER.encode(END))) == text
    wanted = targets != -100
    assert TOKENIZER.decode(targets[wanted]) == f"yo{END}bye{END}"
    np.testing.assert_array_equal(targets[:-1][wanted[:-1]], ids[1:][wanted[:-1]])


def test_a_conversation_without_a_system_message_has_that_of_the_template():
    ids, _ = conversation_example(TOKENIZER, [HI, YO])
    assert TOKENIZER.decode(ids).startswith(f"{START}system\nYou are a helpful AI assistant")


def test_conversations_that_are_too_long_are_cut_and_counted():
    short, long = [BE, HI, YO], [BE, {**HI, "content": "x" * 90}, YO]
    end = [BE, HI, {**YO, "content": "y" * 90}]
    with pytest.warns(UserWarning, match="^2 of 3 conversations are longer than 80 tokens: .* 1 "):
        found = Examples.encode([short, long, end], TOKENIZER, 80)
    assert [len(ids) for ids, _ in found.rows][1] == 80 and found.answers == ["yo", "y" * 90]
    assert TOKENIZER.decode(found.prompts[0]).endswith(f"hi{END}\n{START}assistant\n")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="within the first 9 tokens"):
        Examples.encode([short], TOKENIZER, 9)


def test_the_answer_to_compare_with_is_the_last_that_begins_within_the_context():
    messages = [BE, HI, YO, {**HI, "content": "x" * 90}, {**YO, "content": "never"}]
    with pytest.warns(UserWarning, match="1 of 1 conversations are longer"):
        found = Examples.encode([messages], TOKENIZER, 60)
    assert (found.questions, found.answers) == (["hi"], ["yo"])
    np.testing.assert_array_equal(found.prompts[0], TOKENIZER.chat(messages[:2]))


def test_some_conversations_are_held_out_at_random_and_none_is_in_both_parts():
    rows = [[BE, {**HI, "content": str(i)}, {**YO, "content": str(i)}] for i in range(20)]
    data = Examples.encode(rows, TOKENIZER, 100)
    training, held_out = data.split(0.1, seed=3)
    assert len(training.rows) == 18 and len(held_out.answers) == 2
    assert {*training.answers, *held_out.answers} == set(map(str, range(20)))
    assert data.split(0.1, seed=3)[1].answers == held_out.answers != data.split(0.1, 4)[1].answers
    assert len(training.evaluation(4)) == 5 and len(training.evaluation(4, 6)) == 2
    ids, targets = next(held_out.batches(8, seed=0))  # no more than there are
    assert len(ids) == len(targets) == 2
    with pytest.raises(ValueError, match="1 conversations are too few"):
        Examples.encode(rows[:1], TOKENIZER, 100).split(0.5)


# ---- Text


def test_a_text_is_split_at_its_end_and_read_in_windows_that_fit():
    text = Text.encode(["ab" * 50, "cd" * 50], ml.CharTokenizer(), 64)
    assert len(text.ids) == 202 and text.context_length == 64
    training, held_out = text.split(0.1)
    assert len(held_out.ids) == 20 and held_out.context_length == 19
    np.testing.assert_array_equal(np.append(training.ids, held_out.ids), text.ids)
    assert ml.CharTokenizer().decode(text.prompt) == "ab" * 16
    (ids, targets), = held_out.evaluation(16)
    assert ids.shape == (1, 19) and targets.tolist() == [held_out.ids[1:].tolist()]
    assert next(training.batches(5, 0))[0].shape == (5, 64)
    for short in ("a", "abc"):
        with pytest.raises(ValueError, match="too short"):
            Text.encode([short], ml.CharTokenizer(), 64).split(0.1)


def test_texts_of_a_language_model_are_separated_by_the_token_that_ends_one():
    text = Text.encode(["é", f"{END}"], TOKENIZER, 8)
    assert text.ids.tolist() == [*"é".encode(), TOKENIZER.eos, *END.encode(), TOKENIZER.eos]
