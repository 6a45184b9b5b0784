"""The released model in float32, from its description alone: no code is shared with dualtrain."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

VOCABULARY, WIDTH, LAYERS, HEADS, MLP = 96, 24, 3, 3, 20
SETTINGS = {
    "d_h": WIDTH // HEADS,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "max_sequence_length": 32,
    "norm_eps": 1e-3,  # large, so that it counts
    "num_attention_heads": HEADS,
    "num_layers": LAYERS,
    "rope_theta": 70.0,
    "vocab_size": VOCABULARY,
    "tie_weights": False,
}
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "<mask>": 4}


def released_weights(prefix: str = "") -> dict[str, Tensor]:
    """A state dict of random weights, by the names of the released code."""
    shapes = {
        "embedding.word_embedding.weight": (VOCABULARY, WIDTH),
        "classifier.pre_norm.weight": (WIDTH,),
        "classifier.projection.weight": (WIDTH, WIDTH),
        "classifier.emb2vocab.weight": (VOCABULARY, WIDTH),
        "classifier.emb2vocab.bias": (VOCABULARY,),
    }
    for layer in range(LAYERS):
        attention, mlp = (f"encoder.layers.{layer}.{part}" for part in ("attention", "mlp"))
        shapes |= {f"{part}.pre_norm.weight": (WIDTH,) for part in (attention, mlp)}
        shapes |= {f"{attention}.qkv_proj.weights.{i}": (WIDTH, WIDTH) for i in range(3)}
        shapes |= {f"{attention}.out_proj.weight": (WIDTH, WIDTH)}
        shapes |= {f"{mlp}.up_proj.weights.{i}": (MLP, WIDTH) for i in range(2)}
        shapes |= {f"{mlp}.down_proj.weight": (WIDTH, MLP)}
    random = torch.Generator().manual_seed(3)
    return {
        prefix + name: torch.randn(shape, generator=random) * (0.3 if len(shape) == 2 else 1)
        for name, shape in shapes.items()
    }


def released_logits(weights: dict[str, Tensor], ids: Tensor, documents: Tensor, causal: bool):
    """(B, T, V) logits of the released model, position by position and head by head."""

    def norm(hidden: Tensor, name: str) -> Tensor:
        mean = hidden.pow(2).mean(-1, keepdim=True)
        return hidden / torch.sqrt(mean + SETTINGS["norm_eps"]) * weights[f"{name}.weight"]

    def turned(vector: Tensor, position: int) -> Tensor:
        half = len(vector) // 2
        result = vector.clone()
        for i in range(half):
            angle = position / SETTINGS["rope_theta"] ** (2 * i / len(vector))
            a, b = vector[i], vector[i + half]
            result[i] = a * math.cos(angle) - b * math.sin(angle)
            result[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return result

    def attention(hidden: Tensor, name: str, documents: Tensor) -> Tensor:
        size = WIDTH // HEADS
        query, key, value = (hidden @ weights[f"{name}.qkv_proj.weights.{i}"].T for i in range(3))
        mixed = torch.zeros_like(hidden)
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            queries, keys = (
                [turned(row[part], position) for position, row in enumerate(rows)]
                for rows in (query, key)
            )
            for i in range(len(hidden)):
                seen = [
                    j
                    for j in range(i + 1 if causal else len(hidden))
                    if documents[j] == documents[i]
                ]
                scores = torch.stack([queries[i] @ keys[j] for j in seen]) / math.sqrt(size)
                mixed[i, part] = scores.softmax(0) @ value[seen][:, part]
        return mixed @ weights[f"{name}.out_proj.weight"].T

    def mlp(hidden: Tensor, name: str) -> Tensor:
        up, gate = (hidden @ weights[f"{name}.up_proj.weights.{i}"].T for i in range(2))
        return (up * gate * torch.sigmoid(gate)) @ weights[f"{name}.down_proj.weight"].T

    rows = []
    for row, parts in zip(ids, documents, strict=True):
        hidden = weights["embedding.word_embedding.weight"][row]
        for layer in range(LAYERS):
            name = f"encoder.layers.{layer}"
            mixed = norm(hidden, f"{name}.attention.pre_norm")
            hidden = hidden + attention(mixed, f"{name}.attention", parts)
            hidden = hidden + mlp(norm(hidden, f"{name}.mlp.pre_norm"), f"{name}.mlp")
        hidden = norm(hidden, "classifier.pre_norm") @ weights["classifier.projection.weight"].T
        hidden = F.gelu(hidden, approximate="tanh")
        rows.append(
            hidden @ weights["classifier.emb2vocab.weight"].T + weights["classifier.emb2vocab.bias"]
        )
    return torch.stack(rows)
