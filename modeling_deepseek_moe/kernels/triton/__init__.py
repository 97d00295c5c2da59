"""Triton kernels of the routed experts and of decoding on the latent cache, with their references.

experts.py          `experts_implementation="triton"`: both passes over the kernels as two operators
pair_sorting.py     pairs of token and expert sorted on the device, and a token's pairs summed
grouped_gemm.py     one product of sorted rows with the weights of all experts
gate_up.py          that product with SwiGLU behind it, and SwiGLU's gradient behind the one with down
weight_gradient.py  gradients of the weights and of the LoRA factors of all experts
mla_triton.py       `attn_implementation="mla_triton"`
latent_decode.py    decode attention over a cache of latents, as operators
latent_kernels.py   its two kernels
launch.py           where the kernels can run, their launch, their matrix product
reference.py        each launcher in plain PyTorch
"""
