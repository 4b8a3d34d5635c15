"""What a run leaves behind: its folder, where its figures come from, pictures."""

from typing import TYPE_CHECKING

from convwave._lazy import attach

if TYPE_CHECKING:
    from convwave.runs.registry import provenance

__all__ = [
    "provenance",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "registry": [
            "provenance",
        ],
    },
)
