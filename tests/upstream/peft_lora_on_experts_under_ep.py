"""PEFT: LoRA on the stacked experts of a model that `DistributedConfig(ep_size=2)` loaded.

    torchrun --nproc-per-node 2 peft_lora_on_experts_under_ep.py

Expected: the loss of a process without expert parallelism. Seen with peft 0.21.2, transformers 5.24.0, torch 2.13.0:
`ParamWrapper` parametrizes a weight that FSDP and the exchange of tokens have to gather and to cut.
"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from transformers import DistributedConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 96, "num_attention_heads": 4, "head_dim": 8}
SIZES |= {"num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}

distributed.init_process_group("gloo")
folder = [tempfile.mkdtemp()]
distributed.broadcast_object_list(folder)
if distributed.get_rank() == 0:
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)).save_pretrained(folder[0])
distributed.barrier()
ids, losses = torch.arange(12)[None], []
for config in (None, DistributedConfig(fsdp_size=2, ep_size=2)):
    model = Qwen3MoeForCausalLM.from_pretrained(folder[0], distributed_config=config)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(target_modules=[], target_parameters=targets, init_lora_weights=False))
    loss = model(ids, labels=ids).loss
    loss.backward()
    losses.append(loss.detach())
torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
