"""The same GPT and Llama in PyTorch, for peer tests and `minilora bench --peers`. Needs torch.

The GPT's modules are named as in `minilora.GPT`, so a state dict only needs its linear weights
transposed. The Llama is that of transformers.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from minilora.nn.functional import IGNORE_INDEX
from minilora.nn.gpt import GPTConfig
from minilora.nn.llama import LlamaConfig
from minilora.nn.module import Module


class Attention(nn.Module):
    """Causal self-attention: x (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_heads = config.n_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(config.d_model, config.d_model, config.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with GELU (tanh form) between them: x (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, 4 * config.d_model, config.bias)
        self.down_proj = nn.Linear(4 * config.d_model, config.d_model, config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.gelu(self.up_proj(x), approximate="tanh"))


class Block(nn.Module):
    """A pre-norm transformer block: x (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        norm: dict[str, Any] = {"eps": config.layer_norm_eps, "bias": config.bias}
        self.ln_1, self.attn = nn.LayerNorm(config.d_model, **norm), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.d_model, **norm), MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TorchGPT(nn.Module):
    """`minilora.GPT` in PyTorch: ids (B, T) -> logits (B, T, V). No dropout."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.context_length, config.d_model)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps, bias=config.bias)
        self.lm_head = None
        if not config.tie_weights:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        return x @ self.wte.weight.T if self.lm_head is None else self.lm_head(x)


def is_linear_weight(name: str) -> bool:
    """Return whether PyTorch stores the array of this name transposed."""
    return name.endswith(("_proj.weight", "lm_head.weight", "linear.weight"))


def copy_weights(source: Module, target: nn.Module) -> None:
    """Copy the weights of a minilora GPT without LoRA into a `TorchGPT`."""
    target.load_state_dict({
        name: torch.from_numpy(np.array(array.T if is_linear_weight(name) else array, order="C"))
        for name, array in source.state_dict().items()
    })


def add_peft_lora(
    model: nn.Module, rank: int, alpha: float, names: list[str] | None = None
) -> Any:
    """Return the model with PEFT's LoRA on the linear layers of these names, or on every one."""
    from peft import LoraConfig, get_peft_model

    names = names or sorted({
        name.rpartition(".")[2] for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    })
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=names))


def random_llama(config: LlamaConfig) -> Any:
    """Return transformers' Llama of these sizes, with random weights and the usual rotations."""
    import transformers

    c = config
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, head_dim=c.head_dim,
        num_key_value_heads=c.n_kv_heads, max_position_embeddings=c.context_length,
        tie_word_embeddings=c.tie_weights, rms_norm_eps=c.rms_norm_eps, use_cache=False,
        bos_token_id=None, eos_token_id=None,
    ))


def answer_step(
    model: Any, ids: np.ndarray, targets: np.ndarray, lr: float
) -> Callable[[], float]:
    """Return a function that does one training step of a Llama with PEFT, and returns the loss.

    As `answer_loss` does, it computes logits only where there is a target.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.01, fused=True)
    where = torch.from_numpy(targets != IGNORE_INDEX)
    tokens, wanted = torch.from_numpy(ids), torch.from_numpy(targets)[where]
    llama = model.base_model.model

    def step() -> float:
        states = llama.model(input_ids=tokens).last_hidden_state
        loss = nn.functional.cross_entropy(llama.lm_head(states[where]), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
