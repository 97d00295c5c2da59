"""What a checkpoint can be written as: plain and FP8 weights, transformers' types, DeepSeek's inference files.

table.py             the formats: which weights are FP8, which type the others have
native.py            `config.json` as other software reads it, and what each type cannot express
inference_config.py  ModelArgs, the JSON of DeepSeek's inference program
inference_shards.py  its model-parallel files: names, and which slice a rank has
inference_source.py  such a folder as one checkpoint under published names
inference_plan.py    a checkpoint cut for N ranks, and their files joined
"""
