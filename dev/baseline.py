"""
A plain training step, frozen: the yardstick of every claim about speed.

    python -m dev.baseline                      depth 4, width 256, 8,192 tokens a step, random ids
    python -m dev.baseline --no-compile --steps 5

What a careful reader of the formulas would write with torch alone: fp32 throughout, the full logits, the whole model
under torch.compile, the optimizer as it stands (its iteration in bf16). It imports nothing of nanochat and is never
made faster: speeds are ratios to it, measured on the same machine at the same time. The last line is JSON.

Letters: B rows, T positions, C width, H heads, D = C / H, V vocabulary, L layers.
"""
import argparse
import json
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

POLAR_EXPRESS = [ # Amsel et al. 2025, https://arxiv.org/abs/2505.16932: 5 iterations, safety factor 2e-2, cushion 2
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]

# -----------------------------------------------------------------------------
# The model

def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Turn the channel pairs (i, i + D/2) of x (B, T, H, D) by minus their position's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, width, num_heads, has_ve):
        super().__init__()
        self.num_heads = num_heads
        self.c_q = nn.Linear(width, width, bias=False)
        self.c_k = nn.Linear(width, width, bias=False)
        self.c_v = nn.Linear(width, width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.ve_gate = nn.Linear(32, num_heads, bias=False) if has_ve else None

    def forward(self, u, ve, cos, sin, mask):
        B, T, C = u.shape
        shape = (B, T, self.num_heads, C // self.num_heads)
        q, k, v = self.c_q(u).view(shape), self.c_k(u).view(shape), self.c_v(u).view(shape)
        if ve is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(u[..., :32])) # (B, T, H), starts at 1
            v = v + gate.unsqueeze(-1) * ve.view(shape)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2) # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, width, num_heads, has_ve):
        super().__init__()
        self.attn = Attention(width, num_heads, has_ve)
        self.mlp = MLP(width)

    def forward(self, x, ve, cos, sin, mask):
        x = x + self.attn(norm(x), ve, cos, sin, mask)
        return x + self.mlp(norm(x))


class Model(nn.Module):
    """Decoder with value embeddings on every second layer (the last included), residual scalars and a logit softcap."""

    def __init__(self, vocab_size, num_layers, num_heads, width, seq_len, window_pattern):
        super().__init__()
        self.vocab_size, padded = vocab_size, -(-vocab_size // 64) * 64
        ve_layers = [i for i in range(num_layers) if i % 2 == (num_layers - 1) % 2]
        self.resid_lambdas = nn.Parameter(torch.ones(num_layers))
        self.x0_lambdas = nn.Parameter(torch.full((num_layers,), 0.1))
        blocks = nn.ModuleList([Block(width, num_heads, i in ve_layers) for i in range(num_layers)])
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(padded, width), "h": blocks})
        self.lm_head = nn.Linear(width, padded, bias=False)
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(padded, width) for i in ve_layers})
        self._init_weights(width)

        frequencies = 10_000 ** (-torch.arange(0, width // num_heads, 2) / (width // num_heads))
        angles = torch.outer(torch.arange(seq_len), frequencies)[None, :, None, :] # (1, T, 1, D/2)
        self.register_buffer("cos", angles.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angles.sin().bfloat16(), persistent=False)
        distance = torch.arange(seq_len)[:, None] - torch.arange(seq_len)[None, :]
        self.register_buffer("short", (distance >= 0) & (distance <= seq_len // 2), persistent=False)
        letters = [window_pattern[i % len(window_pattern)] for i in range(num_layers - 1)] + ["L"]
        self.is_short = [letter == "S" for letter in letters]

    @torch.no_grad()
    def _init_weights(self, width):
        bound = 3**0.5 * width**-0.5
        nn.init.normal_(self.transformer.wte.weight, std=1.0)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
            if block.attn.ve_gate is not None:
                nn.init.zeros_(block.attn.ve_gate.weight)
        for table in self.value_embeds.values():
            nn.init.uniform_(table.weight, -bound, bound)

    def forward(self, idx, targets):
        """Mean cross entropy in nats of ids (B, T) against targets (B, T)."""
        x = x0 = norm(self.transformer.wte(idx))
        for i, block in enumerate(self.transformer.h):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            ve = self.value_embeds[str(i)](idx) if str(i) in self.value_embeds else None
            x = block(x, ve, self.cos, self.sin, self.short if self.is_short[i] else None)
        logits = self.lm_head(norm(x))[..., :self.vocab_size].float()
        logits = 15 * torch.tanh(logits / 15)
        return F.cross_entropy(logits.view(-1, self.vocab_size), targets.view(-1))

# -----------------------------------------------------------------------------
# The optimizer: AdamW for tables, head and scalars, Muon for the matrices of the blocks

class Optimizer:
    def __init__(self, model, width, matrix_lr=0.02, weight_decay=0.2):
        scale = (width / 768) ** -0.5
        self.adamw = [([model.lm_head.weight], 0.004 * scale, (0.8, 0.95)),
                      ([model.transformer.wte.weight, *model.value_embeds.parameters()], 0.3 * scale, (0.8, 0.95)),
                      ([model.resid_lambdas], 0.005, (0.8, 0.95)), ([model.x0_lambdas], 0.5, (0.96, 0.95))]
        matrices = list(model.transformer.h.parameters())
        self.muon = [[p for p in matrices if p.shape == shape] for shape in sorted({p.shape for p in matrices})]
        self.matrix_lr, self.weight_decay, self.step_count, self.state = matrix_lr, weight_decay, 0, {}

    @torch.no_grad()
    def step(self):
        self.step_count += 1
        for params, lr, betas in self.adamw:
            for p in params:
                self._adamw_step(p, lr, *betas)
        for params in self.muon:
            self._muon_step(params)
        for p in [*(p for params, _, _ in self.adamw for p in params), *(p for params in self.muon for p in params)]:
            p.grad = None

    def _adamw_step(self, p, lr, beta1, beta2):
        m, v = self.state.setdefault(p, (torch.zeros_like(p), torch.zeros_like(p)))
        m.lerp_(p.grad, 1 - beta1)
        v.lerp_(p.grad.square(), 1 - beta2)
        denominator = (v / (1 - beta2**self.step_count)).sqrt() + 1e-10
        p.sub_(lr / (1 - beta1**self.step_count) * m / denominator)

    def _muon_step(self, params, momentum=0.95, beta2=0.95):
        """Muon with a variance per neuron and cautious weight decay, for the matrices (G, r, c) of one shape."""
        weight, grad = torch.stack(list(params)), torch.stack([p.grad for p in params])
        rows, cols = weight.shape[-2:]
        dim = -1 if rows >= cols else -2
        fresh = torch.zeros_like(weight), torch.zeros_like(weight.narrow(dim, 0, 1)) # the second (G, r, 1) or (G, 1, c)
        buffer, variance = self.state.setdefault(params[0], fresh)
        buffer.lerp_(grad, 1 - momentum)
        x = grad.lerp(buffer, momentum).bfloat16()
        x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
        for a, b, c in POLAR_EXPRESS:
            gram = x.mT @ x if rows > cols else x @ x.mT
            z = b * gram + c * (gram @ gram)
            x = a * x + (x @ z if rows > cols else z @ x)
        x = x.float()
        square = x.square().mean(dim=dim, keepdim=True)
        variance.lerp_(square, 1 - beta2)
        scaled = x * variance.clamp_min(1e-10).rsqrt()
        x = scaled * (x.norm(dim=(-2, -1), keepdim=True) / scaled.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))
        lr = self.matrix_lr * max(1, rows / cols) ** 0.5
        weight = weight - lr * x - lr * self.weight_decay * weight * (x * weight >= 0)
        for p, updated in zip(params, weight, strict=True):
            p.copy_(updated)

# -----------------------------------------------------------------------------
# The measurement

def build_parser():
    parser = argparse.ArgumentParser(description="Measure a plain training step, in tokens per second.")
    add = parser.add_argument
    add("--depth", type=int, default=4, help="layers")
    add("--aspect-ratio", type=int, default=64, help="width per layer, in channels")
    add("--width", type=int, default=-1, help="channels; -1 = depth x aspect ratio, rounded up to whole heads")
    add("--head-dim", type=int, default=128, help="channels of a head")
    add("--vocab-size", type=int, default=8192, help="tokens in the vocabulary")
    add("--seq-len", type=int, default=512, help="positions in a row")
    add("--batch", type=int, default=16, help="rows in a step")
    add("--window-pattern", default="L", help="S = half of the context, L = all of it; tiled, the last layer is L")
    add("--steps", type=int, default=12, help="steps in all; the first two (compilation) are not counted")
    add("--no-compile", action="store_true", help="without torch.compile")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    width = args.width if args.width > 0 else -(-args.depth * args.aspect_ratio // args.head_dim) * args.head_dim
    if args.steps < 3 or width % args.head_dim:
        parser.error("--steps must be at least 3, and --width a multiple of --head-dim")
    torch.manual_seed(42)
    model = Model(args.vocab_size, args.depth, width // args.head_dim, width, args.seq_len, args.window_pattern)
    optimizer = Optimizer(model, width)
    compiled = model if args.no_compile else torch.compile(model, dynamic=False)
    tokens_per_step, seconds = args.batch * args.seq_len, []
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokens_per_step:,} tokens a step")
    for step in range(args.steps):
        ids = torch.randint(args.vocab_size, (args.batch, args.seq_len + 1))
        start = time.perf_counter()
        loss = compiled(ids[:, :-1], ids[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        speed = tokens_per_step / seconds[-1]
        print(f"step {step:3d} | loss {loss.item():.6f} | {seconds[-1]:.3f} s | {speed:,.0f} tok/s")
    median = statistics.median(seconds[2:])
    print(json.dumps({"tokens_per_second": round(tokens_per_step / median), "median_step_seconds": round(median, 4),
                      "first_step_seconds": round(seconds[0], 2), "compiled": not args.no_compile, "width": width,
                      "loss": round(loss.item(), 6), "threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
