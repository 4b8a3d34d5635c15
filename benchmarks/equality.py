"""What is equal and what is not, measured: the figures of the README's page of that name.

    python -m benchmarks.equality        trains by recipe fast (seconds), writes benchmarks/results/equality.json

1. How far the usual temporal convolution (nn.Conv1d with zero padding, nn.BatchNorm1d) is from the MLP when it is
   given the MLP's own weights.
2. How much BatchNorm in training mode lets a position see of later ones.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import convwave as cw
from benchmarks.figures import RESULTS
from convwave.files import write_atomic
from convwave.runs.registry import provenance
from convwave.train.loop import Config, train


class ZeroPadded(nn.Module):
    """The network as a user of temporal convolutions would write it, with the weights of a `ConvWave`."""

    def __init__(self, model: cw.ConvWave) -> None:
        super().__init__()
        self.embedding, self.head = copy.deepcopy(model.embedding), copy.deepcopy(model.head)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        self.paddings: list[int] = []
        for block in model.layers:
            H, C, k = block.conv.weight.shape
            conv = nn.Conv1d(C, H, k, dilation=block.conv.dilation, bias=False)
            norm = nn.BatchNorm1d(H, eps=block.norm.eps)
            conv.load_state_dict(block.conv.state_dict())
            norm.load_state_dict({**norm.state_dict(), **block.norm.state_dict()})
            self.convs.append(conv)
            self.norms.append(norm)
            self.paddings.append(block.conv.dilation * (k - 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, V)."""
        h = self.embedding(tokens).transpose(1, 2)
        for conv, norm, padding in zip(self.convs, self.norms, self.paddings, strict=True):
            h = torch.tanh(norm(conv(F.pad(h, (padding, 0)))))
        return self.head(h.transpose(1, 2))


@torch.no_grad()
def zero_padding(model: cw.ConvWave, packed: cw.Packed) -> dict[str, Any]:
    """Zero padding against the clamp, in evaluation mode, on the same weights."""
    exact = model.eval()(cw.dense_graph(packed))
    lengths = packed.cu_seqlens.diff()
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.zeros(inside.shape, dtype=torch.int64)
    tokens[inside] = packed.tokens
    padded = ZeroPadded(model).eval()(tokens)[inside]
    offset = torch.arange(len(packed)) - torch.repeat_interleave(packed.cu_seqlens[:-1], lengths)
    early = offset < model.context - 1
    difference = (padded - exact).abs().amax(1)
    return {
        "positions": len(packed),
        "positions_before_the_context_is_full": float(early.float().mean()),
        "largest_logit_difference_early": float(difference[early].max()),
        "mean_logit_difference_early": float(difference[early].mean()),
        "largest_logit_difference_later": float(difference[~early].max()),
        "val_loss": float(F.cross_entropy(exact, packed.targets)),
        "val_loss_with_zero_padding": float(F.cross_entropy(padded, packed.targets)),
    }


@torch.no_grad()
def look_ahead(model: cw.ConvWave, packed: cw.Packed, batches: tuple[int, ...] = (4, 32, 512)) -> list[dict[str, Any]]:
    """Change the last letter of one name: how far do logits move that have not read it?

    In evaluation mode by nothing at all. In training mode the letter is in the batch's statistics.
    """
    rows = []
    for names in batches:
        chosen = packed.select(torch.arange(names))
        last = int(chosen.cu_seqlens[1]) - 1
        changed = chosen.tokens.clone()
        changed[last] = 1 + changed[last] % (model.vocab_size - 1)
        other = cw.Packed(changed, chosen.targets, chosen.cu_seqlens)
        row: dict[str, Any] = {"names": names, "positions": len(chosen)}
        for mode in ("training", "evaluation"):
            network = copy.deepcopy(model).double().train(mode == "training")
            before, after = network(cw.dense_graph(chosen)), network(cw.dense_graph(other))
            unread = torch.ones(len(chosen), dtype=torch.bool)
            unread[last] = False
            row[mode] = {
                "largest_logit_change": float((after - before)[unread].abs().max()),
                "largest_logit": float(before.abs().max()),
            }
        rows.append(row)
    return rows


def main() -> int:
    words = cw.load_words()
    if not words.is_names_txt:
        print("benchmarks.equality: needs the post's names.txt: 'convwave data fetch'", file=sys.stderr)
        return 2
    model = train(Config.make(), words).model
    assert model.vocabulary is not None
    packed = cw.pack(cw.split_words(words.words).val, model.vocabulary)
    report = {
        "provenance": provenance("python -m benchmarks.equality"),
        "zero_padding": zero_padding(model, packed),
        "look_ahead": look_ahead(model, packed),
    }
    write_atomic(RESULTS / "equality.json", (json.dumps(report, indent=2) + "\n").encode())
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
