"""transformers: a Trainer that evaluates a model sharded at load before it trains it.

    torchrun --nproc-per-node 2 transformers_evaluate_before_train.py

Expected: the weights after a step are those without the evaluation. Seen with transformers 5.23.0, torch 2.13.0: the
optimizer gets parameters that stayed gathered, and trains them in vain. transformers 5.24.0 is right.
"""

import tempfile

import torch
from torch import distributed
from transformers import DistributedConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

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
rows = [{"input_ids": list(range(12)), "labels": list(range(12))}] * 4
options = {"use_cpu": True, "max_steps": 1, "report_to": "none", "save_strategy": "no", "learning_rate": 0.01}
heads = []
for evaluates_first in (False, True):
    model = LlamaForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(fsdp_size=2))
    args = TrainingArguments(f"{folder[0]}/run", **options)
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
    if evaluates_first:
        trainer.evaluate()
    trainer.train()
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    heads.append(model.lm_head.weight.full_tensor().detach())
torch.testing.assert_close(heads[1], heads[0], rtol=1e-5, atol=1e-7)
