"""Convert a dense Llama-like model to sparse attention and continue its training.

    python examples/convert.py --spec llama3_8b --model meta-llama/Llama-3.1-8B --text book.txt --tokens 8192
    python examples/convert.py --tokens 24 --steps 2 --ranks 2  # a small random model, on a CPU in Triton's interpreter

The dense model has no gates. Their biases start as a least-squares fit of the branches' outputs to dense attention's,
for each head, on the first batch. phi starts as the mean of a block. The first step is therefore close to the dense
model, and the distance is printed. With `--distill`, each layer's distance to dense attention is added to the loss. An
interrupted run continues from its last checkpoint in `--out`, where the losses are plotted too.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import nsa_gen
from nsa_gen.llama import scale_of
from nsa_gen.transformers import apply_sparse_attention

WORDS = 256
README = Path(__file__).resolve().parent.parent / "README.md"


class Rotary(nn.Module):
    """Cosines and sines (1, T, D) of positions."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        powers = torch.arange(self.dims // 2, device=x.device) * (2 / self.dims)
        angles = positions[..., None] * 10000.0**-powers
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Attention(nn.Module):
    """Dense causal attention with the same parts as LlamaAttention."""

    def __init__(self, op: Any, width: int) -> None:
        super().__init__()
        heads, dims = op.SPEC["heads"], op.SPEC["head_dim"]
        self.head_dim, self.scaling = dims["qk"], scale_of(op)
        self.q_proj = nn.Linear(width, heads["query"] * dims["qk"], bias=False)
        self.k_proj = nn.Linear(width, heads["kv"] * dims["qk"], bias=False)
        self.v_proj = nn.Linear(width, heads["kv"] * dims["v"], bias=False)
        self.o_proj = nn.Linear(heads["query"] * dims["v"], width, bias=False)

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any) -> tuple[Any, None]:
        q, k, v = (f(hidden_states).unflatten(-1, (-1, self.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotate(x, torch.stack(position_embeddings)) for x in (q, k))
        return self.o_proj(dense(q, k, v, self.scaling).flatten(-2)), None


class Layer(nn.Module):
    """Attention and a gated feed-forward layer, each after a norm."""

    def __init__(self, op: Any, width: int) -> None:
        super().__init__()
        self.self_attn = Attention(op, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.up, self.gate = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(hidden_states=self.norms[0](x), position_embeddings=embeddings)[0]
        y = self.norms[1](x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """A small model over bytes, whose parts have the names that the transformers library uses."""

    def __init__(self, op: Any, width: int, layers: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=False)
        self.model = nn.Module()
        self.model.embed_tokens, self.model.norm = nn.Embedding(WORDS, width), nn.RMSNorm(width)
        self.model.layers = nn.ModuleList(Layer(op, width) for _ in range(layers))
        self.model.rotary_emb = Rotary(op.SPEC["head_dim"]["qk"])
        self.lm_head = nn.Linear(width, WORDS, bias=False)

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        x = self.model.embed_tokens(tokens)
        embeddings = self.model.rotary_emb(x, torch.arange(tokens.shape[1], device=x.device)[None])
        for layer in self.model.layers:
            x = layer(x, embeddings)
        return SimpleNamespace(logits=self.lm_head(self.model.norm(x)))


def rotate(x: Tensor, embeddings: Tensor) -> Tensor:
    """Rotate heads (B, T, H, D) by cosines and sines (2, 1 or B, T, R); the two columns of a pair are R / 2 apart."""
    cos, sin = embeddings[:, :, :, None]
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    return torch.cat((turned * cos + torch.cat((-second, first), -1) * sin, rest), -1)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of (B, T, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return o.transpose(1, 2)


def heads_of(sparse: Any, op: Any, hidden: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a `NativeSparseAttention`, as it computes them."""
    dims = op.SPEC["head_dim"]
    q, k, v = (
        getattr(sparse, f"{name}_proj")(hidden).unflatten(-1, (-1, dims["v" if name == "v" else "qk"]))
        for name in ("q", "k", "v")
    )
    return (q, k, v) if positions is None else (rotate(q, positions), rotate(k, positions), v)


def fit_gates(sparse: Any, op: Any, hidden: Tensor, positions: Tensor | None) -> tuple[float, float]:
    """Set the biases of a layer's gates so that its heads are closest to dense attention's on these tokens.

    Returns the distance relative to dense attention, first with all gates at one half, then with the new biases.
    """
    q, k, v = heads_of(sparse, op, hidden, positions)
    branches = [name for name in ("cmp", "slc", "win") if f"o_{name}" in op.Auxiliary._fields]
    gates = q.new_zeros(*q.shape[:3], len(branches))
    parameters = getattr(op, "CompressionParameters", None)
    phi = None if parameters is None else parameters(*(getattr(sparse, f"phi_{name}") for name in parameters._fields))
    _, found = op.nsa_attention(q, k, v, gates, return_aux=True, **({} if phi is None else {"compression": phi}))
    outputs = torch.stack([getattr(found, f"o_{name}") for name in branches], -1).float()  # (B, T, Hq, Dv, branches)
    outputs = outputs.permute(2, 0, 1, 3, 4).flatten(1, 3)
    wanted = dense(q, k, v, scale_of(op)).float().permute(2, 0, 1, 3).flatten(1)
    # Normal equations of each head. The ridge makes the fit unique if branches see the same keys.
    product = outputs.mT @ outputs
    ridge = 1e-4 * product.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(len(branches)).to(product)
    values = torch.linalg.solve(product + ridge, outputs.mT @ wanted[..., None])[..., 0]
    values = values.clamp(0.01, 0.99)  # a gate at 0 or 1 would hardly learn
    sparse.gate_proj.bias.copy_(values.logit().flatten())
    off = [outputs @ each[..., None] - wanted[..., None] for each in (torch.full_like(values, 0.5), values)]
    half, fitted = (float(each.norm() / wanted.norm()) for each in off)
    return half, fitted


def converted(model: Any, op: Any, tokens: Tensor) -> list[tuple[float, float]]:
    """Give the model sparse attention, and fit its gates layer by layer while these tokens go through it.

    Returns the result of `fit_gates` for each layer.
    """
    apply_sparse_attention(model, op)
    handles, found = [], []
    for layer in model.model.layers:

        def fit(sparse: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            found.append(fit_gates(sparse, op, given[0], named.get("positions")))

        handles.append(layer.self_attn.sparse.register_forward_pre_hook(fit, with_kwargs=True))
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return found


def distilling(model: Any, op: Any) -> list[Tensor]:
    """Make each layer append its relative squared distance to dense attention to the returned list."""
    found: list[Tensor] = []

    def compare(sparse: Any, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        with torch.no_grad():
            q, k, v = heads_of(sparse, op, given[0], named.get("positions"))
            wanted = sparse.o_proj(dense(q, k, v, scale_of(op)).flatten(-2)).float()
        found.append((output.float() - wanted).square().mean() / wanted.square().mean())

    for layer in model.model.layers:
        layer.self_attn.sparse.register_forward_hook(compare, with_kwargs=True)
    return found


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def load(options: argparse.Namespace, op: Any, device: str) -> tuple[Any, Tensor]:
    """The dense model, and the text's tokens (N,)."""
    dtype = getattr(torch, op.SPEC["dtype"])
    if options.model is None:
        words = torch.frombuffer(bytearray(Path(options.text).read_bytes()), dtype=torch.uint8).long()
        return Llama(op, options.width, options.layers).to(device, dtype), words
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = Path(options.text).read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="sdpa", torch_dtype=dtype)
    return model.to(device), AutoTokenizer.from_pretrained(options.model)(text, return_tensors="pt").input_ids[0]


def batch_of(words: Tensor, step: int, rank: int, options: argparse.Namespace) -> Tensor:
    """Pieces of the text (B, T). They depend only on step and rank, not on interruptions of the run."""
    draw = torch.Generator().manual_seed(1000003 * step + rank)
    starts = torch.randint(len(words) - options.tokens, (options.batch,), generator=draw)
    return torch.stack([words[start : start + options.tokens] for start in starts.tolist()])


def train(options: argparse.Namespace) -> None:
    """Convert the model, or load the checkpoint, and train."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = f"cuda:{os.environ.get('LOCAL_RANK', rank)}" if torch.cuda.is_available() else "cpu"
    op = nsa_gen.load(options.spec)
    torch.manual_seed(0)
    model, words = load(options, op, device)
    if len(words) <= options.tokens:
        raise SystemExit(f"--text: expected more than {options.tokens} tokens, got {len(words)}")
    checkpoint = options.out / "checkpoint.pt"
    state = torch.load(checkpoint, map_location=device, weights_only=True) if checkpoint.exists() else None
    if state is None:
        held_out = batch_of(words, -1, 0, options).to(device)
        with torch.no_grad():
            before = model(held_out).logits
            distances = converted(model, op, batch_of(words, -2, 0, options).to(device))
            after = model(held_out).logits
        off = float((after - before).norm() / before.norm())
        if rank == 0:
            for number, (half, fitted) in enumerate(distances):
                print(f"layer {number}: attention {100 * fitted:.1f}% off, {100 * half:.1f}% with gates at one half")
            said = f"loss {loss_of(before, held_out):.4f} dense, {loss_of(after, held_out):.4f} converted"
            print(f"first step: {said}; logits {100 * off:.2f}% off", flush=True)
        losses: list[float] = []
    else:
        apply_sparse_attention(model, op).load_state_dict(state["model"])
        losses = state["losses"]
        if rank == 0:
            print(f"goes on behind step {len(losses)}", flush=True)
    distances_of_step = distilling(model, op) if options.distill else []
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.lr)
    if state is not None:
        optimiser.load_state_dict(state["optimiser"])
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    steps = range(len(losses), options.steps)
    for step in track(steps, "training", disable=rank > 0 or not sys.stderr.isatty()):
        tokens = batch_of(words, step, rank, options).to(device)
        distances_of_step.clear()
        loss = loss_of(wrapped(tokens).logits, tokens)
        total = loss + options.distill * torch.stack(distances_of_step).mean() if options.distill else loss
        total.backward()
        optimiser.step()
        optimiser.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / ranks)
        if rank == 0 and ((step + 1) % options.save_every == 0 or step + 1 == options.steps):
            save(checkpoint, {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "losses": losses})
    if rank == 0:
        print("losses: " + " ".join(f"{loss:.4f}" for loss in losses), flush=True)
        plot(losses, options.out / "losses.png")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def plot(losses: list[float], path: Path) -> None:
    with contextlib.suppress(ImportError):  # matplotlib comes with nsa-gen[bench]
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4))
        axes = figure.subplots()
        axes.plot(range(1, len(losses) + 1), losses)
        axes.set(xlabel="step", ylabel="loss (nats a token)")
        figure.savefig(path)


def _run(options: argparse.Namespace, **where: Any) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **where)
    train(options)
    dist.destroy_process_group()
    # DDP keeps gloo's threads after the process group is destroyed. A thread that frees a tensor after the interpreter
    # has shut down aborts the process, so exit before that.
    sys.stdout.flush()
    os._exit(0)


def _rank(rank: int, meeting: str, options: argparse.Namespace) -> None:
    """One process of several on this machine."""
    os.environ["LOCAL_RANK"] = str(rank)
    _run(options, init_method=f"file://{meeting}", rank=rank, world_size=options.ranks)


def main() -> None:
    """Read the command line; convert and train as a process of torchrun, or in `--ranks` processes on this machine."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spec", default="tiny", help="a spec with sigmoid gates, of the model's heads (tiny)")
    parser.add_argument("--model", help="a model of the transformers library; a small random one if left out")
    parser.add_argument("--text", default=str(README), help="what is trained on (the README)")
    parser.add_argument("--out", type=Path, default=Path("build/convert"), help="of the checkpoint and the plot")
    parser.add_argument("--ranks", type=int, default=1, help="processes to start, without torchrun (1)")
    parser.add_argument("--tokens", type=int, default=48, help="of a sequence (48)")
    parser.add_argument("--batch", type=int, default=1, help="sequences a rank and step (1)")
    parser.add_argument("--layers", type=int, default=1, help="of the random model (1)")
    parser.add_argument("--width", type=int, default=64, help="of the random model (64)")
    parser.add_argument("--steps", type=int, default=3, help="in all, those before an interruption included (3)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--distill", type=float, default=0.0, help="weight of the distance to dense attention (0)")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints (100)")
    options = parser.parse_args()
    if "RANK" in os.environ:
        _run(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments = str(Path(folder) / "meeting"), copy.copy(options)
        torch.multiprocessing.spawn(_rank, arguments, nprocs=options.ranks)


if __name__ == "__main__":
    main()
