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


def mean_scatter(tensor, chunk):
    """
    Begin to average `tensor` (n, ...) over the ranks. Returns (handle, out): after handle.wait() and a division by the
    number of ranks, out (chunk, ...) holds this rank's rows, R chunk .. (R+1) chunk, zeros beyond n.
    """
    world_size = dist.get_world_size()
    out = tensor.new_empty((chunk, *tensor.shape[1:]))
    return dist.reduce_scatter_tensor(out, padded(tensor, chunk * world_size), async_op=True), out


def padded(tensor, num_rows):
    """`tensor` (n, ...) with rows of zeros up to num_rows, contiguous; itself when there is nothing to add."""
    if len(tensor) == num_rows:
        return tensor.contiguous()
    return torch.cat([tensor, tensor.new_zeros((num_rows - len(tensor), *tensor.shape[1:]))])


class MuonAdamW(torch.optim.Optimizer):
    """
    AdamW for groups {"kind": "adamw", params, lr, betas, eps, weight_decay}, Muon for groups {"kind": "muon", params,
    lr, momentum, ns_steps, beta2, weight_decay} whose params are matrices of one shape.

    With a process group of W ranks, gradients are averaged over them inside `step()`; there is no wrapper around the
    model. Work and state are shared out as in ZeRO-2 (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054): a
    rank averages, updates and sends only its part, which is ceil(n / W) of the n rows of an AdamW parameter or of the n
    matrices of a Muon group. Any W will do: the last parts may be short or empty, padded with zeros. AdamW parameters
    of fewer than SMALL numbers are updated everywhere. What is sent overlaps with what is computed.

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

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters from their gradients. `closure`, when given, recomputes the loss first, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Three phases: all gradients set out at once; each unit is updated when its gradient is there and sets out
        # again; whatever is still on its way is waited for. The ranks agree on the order, whatever each computed.
        averaging = [(group, params, self._average(group, params)) for group in self.param_groups
                     for params in self._units(group)]
        arriving = [self._update(group, params, average()) for group, params, average in averaging]
        for finish in filter(None, arriving):
            finish()
        return loss

    def _units(self, group):
        """What is updated together: each parameter of an AdamW group alone, all of a Muon group."""
        return [group["params"]] if group["kind"] == "muon" else [[p] for p in group["params"]]

    def _is_shared_out(self, group, params):
        return self.world_size > 1 and (group["kind"] == "muon" or params[0].numel() >= SMALL)

    def _part(self, num_rows):
        """(first row, end, size of a whole part) of this rank's part of num_rows."""
        chunk = -(-num_rows // self.world_size)
        return min(self.rank * chunk, num_rows), min((self.rank + 1) * chunk, num_rows), chunk

    def _average(self, group, params):
        """Begin to average a unit's gradients. Returns a function that waits and gives this rank's part, or None."""
        def whole_gradient():
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            return torch.stack(grads) if group["kind"] == "muon" else grads[0]

        if self.world_size == 1: # nothing to wait for: made when it is needed
            return whole_gradient if group["kind"] == "muon" else lambda: params[0].grad
        whole = whole_gradient()
        if self._is_shared_out(group, params):
            handle, part = mean_scatter(whole, self._part(len(whole))[2])
        else:
            part = whole.clone() # the gradient itself is its owner's
            handle = dist.all_reduce(part, async_op=True)

        def wait():
            handle.wait()
            return part.div_(self.world_size) # SUM and a division, because gloo has no AVG
        return wait

    def _update(self, group, params, grad):
        """
        Update this rank's part of a unit and begin to send it; returns a function that puts all parts in place, or
        None for a unit that is whole here.
        """
        whole = torch.stack([p.detach() for p in params]) if group["kind"] == "muon" else params[0]
        if not self._is_shared_out(group, params):
            self._step(group, params, whole, grad)
            return self._put(group, params, whole)
        first, end, chunk = self._part(len(whole))
        part = padded(whole[first:end], chunk)
        self._step(group, params, part, grad)
        gathered = part.new_empty((chunk * self.world_size, *part.shape[1:]))
        handle = dist.all_gather_into_tensor(gathered, part, async_op=True)

        def finish():
            handle.wait()
            whole.copy_(gathered[:len(whole)])
            self._put(group, params, whole)
        return finish

    def _put(self, group, params, whole):
        if group["kind"] == "muon":
            for p, updated in zip(params, whole.unbind(0)):
                p.copy_(updated)

    def _step(self, group, params, part, grad):
        """Update `part` in place with the state of its unit, which is kept under the unit's first parameter."""
        if grad is None:
            return
        state = self.state[params[0]]
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
        saved, shared = super().state_dict(), dict(self._shared_units())
        for i, state in sorted(saved["state"].items()): # the ranks gather in the same order
            saved["state"][i] = {name: self._whole(value, shared.get(i)) for name, value in sorted(state.items())}
        return saved if self.rank == 0 else None

    def _whole(self, part, num_rows):
        """On rank 0 a copy of the tensor (num_rows, ...) of which each rank has a part; None: of `part`, whole here."""
        if not torch.is_tensor(part):
            return part
        if num_rows is not None:
            gathered = part.new_empty((len(part) * self.world_size, *part.shape[1:]))
            dist.all_gather_into_tensor(gathered, part)
            part = gathered[:num_rows]
        return part.to("cpu", copy=True) if self.rank == 0 else None

    def load_state_dict(self, state_dict):
        """Take this rank's part of a whole state."""
        parts = dict(state_dict["state"])
        for i, num_rows in self._shared_units():
            first, end, chunk = self._part(num_rows)
            parts[i] = {name: padded(value[first:end], chunk).clone() if torch.is_tensor(value) else value
                        for name, value in parts.get(i, {}).items()}
        super().load_state_dict({**state_dict, "state": {i: state for i, state in parts.items() if state}})

    def _shared_units(self):
        """(number of the first parameter, rows) of each unit that is shared out, as state_dict numbers parameters."""
        i = 0
        for group in self.param_groups:
            for params in self._units(group):
                if self._is_shared_out(group, params):
                    yield i, len(params) if group["kind"] == "muon" else len(params[0])
                i += len(params)


DistMuonAdamW = MuonAdamW # earlier versions had a second class for several ranks
