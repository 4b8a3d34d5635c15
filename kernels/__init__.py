"""The Triton kernels and their launchers, installed as ``convwave.kernels``.

None has landed yet: every backend name resolves to the plain PyTorch of `convwave.functional`.
"""
