"""The frozen baseline and the library were written separately from one specification: they must agree."""
import ast
import json
from pathlib import Path

import pytest
import torch

from dev import baseline
from nanochat.gpt import GPT, GPTConfig


def test_it_imports_nothing_of_ours():
    tree = ast.parse(Path(baseline.__file__).read_text("utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert names == {"argparse", "json", "statistics", "time", "torch", "torch.nn", "torch.nn.functional"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


def make_pair(pattern="L"):
    """(baseline's model, ours) with the same weights, none of them zero."""
    torch.manual_seed(0)
    plain = baseline.Model(vocab_size=100, num_layers=3, num_heads=2, width=64, seq_len=24, window_pattern=pattern)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = GPT(GPTConfig(sequence_len=24, vocab_size=100, n_layer=3, n_head=2, n_kv_head=2, n_embd=64,
                          window_pattern=pattern))
    model.load_state_dict(plain.state_dict())
    model.init_rotary()
    return plain, model


def assert_near(mine, theirs, tolerance, name):
    """Relative to the matrix as a whole."""
    assert (mine - theirs).norm() <= tolerance * theirs.norm() + 1e-12, name


@pytest.mark.parametrize("pattern", ["L", "SSL"])
def test_loss_and_gradients_equal_the_librarys(pattern):
    plain, model = make_pair(pattern)
    ids = torch.randint(100, (4, 25))
    losses = [each(ids[:, :-1], ids[:, 1:].contiguous()) for each in (plain, model)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    for (name, mine), theirs in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert_near(mine.grad, theirs.grad, 1e-5, name)


def test_steps_equal_the_librarys():
    """Three steps on the same gradients: AdamW to fp32 rounding, Muon to that of its bf16 iteration."""
    plain, model = make_pair()
    optimizers = baseline.Optimizer(plain, 64), model.setup_optimizer(embedding_lr=0.3, weight_decay=0.2)
    before = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    for _ in range(3):
        for mine, theirs in zip(plain.parameters(), model.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for (name, mine), theirs in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert_near(mine - before[name], theirs - before[name], 0.01 if "transformer.h" in name else 1e-4, name)


def test_the_last_line_is_json(capsys):
    flags = "--depth 1 --width 64 --head-dim 32 --vocab-size 64 --seq-len 8 --batch 2 --steps 4 --no-compile"
    baseline.main(flags.split())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["tokens_per_second"] > 0 and result["width"] == 64 and not result["compiled"]
