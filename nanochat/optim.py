"""
MuonAdamW: one optimizer for all parameters of a model, on one rank or many.

    groups of kind "adamw"   Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization"
                             (https://arxiv.org/abs/1711.05101)
    groups of kind "muon"    Jordan et al. 2024, "Muon" (https://kellerjordan.github.io/posts/muon/), orthogonalised by
                             Polar Express (Amsel et al. 2025, https://arxiv.org/abs/2505.16932), with the row-wise
                             variance reduction of NorMuon (Li et al. 2025, https://arxiv.org/abs/2510.05491) and
                             cautious weight decay (Chen et al. 2025, https://arxiv.org/abs/2510.12402)

Hyper-parameters are read from the groups at every step, so schedules just assign to them.
"""
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

SMALL = 1024 # numbers in an AdamW parameter: below, sharing out the work costs more than it saves

# Coefficients of the odd polynomial of each iteration: 5 iterations, safety factor 2e-2, cushion 2.
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def orthogonalize(g, ns_steps=5, dtype=torch.bfloat16):
    """
    Replace each matrix by an approximation of its polar factor: same singular vectors, singular values near 1.

    g (G, r, c) in any float dtype; the iteration runs in `dtype`, which the result (G, r, c) has.
    """
    x = g.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6) # spectral norm below 1
    tall = x.size(-2) > x.size(-1)
    for alpha, beta, gamma in POLAR_EXPRESS[:ns_steps]:
        gram = x.mT @ x if tall else x @ x.mT # the smaller of the two
        z = beta * gram + gamma * (gram @ gram)
        x = alpha * x + (x @ z if tall else z @ x)
    return x


def muon_update(p, grad, momentum_buffer, second_momentum_buffer, lr, momentum, ns_steps, beta2, weight_decay):
    """
    One Muon step for a stack of matrices; returns the new stack.

    p, grad, momentum_buffer  (G, r, c)
    second_momentum_buffer    (G, r, 1) when r >= c, else (G, 1, c)
    The buffers change in place. The iteration runs in bf16, in float64 for float64 parameters.
    """
    rows, cols = p.shape[-2:]
    dtype = torch.promote_types(p.dtype, torch.float32)
    momentum_buffer.lerp_(grad, 1 - momentum)
    g = grad.lerp(momentum_buffer, momentum) # Nesterov: look ahead along the new momentum
    x = orthogonalize(g, ns_steps, torch.float64 if p.dtype == torch.float64 else torch.bfloat16).to(dtype)

    dim = -1 if rows >= cols else -2 # one variance per neuron along the longer side
    size = x.size(dim)
    square = x.square().mean(dim=dim, keepdim=True) # (G, r, 1) or (G, 1, c)
    length = (square.sum(dim=(-2, -1), keepdim=True) * size).sqrt() # Frobenius norm of each matrix
    second_momentum_buffer.lerp_(square.to(second_momentum_buffer.dtype), 1 - beta2)
    scale = second_momentum_buffer.to(dtype).clamp_min(1e-10).rsqrt()
    scaled = (square * size * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    x = x * scale * (length / scaled.clamp_min(1e-10)) # the rescaling keeps the Frobenius norm

    eta = lr * max(1, rows / cols) ** 0.5
    weight = p.to(dtype)
    agree = (x * weight >= 0).to(dtype) # cautious: decay only where the step does not already push away from zero
    return (weight - eta * x - eta * weight_decay * weight * agree).to(p.dtype)


# -----------------------------------------------------------------------------
# Who updates what, with W ranks

class Unit(NamedTuple):
    """
    What is updated together, in rows: the matrices of a Muon group, or the rows of one AdamW parameter.

    Rank R owns the rows R even .. (R+1) even - 1, and rank owners[j] the row W even + j, one of those left over.
    `even` is None where every rank updates the whole.
    """
    group_idx: int
    param_idx: int      # of its first parameter, as state_dict numbers them
    params: list
    num_rows: int
    even: int | None
    owners: tuple

    def own(self, rows, rank):
        """What `rank` updates of `rows`, a tensor or a list, in one or two pieces of the same kind."""
        if self.even is None:
            yield rows
            return
        yield rows[rank * self.even:(rank + 1) * self.even]
        if rank in self.owners:
            i = self.num_rows - len(self.owners) + self.owners.index(rank)
            yield rows[i:i + 1]


def share_out(param_groups, world_size):
    """
    The plan of every step: Units in the order of the groups. Nothing is padded, so no byte is sent in vain; a row that
    is left over goes to a rank that has fewest of them, counted in numbers.
    """
    load, units, param_idx = [0] * world_size, [], 0
    for i, group in enumerate(param_groups):
        for params in [group["params"]] if group["kind"] == "muon" else [[p] for p in group["params"]]:
            num_rows = len(params) if group["kind"] == "muon" else (*params[0].shape, 1)[0]
            even, owners = None, ()
            if world_size > 1 and (group["kind"] == "muon" or params[0].numel() >= SMALL):
                even, num_left = divmod(num_rows, world_size)
                owners = tuple(sorted(range(world_size), key=load.__getitem__)[:num_left])
                for rank in owners:
                    load[rank] += sum(p.numel() for p in params) // num_rows
            units.append(Unit(i, param_idx, params, num_rows, even, owners))
            param_idx += len(params)
    return units


def sum_scatter(rows):
    """
    Begin to add `rows` (W even, ...) up over the W ranks; returns a function that waits and gives this rank's sums
    (even, ...). gloo's own reduce-scatter is an all-reduce inside, twice the bytes: there each rank adds up for itself.
    """
    if not len(rows):
        return lambda: rows
    parts = rows.view(dist.get_world_size(), -1, *rows.shape[1:])
    if dist.get_backend() == "gloo":
        received = torch.empty_like(parts)
        handle = dist.all_to_all_single(received, parts, async_op=True)
    else:
        received = torch.empty_like(parts[:1])
        handle = dist.reduce_scatter_single(received, parts, async_op=True)

    def wait():
        handle.wait()
        return received.sum(0)
    return wait


def padded(tensor, num_rows):
    """`tensor` (n, ...) with rows of zeros up to num_rows."""
    return torch.cat([tensor, tensor.new_zeros((num_rows - len(tensor), *tensor.shape[1:]))])


class MuonAdamW(torch.optim.Optimizer):
    """
    AdamW for groups {"kind": "adamw", params, lr, betas, eps, weight_decay}, Muon for groups {"kind": "muon", params,
    lr, momentum, ns_steps, beta2, weight_decay} whose params are matrices of one shape.

    With a process group of W ranks, gradients are averaged over them inside `step()`; there is no wrapper around the
    model. Work and state are shared out as in ZeRO-2 (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054): a
    rank averages, updates and sends only what it owns, n / W of the n rows of an AdamW parameter or of the n matrices
    of a Muon group, rounded down or up. Any W will do (see `share_out`). AdamW parameters of fewer than SMALL numbers
    are updated everywhere. What is sent overlaps with what is computed.

    A missing gradient is skipped by AdamW and counts as zero in Muon and on several ranks.
    Raises ValueError for an unknown kind or a Muon group of mixed shapes.
    """

    def __init__(self, param_groups):
        super().__init__(param_groups, {})
        is_many = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if is_many else (0, 1)
        for group in self.param_groups:
            shapes = {p.shape for p in group["params"]}
            if group.get("kind") not in ("adamw", "muon"):
                raise ValueError(f"the kind of a parameter group must be adamw or muon, got {group.get('kind')!r}")
            if group["kind"] == "muon" and (len(shapes) != 1 or len(next(iter(shapes))) != 2):
                raise ValueError(f"a muon group must hold matrices of one shape, got {sorted(map(tuple, shapes))}")
        self.units = share_out(self.param_groups, self.world_size)

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters from their gradients. `closure`, when given, recomputes the loss first, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Three phases: all gradients set out at once; each unit is updated when its gradient is there and sets out
        # again; whatever is still on its way is waited for. The ranks agree on the order, whatever each computed.
        averaging = [(unit, self._average(unit)) for unit in self.units]
        arriving = [self._update(unit, average()) for unit, average in averaging]
        for finish in filter(None, arriving):
            finish()
        return loss

    def _is_muon(self, unit):
        return self.param_groups[unit.group_idx]["kind"] == "muon"

    def _average(self, unit):
        """Begin to average a unit's gradients. Returns a function that waits and gives this rank's part, or None."""
        def gradient():
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in unit.params]
            return torch.stack(grads) if self._is_muon(unit) else grads[0]

        if self.world_size == 1: # nothing to wait for: made when it is needed
            return gradient if self._is_muon(unit) else lambda: unit.params[0].grad
        whole = gradient()
        shared = unit.even is not None
        num_even = unit.even * self.world_size if shared else 0
        rest = whole[num_even:].clone() if shared else whole.clone() # summed in place: the gradient is its owner's
        if shared:
            block = sum_scatter(whole[:num_even].contiguous())
            handles = [dist.reduce(row, owner, async_op=True) for row, owner in zip(rest, unit.owners)]
        else:
            handles = [dist.all_reduce(rest, async_op=True)]

        def wait():
            for handle in handles:
                handle.wait()
            part = rest
            if shared:
                left = [j for j, owner in enumerate(unit.owners) if owner == self.rank]
                part = torch.cat([block(), rest[left]]) if left else block()
            return part.div_(self.world_size) # SUM and a division, because gloo has no AVG
        return wait

    def _update(self, unit, grad):
        """
        Update this rank's part of a unit and begin to send it; returns a function that puts all parts in place, or
        None for a unit that is whole here.
        """
        table = None if self._is_muon(unit) else unit.params[0].detach()
        pieces = list(unit.own(unit.params if table is None else table, self.rank))
        if table is None:
            part = torch.stack(sum(pieces, [])) if len(grad) else grad
        else:
            part = torch.cat(pieces) if len(pieces) > 1 else pieces[0] # alone it is a view: updated where it is
        self._step(unit, part, grad)
        if unit.even is not None:
            return self._send(unit, table, part)
        for p, updated in zip(unit.params, part if table is None else []):
            p.copy_(updated)

    def _send(self, unit, table, part):
        """Begin to send this rank's part of a unit to the others; returns a function that puts all parts in place."""
        num_even = unit.even * self.world_size
        whole = part.new_empty((num_even, *part.shape[1:])) if table is None else table[:num_even]
        rest = part.new_empty((len(unit.owners), *part.shape[1:]))
        handles = [dist.all_gather_single(whole, part[:unit.even], async_op=True)] if unit.even else []
        for row, owner in zip(rest, unit.owners):
            if owner == self.rank:
                row.copy_(part[unit.even])
            handles.append(dist.broadcast(row, owner, async_op=True))

        def finish():
            for handle in handles:
                handle.wait()
            rows, updated = (unit.params, [*whole, *rest]) if table is None else (table[num_even:], rest)
            for row, new in zip(rows, updated):
                row.copy_(new)
        return finish

    def _step(self, unit, part, grad):
        """Update `part` in place with the state of its unit, which is kept under the unit's first parameter."""
        if grad is None:
            return
        group, state = self.param_groups[unit.group_idx], self.state[unit.params[0]]
        if group["kind"] == "adamw":
            self._step_adamw(group, state, part, grad)
            return
        if not state:
            rows, cols = part.shape[-2:]
            state["momentum_buffer"] = torch.zeros_like(part)
            state["second_momentum_buffer"] = part.new_zeros((len(part), *((rows, 1) if rows >= cols else (1, cols))))
        part.copy_(muon_update(part, grad, state["momentum_buffer"], state["second_momentum_buffer"], group["lr"],
                               group["momentum"], group["ns_steps"], group["beta2"], group["weight_decay"]))

    def _step_adamw(self, group, state, part, grad):
        """One pass over the memory of each parameter: torch's fused kernel, which computes in at least fp32."""
        beta1, beta2 = group["betas"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(part), exp_avg_sq=torch.zeros_like(part))
        before = torch.tensor(float(state["step"]), device=part.device) # what the kernel counts up
        adamw([part], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [before], fused=True, amsgrad=False,
              beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
              maximize=False)
        state["step"] += 1

    # ---- state on disk: whole, whatever the number of ranks ----

    @torch.no_grad()
    def state_dict(self):
        """
        A copy, on the CPU, of the state as one rank alone would have it, so that it loads at any number of ranks.
        With several ranks all of them must call this; rank 0 gets the state, the others None.
        """
        saved, shared = super().state_dict(), {unit.param_idx: unit for unit in self._shared_units()}
        for i, state in sorted(saved["state"].items()): # the ranks gather in the same order
            saved["state"][i] = {name: self._whole(shared.get(i), value) if torch.is_tensor(value) else value
                                 for name, value in sorted(state.items())}
        return saved if self.rank == 0 else None

    def _whole(self, unit, part):
        """On rank 0 a copy of the whole of which `part` is this rank's; it is whole already where `unit` is None."""
        if unit is not None:
            longest = padded(part, unit.even + bool(unit.owners))
            gathered = part.new_empty((self.world_size, *longest.shape))
            dist.all_gather_single(gathered.flatten(0, 1), longest)
            left = gathered[list(unit.owners), unit.even:]
            part = torch.cat([gathered[:, :unit.even].flatten(0, 1), left.flatten(0, 1)])
        return part.to("cpu", copy=True) if self.rank == 0 else None

    def load_state_dict(self, state_dict):
        """Take this rank's part of a whole state."""
        parts = dict(state_dict["state"])
        for unit in self._shared_units():
            i = unit.param_idx
            parts[i] = {name: torch.cat(list(unit.own(value, self.rank))) if torch.is_tensor(value) else value
                        for name, value in parts.get(i, {}).items()}
        super().load_state_dict({**state_dict, "state": {i: state for i, state in parts.items() if state}})

    def _shared_units(self):
        return [unit for unit in self.units if unit.even is not None]


DistMuonAdamW = MuonAdamW # earlier versions had a second class for several ranks
