"""The README's script that trains an adapter further in several processes, started as it says."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import randomise

import minilora as ml
from minilora.data.batches import random_batches, sequential_batches
from minilora.data.corpus import load_tokens

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
NEEDED = ("torch", "transformers", "peft", "safetensors")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if MISSING:
    reason = f"the extra 'peers' is not installed: no {', '.join(MISSING)}"
    pytest.skip(reason, allow_module_level=True)

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SCRIPT = re.search(r"```py\n(.*?)```", README, re.DOTALL).group(1)
SIZES = re.search(r"^(steps, batch_size, length, lr) = ([^#\n]+)", SCRIPT, re.MULTILINE)
STEPS, BATCH_SIZE, LENGTH, LR = ast.literal_eval(SIZES.group(2))


def small_gpt(base, adapter):
    """Write a GPT of characters, and an adapter as it is before any training."""
    model = ml.load_base("small")
    ml.to_hf_gpt2(model, base)
    ml.replace_linear_with_lora(model, 4, 8, ["q_proj", "v_proj", "up_proj"], rng=0)
    ml.save_peft(model, adapter)


def small_llama(base, adapter):
    """Write a Llama of random weights, and an adapter as it is after some training."""
    model = randomise(ml.Llama(ml.LlamaConfig(
        vocab_size=96, d_model=32, d_ff=48, n_layers=2, n_heads=4, n_kv_heads=2)), 0.1)
    ml.to_hf_llama(model, base)
    ml.replace_linear_with_lora(model, 4, 8, ["*_proj"], rng=0)
    rng = np.random.default_rng(0)
    for name, p in model.named_parameters():
        if name.endswith(".lora.B"):
            p.data += 0.1 * rng.standard_normal(p.shape)
    ml.save_adapter(model, adapter)


def run(folder, *arguments):
    """Run the script in two processes, and return the loss that they print at each step."""
    (folder / "train_further.py").write_text(SCRIPT, encoding="utf-8")
    torchrun = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [sys.executable, "-m", *torchrun, "--nproc-per-node", "2", "train_further.py"]
    done = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"step (\d+): loss (\S+)\n", done.stdout)
    assert [int(step) for step, _ in lines] == list(range(STEPS)), done.stdout
    return [float(loss) for _, loss in lines]


@pytest.mark.parametrize("write, read", [(small_gpt, ml.from_hf_gpt2),
                                         (small_llama, ml.from_hf_llama)])
def test_two_processes_train_as_this_library_does(tmp_path, write, read):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write(base, adapter)
    model = ml.load_adapter(read(base), adapter)
    before = ml.lora_state_dict(model)
    tokens, held_out = load_tokens("code")
    np.save(tmp_path / "tokens.npy", tokens)
    losses = run(tmp_path, "base", "adapter", "tokens.npy")

    batches = random_batches(tokens, BATCH_SIZE, LENGTH, rng=0)
    optimizer = ml.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    history = ml.fit(model, batches, optimizer, STEPS, progress=False)
    np.testing.assert_allclose(losses, history.losses, rtol=0, atol=2e-5)

    further = ml.load_adapter(read(base), adapter)
    after = ml.lora_state_dict(further)
    assert after.keys() == before.keys()
    assert all(np.abs(after[name] - before[name]).max() > LR for name in after)
    for name, array in ml.lora_state_dict(model).items():
        assert np.abs(after[name] - array).max() < 0.01 * np.abs(after[name] - before[name]).max()

    windows = sequential_batches(held_out, 16, LENGTH, limit=1)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    ids, targets = map(torch.from_numpy, windows[0])
    with torch.no_grad():
        logits = theirs(input_ids=ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert ml.evaluate(further, windows) == pytest.approx(loss, abs=1e-5)
    assert ml.evaluate(model, windows) == pytest.approx(loss, abs=1e-4)
