"""The same ten AdamW steps as PyTorch did them; golden.npz comes from peer_runs.py."""

from pathlib import Path

import numpy as np
import pytest

import minilora as ml

CONFIG = ml.GPTConfig(vocab_size=13, context_length=7, d_model=12, n_layers=2, n_heads=3)


def relative(got, expected):
    """The largest difference, relative to the largest number."""
    return np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-6)


def our_run(start, ids, targets, lora, dtype, rank=3, alpha=6.0, steps=10):
    model = ml.GPT(CONFIG, dtype=dtype)
    if lora:
        ml.replace_linear_with_lora(model, rank, alpha)
    model.load_state_dict(start)
    optimizer = ml.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    out, losses = {}, []
    for step in range(steps):
        logits = model(ids)
        loss, dlogits = ml.cross_entropy(logits, targets)
        optimizer.zero_grad()
        model.backward(dlogits)
        if step == 0:
            out["logits"] = logits
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            out |= {f"grad/{name}": grad.copy() for name, grad in gradients.items()}
        optimizer.step()
        losses.append(loss)
    out["losses"] = np.array(losses)
    return out | {f"end/{name}": array for name, array in model.state_dict().items()}


def compare_runs(ours, theirs, tolerance):
    """Check every array; gradients of k_proj's bias are zero but for round-off, so scaled alike."""
    theirs = {key: array for key, array in theirs.items() if not key.startswith("start/")}
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(a).max() for key, a in theirs.items() if key.startswith("grad/"))
    for key, expected in theirs.items():
        if key.endswith("k_proj.bias") or key.endswith("k_proj.linear.bias"):
            if key.startswith("grad/"):
                assert np.abs(ours[key] - expected).max() <= tolerance * largest, key
                continue
        assert relative(ours[key], expected) <= tolerance, key


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_ten_adamw_steps_as_pytorch_did_them(kind):
    with np.load(Path(__file__).with_name("golden.npz"), allow_pickle=False) as file:
        golden = dict(file)
    theirs = {k.removeprefix(f"{kind}/"): a for k, a in golden.items() if k.startswith(f"{kind}/")}
    start = {k.removeprefix("start/"): a for k, a in theirs.items() if k.startswith("start/")}
    ours = our_run(start, golden["ids"], golden["targets"], kind == "lora", np.float64)
    compare_runs(ours, theirs, 1e-9)
    assert sum(key.startswith("grad/") for key in ours) == {"full": 37, "lora": 26}[kind]
