"""Ten AdamW steps in PyTorch, recorded under minilora's names. Needs torch and peft.

Run as a script it writes golden.npz, which test_golden.py compares with, without torch:

    python tests/peer_runs.py
"""

from pathlib import Path

import numpy as np
import torch

import minilora as ml
from minilora.lab.torch_peer import TorchGPT, add_peft_lora, copy_weights, is_linear_weight

CONFIG = ml.GPTConfig(vocab_size=13, context_length=7, d_model=12, n_layers=2, n_heads=3)
RANK, ALPHA, STEPS = 3, 6.0, 10
LR, WEIGHT_DECAY = 1e-2, 0.1


def start(rng, dtype=np.float64):
    """Return a minilora GPT with every parameter off its initial value, ids and targets."""
    model = ml.GPT(CONFIG, rng=rng, dtype=dtype)
    for p in model.parameters():
        p.data += 0.2 * rng.standard_normal(p.shape)
    ids = rng.integers(0, CONFIG.vocab_size, (4, CONFIG.context_length))
    targets = rng.integers(0, CONFIG.vocab_size, ids.shape)
    targets[0, :3] = -100
    return model, ids, targets


def our_name(name):
    """base_model.model.h.0.attn.q_proj.lora_A.default.weight -> h.0.attn.q_proj.lora.A"""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".linear.")
    return name.replace(".lora_A.default.weight", ".lora.A").replace(
        ".lora_B.default.weight", ".lora.B"
    )


def as_ours(name, tensor):
    array = tensor.detach().numpy()
    flip = is_linear_weight(name) or name.endswith((".lora.A", ".lora.B"))
    return (array.T if flip else array).copy()


def torch_run(model, ids, targets, lora):
    """Train a PyTorch copy of the model; return {key: array}, keys as "grad/h.0..."."""
    dtype = torch.float64 if model.wte.weight.data.dtype == np.float64 else torch.float32
    peer = TorchGPT(CONFIG).to(dtype)
    copy_weights(model, peer)
    if lora:
        torch.manual_seed(0)
        peer = add_peft_lora(peer, RANK, ALPHA).to(dtype)
        with torch.no_grad():
            for name, p in peer.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1)
    names = {our_name(name): p for name, p in peer.named_parameters()}
    out = {f"start/{name}": as_ours(name, p) for name, p in names.items()}
    optimizer = torch.optim.AdamW(
        [p for p in peer.parameters() if p.requires_grad], lr=LR, weight_decay=WEIGHT_DECAY
    )
    losses = []
    for step in range(STEPS):
        logits = peer(torch.from_numpy(ids))
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(targets).flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            out["logits"] = logits.detach().numpy()
            out |= {f"grad/{n}": as_ours(n, p.grad) for n, p in names.items() if p.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    out["losses"] = np.array(losses)
    return out | {f"end/{name}": as_ours(name, p) for name, p in names.items()}


def main():
    arrays = {}
    for kind in ("full", "lora"):
        model, ids, targets = start(np.random.default_rng(0))
        arrays |= {"ids": ids, "targets": targets}
        run = torch_run(model, ids, targets, kind == "lora")
        arrays |= {f"{kind}/{key}": array for key, array in run.items()}
    np.savez_compressed(Path(__file__).with_name("golden.npz"), **arrays)


if __name__ == "__main__":
    main()
