"""One seam for attention, and the kernels behind it: XLA's own, cuDNN's on NVIDIA GPUs, Splash on TPUs."""
