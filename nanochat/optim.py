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


class MuonAdamW(torch.optim.Optimizer):
    """
    AdamW for groups {"kind": "adamw", params, lr, betas, eps, weight_decay}, Muon for groups {"kind": "muon", params,
    lr, momentum, ns_steps, beta2, weight_decay} whose params are matrices of one shape.

    With a process group, gradients are averaged over the ranks inside `step()`; there is no wrapper around the model.
    A missing gradient is skipped by AdamW and counts as zero in Muon and on several ranks.
    Raises ValueError for an unknown kind or a Muon group of mixed shapes.
    """

    def __init__(self, param_groups):
        super().__init__(param_groups, {})
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
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._average_gradients()
        for group in self.param_groups:
            self._step_adamw(group) if group["kind"] == "adamw" else self._step_muon(group)
        return loss

    def _average_gradients(self):
        """Make every rank hold the mean gradient. SUM and a division, because gloo has no AVG."""
        handles = []
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.grad is None: # the ranks must agree on the collectives, whatever each of them computed
                p.grad = torch.zeros_like(p)
            handles.append((p, dist.all_reduce(p.grad, async_op=True)))
        for p, handle in handles:
            handle.wait()
            p.grad /= dist.get_world_size()

    def _step_adamw(self, group):
        """One pass over the memory of each parameter: torch's fused kernel, which computes in at least fp32."""
        for p in group["params"]:
            if p.grad is None:
                continue
            state, (beta1, beta2) = self.state[p], group["betas"]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            before = torch.tensor(float(state["step"]), device=p.device) # what the kernel counts up
            adamw([p], [p.grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [before], fused=True, amsgrad=False,
                  beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
                  maximize=False)
            state["step"] += 1

    def _step_muon(self, group):
        params = group["params"]
        stack = torch.stack([p.detach() for p in params]) # (G, r, c)
        grads = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
        state = self.state[params[0]] # the whole group's, under its first parameter
        if not state:
            G, rows, cols = stack.shape
            state["momentum_buffer"] = torch.zeros_like(stack)
            state["second_momentum_buffer"] = stack.new_zeros((G, rows, 1) if rows >= cols else (G, 1, cols))
        stack = muon_update(stack, grads, state["momentum_buffer"], state["second_momentum_buffer"], group["lr"],
                            group["momentum"], group["ns_steps"], group["beta2"], group["weight_decay"])
        for p, updated in zip(params, stack.unbind(0)):
            p.copy_(updated)


DistMuonAdamW = MuonAdamW # earlier versions had a second class for several ranks
