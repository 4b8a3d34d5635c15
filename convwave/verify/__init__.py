"""Comparing a network with the windowed network."""

from typing import TYPE_CHECKING

from convwave._lazy import attach

if TYPE_CHECKING:
    from convwave.verify.certificate import verify, weights_sha256

__all__ = [
    "verify",
    "weights_sha256",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "certificate": [
            "verify",
            "weights_sha256",
        ],
    },
)
