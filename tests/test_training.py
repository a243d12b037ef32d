"""The pieces of a training loop against hand computations."""
import argparse
import datetime
import gc
import json
import os
import signal
import socket
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat import training
from nanochat.common import Compute, UserError, compute_init
from nanochat.gpt import GPT, GPTConfig, memory_forecast
from nanochat.training import (LossMeter, MetricsLog, Stop, Throughput, accumulate, check_loss, check_weights,
                               batch_for_horizon, collector_by_hand, compile_model, fitting_rows, grad_accum_steps,
                               horizon_tokens, is_due, lr_multiplier, muon_momentum, nearest_multiple, rate_scale,
                               refuse_changes, set_schedule, training_horizon, try_evaluation)

ONE_RANK = Compute(False, 0, 0, 1, torch.device("cpu"))


quiet_compiler = pytest.mark.filterwarnings("ignore") # torch's compiler warns about torch's own ways


def tiny_model(dtype=torch.float64):
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 60, 2, 2, 2, 32, "SL"))
    model.rotary_dtype = dtype
    model.init_weights()
    return model.to(dtype)


def test_due():
    assert [step for step in range(10) if is_due(3, step, step == 9)] == [3, 6, 9]
    assert [step for step in range(10) if is_due(4, step, step == 9)] == [4, 8, 9]
    assert not any(is_due(every, step, True) for every in (0, -1) for step in range(5))


def test_lr_multiplier_at_the_boundaries():
    """N = 10, warmup 0.2 -> 2 steps, warmdown 0.4 -> 4 steps: 1/2, 1, then 1 until step 6, then 3/4, 2/4, 1/4."""
    values = [lr_multiplier(t, 10, 0.2, 0.4, 0.0) for t in range(10)]
    assert values == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert lr_multiplier(9, 10, 0.0, 0.4, 0.2) == pytest.approx(0.25 + 0.75 * 0.2)
    assert [lr_multiplier(t, 5, 0.0, 0.0, 0.0) for t in range(5)] == [1] * 5
    assert lr_multiplier(0, 1, 0.0, 1.0, 0.0) == 1


def test_muon_momentum():
    assert [muon_momentum(t) for t in (0, 150, 300, 1000)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert [muon_momentum(t, 2205) for t in (0, 150, 300)] == pytest.approx([0.85, 0.90, 0.95]), "d12: as published"
    assert [muon_momentum(t, 700) for t in (0, 50, 100, 699)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert [muon_momentum(t, 1) for t in (0, 1)] == pytest.approx([0.85, 0.95])


def test_set_schedule_reaches_all_groups_and_decay_only_muon():
    optimizer = tiny_model().setup_optimizer(weight_decay=0.3)
    set_schedule(optimizer, 0.5, momentum=0.9, weight_decay=0.1)
    assert all(g["lr"] == 0.5 * g["initial_lr"] for g in optimizer.param_groups)
    assert {g["momentum"] for g in optimizer.param_groups if g["kind"] == "muon"} == {0.9}
    assert {(g["kind"], g["weight_decay"]) for g in optimizer.param_groups} == {("muon", 0.1), ("adamw", 0.0)}


def test_a_batch_size_that_does_not_divide_names_the_flags_and_a_cure():
    assert grad_accum_steps(524_288, 32, 2048, 8) == 1 and grad_accum_steps(8192, 4, 256, 1) == 8
    with pytest.raises(ValueError, match=r"--total-batch-size must be a multiple of 196,608.*nearest: 589,824"):
        grad_accum_steps(524_288, 12, 2048, 8)


@pytest.mark.parametrize("flags, steps", [
    ({"num_iterations": 7, "target_flops": 1e9}, 7), ({"target_flops": 3e6}, 3), ({"target_flops": 2.6e6}, 3),
    ({"target_param_data_ratio": 10.5}, 10)]) # int(10.5 * 1000) // 1000
def test_horizon_precedence(flags, steps):
    args = argparse.Namespace(num_iterations=-1, target_flops=-1.0, target_param_data_ratio=20.0, total_batch_size=1000)
    vars(args).update(flags)
    assert training_horizon(args, flops_per_token=1000, scaling_params=1000) == steps


@pytest.mark.parametrize("free, fails_from, rows", [
    (1e12, 99, 12), (1e12, 12, 8), (1e12, 3, 2), # 16 is tried by nobody: it does not divide 24
    ("forecast of 6", 99, 6), ("forecast of 1", 99, 1)])
def test_the_most_rows_that_fit_are_taken(monkeypatch, capsys, free, fails_from, rows):
    model, tried = tiny_model(), []
    model.compute_dtype = torch.float64

    def probe(n):
        tried.append(n)
        if n >= fails_from:
            raise torch.OutOfMemoryError
    if isinstance(free, str):
        parts = memory_forecast(model.config, int(free.split()[-1]), "cpu", 8)
        free = (parts["peak"] - parts["weights"]) / 0.9 + 1
    monkeypatch.setattr(training, "available_memory", lambda compute: free)
    monkeypatch.setitem(training.MOST_TOKENS, "cpu", 16 * 16) # 16 rows
    assert fitting_rows(model, 24, ONE_RANK, probe) == rows
    assert tried == [n for n in (12, 8, 6, 4, 3, 2, 1) if rows <= n and (fails_from < 99 or n == rows)]
    assert f"Device batch size: {rows} rows (auto" in capsys.readouterr().out
    monkeypatch.setattr(training, "available_memory", lambda compute: 1000)
    with pytest.raises(UserError, match="one row of 16 tokens needs .* pass --recompute"):
        fitting_rows(model, 24, ONE_RANK, probe)


def test_the_collector_rests_between_the_steps_and_comes_back():
    class Node:
        pass

    def cycle():
        node = Node()
        node.itself = node
        return weakref.ref(node)
    gc.enable()
    with collector_by_hand() as collect:
        assert not gc.isenabled()
        collect(True)
        assert gc.get_freeze_count() > 0
        node = cycle()
        collect(False)
        assert node() is None, "what is made later is still collected"
    assert gc.get_freeze_count() == 0 and gc.isenabled()


def test_a_horizon_of_no_steps_is_refused():
    args = argparse.Namespace(num_iterations=-1, target_flops=-1.0, target_param_data_ratio=0.001,
                              total_batch_size=1000)
    with pytest.raises(ValueError, match="--target-param-data-ratio is too small"):
        training_horizon(args, 1000, 1000)


@pytest.mark.parametrize("depth_12_tokens, batch", [(1, 2**19), (4, 2**20), (1000, 2**20), (1 / 8, 2**18)])
def test_the_batch_follows_the_length_of_the_run(depth_12_tokens, batch):
    assert batch_for_horizon(1.156e9 * depth_12_tokens) == batch


def test_sizes_become_the_nearest_multiple_of_what_the_ranks_take_at_a_time():
    assert [nearest_multiple(size, 98304) for size in (1, 2**17, 2**18, 2**20)] == [98304, 98304, 294912, 1081344]


def test_a_number_of_steps_agrees_with_its_own_batch():
    args = argparse.Namespace(num_iterations=2205, target_flops=-1.0, target_param_data_ratio=-1.0,
                              total_batch_size="auto")
    tokens = horizon_tokens(args, 1, 1)
    assert tokens == pytest.approx(2205 * 2**19, rel=0.001) and batch_for_horizon(tokens) == 2**19


def test_rates_grow_with_the_batch_and_in_runs_shorter_than_the_reference():
    assert rate_scale(2**19, 1.156e9) == 1 and rate_scale(2**17, 1.156e9) == 0.5
    assert rate_scale(2**20, 1e10) == pytest.approx(2**0.5) # nothing was tuned there
    assert rate_scale(2**19, 1.156e9 / 32) == pytest.approx(2 ** (5 * 0.32))


def ragged_batch():
    """Six rows of which some targets are ignored, unevenly."""
    torch.manual_seed(1)
    inputs, targets = torch.randint(0, 60, (6, 16)), torch.randint(0, 60, (6, 16))
    targets[0, 2:] = -1
    targets[3] = -1
    return inputs, targets


def test_weights_do_not_depend_on_the_micro_batch_size():
    results = []
    for size in (1, 2, 3, 6):
        model, (inputs, targets) = tiny_model(), ragged_batch()
        optimizer = model.setup_optimizer()
        for _ in range(20):
            micro_batches = list(zip(inputs.split(size), targets.split(size)))
            loss = accumulate(model, micro_batches, int((targets >= 0).sum()), ONE_RANK)
            optimizer.step()
            optimizer.zero_grad()
        results.append((loss, [p.detach().clone() for p in model.parameters()]))
    for loss, weights in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-9)
        for p, q in zip(weights, results[0][1]):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def test_gradient_is_that_of_the_mean_over_all_supervised_tokens():
    model, (inputs, targets) = tiny_model(), ragged_batch()
    losses = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-1)
    losses.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    accumulate(model, list(zip(inputs.split(1), targets.split(1))), int((targets >= 0).sum()), ONE_RANK)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-10, rtol=1e-8)


def test_loss_meter_of_a_constant_is_the_constant():
    meter = LossMeter()
    assert [meter.update(3.0) for _ in range(5)] == pytest.approx([3.0] * 5)
    restored = LossMeter(**meter.state())
    assert restored.update(1.0) == meter.update(1.0)


def test_throughput_leaves_out_the_first_ten_steps():
    speed = Throughput(tokens_per_step=1000, flops_per_token=5, peak_flops=50_000)
    for _ in range(10):
        speed.update(9.0)
    assert speed.total_time == 0 and speed.eta(5) is None
    for seconds in (1.0, 3.0):
        speed.update(seconds)
    assert (speed.total_time, speed.eta(5)) == (4.0, 10.0)
    speed.update(0.5)
    assert speed.tok_per_sec == 2000 and speed.mfu == pytest.approx(20.0)


def test_metrics_log_drops_what_is_done_again_and_half_lines(tmp_path):
    log = MetricsLog(str(tmp_path))
    for step in range(4):
        log.log(step, **{"train/loss": float("nan") if step == 1 else step})
    with open(log.path, "a") as file:
        file.write('{"step": 4, "train/lo')
    MetricsLog(str(tmp_path), resume_step=3).log(3, **{"val/bpb": 1.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 0, "train/loss": 0}, {"step": 1, "train/loss": None}, {"step": 2, "train/loss": 2},
                     {"step": 3, "val/bpb": 1.5}]
    MetricsLog(str(tmp_path / "none"), enabled=False).log(0, x=1)
    assert not (tmp_path / "none").exists()


def test_stop_notes_a_signal_and_gives_handlers_back():
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert not stop.requested(ONE_RANK)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM) # from the batch system, then from torchrun: they mean the same
        signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert stop.requested(ONE_RANK) and stop.exit_code() == 128 + signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pthread_sigmask(signal.SIG_BLOCK, []) # a point where the second signal is surely delivered
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_torchrun_sends_again_does_not_cut_the_saving_short(monkeypatch):
    with Stop() as stop: # one Ctrl-C reaches the process from the terminal and from torchrun, one SIGTERM of a job too
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.setenv(name, "1")
        os.kill(os.getpid(), signal.SIGINT)
        signal.pthread_sigmask(signal.SIG_BLOCK, []) # a point where all are surely delivered
        assert stop.exit_code() == 128 + signal.SIGTERM


def test_failures_in_words(capsys):
    check_loss(1.0, 0)
    with pytest.raises(UserError, match="the loss became nan in step 7"):
        check_loss(float("nan"), 7)
    model = tiny_model()
    check_weights(model, 0)
    model.x0_lambdas.data[1] = float("inf")
    with pytest.raises(UserError, match="the weights of x0_lambdas are not finite after 7 steps, which is not saved"):
        check_weights(model, 7)
    assert try_evaluation("CORE", lambda: 1 / 0) is None
    assert "CORE failed and is left out: ZeroDivisionError" in capsys.readouterr().out
    refuse_changes({"depth": 4, "seed": 1}, {"depth": 4, "seed": 2}, ["depth", "new_flag"])
    with pytest.raises(ValueError, match="--depth was 4, is 6"):
        refuse_changes({"depth": 4}, {"depth": 6}, ["depth"])


def evaluate_on_two_ranks(rank, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    compute, new_group = compute_init("cpu"), dist.new_group
    training.dist.new_group = lambda **kw: new_group(**{**kw, "timeout": datetime.timedelta(seconds=2)})

    def evaluate(fails, collective):
        if fails and rank == 1:
            raise OSError("disk gone")
        return compute.all_reduce(rank + 1) if collective else "fine"
    assert try_evaluation("A", lambda: evaluate(False, True)) == [3.0]
    assert try_evaluation("B", lambda: evaluate(True, False)) is None, "on both ranks"
    assert compute.all_reduce(rank + 1) == [3.0], "in step again"
    with pytest.raises(UserError, match="C did not end on all ranks, so that they are out of step: --resume"):
        try_evaluation("C", lambda: evaluate(True, True))
    os._exit(0) # as in a run, the end of rank 1 frees rank 0 from all_reduce; no tidying up of broken groups


@pytest.mark.slow
def test_ranks_agree_on_a_failed_evaluation_and_none_waits_for_ever():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    mp.spawn(evaluate_on_two_ranks, (port,), nprocs=2)


@quiet_compiler
def test_compiling_that_fails_falls_back_and_says_why():
    model = tiny_model(torch.float32)
    def broken(*shape):
        raise RuntimeError("no C++ compiler\nand a long trace")
    model.warm_up = broken
    reason = "Compile: off, running eagerly because compiling failed: no C++ compiler"
    assert compile_model(model, "auto", 2) == reason
    assert model.block_fn is type(model.transformer.h[0]).forward
    with pytest.raises(UserError, match="--compile on was asked for, but compiling failed: no C"):
        compile_model(model, "on", 2)
    assert compile_model(model, "off", 2) == "Compile: off (--compile off)"


@quiet_compiler
@pytest.mark.slow
def test_compiled_and_eager_agree():
    model, (inputs, targets) = tiny_model(torch.float32), ragged_batch()
    def gradients():
        model.zero_grad()
        loss = model(inputs, targets)
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters()]
    loss, expected = gradients()
    message = compile_model(model, "on", *inputs.shape)
    assert "compiled in" in message
    compiled_loss, got = gradients()
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    for g, e in zip(got, expected):
        assert (g - e).norm() <= 1e-5 * e.norm() + 1e-9
