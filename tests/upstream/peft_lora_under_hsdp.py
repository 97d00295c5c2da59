"""PEFT: LoRA on a linear layer of a model under FSDP with replicas.

    torchrun --nproc-per-node 4 peft_lora_under_hsdp.py

Expected: the loss of one process. Seen with peft 0.21.2, transformers 5.24.0, torch 2.13.0: the adapters have the
widths of one rank's part of the weight, as under tensor parallelism, since the mesh has an axis beside `fsdp`.
"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
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
    LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4)).save_pretrained(folder[0])
distributed.barrier()
ids, losses = torch.arange(12)[None], []
for config in (None, DistributedConfig(dp_replicate_size=2, fsdp_size=2)):
    model = LlamaForCausalLM.from_pretrained(folder[0], distributed_config=config)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    losses.append(model(ids, labels=ids).loss.detach())
torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
