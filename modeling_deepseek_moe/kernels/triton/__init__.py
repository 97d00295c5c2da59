"""Triton kernels of the routed experts and of decoding on the latent cache, with their references."""
