"""`deepseek-moe plan` against real training steps on CPU: predicted and measured peaks of a model of a few 100 MB.

    python tests/benchmarks/plan_check.py

Each step runs in a process of its own. Measured are all allocations of torch's allocator in the second step; beside it
the process's own peak, which has the libraries and what the allocator keeps for later in it.
"""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from environment import commit, processor
from measure import peak_bytes, reset_peak, resident_bytes
from rich.console import Console
from rich.table import Table
from step_memory import measured_step, recipe_of

from modeling_deepseek_moe import DeepseekMoeConfig
from modeling_deepseek_moe.finetune.plan.memory import Memory, MemoryPlan

BOUND = 0.1
MIB = 2**20
FIELDS = {
    "model_type": "deepseek_v3",
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
}
_LORA = {"dtype": "bfloat16", "lora.r": 16}
RECIPES: dict[str, dict[str, Any]] = {
    "lora_attention": {**_LORA, "lora.targets": ["attention", "shared_experts"], "lora.lora_dropout": 0.05},
    "lora_shared": {**_LORA, "lora.targets": ["shared_experts"]},
    "lora_routed": {**_LORA, "lora.targets": ["routed_experts"], "lora.r": 8},
    "lora_all": {**_LORA, "lora.targets": ["all"]},
    "lora_all, checkpointing": {**_LORA, "lora.targets": ["all"], "gradient_checkpointing": True},
    "qlora": {**_LORA, "lora.targets": ["all"], "quantization": "nf4", "gradient_checkpointing": True},
    "esft": {"dtype": "bfloat16", "esft.score": "token"},
    "full": {"dtype": "float32"},
    "full, checkpointing": {"dtype": "float32", "gradient_checkpointing": True},
    "full, autocast": {"dtype": "float32", "training.bf16": True},
    "full, adafactor": {"dtype": "float32", "training.optim": "adafactor"},
}
SHAPES = ((2, 256), (4, 512))


def main() -> int:
    """Print the table; 1 if a prediction is off by more than `BOUND`."""
    table = Table("recipe", "rows x tokens", "predicted", "measured", "ratio", "ratio beyond weights", "process")
    worst = 0.0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for name, values in RECIPES.items():
            for rows, length in SHAPES:
                values = {**values, "max_length": length, "training.per_device_train_batch_size": rows}
                memory = predicted(values)
                measured, process = pool.submit(measure, values).result()
                ratio = memory.peak / measured
                beyond = (memory.peak - memory.static) / (measured - memory.static)
                worst = max(worst, abs(ratio - 1), abs(beyond - 1))
                sizes = (f"{size / MIB:.0f} MiB" for size in (memory.peak, measured))
                cells = (
                    name,
                    f"{rows} x {length}",
                    *sizes,
                    f"{ratio:.3f}",
                    f"{beyond:.3f}",
                    f"{process / MIB:.0f} MiB",
                )
                table.add_row(*cells)
                print(*cells, sep="  ", file=sys.stderr)
    console = Console()
    console.print(table)
    console.print(f"largest error: {worst:.1%} (commit {commit()}, torch {torch.__version__}, {processor()})")
    return int(worst > BOUND)


def predicted(values: dict[str, Any]) -> Memory:
    """Of a step on CPU whose rows are all of the same length."""
    return MemoryPlan(DeepseekMoeConfig.from_dict(FIELDS), recipe_of(values), "cpu").memory(is_padded=False)


def measure(values: dict[str, Any]) -> tuple[int, int]:
    """Peak of the allocator, and how much the process grew."""
    torch.set_num_threads(1)
    before = resident_bytes()
    reset_peak()
    peak = measured_step(FIELDS, values)
    return peak, peak_bytes() - before


if __name__ == "__main__":
    sys.exit(main())
