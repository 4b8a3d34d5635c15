"""A PTX interpreter: what Triton compiles for an NVIDIA GPU, executed and checked on a CPU, without CUDA.

    with on_emulator("sm_90") as log:       # launch.py: Triton's launches go to the interpreter
        z, stats = conv_forward(...)        # CPU tensors in and out, compiled PTX in between
    assert not log.problems()

Only numpy is used. What is checked, in the words of the PTX ISA (version 8.x, sections by name):

- global accesses outside the arguments' tensors, misaligned ones ("Addresses as Operands"), stores to arguments that
  are read only, reads of memory that nobody has written, output elements that nobody writes;
- conflicting accesses of one program's threads without a barrier between ("Memory Consistency Model", "Data-races"),
  in shared and in global memory, also against cp.async and wgmma that are still in flight;
- reads of what another program wrote without release and acquire between ("Causality Order");
- wgmma reads of bytes stored without fence.proxy.async ("Async proxy"), wgmma's registers touched before its wait
  ("wgmma.fence", "wgmma.wait_group": registers.py, and sass.py for the machine code);
- branches that differ between threads that have to agree, barriers that not all threads reach ("bar, barrier").

Programs run in random order, several at a time; an *agent* is what runs in lockstep: a whole program (fast), or each
warp by itself, in random order between barriers, so that a missing barrier changes values too.

Not modelled: time, caches, denormals flushed to 0, the last bits of ex2.approx, div.full and tensor cores: products
are exact, each instruction's sum is rounded to float32 once. gfx942 has no PTX: its kernels are compiled, not executed.

| file | what it does |
|---|---|
| `parse.py` | PTX text -> instructions |
| `translate.py` | instructions -> Python functions over numpy lanes |
| `machine.py` | programs, their order, barriers; what an agent is |
| `registers.py` | arithmetic and warp shuffles |
| `memory.py` | global memory: bounds, alignment, initialised or not, atomics |
| `shared.py` | shared memory, ldmatrix and stmatrix, cp.async |
| `races.py` | who wrote and read what, and whether something orders it |
| `tensor_cores.py` | mma and wgmma, fragments and swizzles |
| `launch.py` | `on_emulator`: Triton's launches on CPU tensors |
| `traffic.py` | bytes moved by tensor: asked for, once a program, once in all |
"""
