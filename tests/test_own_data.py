"""The commands for one's own data: finetune, eval, chat, list."""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import many
from helpers_llama import TOKENIZER, tiny_llama

import minilora as ml
from minilora.cli import main
from minilora.data.corpus import module_source
from minilora.lab import chat, finetune_run
from minilora.lab.finetune_run import CHECKPOINT, STATE, Plan

CODE = module_source("bisect")
HI, YO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
FILES = {"adapter_config.json", "adapter_model.safetensors", "loss.png", "settings.json",
         "finetune.json"}
QUICK = ["--base", "small", "--steps", "12", "--batch-size", "4", "--context-length", "32",
         "--threads", "1", "--no-progress", "--save-every", "5"]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "notes.txt").write_text(CODE, encoding="utf-8")
    return str(tmp_path / "notes.txt")


@pytest.fixture
def llama(tmp_path):
    """The folder of a tiny Llama with its tokenizer."""
    ml.to_hf_llama(tiny_llama(512), tmp_path / "llama")
    TOKENIZER.save(tmp_path / "llama")
    return str(tmp_path / "llama")


def pairs(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def factors(folder):
    return ml.load_safetensors(f"{folder}/adapter_model.safetensors")


def same(one, other):
    """Whether two runs have the same result, but for seconds."""
    a, b = factors(one), factors(other)
    records = [json.loads((Path(folder) / "finetune.json").read_text()) for folder in (one, other)]
    for record in records:
        record["history"].pop("seconds")
    return records[0] == records[1] and a.keys() == b.keys() and all(
        np.array_equal(a[name], b[name]) for name in a)


# ---- finetune


def test_a_run_writes_everything_and_says_what_it_has_done(tmp_path, data, capsys):
    out = tmp_path / "out"
    assert main(["finetune", data, "--out", str(out), *QUICK, "--rank", "4"]) == 0
    text = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == FILES
    record = json.loads((out / "finetune.json").read_text())
    losses = record["history"]["validation_losses"]
    assert f"held-out loss: {losses[0]:.4f} before, {losses[-1]:.4f} after (nats per char" in text
    assert "trained 9,216 numbers, 8.4% of the base's 110,336" in text
    assert losses[-1] < losses[0] and len(record["history"]["losses"]) == 12
    (sample,) = record["samples"]
    assert f"before: {sample['before']!r}" in text and sample["before"] != sample["after"]
    settings = json.loads((out / "settings.json").read_text())
    assert settings["rank"] == 4 and settings["alpha"] == 8 and settings["lr"] == 1e-2
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "small" and config["r"] == 4
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    model = ml.load_adapter(ml.load_base("small"), out)
    assert len(ml.get_adapter(model).layers) == 12


def test_settings_can_be_read_from_a_file_and_the_command_line_counts_more(tmp_path, data, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["finetune", data, "--out", str(first), *QUICK, "--target-modules", "q_proj"]) == 0
    config = str(first / "settings.json")
    again = ["finetune", "--config", config, "--no-progress"]
    assert main([*again, "--out", str(second)]) == 0 and same(first, second)
    assert main([*again, "--out", str(tmp_path / "third"), "--rank", "2"]) == 0
    assert json.loads((tmp_path / "third" / "settings.json").read_text()) == json.loads(
        (first / "settings.json").read_text()) | {"rank": 2, "alpha": 16.0}


def test_full_fine_tuning_writes_a_model(tmp_path, data, llama, capsys):
    out = tmp_path / "full"
    assert main(["finetune", data, "--out", str(out), *QUICK, "--full"]) == 0
    assert "trained 110,336 numbers, 100.0%" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == FILES - {
        "adapter_config.json", "adapter_model.safetensors"} | {"model.safetensors"}
    assert main(["eval", data, "--base", str(out / "model.safetensors")]) == 0
    arguments = [*QUICK, "--base", llama, "--steps", "2", "--full"]
    assert main(["finetune", data, "--out", str(tmp_path / "l"), *arguments]) == 0
    assert main(["generate", "--base", str(tmp_path / "l" / "model"), "--tokens", "2"]) == 0


def test_conversations_are_learned_and_a_base_is_found_by_its_adapter(tmp_path, llama, capsys):
    rows = [{"prompt": "ab", "completion": "x"}, {"prompt": "cdcd", "completion": "y"}] * 4
    path, out = pairs(tmp_path / "p.jsonl", *rows), str(tmp_path / "out")
    arguments = ["--base", llama, "--steps", "5", "--lr", "0.01", "--no-progress"]
    assert main(["finetune", path, "--out", out, *arguments]) == 0
    text = capsys.readouterr().out
    assert "nats per token of the answers" in text and "'ab'\n    before: " in text
    assert main(["eval", path, "--adapter", out]) == 0
    text = capsys.readouterr().out
    assert "loss: " in text and re.search(r"exactly right: \d of 8\n$", text)
    loss = float(text.split()[1])
    assert f"perplexity: {np.exp(loss):.3g}"[:15] in text
    assert main(["generate", "--adapter", out, "--prompt", "ab", "--tokens", "3"]) == 0
    shutil.move(llama, tmp_path / "moved")
    assert main(["generate", "--adapter", out]) == 2
    assert "llama, which is not here: add --base with" in capsys.readouterr().err


def test_a_folder_of_parts_is_trained_validated_and_evaluated_on_its_parts(tmp_path, capsys):
    for name, letter in (("train", "abc"), ("valid", "bca"), ("test", "cab")):
        pairs(tmp_path / f"{name}.jsonl", {"text": letter * 100})
    assert main(["finetune", str(tmp_path), "--out", str(tmp_path / "out"), *QUICK]) == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["val"] == str(tmp_path / "valid.jsonl")
    capsys.readouterr()
    assert main(["eval", str(tmp_path), "--adapter", str(tmp_path / "out")]) == 0
    of_test = capsys.readouterr().out
    assert main(["eval", str(tmp_path / "test.jsonl"), "--adapter", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == of_test


def test_no_data_are_both_trained_and_validated_on(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    pairs(tmp_path / "data" / "valid.jsonl", {"text": "no train.jsonl is beside it, so it is all"})
    assert main(["finetune", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *QUICK]) == 0
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["val"] is None


def test_the_loss_of_eval_is_the_last_of_the_run(tmp_path, data, capsys):
    val = tmp_path / "val.txt"
    val.write_text(CODE[:400])
    out = str(tmp_path / "out")
    assert main(["finetune", data, "--val", str(val), "--out", out, *QUICK]) == 0
    capsys.readouterr()
    assert main(["eval", str(val), "--adapter", out, "--context-length", "32"]) == 0
    loss = json.loads((tmp_path / "out" / "finetune.json").read_text())["history"][
        "validation_losses"][-1]
    assert capsys.readouterr().out.startswith(f"loss: {loss:.4f} nats per character\n")
    assert main(["eval", str(val), "--adapter", out, "--context-length", "65"]) == 2
    assert "a context of 64 tokens, not of 65" in capsys.readouterr().err


def test_characters_that_are_left_out_are_one_line(tmp_path, capsys):
    (tmp_path / "über.txt").write_text(CODE + "Über\n" * 3000, encoding="utf-8")
    arguments = ["finetune", str(tmp_path / "über.txt"), "--out", str(tmp_path / "out"), *QUICK]
    assert main(arguments) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("minilora finetune: 3,000 of ") and "'Ü' 3,000; the language" in line


WRONG = [
    ([], "finetune needs DATA and --out DIR"), (["{data}"], "finetune needs DATA and --out DIR"),
    (["nowhere", "--out", "{out}"], "no file or folder nowhere\n"),
    (["{data}", "--out", "{data}"], "notes.txt is a file, not a folder"),
    (["{data}", "--out", "{full}"], "full has something in it already: add --overwrite to"),
    (["{data}", "--out", "{out}", "--base", "smal"], "did you mean 'small'?"),
    (["{data}", "--out", "{out}", "--target-modules", "q_porj"], "did you mean 'q_proj'"),
    (["{data}", "--out", "{out}", "--context-length", "129"], "a context of 128 tokens, not of"),
    (["{data}", "--out", "{out}", "--val", "nowhere"], "no file or folder nowhere\n"),
    (["{data}", "--out", "{out}", "--val", "{pairs}"], "prompts with answers need a language"),
    (["{pairs}", "--out", "{out}", "--base", "small"], "prompts with answers need a language"),
    (["{data}", "--out", "{out}", "--config", "nowhere"], "No such file or directory: nowhere"),
    (["{data}", "--out", "{out}", "--config", "{data}"], "is not JSON"),
    (["{data}", "--out", "{out}", "--config", "{config}"], "there is no setting 'rnak'; did you "),
    (["{data}", "--out", "{out}", "--config", "{wrong}"], "rank: '0' is not a whole number of 1"),
    (["{data}", "--out", "{out}", "--full", "--rank", "4"], "--rank means nothing with --full"),
    (["{data}", "--out", "{out}", "--val", "x", "--val-fraction", "0.2"], "--val-fraction means"),
    (["--resume", "nowhere"], "there is nothing to resume in nowhere: it has no checkpoint"),
    (["--resume", "{full}"], "there is nothing to resume in"),
    (["{data}", "--out", "{full}/x/y", "--lr", "1e30"], "the loss became"),
]


@pytest.mark.parametrize("arguments, words", WRONG)
def test_bad_input_is_one_sentence(tmp_path, data, capsys, arguments, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    names = {"data": data, "out": tmp_path / "out", "full": tmp_path / "full",
             "pairs": pairs(tmp_path / "p.jsonl", {"prompt": "a", "completion": "b"}),
             "config": pairs(tmp_path / "c.json", {"rnak": 3}),
             "wrong": pairs(tmp_path / "w.json", {"rank": 0})}
    if "the loss" in words:
        names["full"] = tmp_path / "other"
    given = [part.format(**names) for part in arguments]
    steps = [] if "--resume" in given else ["--steps", "3", "--no-progress", "--threads", "1"]
    assert main(["finetune", *given, *steps]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and len(error) < 300
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option, value", [
    ("rank", "0"), ("alpha", "-1"), ("lr", "nan"), ("steps", "1.5"), ("batch-size", "x"),
    ("context-length", "0"), ("val-fraction", "1"), ("seed", "-1"), ("threads", "0"),
    ("save-every", "-1"), ("target-modules", "a,,b"), ("base", ""), ("val", "")])
def test_bad_values_are_refused_before_anything_is_read(capsys, option, value):
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "nowhere", "--out", "x", f"--{option}={value}"])
    assert stop.value.code == 2 and f"argument --{option}: " in capsys.readouterr().err


def test_a_folder_is_not_overwritten_unless_that_is_asked_for(tmp_path, data, capsys):
    out = str(tmp_path / "out")
    assert main(["finetune", data, "--out", out, *QUICK]) == 0
    (tmp_path / "out" / "mine.txt").write_text("mine")
    before = factors(out)
    assert main(["finetune", data, "--out", out, *QUICK, "--seed", "1"]) == 2
    assert all(np.array_equal(before[name], a) for name, a in factors(out).items())
    assert main(["finetune", data, "--out", out, *QUICK, "--seed", "1", "--overwrite"]) == 0
    assert any((before[name] != a).any() for name, a in factors(out).items())
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert main(["finetune", data, "--out", str(tmp_path / "empty"), *QUICK]) == 0


# ---- Going on


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, data, capsys, monkeypatch):
    out = str(tmp_path / "out")
    monkeypatch.setattr(finetune_run, "save_state", stopping(finetune_run.save_state, calls=2))
    assert main(["finetune", data, "--out", out, *QUICK]) == 130
    printed = capsys.readouterr()
    assert "interrupted after 6 of 12 steps; to go on:" in printed.out
    assert f"    minilora finetune --resume {out}\n" in printed.out
    assert {p.name for p in (tmp_path / "out" / CHECKPOINT).iterdir()} == {
        STATE, "adapter_config.json", "adapter_model.safetensors"}
    assert main(["generate", "--adapter", f"{out}/{CHECKPOINT}", "--tokens", "1"]) == 0
    assert main(["finetune", data, "--out", out, *QUICK]) == 2
    assert f"or --resume {out} to go on" in capsys.readouterr().err
    assert main(["finetune", "--resume", out, "--no-progress"]) == 0
    assert main(["finetune", data, "--out", str(tmp_path / "whole"), *QUICK]) == 0
    assert same(out, tmp_path / "whole")
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES
    capsys.readouterr()
    assert main(["finetune", "--resume", out]) == 2
    assert "its run is complete" in capsys.readouterr().err


def test_full_fine_tuning_that_is_interrupted_names_no_adapter(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setattr(finetune_run, "save_state", stopping(finetune_run.save_state, calls=1))
    assert main(["finetune", data, "--out", str(tmp_path / "out"), *QUICK, "--full"]) == 130
    printed = capsys.readouterr().out
    assert "minilora finetune --resume" in printed and "adapter" not in printed


def stopping(function, calls):
    """A function that after some calls sends this process Ctrl-C."""
    count = [0]

    def call(*given):
        function(*given)
        count[0] += 1
        if count[0] == calls:
            signal.raise_signal(signal.SIGINT)

    return call


def test_after_a_second_ctrl_c_the_last_save_stands(tmp_path, data, capsys, monkeypatch):
    out, saves, updates = str(tmp_path / "out"), [], []

    def step(self, real=ml.AdamW.step):
        updates.append(1)
        for _ in range(2 * (len(updates) == 8)):
            signal.raise_signal(signal.SIGINT)
        real(self)

    def save(*given, real=finetune_run.save_state):
        real(*given)
        saves.append(len(given[3].steps))

    monkeypatch.setattr(ml.AdamW, "step", step)

    monkeypatch.setattr(finetune_run, "save_state", save)
    before = signal.getsignal(signal.SIGINT)
    assert main(["finetune", data, "--out", out, *QUICK]) == 130
    assert signal.getsignal(signal.SIGINT) is before and saves == [0, 5]
    assert "to go on from the last save:" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(["finetune", "--resume", out, "--no-progress"]) == 0
    assert main(["finetune", data, "--out", str(tmp_path / "whole"), *QUICK]) == 0
    assert same(out, tmp_path / "whole")


@pytest.mark.parametrize("change, words", [
    (["--rank", "3"], "began with --rank 8, and cannot go on with 3: leave it out"),
    (["--out", "elsewhere"], "--resume takes everything from its folder"),
    (["--overwrite"], "--resume takes everything from its folder"),
    (["--full"], "began with --full False"), (["other.txt"], "began with DATA /")])
def test_a_run_cannot_go_on_with_other_settings(tmp_path, data, capsys, monkeypatch, change, words):
    out = interrupted(tmp_path, data, monkeypatch)
    assert main(["finetune", "--resume", out, *change]) == 2
    assert words in capsys.readouterr().err
    same_options = [data, "--rank", "8", "--base", "small", "--out", out, "--no-progress"]
    assert main(["finetune", "--resume", out, *same_options]) == 0


def interrupted(tmp_path, data, monkeypatch, options=QUICK):
    with monkeypatch.context() as patch:
        patch.setattr(finetune_run, "save_state", stopping(finetune_run.save_state, calls=1))
        assert main(["finetune", data, "--out", str(tmp_path / "out"), *options]) == 130
    return str(tmp_path / "out")


def test_a_run_cannot_go_on_if_its_data_have_changed_or_its_state_is_damaged(
    tmp_path, data, capsys, monkeypatch
):
    out = interrupted(tmp_path, data, monkeypatch)
    with open(data, "a", encoding="utf-8") as file:
        file.write("more")
    assert main(["finetune", "--resume", out]) == 2
    assert "notes.txt has changed since the run began" in capsys.readouterr().err
    state = tmp_path / "out" / CHECKPOINT / STATE
    state.write_bytes(state.read_bytes()[:-9])
    assert main(["finetune", "--resume", out]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_goes_on_from_another_folder(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    interrupted(tmp_path, "notes.txt", monkeypatch)
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert main(["finetune", "--resume", "../out", "--no-progress"]) == 0


def test_kills_at_any_moment_lose_nothing(tmp_path, data):
    """Some processes are killed at random moments, and the run that goes on is the whole one."""
    command = [sys.executable, "-m", "minilora", "finetune"]
    options = [*QUICK, "--steps", "40", "--save-every", "3"]
    start = time.perf_counter()
    subprocess.run([*command, data, "--out", tmp_path / "whole", *options], check=True,
                   capture_output=True)
    most, out = time.perf_counter() - start, tmp_path / "out"
    draw, kills, states = random.Random(0), 0, set()
    while kills < many(3, 20):
        begun = (out / CHECKPOINT / STATE).exists()
        given = ["--resume", out, "--no-progress"] if begun else [
            data, "--out", out, *options, "--overwrite"]
        process = subprocess.Popen([*command, *given], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0.5, 1.0) * most)
        if process.poll() is None:
            process.kill()
            kills += 1
        _, error = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL if os.name == "posix" else 1), error
        if process.returncode == 0:
            assert same(out, tmp_path / "whole")
            shutil.rmtree(out)
        elif (out / CHECKPOINT / STATE).exists():
            ml.load_safetensors(out / CHECKPOINT / STATE)
            states.add((out / CHECKPOINT / STATE).read_bytes())
    if out.exists():
        given = ["--resume", out] if (out / CHECKPOINT / STATE).exists() else [
            data, "--out", out, *options, "--overwrite"]
        subprocess.run([*command, *given], check=True, capture_output=True)
        assert same(out, tmp_path / "whole")
        assert {p.name for p in out.rglob("*")} == FILES
    print(f"{kills} kills, {len(states)} different states")


# ---- list


def test_list_shows_adapters_of_all_kinds_and_what_is_damaged(tmp_path, data, capsys):
    assert main(["finetune", data, "--out", str(tmp_path / "a" / "mine"), *QUICK]) == 0
    loss = json.loads((tmp_path / "a" / "mine" / "finetune.json").read_text())["history"][
        "validation_losses"][-1]
    ml.save_adapter(ml.replace_linear_with_lora(tiny_llama(), 3, 6, ["v_proj"]), tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "c\x1b[2J")
    (tmp_path / "c\x1b[2J" / "adapter_model.safetensors").write_text("no")
    capsys.readouterr()
    assert main(["list", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [cell.strip() for cell in lines[2].split("|")][1:-1] == [
        "a/mine", "small", "8", "down_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        f"{sum(p.stat().st_size for p in (tmp_path / 'a' / 'mine').glob('adapter*')):,}",
        f"{loss:.4f}"]
    assert [cell.strip() for cell in lines[3].split("|")][1:4] == ["b", "", "3"]
    assert lines[4].startswith("c\\x1b[2J: ") and "\x1b" not in out
    assert main(["list", str(tmp_path / "b")]) == 0 and "| b " in capsys.readouterr().out
    (tmp_path / "nothing").mkdir()
    for folder, words in (("nothing", "no adapter in"), ("nowhere", "there is no folder")):
        assert main(["list", str(tmp_path / folder)]) == 2
        assert words in capsys.readouterr().err


# ---- chat


def talk(monkeypatch, capsys, lines, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    status = main(["chat", *arguments])
    return status, capsys.readouterr()


@pytest.fixture
def two(tmp_path, llama):
    """Two adapters that make the tiny Llama answer differently from the base."""
    for seed, name in enumerate(("one", "two")):
        model = ml.replace_linear_with_lora(ml.from_hf_llama(llama), 2, 4, rng=seed)
        rng = np.random.default_rng(seed)
        for path, p in model.named_parameters():
            if path.endswith("lora.B"):
                p.data += rng.standard_normal(p.shape)
        ml.save_adapter(model, tmp_path / name, base=llama)
    return str(tmp_path / "one"), str(tmp_path / "two")


def test_a_conversation_switches_between_adapters(llama, two, monkeypatch, capsys):
    lines = ["hi", "/clear", "/adapter two", "hi", "/clear", "/adapter none", "hi", "/clear",
             "/adapter", "/adapter one", "hi", "/quit", "never"]
    status, printed = talk(monkeypatch, capsys, lines, "--adapter", two[0], "--adapter", two[1],
                           "--tokens", "6", "--system", "")
    assert status == 0 and not printed.err

    def expected(adapter):
        model = ml.from_hf_llama(llama)
        if adapter:
            ml.load_adapter(model, adapter)
        ids = TOKENIZER.chat("hi", system=None)
        new, = ml.generate_batch(model, [ids], 6, stop=257)
        return TOKENIZER.decode(new, skip_special=True)

    one, other, base = expected(two[0]), expected(two[1]), expected(None)
    assert len({one, other, base}) == 3
    assert printed.out == (
        f"{one}\n(with the adapter two)\n{other}\n(the base, without an adapter)\n{base}\n"
        f"* none\n  one\n  two\n(with the adapter one)\n{one}\n")


def test_only_the_first_sign_separates_a_name_from_its_folder(tmp_path, two, monkeypatch, capsys):
    folder = str(tmp_path / "lr=0.1")
    shutil.copytree(two[0], folder)
    status, printed = talk(monkeypatch, capsys, ["/adapter"], "--adapter", f"mine={folder}")
    assert status == 0 and printed.out == "  none\n* mine\n" and not printed.err


def test_a_conversation_is_remembered_until_it_is_cleared(llama, monkeypatch, capsys):
    seen = []

    def tokens(model, ids, *given):
        seen.append(TOKENIZER.decode(ids))
        return iter(np.array([[byte] for byte in b"yo"]))

    monkeypatch.setattr(chat, "sample_tokens", tokens)
    status, printed = talk(monkeypatch, capsys, ["hi", "and?", "/clear", "hi"], "--base", llama,
                           "--system", "Be brief.")
    assert status == 0 and printed.out == "yo\nyo\nyo\n"
    assert seen[0] == seen[2] and "Be brief." in seen[0]
    assert seen[1].startswith(seen[0] + "yo<|im_end|>\n<|im_start|>user\nand?")


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(llama):
    model = tiny_llama(100)
    conversation = chat.Chat(model, TOKENIZER, None, max_new_tokens=2)
    for text in ("first", "second", "third"):
        "".join(conversation.answer(text))
    asked = [m["content"] for m in conversation.messages if m["role"] == "user"]
    assert asked[-1] == "third" and "first" not in asked
    with pytest.raises(ValueError, match="too long for the context of 100"):
        list(conversation.answer("x" * 90))
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == asked


def test_ctrl_c_stops_an_answer_but_not_the_conversation(llama, monkeypatch, capsys):
    def tokens(model, ids, *given):
        yield np.array([ord("a")])
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "sample_tokens", tokens)
    status, printed = talk(monkeypatch, capsys, ["hi", "hi"], "--base", llama)
    assert status == 0 and printed.out == "a ...\na ...\n"


def test_what_is_wrong_in_a_conversation_is_said_and_it_goes_on(llama, two, monkeypatch, capsys):
    lines = ["/adpater", "/adapter nowhere", "", "/help", f"/adapter {two[1]}", "x" * 600,
             "/adapter a b"]
    status, printed = talk(monkeypatch, capsys, lines, "--base", llama)
    out = printed.out.splitlines()
    assert status == 0 and out[0].startswith("(/adpater is not a command")
    assert out[1].startswith("(there is no adapter at nowhere") and "/quit" in printed.out
    assert "(with the adapter two)" in out and "too long for the context" in out[-2]


@pytest.mark.parametrize("arguments, words", [
    (["--base", "small"], "small is a GPT; chat needs a language model"),
    (["--base", "nowhere"], "nowhere"), (["--adapter", "nowhere"], "no adapter at"),
    (["--base", "{llama}", "--adapter", "none={one}"], "cannot have the name 'none'"),
    (["--base", "{llama}", "--adapter", "{one}", "--adapter", "{one}"], "'one' exists already"),
    (["--base", "{llama}", "--adapter", "{small}"], "was made for small, and does not fit"),
])
def test_a_conversation_that_cannot_begin_is_one_sentence(
    tmp_path, llama, two, monkeypatch, capsys, arguments, words
):
    ml.save_adapter(ml.replace_linear_with_lora(ml.load_base("small"), 1, 1), tmp_path / "small")
    given = [a.format(llama=llama, one=two[0], small=tmp_path / "small") for a in arguments]
    status, printed = talk(monkeypatch, capsys, ["hi"], *given)
    assert status == 2 and words in printed.err and printed.err.count("\n") == 1


def test_a_plan_is_the_same_after_it_was_written_down():
    plan = Plan.from_flat({"data": "x", "rank": 3, "target_modules": ("q_proj",), "full": True})
    flat = json.loads(json.dumps(plan.flat()))
    assert Plan.from_flat(flat).flat() == plan.flat() and flat["target_modules"] == ["q_proj"]


def test_warnings_of_a_command_do_not_change_those_of_others():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["count", "gpt2-xl"]) == 0
        warnings.warn("still here", stacklevel=1)
    assert len(caught) == 1
