"""PEFT: saving an adapter of a sharded base model gathers the base model too, in every process.

    torchrun --nproc-per-node 2 peft_save_gathers_the_base_model.py

Expected: no tensor is gathered that is not of the adapter. Seen with peft 0.21.2, transformers 5.24.0, torch 2.13.0:
`get_peft_model_state_dict` gathers the whole state dict and picks the adapter out of it afterwards.
"""

import tempfile

from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.tensor import DTensor
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
model = LlamaForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(fsdp_size=2))
model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
gathered, gather = [], DTensor.full_tensor
DTensor.full_tensor = lambda tensor, **options: (gathered.append(tensor.shape), gather(tensor, **options))[1]
model.save_pretrained(f"{folder[0]}/adapter", is_main_process=distributed.get_rank() == 0)
assert not gathered, f"{len(gathered)} tensors of the base model were gathered, the first of shape {gathered[0]}"
