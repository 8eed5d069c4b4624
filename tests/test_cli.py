import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import minilora as ml
from minilora import cli
from minilora.cli import main
from minilora.files import bases, checkpoint
from minilora.files.bases import load_model
from minilora.lab import bench, compare, plots, pretrain


def test_compare_prints_the_table_and_writes_all(tmp_path, capsys):
    arguments = ["compare", "--quick", "--steps", "3", "--ranks", "2", "--out", str(tmp_path),
                 "--no-progress", "--threads", "1", "--target-modules", "q_proj,v_proj"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "LoRA r=2" in captured.out and "= base, exactly" in captured.out and not captured.err
    assert {p.name for p in tmp_path.iterdir()} == {
        "loss_curves.png", "parameters_against_loss.png", "where_the_bytes_go.png",
        "compare.json", "adapters",
    }
    settings = json.loads((tmp_path / "compare.json").read_text())["settings"]
    assert settings["base"] == "small" and settings["target_modules"] == ["q_proj", "v_proj"]
    out = ["--adapter", str(tmp_path / "adapters" / "r2-seed0"), "--base", "small"]
    assert main(["generate", "--prompt", "def ", "--tokens", "20", *out]) == 0
    assert capsys.readouterr().out.startswith("def ")


ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a clone, or no git"
)
@pytest.mark.parametrize("options", [[], ["--quick"], ["--out", "figures"]])
def test_git_ignores_what_compare_writes(options):
    """By default everything; in figures/, which the README shows, all but figures and numbers."""
    out = Path(cli.build_parser().parse_args(["compare", *options]).out)
    assert out == (Path("figures") if "--out" in options else Path("runs/compare"))
    written = [out / name for name in (*plots.COMPARISON, "compare.json")]
    adapters = [out / "adapters" / "r8-seed0" / "adapter_config.json"]
    ignored = adapters if "--out" in options else written + adapters
    paths = [path.as_posix() for path in written + adapters]
    run = subprocess.run(["git", "check-ignore", "--no-index", *paths],
                         cwd=ROOT, capture_output=True, text=True)
    if run.returncode == 128:
        pytest.skip(run.stderr)
    assert run.stdout.split() == [path.as_posix() for path in ignored], run.stderr


def test_compare_writes_below_the_working_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["compare", "--quick", "--steps", "2", "--ranks", "1", "--no-progress"]
    assert main([*arguments, "--target-modules", "q_proj"]) == 0
    assert "Written to runs/compare: loss_curves.png, " in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    assert (tmp_path / "runs" / "compare" / "adapters" / "r1-seed0").is_dir()


@pytest.mark.parametrize("command", ["compare", "pretrain"])
def test_threads_are_none_unless_given(command):
    parser = cli.build_parser()
    assert parser.parse_args([command]).threads is None is compare.Settings().threads
    assert parser.parse_args([command, "--threads", "3"]).threads == 3


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["compare", "--target-modules", "q_porj"], "did you mean 'q_proj'"),
        (["compare", "--quick", "--out", "/dev/null/x", "--steps", "2", "--no-progress"], "null"),
        (["generate", "--prompt", "h\u00e9"], "'\u00e9' at 1"),
        (["generate", "--prompt", ""], "the prompt is empty"),
        (["generate", "--adapter", "no/such"], "no/such"),
        (["generate", "--base", "tiny"], "'tiny' is neither a file or folder, nor one of base"),
        (["generate", "--base", "smal"], "did you mean 'small'"),
        (["generate", "--base", "."], ". is no model: it has no config.json"),
        (["generate", "--base", "no/such.safetensors"], "no/such.safetensors"),
        (["generate", "--base", __file__], "header claims"),
        (["pretrain", "--steps", "1", "--out", "."], ". is a directory"),
        (["info", "no/such"], "'no/such' is neither"), (["info", "bsae"], "did you mean 'base'"),
        (["info", "."], "neither an adapter nor a model: it has no adapter_config.json, and no"),
        (["info", __file__], "is no safetensors file, or a damaged one"),
        (["merge", "small", "no/such", "x"], "no/such"),
        (["count", "gpt2-xl", "--target-modules", "qproj"], "did you mean 'q_proj'"),
        (["bench", "--sizes", "XXL"], "XS, S, M, L, got 'XXL'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(capsys, arguments, words):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err and "Traceback" not in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["fly"], "'fly' is not among compare, "),
        (["compare", "--ranks", "0"], "'0' is not a whole number of 1 or more"),
        (["compare", "--ranks", "2,x"], "'x' is not a whole number"),
        (["compare", "--ranks", ""], "'' is not a whole number"),
        (["compare", "--threads", "0"], "'0' is not a whole number of 1 or more"),
        (["compare", "--steps", "-3"], "'-3' is not a whole number of 2 or more"),
        (["compare", "--lr", "nan"], "'nan' is not a number above 0"),
        (["compare", "--alpha", "0"], "'0' is not a number above 0"),
        (["pretrain", "--model", "big"], "'big' is not among base, small"),
        (["generate", "--temperature", "-1"], "'-1' is not a number above 0"),
        (["generate", "--temperature", "inf"], "'inf' is not a number"),
        (["bench", "--sizes", ","], "has an empty name"),
        (["generate", "--top-k", "0"], "'0' is not a whole number of 1"),
        (["generate", "--seed", "-1"], "'-1' is not a whole number of 0"),
        (["count", "gpt5"], "'gpt5' is not among gpt2-small"),
        (["count"], "required: model"), (["info", ""], "argument model: is empty"),
        (["merge", "base", "task", ""], "argument out: is empty"),
        (["bench", "--llm", "--sizes", "S"], "--sizes: not allowed with argument --llm"),
        # a word that is not known
        (["comapre"], "did you mean 'compare'?"), (["--versoin"], "did you mean '--version'?"),
        (["compare", "--rnaks", "2"], "there is no option --rnaks; did you mean '--ranks'?"),
        (["compare", "-ranks=2"], "there is no option -ranks; did you mean '--ranks'?"),
        (["compare", "--base", "bsae"], "'bsae' is not among base, small; did you mean 'base'?"),
        (["teach", "--task", "comands"], "did you mean 'commands'?"),
        (["count", "gpt2-xxl"], "did you mean 'gpt2-xl'?"),
        # not a complaint of what follows it, or of what is missing
        (["count", "--rnak", "8", "gpt2-xl"], "no option --rnak; did you mean '--rank'?"),
        (["check", "--jsno"], "there is no option --jsno; did you mean '--json'?"),
        (["--quick", "compare"], "minilora: error: there is no option --quick\n"),
        (["generate", "base"], "minilora generate: error: unexpected argument 'base'"),
        (["compare", "-1"], "minilora compare: error: unexpected argument '-1'"),
    ],
)
def test_bad_options_exit_2(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err
    assert err.startswith("usage: minilora") and len(re.findall("^minilora", err, re.M)) == 1


def test_what_begins_with_a_dash_may_be_a_value(capsys):
    arguments = "generate --base small --tok 1 --seed 0 --prompt".split()  # --tok is --tokens
    assert main([*arguments[:-1], "--prompt=--x"]) == 0
    assert capsys.readouterr().out.startswith("--x")
    assert main([*arguments, "-x y"]) == 0
    assert capsys.readouterr().out.startswith("-x y")


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"minilora {ml.__version__}\n"


def test_no_command_is_helped(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert err == cli.build_parser().format_help() and not out
    assert all(f"\n    {name} " in err for name in cli.COMMANDS)


@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_examples_are_shown_and_can_be_parsed(capsys, name):
    examples = cli.COMMANDS[name].examples if name else cli.EXAMPLES
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    shown = capsys.readouterr().out.partition("\n\nexamples:\n")[2].splitlines()
    assert shown[: len(examples)] == [f"  {example}" for example in examples]
    commands = []
    for example in examples:
        program, *arguments = shlex.split(example)
        commands.append(cli.build_parser().parse_args(arguments).command)
        assert program == "minilora" and len(example) < 80
    assert commands[:1] == [name] if name else len(set(commands)) == len(commands)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_can_complete_commands_and_options(tmp_path, shell):
    shtab = pytest.importorskip("shtab", reason="the extra 'completion' is not installed")
    script = shtab.complete(cli.build_parser(), shell=shell)
    assert all(name in script for name in cli.COMMANDS)
    assert "--target-modules" in script and "smollm2-135m" in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)


def test_pretrain_writes_a_checkpoint_that_generate_reads(tmp_path, capsys):
    out = str(tmp_path / "mine.safetensors")
    arguments = ["pretrain", "--model", "small", "--steps", "3", "--out", out, "--no-progress"]
    assert main(arguments) == 0
    assert "step     3:" in capsys.readouterr().out
    assert checkpoint.load_checkpoint(out).config == pretrain.RECIPES["small"].config
    assert main(["generate", "--base", out, "--tokens", "5", "--prompt", r"a\nb"]) == 0
    assert capsys.readouterr().out.startswith("a\nb")
    with pytest.raises(ValueError, match="recipe for base, small; got 'big'"):
        pretrain.pretrain("big", out)


def test_pretraining_that_is_interrupted_keeps_what_was_done(tmp_path, monkeypatch, capsys):
    def batches(*args, **options):
        yield np.zeros((2, 64), int), np.zeros((2, 64), int)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "random_batches", batches)
    out = tmp_path / "mine.safetensors"
    assert main(["pretrain", "--model", "small", "--out", str(out), "--no-progress"]) == 130
    assert "interrupted; written to" in capsys.readouterr().out and not out.exists()
    assert checkpoint.load_checkpoint(f"{out}.interrupted").num_parameters() == 110_336


def test_an_interrupted_comparison_leaves_the_earlier_result(tmp_path, monkeypatch, capsys):
    (tmp_path / "compare.json").write_text("an earlier result")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_method", interrupt)
    assert main(["compare", "--quick", "--out", str(tmp_path), "--no-progress"]) == 130
    assert (tmp_path / "compare.json").read_text() == "an earlier result"
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["compare", "--quick"], ["pretrain", "--model", "small"]])
def test_a_folder_that_cannot_be_written_is_found_before_the_training(
    tmp_path, monkeypatch, capsys, arguments
):
    def refuse(self, *args, **options):
        raise PermissionError(f"Permission denied: {self}")

    monkeypatch.setattr(compare, "fit", None)
    monkeypatch.setattr(pretrain, "fit", None)
    monkeypatch.setattr(Path, "touch", refuse)
    out = tmp_path if arguments[0] == "compare" else tmp_path / "x.safetensors"
    assert main([*arguments, "--out", str(out)]) == 2
    assert "Permission denied" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_a_file_called_base_does_not_take_the_shipped_model_s_place(
    tmp_path, monkeypatch, capsys, make
):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "base")
    assert load_model("base").num_parameters() == 822_016
    with pytest.raises((OSError, ValueError)):
        load_model("./base")
    assert main(["info", "base"]) == 0 and "822,016 numbers" in capsys.readouterr().out
    assert main(["info", "./base"]) == 2 and "base" in capsys.readouterr().err


def test_a_closed_pipe_is_not_an_ignored_exception():
    command = f"{sys.executable} -m minilora count gpt2-xl | true; exit ${{PIPESTATUS[0]}}"
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=buffered)
    assert run.returncode in (0, 141) and not run.stderr


def test_info_and_merge(tmp_path, capsys):
    model = ml.replace_linear_with_lora(ml.load_base("small"), 2, 4, "v_proj", rng=0)
    layer = model.h[1].attn.v_proj
    layer.lora.B.data += np.random.default_rng(0).standard_normal((2, 64))
    ml.save_adapter(model, tmp_path / "task")
    merged = str(tmp_path / "merged.safetensors")
    assert main(["info", str(tmp_path / "task")]) == 0
    out = capsys.readouterr().out
    assert "rank 2, alpha 4, scaling alpha/r = 2" in out and "2 layers, 512 parameters" in out
    assert main(["generate", "--base", str(tmp_path / "task")]) == 2
    assert "task is the folder of an adapter: it has no config.json" in capsys.readouterr().err
    norm = np.linalg.norm(layer.lora.delta_weight())
    assert f"h.1.attn.v_proj: {norm:.4g}  (64, 64)" in out and "h.0.attn.v_proj: 0  " in out

    assert main(["merge", "small", str(tmp_path / "task"), merged]) == 0
    assert "110,336 parameters" in capsys.readouterr().out
    ids = np.arange(20)[None]
    np.testing.assert_allclose(ml.load_checkpoint(merged)(ids), model(ids), atol=1e-5)
    assert main(["info", merged]) == 0
    out = capsys.readouterr().out
    assert "36 arrays, 110,336 numbers" in out and '"d_model": 64' in out


def test_count_prints_the_paper_s_number(capsys):
    assert main(["count", "gpt3-175b", "--rank", "4", "--target-modules", "q_proj,v_proj"]) == 0
    out = capsys.readouterr().out
    assert "18,874,368 parameters, 0.0108%" in out and "LoRA: 37,748,736 bytes" in out


def test_count_prints_the_bytes_of_a_4_bit_base(capsys):
    assert main(["count", "smollm2-135m"]) == 0
    out = capsys.readouterr().out
    assert "134,515,008 parameters" in out and "2,442,240 parameters, 1.8156%" in out
    assert "in 4 bits (NF4): 168,156,792 bytes" in out


def test_bench_prints_every_size_and_method(capsys):
    assert main(["bench", "--sizes", "XS", "--seconds", "0.01"]) == 0
    out = capsys.readouterr().out
    assert "| XS | full |" in out and "| XS | LoRA r=8 |" in out and "sgemm" in out


def test_bench_without_peers_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["bench", "--sizes", "XS", "--peers"]) == 2
    assert "pip install torch" in capsys.readouterr().err


def test_bench_really_trains():
    step = bench.minilora_step("XS", lora=True)
    model = step.__closure__[step.__code__.co_freevars.index("model")].cell_contents
    before = model.h[0].attn.q_proj.lora.B.data.copy()
    step()
    assert not np.array_equal(before, model.h[0].attn.q_proj.lora.B.data)


def test_ctrl_c_is_not_a_traceback(monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    command = cli.COMMANDS["generate"]._replace(run=interrupt)
    monkeypatch.setitem(cli.COMMANDS, "generate", command)
    assert main(["generate"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_python_m_minilora():
    command = [sys.executable, "-m", "minilora", "--help"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and "compare" in run.stdout


@pytest.mark.parametrize("module", ["minilora", "minilora.cli", "minilora.lab.plots"])
def test_importing_minilora_is_light(module):
    code = (
        f"import sys, {module}\n"
        "print([name for name in ('matplotlib', 'tqdm', 'torch') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_is_there():
    import minilora

    for name in minilora.__all__:
        assert getattr(minilora, name).__doc__, name


def test_a_folder_of_transformers_is_a_base(tmp_path, capsys):
    ml.to_hf_gpt2(ml.load_base("small"), tmp_path / "gpt2")
    model = ml.replace_linear_with_lora(ml.load_base("small"), 2, 4, "q_proj", rng=0)
    ml.save_peft(model, tmp_path / "task")
    args = ["merge", str(tmp_path / "gpt2"), str(tmp_path / "task"), str(tmp_path / "out")]
    assert main(args) == 0
    assert main(["info", str(tmp_path / "gpt2")]) == 0
    assert "transformer.h.0.attn.c_attn.weight: (64, 192)" in capsys.readouterr().out
    state = ml.load_checkpoint(tmp_path / "out").state_dict()
    base = ml.load_base("small").state_dict()
    assert all(np.array_equal(state[name], array) for name, array in base.items())


def test_info_describes_what_generate_takes(tmp_path, monkeypatch, capsys):
    ml.to_hf_gpt2(ml.load_base("small"), tmp_path)
    tensors = ml.load_safetensors(tmp_path / "model.safetensors")
    whole = sum(array.size for array in tensors.values())
    (tmp_path / "model.safetensors").unlink()
    shards = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shards.values()):
        ml.save_safetensors(tmp_path / shard, {
            name: array for name, array in tensors.items() if shards[name] == shard})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    counts = re.findall(r"arrays, ([\d,]+) numbers", out)
    assert len(counts) == 2 and sum(int(n.replace(",", "")) for n in counts) == whole
    assert all(f"  {name}: " in out for name in tensors)
    index.write_text("{}")
    for command in (["info"], ["generate", "--base"]):
        assert main([*command, str(tmp_path)]) == 2
        assert "weight_map must map names to files" in capsys.readouterr().err

    monkeypatch.setattr(bases, "base_file", lambda name: tmp_path / "model-0.safetensors")
    assert main(["info", "smollm2"]) == 0 and f"{counts[0]} numbers" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["\x1b[2Jgone", "a\nb", "\u202egpj.exe", "\x07"])
def test_what_a_file_says_cannot_act_on_the_terminal(tmp_path, capsys, name):
    path = tmp_path / "x.safetensors"
    ml.save_safetensors(path, {name: np.zeros(2)}, {name: name})
    assert main(["info", str(path)]) == 0
    ml.save_safetensors(tmp_path / "adapter_model.safetensors", {name: np.zeros(2)})
    (tmp_path / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["a"]}))
    assert main(["info", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert all(line.isprintable() for line in (out + err).split("\n"))
    assert err.count("\n") == 1 and len(out.split("\n")) == 4


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero here")
def test_a_device_is_no_file(capsys):
    for command in (["info", "/dev/zero"], ["generate", "--base", "/dev/zero"]):
        assert main(command) == 2
        assert capsys.readouterr().err.endswith("/dev/zero is not a regular file\n")
