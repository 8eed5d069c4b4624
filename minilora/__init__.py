"""minilora: low-rank adaptation from scratch in NumPy, every gradient derived by hand.

Start with `minilora/lora/layer.py`. The package has eight rooms, each of them using only those
before it: `nn` (the network), `lora` (the adaptation), `train` (training), `files` (file formats),
`data` (text), `lab` (experiments), `exercises` (exercises and their checks),
`commands` (the command line).
"""

from minilora.train.blas import blas_threads, one_thread_by_default, set_blas_threads

with one_thread_by_default():
    import numpy  # noqa: F401

from minilora.data.answers import answer_loss
from minilora.data.bpe import BPETokenizer
from minilora.data.datasets import load_data
from minilora.data.generate import generate, generate_batch
from minilora.data.tokenizer import CharTokenizer, load_tokenizer
from minilora.files.adapter_set import AdapterSet
from minilora.files.checkpoint import load_base, load_checkpoint, save_checkpoint
from minilora.files.gpt2 import from_hf_gpt2, to_hf_gpt2
from minilora.files.llama import from_hf_llama, to_hf_llama
from minilora.files.peft_read import load_adapter
from minilora.files.peft_write import save_adapter, save_peft
from minilora.files.safetensors import load_safetensors, save_safetensors
from minilora.lab.finetune import finetune
from minilora.lora.adapter import Adapter, Factors, attach, get_adapter
from minilora.lora.combine import compress, extract_lora, weighted_sum
from minilora.lora.dora import DoRALinear
from minilora.lora.layer import LinearWithLoRA, LoRALayer
from minilora.lora.qlora import dequantize, quantize, stored_bytes
from minilora.lora.saved import ModuleToSave
from minilora.lora.wrap import (
    lora_state_dict,
    merge_lora,
    remove_lora,
    replace_linear_with_lora,
    unmerge_lora,
)
from minilora.nn.attention import CausalSelfAttention
from minilora.nn.functional import cross_entropy
from minilora.nn.gpt import GPT, MLP, Block, GPTConfig
from minilora.nn.gradcheck import gradcheck
from minilora.nn.layers import (
    GELU,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    TiedHead,
)
from minilora.nn.llama import Llama, LlamaConfig
from minilora.nn.module import Module, ModuleList, Parameter, Sequential
from minilora.nn.rotary import RopeScaling
from minilora.nn.validate import CheckpointError
from minilora.train.history import History
from minilora.train.loop import evaluate, fit
from minilora.train.optim import SGD, AdamW
from minilora.train.schedule import clip_grad_norm, cosine_schedule

__version__ = "0.4.0"

__all__ = [
    "GELU", "GPT", "MLP", "SGD", "AdamW", "Adapter", "AdapterSet", "BPETokenizer", "Block",
    "CausalSelfAttention", "CharTokenizer", "CheckpointError", "DoRALinear", "Dropout",
    "Embedding", "Factors", "GPTConfig", "History", "LayerNorm", "Linear", "LinearWithLoRA",
    "Llama", "LlamaConfig", "LoRALayer", "Module", "ModuleList", "ModuleToSave", "Parameter",
    "RopeScaling", "Sequential", "TiedHead", "answer_loss", "attach", "blas_threads",
    "clip_grad_norm", "compress", "cosine_schedule", "cross_entropy", "dequantize", "evaluate",
    "extract_lora", "finetune", "fit", "from_hf_gpt2", "from_hf_llama", "generate",
    "generate_batch", "get_adapter", "gradcheck", "load_adapter", "load_base",
    "load_checkpoint", "load_data", "load_safetensors", "load_tokenizer", "lora_state_dict",
    "merge_lora", "quantize", "remove_lora", "replace_linear_with_lora", "save_adapter",
    "save_checkpoint", "save_peft", "save_safetensors", "set_blas_threads", "stored_bytes",
    "to_hf_gpt2", "to_hf_llama", "unmerge_lora", "weighted_sum",
]
