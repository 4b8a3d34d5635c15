"""A level's mathematics: definition, kernels' twin, the op boundary, the public functions."""

from typing import TYPE_CHECKING

from convwave._lazy import attach

if TYPE_CHECKING:
    from convwave.ops.functional import conv_bn_tanh, loss
    from convwave.ops.level import Activation, Level
    from convwave.ops.library import available_backends, conv_stack

__all__ = [
    "Activation",
    "Level",
    "available_backends",
    "conv_bn_tanh",
    "conv_stack",
    "loss",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "functional": [
            "conv_bn_tanh",
            "loss",
        ],
        "level": [
            "Activation",
            "Level",
        ],
        "library": [
            "available_backends",
            "conv_stack",
        ],
    },
)
