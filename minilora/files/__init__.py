"""Files: safetensors, checkpoints, GPT-2 of transformers, adapters of PEFT."""
