"""The model of communication against real processes: what they ask of torch.distributed, what leaves their sockets."""
import json
import sys
import time
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dev import bench_distributed, scaling
from nanochat.common import Compute
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import share_out
from nanochat.training import accumulate

COLLECTIVES = {"all_reduce": "all_reduce", "reduce": "reduce", "broadcast": "broadcast", "barrier": "barrier",
               "all_gather_single": "all_gather", "all_gather_into_tensor": "all_gather", "all_gather": "all_gather",
               "all_to_all_single": "reduce_scatter", # what gloo has instead, see optim.sum_scatter
               "reduce_scatter_single": "reduce_scatter", "reduce_scatter_tensor": "reduce_scatter",
               "reduce_scatter": "reduce_scatter", "gather": "gather", "scatter": "scatter", "send": "send",
               "isend": "send", "all_to_all": "all_to_all", "all_gather_object": "object",
               "broadcast_object_list": "object"}
LOSS = ("all_reduce", 8) # `accumulate` adds up one float64


def count_calls(calls):
    """Replace the collectives of torch.distributed by ones that also note (name, bytes of the larger tensor)."""
    def counted(function, name):
        def call(*args, **kwargs):
            sizes = [arg.numel() * arg.element_size() for arg in args if torch.is_tensor(arg)]
            calls[name, max(sizes, default=0)] += 1
            return function(*args, **kwargs)
        return call
    for name, kind in COLLECTIVES.items():
        setattr(dist, name, counted(getattr(dist, name), kind))


def written():
    """Bytes that this process has written, sockets included: gloo writes to them as to files."""
    with open("/proc/self/io") as file:
        return int(dict(line.split(": ") for line in file)["wchar"])


def worker(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    compute, calls = Compute(True, rank, rank, world_size, torch.device("cpu")), Counter()
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 4096, 4, 2, 2, 256, "L"))
    model.init_weights()
    optimizer = model.setup_optimizer()
    ids = torch.randint(4096, (1, 33))

    def step():
        accumulate(model, [(ids[:, :-1], ids[:, 1:])], 32 * world_size, compute)
        optimizer.step()
    step() # the first one makes the state and the connections
    dist.barrier()
    time.sleep(0.5) # what the barrier sends is on its way
    before = written() if sys.platform == "linux" else None
    count_calls(calls)
    step()
    dist.monitored_barrier() # nobody is still sending; its few bytes do not matter
    sent = written() - before if before is not None else None
    with open(f"{folder}/rank{rank}.json", "w") as file:
        json.dump({"calls": [[*call, times] for call, times in calls.items()], "sent": sent,
                   "plan": [*scaling.collectives(share_out(optimizer.param_groups, world_size), world_size)],
                   "optimal": scaling.optimal_bytes(optimizer.param_groups, world_size),
                   "traffic": scaling.traffic(optimizer.param_groups, world_size)}, file)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_bytes_of_a_real_step_are_those_of_the_model(tmp_path, world_size):
    """Four layers, whose matrices three ranks do not divide, and a small vocabulary, where that tells."""
    mp.spawn(worker, (world_size, str(tmp_path)), nprocs=world_size)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(world_size)]
    for rank in ranks:
        expected = Counter([LOSS, *((name, size) for name, size, _ in rank["plan"])])
        assert {(name, size): times for name, size, times in rank["calls"]} == expected
        assert sum(rank["traffic"].values()) <= 1.05 * rank["optimal"]
    if sys.platform == "linux":
        sent = sum(rank["sent"] for rank in ranks) / world_size
        assert 0.99 < sent / ranks[0]["optimal"] < 1.05


@pytest.mark.parametrize("depth", [4, 6, 12, 20, 32])
def test_no_more_is_sent_than_a_reduce_scatter_and_an_all_gather_of_all_parameters(depth):
    groups = scaling.build(depth, 32768, torch.float32)[1].param_groups
    num_bytes = 4 * sum(p.numel() for group in groups for p in group["params"])
    for world_size in (2, 3, 4, 5, 6, 7, 8, 16, 64, 512):
        moved = scaling.traffic(groups, world_size)
        optimal = 2 * num_bytes * (world_size - 1) / world_size
        assert sum(moved.values()) == pytest.approx(optimal, rel=1e-9)
        # counted in the worst way, as a rank that passes every left-over matrix on, and owns none
        left = moved["reduce"] + moved["broadcast"]
        assert optimal + left / (world_size - 1) <= 1.05 * optimal


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64, 512])
def test_everything_has_one_owner_and_the_left_over_is_spread_evenly(world_size):
    groups = scaling.build(12, 32768)[1].param_groups
    units = share_out(groups, world_size)
    assert [p for unit in units for p in unit.params] == [p for group in groups for p in group["params"]]
    load = [0] * world_size # in numbers
    for unit in units:
        if unit.even is not None:
            owned = [sum(unit.own(list(range(unit.num_rows)), rank), []) for rank in range(world_size)]
            assert sorted(sum(owned, [])) == list(range(unit.num_rows))
            size = sum(p.numel() for p in unit.params) // unit.num_rows
            load = [before + len(mine) * size for before, mine in zip(load, owned)]
    assert max(load) - min(load) <= max(p.numel() for group in groups[-3:] for p in group["params"])


def test_a_step_by_hand():
    """d20 on 2 nodes: 896.5M parameters, of which 461.4M in tables of bf16; first the links inside count alone."""
    model, optimizer = scaling.build(20, 32768)
    flags = ["--intra-node=1", "--inter-node=1e9", "--latency=0", "--mfu=0.5", "--peak-flops=1e15"]
    args = scaling.build_parser().parse_args(flags)
    compute, waiting = scaling.step_seconds(model, optimizer.param_groups, 2, args)
    assert waiting == pytest.approx(2 * (2 * 461_373_440 + 4 * 435_162_280) * 15 / 16 / 1e9, rel=1e-6)
    forward_backward = 3_004_189_440 * 524_288 / 16 / 0.5e15
    assert forward_backward < compute < 1.05 * forward_backward
    args.intra_node, args.inter_node, args.overlap = 1e9, 1, 0.25 # now between two nodes, over 8 links each
    _, waiting = scaling.step_seconds(model, optimizer.param_groups, 2, args)
    assert waiting == pytest.approx(0.75 * 2 * (2 * 461_373_440 + 4 * 435_162_280) / 2 / 8 / 1e9, rel=1e-3)


def test_the_tables(capsys):
    scaling.main(["--depths", "12", "--nodes", "1", "2", "64", "--ranks", "2", "3"])
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["ratio"] == 1.0 and list(result["efficiency"]["d12"]) == ["1", "2"]
    assert 0.5 < result["efficiency"]["d12"]["2"] < 1 == result["efficiency"]["d12"]["1"]
    assert any("fewer rows in a step than GPUs" in line for line in table)
    with pytest.raises(SystemExit) as stop:
        scaling.main(["--mfu", "0", "--ranks", "1"])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and "--mfu must be positive, got 0.0; --ranks must be at least 2, got 1" in text


@pytest.mark.slow
def test_the_benchmark_of_several_processes(capfd):
    flags = "--depth 4 --vocab-size 256 --total-batch-size 1024 --device-batch-size 1 --turns 1 --steps 1"
    bench_distributed.main(flags.split())
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    whole = result["state_bytes"]["1"][0]
    for num in (2, 4):
        assert len(result["state_bytes"][str(num)]) == num and max(result["state_bytes"][str(num)]) < 1.05 * whole / num
    assert result["ratio"] > 0
    with pytest.raises(SystemExit):
        bench_distributed.main(["--total-batch-size", "1000", "--turns", "0"])
    error = capfd.readouterr().err
    assert "--turns must be at least 1, got 0; --total-batch-size must be a multiple of 1024, got 1000" in error
