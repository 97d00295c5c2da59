"""accelerate: FSDP that a Trainer is told to use in processes on CPUs.

    torchrun --nproc-per-node 2 accelerate_fsdp_on_cpu.py

Expected: parameters are sharded, or the request is refused. Seen with accelerate 1.15.0, transformers 5.24.0, torch
2.13.0: the model is trained under DDP, without a word.
"""

import tempfile

from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "vocab_size": 96,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}

model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4))
options = {"use_cpu": True, "max_steps": 1, "report_to": "none", "save_strategy": "no"}
options |= {"fsdp": True, "fsdp_config": {"fsdp_version": 2}}
rows = [{"input_ids": list(range(12)), "labels": list(range(12))}] * 4
trainer = Trainer(model, TrainingArguments(tempfile.mkdtemp(), **options), train_dataset=rows)
trainer.train()
kind = type(trainer.model_wrapped).__name__
assert any(isinstance(p, DTensor) for p in trainer.model_wrapped.parameters()), f"nothing is sharded: {kind}"
