"""Odd data, folders, states and settings for the commands for one's own data."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers_llama import TOKENIZER, tiny_llama
from test_own_data import FILES, QUICK, data, factors, interrupted, llama, pairs, same, talk

import minilora as ml
from minilora.cli import main
from minilora.data.encoded import Examples
from minilora.files.safetensors import load_with_metadata, save_safetensors
from minilora.lab import finetune_run
from minilora.lab.finetune import kind_of
from minilora.lab.finetune_run import CHECKPOINT, STATE
from minilora.train import parallel

__all__ = ["data", "llama"]  # fixtures


# ---- Data


def test_a_run_without_held_out_data(tmp_path, data, llama, capsys):
    rows = [{"prompt": "a", "completion": "b"}]
    for number, source in enumerate((data, pairs(tmp_path / "p.jsonl", *rows))):
        arguments = ["--base", llama, "--steps", "2", "--val-fraction", "0", "--no-progress"]
        assert main(["finetune", source, "--out", str(tmp_path / str(number)), *arguments]) == 0
        assert "held-out" not in capsys.readouterr().out


def test_a_conversation_whose_last_answer_is_cut_off_is_asked_for_an_earlier_one(tmp_path, llama):
    def say(role, text):
        return {"role": role, "content": text}

    long = [say("user", "a"), say("assistant", "b"), say("user", "c" * 600), say("assistant", "d")]
    with pytest.warns(UserWarning, match="1 of 1 conversations are longer"):
        found = Examples.encode([long], TOKENIZER, 300)
    assert found.questions == ["a"] and found.answers == ["b"]
    assert np.array_equal(found.prompts[0], TOKENIZER.chat(long[:1]))
    path = pairs(tmp_path / "p.jsonl", *[{"messages": long}] * 2)
    assert main(["eval", path, "--base", llama]) == 0


def test_a_folder_of_texts_cannot_hold_the_result(tmp_path, data, capsys):
    (tmp_path / "link").symlink_to(tmp_path)
    for out in (tmp_path, tmp_path / "runs" / "x", tmp_path / "link" / "x"):
        assert main(["finetune", str(tmp_path), "--out", str(out), *QUICK]) == 2
        assert "would be among the data" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_only_models_of_characters_have_losses_by_character():
    config = replace(ml.load_base("small").config, vocab_size=258)
    assert kind_of(ml.GPT(config), ["text"]) == "text"
    assert kind_of(ml.load_base("small"), ["text"]) == "characters"


def test_a_language_model_of_characters_has_no_conversations(tmp_path, monkeypatch, capsys):
    config = ml.LlamaConfig(96, 32, 48, 2, 4, 2)
    ml.to_hf_llama(ml.Llama(config), tmp_path / "llama")
    base, path = str(tmp_path / "llama"), pairs(tmp_path / "p.jsonl",
                                                {"prompt": "a", "completion": "b"})
    assert talk(monkeypatch, capsys, ["hi"], "--base", base)[0] == 2
    assert main(["eval", path, "--base", base]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_a_perplexity_that_no_number_can_hold(tmp_path, data, capsys):
    model = tiny_llama(512)
    for p in model.parameters():
        p.data *= 30
    ml.to_hf_llama(model, tmp_path / "big")
    TOKENIZER.save(tmp_path / "big")
    assert main(["eval", data, "--base", str(tmp_path / "big")]) == 0
    assert "perplexity: inf" in capsys.readouterr().out


def test_more_threads_than_rows_cost_nothing(monkeypatch):
    copies = []
    monkeypatch.setattr(parallel, "replicate",
                        lambda model, real=parallel.replicate: copies.append(1) or real(model))
    batch = np.zeros((3, 8), int), np.zeros((3, 8), int)
    ml.evaluate(ml.load_base("small"), [batch], threads=10**30)
    assert len(copies) == 2


# ---- Settings of a file


@pytest.mark.parametrize("setting, value, words", [
    ("full", "no", '"no" is neither true nor false'), ("full", 1, "1 is neither true nor false"),
    ("rank", True, "true is of the wrong type"), ("rank", [1], "[1] is of the wrong type"),
    ("base", 5, "5 is of the wrong type"), ("target_modules", [1], "[1] is of the wrong type"),
    ("rank", 8.5, "'8.5' is not a whole number"), ("lr", float("nan"), "'nan' is not a number")])
def test_values_of_the_wrong_type(tmp_path, data, capsys, setting, value, words):
    config = pairs(tmp_path / "c.json", {setting: value})
    assert main(["finetune", data, "--out", str(tmp_path / "o"), "--config", config]) == 2
    assert f"c.json: {setting}: {words}" in capsys.readouterr().err


@pytest.mark.parametrize("setting, value, words", [
    ("full", "no", "must be True or False"), ("target_modules", "q_proj", "must be a list of"),
    ("lr", "x", "lr must be a number"), ("val_fraction", None, "val_fraction must be a number")])
def test_arguments_of_the_wrong_type(setting, value, words):
    model = ml.load_base("small")
    with pytest.raises(TypeError, match=words):
        ml.finetune(model, "some text", steps=1, progress=False, **{setting: value})
    assert not any("lora" in name for name, _ in model.named_parameters())


# ---- Folders


def test_overwriting_an_adapter_with_a_whole_model_leaves_no_adapter(tmp_path, data):
    out = tmp_path / "out"
    assert main(["finetune", data, "--out", str(out), *QUICK]) == 0
    assert main(["finetune", data, "--out", str(out), *QUICK, "--full", "--overwrite"]) == 0
    assert {p.name for p in out.iterdir()} == FILES - {
        "adapter_config.json", "adapter_model.safetensors"} | {"model.safetensors"}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "finetune.json"])
def test_a_folder_in_the_place_of_a_file_is_found_before_the_training(
    tmp_path, data, capsys, monkeypatch, name
):
    out = interrupted(tmp_path, data, monkeypatch)
    monkeypatch.setattr(ml.AdamW, "step", None)
    (tmp_path / "out" / name).mkdir()
    for arguments in (["--resume", out], [data, "--out", out, *QUICK, "--overwrite"]):
        assert main(["finetune", *arguments]) == 2
        assert f"{name} is a directory, not a file to write" in capsys.readouterr().err


def test_a_folder_with_a_space_can_be_pasted(tmp_path, data, capsys, monkeypatch):
    (tmp_path / "my runs").mkdir()
    interrupted(tmp_path / "my runs", data, monkeypatch)
    assert f"--resume '{tmp_path / 'my runs' / 'out'}'\n" in capsys.readouterr().out


# ---- Going on


def test_a_run_cannot_go_on_with_another_base(tmp_path, data, capsys, monkeypatch):
    model, path = ml.load_base("small"), tmp_path / "base.safetensors"
    ml.save_checkpoint(model, path)
    out = interrupted(tmp_path, data, monkeypatch, [*QUICK, "--base", str(path)])
    next(p for p in model.parameters() if len(p.shape) == 1).data += 1
    ml.save_checkpoint(model, path)
    assert main(["finetune", "--resume", out]) == 2
    assert "base.safetensors has changed since the run began" in capsys.readouterr().err


@pytest.mark.parametrize("threads", ["1", "3"])
@pytest.mark.parametrize("full", [[], ["--full"]])
def test_a_run_with_dropout_goes_on_in_the_same_bits(tmp_path, data, monkeypatch, threads, full):
    model = ml.load_base("small")
    dropping = ml.GPT(replace(model.config, dropout=0.2))
    for p, q in zip(dropping.parameters(), model.parameters(), strict=True):
        p.data[...] = q.data
    ml.save_checkpoint(dropping, tmp_path / "base.safetensors")
    options = [*QUICK, "--base", str(tmp_path / "base.safetensors"), "--threads", threads, *full]
    out, whole = interrupted(tmp_path, data, monkeypatch, options), str(tmp_path / "whole")
    assert main(["finetune", "--resume", out, "--no-progress"]) == 0
    assert main(["finetune", data, "--out", whole, *options]) == 0
    if full:
        one, other = (Path(p, "model.safetensors").read_bytes() for p in (out, whole))
        assert one == other
    else:
        assert same(out, whole)


STATES = {
    "no plan": lambda run, tensors: run["about"].pop("plan"),
    "no samples": lambda run, tensors: run["about"].pop("before"),
    "an unknown setting": lambda run, tensors: run["about"]["plan"].update(foo=1),
    "a record with gaps": lambda run, tensors: run["history"]["losses"].pop(),
    "a record that is none": lambda run, tensors: run["history"].update(steps=3),
    "a moment is gone": lambda run, tensors: tensors.pop("moment/3/1"),
    "endless steps": lambda run, tensors: run["steps"].update({"0": float("inf")}),
}


@pytest.mark.parametrize("change", STATES)
def test_a_state_that_is_wrong_is_one_sentence(tmp_path, data, capsys, monkeypatch, change):
    out = interrupted(tmp_path, data, monkeypatch)
    path = Path(out) / CHECKPOINT / STATE
    tensors, metadata = load_with_metadata(path)
    run = json.loads(metadata["run"])
    STATES[change](run, tensors)
    save_safetensors(path, tensors, {"run": json.dumps(run)})
    capsys.readouterr()
    assert main(["finetune", "--resume", out]) == 2
    error = capsys.readouterr().err
    assert f"{path} " in error and error.count("\n") == 1


def test_ctrl_c_after_the_last_step_says_how_to_go_on(tmp_path, data, capsys, monkeypatch):
    out, whole = str(tmp_path / "out"), str(tmp_path / "whole")

    def stop(*given):
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(finetune_run.plots, "save", stop)
        assert main(["finetune", data, "--out", out, *QUICK]) == 130
    assert "interrupted after 12 of 12 steps; to go on:" in capsys.readouterr().out
    assert main(["finetune", "--resume", out, "--no-progress"]) == 0
    assert main(["finetune", data, "--out", whole, *QUICK]) == 0 and same(out, whole)


def test_two_processes_may_end_the_same_run(tmp_path, data, monkeypatch):
    out = interrupted(tmp_path, data, monkeypatch)

    def write(path, *given, real=finetune_run.write_atomically):
        real(path, *given)
        if path.name == "finetune.json":
            shutil.rmtree(tmp_path / "out" / CHECKPOINT)

    monkeypatch.setattr(finetune_run, "write_atomically", write)
    assert main(["finetune", "--resume", out, "--no-progress"]) == 0 and factors(out)


# ---- Adapters


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 300, "\x1b[2J\n"])
def test_a_name_of_a_base_that_is_no_path(tmp_path, capsys, name):
    ml.save_adapter(ml.replace_linear_with_lora(ml.load_base("small"), 1, 1), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": name,
               "auto_mapping": {"minilora_held_out_loss": 10**400}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert main(["generate", "--adapter", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "which is not here: add --base" in error and "\x1b" not in error
    assert main(["list", str(tmp_path)]) == 0


def test_adapters_with_spaces_and_equals_signs(tmp_path, llama, monkeypatch, capsys):
    folder = tmp_path / "my task=1"
    ml.save_adapter(ml.replace_linear_with_lora(ml.from_hf_llama(llama), 1, 1), folder, base=llama)
    lines = ["/adapter none", "/adapter  my task=1 "]
    status, printed = talk(monkeypatch, capsys, lines, "--adapter", str(folder))
    assert status == 0 and "(with the adapter my task=1)" in printed.out
    status, printed = talk(monkeypatch, capsys, ["/adapter"], "--adapter", f"x={folder}")
    assert status == 0 and "* x" in printed.out


def test_standard_input_that_is_no_text_or_not_there(llama, monkeypatch, capsys):
    command = [sys.executable, "-m", "minilora", "chat", "--base", llama, "--tokens", "1"]
    done = subprocess.run(command, input=b"a\xff\n/adapter\n", capture_output=True, check=True,
                          env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"})
    assert done.stdout.endswith(b"* none\n") or done.stdout.endswith(b"* none\r\n")
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", "--base", llama]) == 2
    assert "no standard input" in capsys.readouterr().err
