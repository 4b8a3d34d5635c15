"""The Triton kernels and their launchers, installed as ``convwave.kernels``. Importing any of its files imports triton.

In reading order:

- primitives.py: activations, merging of statistics, what is done to every row;
- forward.py: one level: gather, BatchNorm + activation of the level below on load, product, statistics;
- activate.py: the end of a stack, BatchNorm + activation by itself, and the gradient that enters there;
- backward.py: one level: gradients of the rows below, of the matrices, and the sums that BatchNorm's gradient needs;
- stack.py: launches them for a whole stack; what they compute is `convwave.ops.stack`;
- score.py: all levels and the head of whole names in one launch, in evaluation mode;
- configs.py: tile sizes by shape.

The dialect: ``i_*`` program ids, ``o_*`` offset vectors, ``m_*`` masks, ``b_*`` tiles in registers, ``B*`` tile sizes;
N rows of a level, M rows of the level below, C channels below, H channels, K taps, P programs that share a sum.
"""
