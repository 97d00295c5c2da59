"""PEFT: LoRA on a layer that tensor parallelism cuts by rows, such as down_proj.

    torchrun --nproc-per-node 2 peft_rowwise_lora_under_tp.py

Expected: the loss of a process without tensor parallelism. Seen with peft 0.21.2, transformers 5.24.0, torch 2.13.0:
a rowwise `lora_A` has the `in_features` of one rank.
"""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import distributed
from transformers import DistributedConfig, LlamaConfig, LlamaForCausalLM

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "vocab_size": 96,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}

distributed.init_process_group("gloo")
folder = [tempfile.mkdtemp()]
distributed.broadcast_object_list(folder)
if distributed.get_rank() == 0:
    base = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4))
    base.save_pretrained(folder[0])
    config = LoraConfig(target_modules=["down_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(f"{folder[0]}/adapter")
distributed.barrier()
ids, losses = torch.arange(12)[None], []
for config in (None, DistributedConfig(tp_size=2)):
    model = LlamaForCausalLM.from_pretrained(folder[0], distributed_config=config)
    model = PeftModel.from_pretrained(model, f"{folder[0]}/adapter", is_trainable=True)
    loss = model(ids, labels=ids).loss
    loss.backward()
    losses.append((loss.full_tensor() if hasattr(loss, "full_tensor") else loss).detach())
torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
