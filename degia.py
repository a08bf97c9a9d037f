"""DeGIA: the task network M, and the objectives of its two phases.

    x, y, c   image (B,3,H,W) in [0,1], its target, its class (digits: c = y)
    x_src     the original training image that x started from
    M         task network; its *template feature* is the input of its last layer
    F         class-conditional flow of the training set, new samples included; it sees x averaged down to
              D numbers
    alpha     weight of the constraint of eq. (6)

min phase, eq. (5):  l = l_task(M(x), y) - log p_X(x, c) / D; M and F share no parameter: each steps alone
max phase, eq. (7):  x <- argmax_x { l - alpha [ d(P_x, P_src) + ||M(x) - M(x_src)||^2 ] }, log p by `density`
"""
import torch
import torch.nn as nn
import torch.nn.functional as nnf

from flows import Flow, gaussian_w2

class LeNet(nn.Module):
    """Two 5x5 convolutions (64, 128) and two layers of 1024: the digit network of ADA, M-ADA and RandConv."""

    def __init__(self, outputs, size=32):
        super().__init__()
        side = ((size - 4) // 2 - 4) // 2
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(128 * side * side, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU())
        self.head = nn.Linear(1024, outputs)

    def forward(self, x):
        """Returns (output, template feature)."""
        feature = self.features(x)
        return self.head(feature), feature

def flow_view(x, shape):
    """What F sees of x: averaged down to F's size; the channels as they are, or their mean if F has one."""
    channels, size, _ = shape
    if channels == 1:
        x = x.mean(1, keepdim=True)
    return nnf.adaptive_avg_pool2d(x.float(), size)

def task_loss(output, y):
    """l_task per image (B,): cross-entropy, the digit form of eq. (1)."""
    return nnf.cross_entropy(output.float(), y, reduction="none")

def ascend(x_src, objective, K, eta, blur):
    """K steps x <- clamp(x + eta g / rms(g)) from x_src, g = d objective / dx smoothed by a blur x blur mean.

    g is normalised per image: eta, a number or (B,1,1,1), is the change of a step in image units. `objective`
    maps x to a scalar. No parameter receives a gradient.
    """
    x = x_src
    for _ in range(K):
        x = x.detach().requires_grad_()
        g, = torch.autograd.grad(objective(x), x)
        g = nnf.avg_pool2d(g, blur, 1, blur // 2, count_include_pad=False)
        x = (x + eta * g / g.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-20)).clamp(0, 1)
    return x.detach()

def max_objective(x, y, c, M, F, feature_src, u, shift, alpha, density):
    """Eq. (7) summed over images: l(x, y, c) - alpha [ d(P_x, P_src) + ||M(x) - M(x_src)||^2 ].

    x (B,3,H,W) of ONE class c (B,); feature_src (B,T) = M(x_src); u, shift as in `Flow.log_prob`, held during
    an ascent. The features' distance is a mean over features, d is per dimension. Without F, -log p and d go:
    what remains is adversarial data augmentation.
    """
    output, feature = M(x)
    loss = task_loss(output, y)
    distance = (feature.float() - feature_src).square().mean(1)
    if F is not None:
        z, log_det = F(flow_view(x, F.shape), u)
        loss = loss - density * (F.prior.log_prob(z, c, shift) + log_det) / F.dim
        std = z.var(0, correction=0).add(1e-8).sqrt()  # differentiable also where a class has one image
        distance = distance + gaussian_w2(z.mean(0), std, F.prior.mean(c[0]), F.prior.std(c[0]))
    return (loss - alpha * distance).sum()

def build(o):
    """M and F of the options o, untrained. Raises ValueError if F's size does not fit."""
    if o.flow_size > o.size:
        raise ValueError(f"--flow-size {o.flow_size}: larger than the images; choose at most --size {o.size}")
    M = LeNet(10, o.size)
    F = Flow(o.flow_channels, o.flow_size, 10, steps=o.flow_steps, hidden=o.flow_hidden, gamma=o.gamma,
             lam=o.lam)
    return M, F
