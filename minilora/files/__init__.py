"""Files: safetensors, checkpoints, transformers' GPT-2, PEFT's adapters."""
