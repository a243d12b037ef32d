"""MuonAdamW against hand-computed steps, torch's AdamW, and an exact polar factor."""
import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat.optim import DistMuonAdamW, MuonAdamW, orthogonalize

P = [[0.5, -0.2, 0.1], [0.3, 0.4, -0.6], [-0.1, 0.7, 0.2], [0.9, -0.3, 0.8]]
G = [[0.02, 0.01, -0.03], [0.05, -0.02, 0.01], [0.0, 0.04, 0.02], [-0.01, 0.03, 0.06]]


def muon(*params, **changes):
    return MuonAdamW([{"kind": "muon", "params": list(params), "lr": 0.02, "momentum": 0.95, "ns_steps": 5,
                       "beta2": 0.95, "weight_decay": 0.1, **changes}])


def adamw(*params, **changes):
    return MuonAdamW([{"kind": "adamw", "params": list(params), "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-10,
                       "weight_decay": 0.1, **changes}])


def param(values, grad=None, dtype=torch.float32):
    p = torch.nn.Parameter(torch.tensor(values, dtype=dtype))
    p.grad = None if grad is None else torch.tensor(grad, dtype=dtype)
    return p


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 2e-3)]) # bf16 iteration in fp32
def test_one_muon_step_on_a_tall_matrix(dtype, tolerance):
    p = param(P, G, dtype)
    optimizer = muon(p)
    optimizer.step()
    after = [[0.489785, -0.210241, 0.111426], [0.283216, 0.405569, -0.605251], [-0.103572, 0.681041, 0.197541],
             [0.901160, -0.306212, 0.781492]]
    torch.testing.assert_close(p.data, torch.tensor(after, dtype=dtype), atol=tolerance, rtol=0)
    state = optimizer.state[p]
    torch.testing.assert_close(state["momentum_buffer"][0, 0], torch.tensor([0.001, 0.0005, -0.0015], dtype=dtype))
    assert state["second_momentum_buffer"].shape == (1, 4, 1)
    variance = torch.tensor([0.00879017, 0.01337086, 0.00842915, 0.00909987], dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float64 else 5e-3
    torch.testing.assert_close(state["second_momentum_buffer"].flatten(), variance, atol=tolerance, rtol=0)


def test_one_muon_step_on_the_transposed_matrix():
    p = param(torch.tensor(P).T.tolist(), torch.tensor(G).T.tolist(), torch.float64)
    optimizer = muon(p)
    optimizer.step()
    first = torch.tensor([0.491154, 0.285464, -0.103093, 0.901005], dtype=torch.float64)
    torch.testing.assert_close(p.data[0], first, atol=1e-5, rtol=0)
    assert optimizer.state[p]["second_momentum_buffer"].shape == (1, 1, 4)


def test_a_zero_or_missing_gradient_only_decays():
    for grad in (torch.zeros(4, 3).tolist(), None):
        p = param(P, grad)
        muon(p).step()
        eta = 0.02 * (4 / 3) ** 0.5
        torch.testing.assert_close(p.data, torch.tensor(P) * (1 - eta * 0.1))


def test_a_group_of_matrices_equals_each_alone():
    together = [torch.nn.Parameter(torch.randn(6, 10, dtype=torch.float64)) for _ in range(3)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [muon(*together)] + [muon(p) for p in alone]
    for _ in range(3):
        for p, q in zip(together, alone):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shape", [(32, 32), (32, 128), (128, 32)])
def test_orthogonalize_is_close_to_the_polar_factor(shape):
    torch.manual_seed(3)
    g = torch.randn(2, *shape, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    for dtype in (torch.float64, torch.bfloat16):
        x = orthogonalize(g, 5, dtype).double()
        cosine = (x * (u @ vh)).sum((-2, -1)) / (x.norm(dim=(-2, -1)) * (u @ vh).norm(dim=(-2, -1)))
        assert cosine.min() > 0.98
        values = torch.linalg.svdvals(x)
        assert values.max() < 1.25 and values.median() > 0.9 # the smallest ones are not quite lifted to 1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_adamw_equals_the_formula(dtype, tolerance):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.linspace(-1, 1, 50, dtype=dtype))
    optimizer, x, m, v = adamw(p), p.detach().double().clone(), 0, 0
    for t in range(1, 21):
        p.grad = torch.randn(50).to(dtype)
        optimizer.step()
        g = p.grad.double()
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        x = x - 0.01 * 0.1 * x - 0.01 * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-10)
    torch.testing.assert_close(p.detach().double(), x, atol=tolerance, rtol=tolerance)
    assert optimizer.state[p]["step"] == 20


def test_adamw_of_a_bf16_table_computes_in_fp32():
    exact, rough = param([1.0, -2.0, 3.0], [0.1, 0.2, -0.3]), param([1.0, -2.0, 3.0], [0.1, 0.2, -0.3], torch.bfloat16)
    adamw(exact).step()
    optimizer = adamw(rough)
    optimizer.step()
    torch.testing.assert_close(rough.data.float(), exact.data.bfloat16().float(), atol=0.0, rtol=2**-7)
    assert optimizer.state[rough]["exp_avg"].dtype == torch.bfloat16


def test_adamw_skips_a_missing_gradient_and_hyperparameters_are_read_each_step():
    p, q = param([1.0, 2.0], [0.5, 0.5]), param([3.0])
    optimizer = adamw(p, q)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert p.tolist() == [1.0, 2.0] and q.tolist() == [3.0] and q not in optimizer.state


def test_state_dict_round_trip_continues_bit_for_bit():
    torch.manual_seed(0)
    grads = torch.randn(6, 5, 5)
    def run(p, optimizer, steps):
        for i in steps:
            p.grad = grads[i].clone()
            optimizer.step()
    p = torch.nn.Parameter(torch.eye(5))
    optimizer = muon(p)
    run(p, optimizer, range(3))
    q = torch.nn.Parameter(p.detach().clone())
    restored = muon(q)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(p, optimizer, range(3, 6))
    run(q, restored, range(3, 6))
    assert torch.equal(p, q)


def test_the_closure_is_called_and_bad_groups_are_refused():
    p = param([1.0], [1.0])
    assert adamw(p).step(lambda: torch.tensor(7.0)) == 7.0
    with pytest.raises(ValueError, match="kind of a parameter group must be adamw or muon, got 'sgd'"):
        MuonAdamW([{"kind": "sgd", "params": [p]}])
    with pytest.raises(ValueError, match="matrices of one shape"):
        muon(torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(3, 2)))
    assert DistMuonAdamW is MuonAdamW


SHAPES = {"adamw": [(7, 400), (1, 2048), (3,), (64, 32)], "muon": [[(6, 5)] * 5, [(4, 9)], [(8, 8)] * 3]}


def many_params():
    """Float64 parameters of awkward shapes, and an optimizer over them: rows and matrices that no W divides."""
    rng = torch.Generator().manual_seed(0)
    def new(shape):
        return torch.nn.Parameter(torch.randn(shape, generator=rng, dtype=torch.float64))
    groups = [{"kind": "adamw", "params": [new(shape) for shape in SHAPES["adamw"]], "lr": 0.1, "betas": (0.8, 0.95),
               "eps": 1e-10, "weight_decay": 0.1}]
    for shapes in SHAPES["muon"]:
        groups.append({"kind": "muon", "params": [new(shape) for shape in shapes], "lr": 0.02, "momentum": 0.95,
                       "ns_steps": 5, "beta2": 0.95, "weight_decay": 0.3})
    return [p for group in groups for p in group["params"]], MuonAdamW(groups)


def gradient_of(step, rank, i, p):
    """None for some: on one rank the second parameter, on all of them a matrix."""
    if i == 1 and rank == 1 or i == 6:
        return None
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + 10 * rank + i), dtype=p.dtype)


def take_steps(params, optimizer, steps, ranks):
    for step in steps:
        for i, p in enumerate(params):
            grads = [gradient_of(step, rank, i, p) for rank in ranks]
            grads = [torch.zeros_like(p) if grad is None and len(ranks) > 1 else grad for grad in grads]
            p.grad = grads[0] if len(ranks) == 1 else sum(grads) / len(ranks)
        optimizer.step()


def rank_worker(rank, world_size, folder):
    """Three steps, a save, and two more after loading it into a fresh optimizer; then the same from one rank's file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world_size}", rank=rank, world_size=world_size)
    params, optimizer = many_params()
    take_steps(params, optimizer, range(3), [rank])
    parts = [None] * world_size
    dist.all_gather_object(parts, {i: tuple(optimizer.state[p]["exp_avg" if i < 4 else "momentum_buffer"].shape)
                                   for i, p in enumerate(params) if p in optimizer.state})
    saved = optimizer.state_dict()
    assert (saved is None) == (rank > 0)
    if rank == 0:
        torch.save({"params": params, "state": saved, "parts": parts}, f"{folder}/after3_{world_size}.pt")
    dist.barrier()
    for source in (world_size, 1):
        if source == 1: # from here on with the collective that GPUs use
            dist.get_backend = lambda: "nccl"
        params, optimizer = many_params()
        loaded = torch.load(f"{folder}/after3_{source}.pt", weights_only=False)
        with torch.no_grad():
            for p, q in zip(params, loaded["params"], strict=True):
                p.copy_(q)
        optimizer.load_state_dict(loaded["state"])
        take_steps(params, optimizer, range(3, 5), [rank])
        torch.save(params, f"{folder}/after5_from{source}_{world_size}_{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_many_ranks_equal_one_with_the_mean_gradient(tmp_path, world_size):
    """With real processes: weights, state on disk, and the same steps after loading another number of ranks' state."""
    params, optimizer = many_params()
    take_steps(params, optimizer, range(3), range(world_size))
    whole = copy.deepcopy(optimizer.state_dict())
    torch.save({"params": params, "state": whole}, tmp_path / "after3_1.pt")
    mp.spawn(rank_worker, (world_size, str(tmp_path)), nprocs=world_size)
    after3 = torch.load(tmp_path / f"after3_{world_size}.pt", weights_only=False)
    for p, q in zip(params, after3["params"], strict=True):
        torch.testing.assert_close(q, p, atol=1e-12, rtol=0)
    assert after3["state"]["state"].keys() == whole["state"].keys()
    for i, state in whole["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(torch.as_tensor(after3["state"]["state"][i][name]), torch.as_tensor(value),
                                       atol=1e-12, rtol=0)
    rows = {0: 7, 1: 1, 3: 64, 4: 5, 9: 1, 10: 3} # of what is shared out: nothing twice, and evenly
    for i, num_rows in rows.items():
        shares = [part[i][0] for part in after3["parts"]]
        assert sum(shares) == num_rows and max(shares) - min(shares) <= 1
    assert all(part.keys() == {2, *rows} and part[2] == (3,) for part in after3["parts"])
    take_steps(params, optimizer, range(3, 5), range(world_size))
    for source in (world_size, 1):
        for rank in range(world_size):
            got = torch.load(tmp_path / f"after5_from{source}_{world_size}_{rank}.pt", weights_only=False)
            for p, q in zip(params, got, strict=True):
                torch.testing.assert_close(q, p, atol=1e-12, rtol=0)
