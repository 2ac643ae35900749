"""Random heads, tables of who learns from whom, and the loss from closed forms of its own, in float64."""

import torch
import torch.nn.functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KD = ([0.1, 0.0], [[0.0, 0.9], [0.0, 0.0]])
DML = ([1.0, 1.0], [[0.0, 1.0], [1.0, 0.0]])
SOKD = ([1.0, 0.7, 0.0], [[0.0, 0.5, 0.0], [0.3, 0.0, 1.0], [0.0, 0.0, 0.0]])
DCM = ([1.0] * 4, [[0, 0, 1.0, 0.5], [0, 0, 0.5, 1.0], [1.0, 0.5, 0, 0], [0.5, 1.0, 0, 0]])
TABLES = {"KD": KD, "DML": DML, "SOKD": SOKD, "DCM": DCM}


def make(H, N, C, dtype=torch.float32, scale=3.0, seed=0, learners=0):
    generator = torch.Generator().manual_seed(seed)
    heads = [(torch.randn(N, C, generator=generator) * scale).to(DEVICE, dtype) for _ in range(H)]
    for head in heads[:learners]:
        head.requires_grad_()
    return heads, torch.randint(C, (N,), generator=generator).to(DEVICE)


def log_softmax(z):
    shifted = z - z.amax(1, keepdim=True)
    return shifted - shifted.exp().sum(1, keepdim=True).log()


def expectation(p, values):
    return torch.where(p > 0, p * values, 0.0).sum()


def independent(heads, y, c, W, T=1.0, smoothing=0.0, ignore=None, standardize=False):
    """Terms [H, 1 + H] and gradients from the closed forms of the equation, in float64."""
    heads = [head.detach().double() for head in heads]
    N, C = heads[0].shape
    kept = torch.ones(N, dtype=torch.bool, device=y.device) if ignore is None else y != ignore
    if not y.is_floating_point():
        y = F.one_hot(torch.where(kept, y, 0), C) * kept[:, None]
    y = ((1 - smoothing) * y.double() + smoothing / C) * kept[:, None]
    scores = heads
    if standardize:
        scores = [(z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7) for z in heads]
    soft, hard = [log_softmax(z / T) for z in scores], [log_softmax(z) for z in heads]
    terms = torch.zeros(len(heads), 1 + len(heads), dtype=torch.float64, device=y.device)
    gradients = []
    for i, z in enumerate(heads):
        terms[i, 0] = -c[i] * expectation(y, hard[i]) / kept.sum() if c[i] else 0
        pull = torch.zeros_like(z)
        for j, w in enumerate(W[i]):
            if w:
                terms[i, 1 + j] = T * T * w * expectation(soft[j].exp(), soft[j] - soft[i]) / N
                pull += w * (soft[i].exp() - soft[j].exp())
        pull *= T / N
        if standardize:
            s, u = z.std(1, keepdim=True), z - z.mean(1, keepdim=True)
            r = 1 / (s + 1e-7)
            pull = r * (pull - pull.mean(1, keepdim=True)) - r**2 * u * (pull * u).sum(1, keepdim=True) / ((C - 1) * s)
        gradients.append(pull + c[i] * (y.sum(1, keepdim=True) * hard[i].exp() - y) / kept.sum())
    return terms, gradients
