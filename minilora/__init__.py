"""minilora: low-rank adaptation from scratch in NumPy, every gradient derived by hand.

Read the files in this order: lora, then module, functional, layers, attention, gpt.
"""

from minilora.attention import CausalSelfAttention
from minilora.checkpoint import (
    CheckpointError,
    load_base,
    load_checkpoint,
    load_safetensors,
    save_checkpoint,
    save_safetensors,
)
from minilora.functional import cross_entropy
from minilora.gpt import GPT, MLP, Block, GPTConfig, generate
from minilora.gradcheck import gradcheck
from minilora.interop import from_hf_gpt2, load_adapter, save_adapter, to_hf_gpt2
from minilora.layers import GELU, Dropout, Embedding, LayerNorm, Linear
from minilora.lora import (
    LinearWithLoRA,
    LoRALayer,
    lora_state_dict,
    merge_lora,
    remove_lora,
    replace_linear_with_lora,
    unmerge_lora,
)
from minilora.module import Module, ModuleList, Parameter, Sequential
from minilora.optim import SGD, AdamW, clip_grad_norm, cosine_schedule
from minilora.text import CharTokenizer
from minilora.training import History, evaluate, fit

__version__ = "0.1.0"

__all__ = [
    "GELU", "GPT", "MLP", "SGD", "AdamW", "Block", "CausalSelfAttention", "CharTokenizer",
    "CheckpointError", "Dropout", "Embedding", "GPTConfig", "History", "LayerNorm", "Linear",
    "LinearWithLoRA", "LoRALayer", "Module", "ModuleList", "Parameter", "Sequential",
    "clip_grad_norm", "cosine_schedule", "cross_entropy", "evaluate", "fit", "from_hf_gpt2",
    "generate", "gradcheck", "load_adapter", "load_base", "load_checkpoint", "load_safetensors",
    "lora_state_dict", "merge_lora", "remove_lora", "replace_linear_with_lora", "save_adapter",
    "save_checkpoint", "save_safetensors", "to_hf_gpt2", "unmerge_lora",
]
