"""minilora: low-rank adaptation from scratch in NumPy, every gradient derived by hand.

Read the files in this order: lora, then module, functional, layers, attention, gpt.
"""

from minilora.data.corpus import CharTokenizer
from minilora.files.adapter_set import AdapterSet
from minilora.files.checkpoint import (
    CheckpointError,
    load_base,
    load_checkpoint,
    load_safetensors,
    save_checkpoint,
    save_safetensors,
)
from minilora.files.gpt2 import from_hf_gpt2, to_hf_gpt2
from minilora.files.peft_read import load_adapter, load_peft, save_adapter, save_peft
from minilora.lora.adapter import (
    Adapter,
    Factors,
    attach,
    compress,
    extract_lora,
    get_adapter,
    weighted_sum,
)
from minilora.lora.dora import DoRALinear
from minilora.lora.wrap import (
    LinearWithLoRA,
    LoRALayer,
    ModuleToSave,
    lora_state_dict,
    merge_lora,
    remove_lora,
    replace_linear_with_lora,
    unmerge_lora,
)
from minilora.nn.attention import CausalSelfAttention
from minilora.nn.functional import cross_entropy
from minilora.nn.gpt import GPT, MLP, Block, GPTConfig, generate
from minilora.nn.gradcheck import gradcheck
from minilora.nn.layers import GELU, Dropout, Embedding, LayerNorm, Linear
from minilora.nn.module import Module, ModuleList, Parameter, Sequential
from minilora.train.loop import History, evaluate, fit
from minilora.train.optim import SGD, AdamW, clip_grad_norm, cosine_schedule

__version__ = "0.1.0"

__all__ = [
    "GELU", "GPT", "MLP", "SGD", "AdamW", "Adapter", "AdapterSet", "Block", "CausalSelfAttention",
    "CharTokenizer", "CheckpointError", "DoRALinear", "Dropout", "Embedding", "Factors",
    "GPTConfig", "History", "LayerNorm", "Linear", "LinearWithLoRA", "LoRALayer", "Module",
    "ModuleList", "ModuleToSave", "Parameter", "Sequential", "attach", "clip_grad_norm",
    "compress", "cosine_schedule", "cross_entropy", "evaluate", "extract_lora", "fit",
    "from_hf_gpt2", "generate", "get_adapter", "gradcheck", "load_adapter", "load_base",
    "load_checkpoint", "load_peft", "load_safetensors", "lora_state_dict", "merge_lora",
    "remove_lora", "replace_linear_with_lora", "save_adapter", "save_checkpoint", "save_peft",
    "save_safetensors", "to_hf_gpt2", "unmerge_lora", "weighted_sum",
]
