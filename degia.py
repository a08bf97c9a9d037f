"""DeGIA: the task network M, and the objectives of its two phases.

    x, y, c   image (B,3,H,W) in [0,1], its target, its class (digits: c = y); it started from x_src
    M         task network; its *template feature* is the input of its last layer
    F         class-conditional flow of the training set, new samples included; sees x averaged to D numbers
    alpha     weight of the constraint of eq. (6)

min phase, eq. (5):  l = l_task(M(x), y) - log p_X(x, c) / D; M and F share no parameter: each steps alone
max phase, eq. (7):  x <- argmax_x { l - alpha [ d(P_x, P_src) + ||M(x) - M(x_src)||^2 ] }, log p by `density`
"""
import torch
import torch.nn as nn
import torch.nn.functional as nnf
from flows import Flow, gaussian_w2

TRAINED = {"degia": "MF", "pure": "M", "ada": "M", "flow": "F"}  # which networks a method trains

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
    x = x.mean(1, keepdim=True) if shape[0] == 1 else x
    return nnf.adaptive_avg_pool2d(x.float(), shape[1])

def task_loss(output, y):
    """l_task per image (B,): cross-entropy, the digit form of eq. (1)."""
    return nnf.cross_entropy(output.float(), y, reduction="none")

def ascend(x_src, objective, K, eta, blur):
    """K steps x <- clamp(x + eta g / rms(g)) from x_src, g = d objective / dx after a blur x blur mean;
    rms per image, so that eta, a number or (B,1,1,1), is in image units. No parameter receives a gradient."""
    x = x_src
    for _ in range(K):
        x = x.detach().requires_grad_()
        g, = torch.autograd.grad(objective(x), x)
        g = nnf.avg_pool2d(g, blur, 1, blur // 2, count_include_pad=False)
        x = (x + eta * g / g.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-20)).clamp(0, 1)
    return x.detach()

def max_objective(x, y, c, M, F, feature_src, u, shift, alpha, density):
    """Eq. (7) summed over images x (B,3,H,W) of ONE class c (B,), both distances per dimension; feature_src
    (B,T) is that of M(x_src); u and shift are those of `Flow.log_prob`, held during an ascent."""
    output, feature = M(x)
    loss, distance = task_loss(output, y), (feature.float() - feature_src).square().mean(1)
    if F is not None:  # without F, -log p and d go: what remains is adversarial data augmentation
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
    return M, Flow(o.flow_channels, o.flow_size, 10, 2, o.flow_steps, o.gamma, o.lam)
