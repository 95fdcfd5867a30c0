"""A slow, obvious model with the original scBERT's function, parameter names and shapes, in float64.

Written from the published description; its state dict is what an original checkpoint holds, so tests
make such checkpoints with it and prove parity against it.
"""

import math
from types import SimpleNamespace

import torch
from torch import nn

SMALL = {"genes": 23, "vocab": 7, "width": 20, "depth": 2, "heads": 3, "head_dim": 8, "features": 17}
FULL = {"genes": 16906, "vocab": 7, "width": 200, "depth": 6, "heads": 10, "head_dim": 64, "features": 266}


def orthogonal_projection(features: int, head_dim: int) -> torch.Tensor:
    blocks = [torch.linalg.qr(torch.randn(head_dim, head_dim)).Q.T for _ in range(-(-features // head_dim))]
    norms = torch.randn(features, head_dim).norm(dim=1)
    return norms[:, None] * torch.cat(blocks)[:features]


class FastAttention(nn.Module):
    def __init__(self, features, head_dim):
        super().__init__()
        self.register_buffer("projection_matrix", orthogonal_projection(features, head_dim))

    def feature_maps(self, q, k, eps=1e-4):
        """phi_q, phi_k [batch, heads, length, features]; the key maximum is over the whole batch."""
        d, m = q.shape[-1], len(self.projection_matrix)
        q, k = q * d**-0.25, k * d**-0.25
        wq, wk = q @ self.projection_matrix.T, k @ self.projection_matrix.T
        hq, hk = (q**2).sum(-1, keepdim=True) / 2, (k**2).sum(-1, keepdim=True) / 2
        phi_q = m**-0.5 * (torch.exp(wq - hq - wq.amax(dim=-1, keepdim=True)) + eps)
        phi_k = m**-0.5 * (torch.exp(wk - hk - wk.max()) + eps)
        return phi_q, phi_k


class SelfAttention(nn.Module):
    def __init__(self, width, heads, head_dim, features):
        super().__init__()
        self.heads = heads
        self.fast_attention = FastAttention(features, head_dim)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_k = nn.Linear(width, heads * head_dim, bias=False)
        self.to_v = nn.Linear(width, heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width)

    def split(self, x):
        batch, length, _ = x.shape
        return x.reshape(batch, length, self.heads, -1).permute(0, 2, 1, 3)

    def forward(self, x, longest_matrix=2048):
        """New values [batch, length, width] and the attention each token receives [batch, length]."""
        batch, length, _ = x.shape
        phi_q, phi_k = self.fast_attention.feature_maps(self.split(self.to_q(x)), self.split(self.to_k(x)))
        v = self.split(self.to_v(x))
        if length <= longest_matrix:
            matrix = phi_q @ phi_k.transpose(-1, -2)
            matrix = matrix / matrix.sum(dim=-1, keepdim=True)
            out, received = matrix @ v, matrix.sum(dim=-2)
        else:
            # the same by associativity; a test holds it against the matrix
            phi_q = phi_q / (phi_q @ phi_k.sum(dim=-2).unsqueeze(-1))
            out = phi_q @ (phi_k.transpose(-1, -2) @ v)
            received = (phi_k @ phi_q.sum(dim=-2).unsqueeze(-1)).squeeze(-1)
        return self.to_out(out.permute(0, 2, 1, 3).reshape(batch, length, -1)), received.mean(dim=1)


class PreLayerNorm(nn.Module):
    def __init__(self, width, fn):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x):
        return self.fn(self.norm(x))


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.w1 = nn.Linear(width, 4 * width)
        self.w2 = nn.Linear(4 * width, width)

    def forward(self, x):
        hidden = self.w1(x)
        return self.w2(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))


class Wrapped(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


class Performer(nn.Module):
    def __init__(self, width, depth, heads, head_dim, features):
        super().__init__()
        self.net = nn.Module()
        self.net.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreLayerNorm(width, SelfAttention(width, heads, head_dim, features)),
                    PreLayerNorm(width, Wrapped(FeedForward(width))),
                ]
            )
            for _ in range(depth)
        )
        self.register_buffer("calls_since_last_redraw", torch.tensor(0))


class ConvHead(nn.Module):
    def __init__(self, length, width, labels, hidden):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 1, (1, width))
        self.fc1 = nn.Linear(length, 512)
        self.fc2 = nn.Linear(512, hidden)
        self.fc3 = nn.Linear(hidden, labels)

    def forward(self, x):
        x = torch.relu(self.conv1(x[:, None])).reshape(len(x), -1)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class OriginalScBert(nn.Module):
    """The whole original model; `labels=None` gives the pretrained form, a number the fine-tuned one."""

    def __init__(self, genes, vocab, width, depth, heads, head_dim, features, labels=None, hidden=128):
        super().__init__()
        self.token_emb = nn.Embedding(vocab, width)
        self.pos_emb = nn.Module()
        self.pos_emb.emb = nn.Embedding(genes + 1, width)
        self.performer = Performer(width, depth, heads, head_dim, features)
        self.norm = nn.LayerNorm(width)
        self.to_out = (
            nn.Linear(width, vocab) if labels is None else ConvHead(genes + 1, width, labels, hidden)
        )
        with torch.no_grad():
            self.pos_emb.emb.weight[-1] = 0

    def forward(self, ids):
        """logits, hidden states (embeddings, each block, final norm) and attention per gene, summed over rows."""
        x = self.token_emb(ids) + self.pos_emb.emb.weight
        states, received = [x], 0
        for attention, feed_forward in self.performer.net.layers:
            out, weights = attention(x)
            received = received + weights / len(self.performer.net.layers)
            x = x + out
            x = x + feed_forward(x)
            states.append(x)
        x = self.norm(x)
        return SimpleNamespace(logits=self.to_out(x), hidden_states=[*states, x], attention=received)


def make_original(seed=0, scale=1.0, **sizes):
    """An original model with random weights in float64; `scale` multiplies to_q and to_k (peakier attention)."""
    torch.manual_seed(seed)
    model = OriginalScBert(**{**SMALL, **sizes})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                weight.normal_(std=0.1)
            elif name.endswith(("to_q.weight", "to_k.weight")):
                weight.mul_(scale)
    return model.eval().requires_grad_(False).double()


def original_checkpoint(model, prefix="") -> dict:
    """What the original saves: float32 weights, a float64 gene table, and what a trainer adds."""
    state = {
        prefix + name: value.float() if value.is_floating_point() and name != "pos_emb.emb.weight" else value
        for name, value in model.state_dict().items()
    }
    return {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}, "losses": 0.5}


def rounded(model):
    """The model with its weights as the checkpoint stores them, so that only arithmetic differs."""
    model.load_state_dict({name: v.float().to(v.dtype) for name, v in model.state_dict().items()})
    return model
