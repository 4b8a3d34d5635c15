"""The stack of `tasks.Stack` in other frameworks, as their users would write it: JAX and ONNX Runtime, on a CPU.

They come with the extra `peers` (pip install -e '.[peers]'). Both use as many threads as torch does.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Results, Unavailable, Work

Arrays = Sequence[Any]
UNSEEN = "another allocator than torch's"


def module_of(name: str, package: str) -> Any:
    """A module of a package that may be missing; raises `Unavailable` then."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Unavailable(f"{package} is not installed") from None


def jax_stack(
    x: Tensor, start: Tensor, levels: Sequence[Sequence[Tensor]], dilations: Sequence[int], eps: float, training: bool
) -> Work:
    """`lax.conv_general_dilated`, BatchNorm and tanh under `jit`, over (B, T, C); in training mode with `vjp`.

    Args:
        x, start: (B, T, C) input, and gradient of the output.
        levels: weight (H, C, k), scale, shift, running mean and running variance of each.
    """
    if torch.get_num_threads() == 1:
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    jax = module_of("jax", "jax")
    jnp, lax = jax.numpy, jax.lax
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise Unavailable("jax computes in 32 bits")

    def array(t: Tensor) -> Any:
        return jnp.asarray(t.detach().float().numpy(), dtype=jnp.bfloat16 if t.dtype == torch.bfloat16 else jnp.float32)

    def tensor(a: Any) -> Tensor:
        return torch.tensor(jax.device_get(a.astype(jnp.float32)))

    parameters = [(array(w.permute(2, 1, 0)), array(g), array(b)) for w, g, b, _, _ in levels]
    running = [(array(m.float()), array(v.float())) for *_, m, v in levels]

    def network(parameters: Arrays, running: Arrays, h: Any) -> tuple[Any, Arrays]:
        moved = []
        for (w, g, b), (m, v), dilation in zip(parameters, running, dilations, strict=True):
            before = jnp.broadcast_to(h[:, :1], (h.shape[0], (w.shape[0] - 1) * dilation, h.shape[2]))
            z = lax.conv_general_dilated(
                jnp.concatenate([before, h], 1), w, (1,), "VALID", rhs_dilation=(dilation,),
                dimension_numbers=("NWC", "WIO", "NWC"),
            ).astype(jnp.float32)  # fmt: skip
            mean, var = m, v
            if training:
                mean = z.mean((0, 1))
                var = jnp.square(z - mean).mean((0, 1))
                n = z.shape[0] * z.shape[1]
                moved.append((0.9 * m + 0.1 * mean, 0.9 * v + 0.1 * var * n / (n - 1)))
            h = jnp.tanh((z - mean) * (g * lax.rsqrt(var + eps)) + b).astype(h.dtype)
        return h, moved

    given, gradient = array(x), array(start)
    if not training:
        evaluate = jax.jit(lambda *arguments: network(*arguments)[0])
        run = lambda: jax.block_until_ready(evaluate(parameters, running, given))  # noqa: E731
        return Work(run, lambda: {"h": tensor(run())}, unseen=UNSEEN)

    @jax.jit
    def step(parameters: Arrays, running: Arrays, x: Any, gradient: Any) -> Any:
        h, back, moved = jax.vjp(lambda p, x: network(p, running, x), parameters, x, has_aux=True)
        return h, back(gradient), moved

    train = lambda: jax.block_until_ready(step(parameters, running, given, gradient))  # noqa: E731

    def result() -> Results:
        h, (gradients, dx), _ = train()
        found = [tensor(dx), *(tensor(w).permute(2, 1, 0) for w, _, _ in gradients)]
        return {"h": tensor(h)} | {f"gradient {i}": t for i, t in enumerate(found)}

    return Work(train, result, unseen=UNSEEN)


def onnx_stack(x: Tensor, levels: Sequence[Sequence[Tensor]], dilations: Sequence[int], eps: float) -> Work:
    """Pad, Conv, BatchNormalization and Tanh in ONNX Runtime, over (B, C, T); it folds and fuses what it can."""
    onnx, runtime = module_of("onnx", "onnx"), module_of("onnxruntime", "onnxruntime")
    if x.dtype != torch.float32:
        raise Unavailable("ONNX Runtime convolves float32 on a CPU")
    node, constant = onnx.helper.make_node, onnx.numpy_helper.from_array
    nodes, constants, h = [], [], "x"
    for i, (tensors, dilation) in enumerate(zip(levels, dilations, strict=True)):
        names = [f"{name}{i}" for name in ("weight", "scale", "shift", "mean", "variance")]
        constants += [constant(t.detach().numpy(), n) for n, t in zip(names, tensors, strict=True)]
        k = tensors[0].shape[2]
        constants.append(constant(torch.tensor([0, 0, (k - 1) * dilation, 0, 0, 0]).numpy(), f"pads{i}"))
        nodes += [
            node("Pad", [h, f"pads{i}"], [f"padded{i}"], mode="edge"),
            node("Conv", [f"padded{i}", names[0]], [f"z{i}"], dilations=[dilation], kernel_shape=[k]),
            node("BatchNormalization", [f"z{i}", *names[1:]], [f"y{i}"], epsilon=eps),
            node("Tanh", [f"y{i}"], [f"h{i}"]),
        ]
        h = f"h{i}"
    B, T, C = x.shape
    shapes = (("x", [B, C, T]), (h, [B, levels[-1][0].shape[0], T]))
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes]
    graph = onnx.helper.make_graph(nodes, "stack", ends[:1], ends[1:], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=10)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = x.transpose(1, 2).contiguous().numpy()
    run: Callable[[], Any] = lambda: session.run(None, {"x": given})[0]  # noqa: E731
    return Work(run, lambda: {"h": torch.tensor(run()).transpose(1, 2)}, unseen=UNSEEN)
