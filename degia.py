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

# ---------------------------------------------------------------- backbones, w: their width
def conv(c_in, c_out, kernel=3, stride=1, norm=False):
    """A convolution that keeps the size (over the stride), GroupNorm if asked for, ReLU."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=not norm),
                         nn.GroupNorm(1, c_out) if norm else nn.Identity(), nn.ReLU())
class Residual(nn.Module):
    """ResNet's basic block: relu(f(x) + x); x goes through a 1x1 convolution where the stride is 2."""
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.f = nn.Sequential(conv(c_in, c_out, 3, stride, norm=True), conv(c_out, c_out, norm=True)[:2])
        self.skip = nn.Identity() if stride == 1 else conv(c_in, c_out, 1, stride, norm=True)[:2]
    def forward(self, x):
        return torch.relu(self.f(x) + self.skip(x))
class Dense(nn.Sequential):
    """DenseNet's layer: x and f(x), w channels more, side by side; f is 1x1, then 3x3."""
    def __init__(self, c_in, w):
        super().__init__(conv(c_in, 4 * w, 1, norm=True), conv(4 * w, w, norm=True))
    def forward(self, x):
        return torch.cat([x, super().forward(x)], 1)
def layers_of(backbone, w):
    """The layers of a backbone, up to the template feature; the older ones end with two full layers."""
    def fc(c, side):
        return [nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(c * side ** 2, 16 * w), nn.ReLU(),
                nn.Linear(16 * w, 16 * w), nn.ReLU()]
    pool2, pool3, grid = nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), (nn.AdaptiveAvgPool2d(4), nn.Flatten())
    if backbone == "lenet":  # two 5x5 convolutions; w = 64 at 32x32: the digit network of ADA and M-ADA
        return [nn.Conv2d(3, w, 5), nn.ReLU(), pool2, nn.Conv2d(w, 2 * w, 5), nn.ReLU(), pool2, *fc(2 * w, 5)]
    if backbone == "alexnet":  # a large first kernel with a stride, overlapping pools
        return [conv(3, w, 11, 2), pool3, conv(w, 3 * w, 5), pool3, conv(3 * w, 6 * w), conv(6 * w, 4 * w),
                conv(4 * w, 4 * w), pool3, *fc(4 * w, 4)]
    if backbone == "vgg":  # stacks of 3x3 convolutions (VGG-11 less its last stack)
        return [conv(3, w), pool2, conv(w, 2 * w), pool2, conv(2 * w, 4 * w), conv(4 * w, 4 * w), pool2,
                conv(4 * w, 8 * w), conv(8 * w, 8 * w), pool2, *fc(8 * w, 4)]
    if backbone == "resnet":  # four stages of two basic blocks (ResNet-18)
        blocks = ((1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8))
        return [conv(3, w, 3, 2, norm=True), *(Residual(i * w, o * w, o // i) for i, o in blocks), *grid]
    dense = [layer for _ in range(3) for layer in (*(Dense((4 + i) * w, w) for i in range(4)),
             conv(8 * w, 4 * w, 1, norm=True), nn.AvgPool2d(2))]  # transitions halve channels and size
    return [conv(3, 4 * w, 3, 2, norm=True), *dense, *grid]

class TaskNetwork(nn.Module):
    """M: a backbone, whose output is the template feature, and a last layer; landmarks add the mean pose."""
    def __init__(self, backbone, width, size, outputs):
        super().__init__()
        self.features = nn.Sequential(*layers_of(backbone, width))
        self.head = nn.Linear(self.features(torch.zeros(1, 3, size, size)).shape[1], outputs)
        self.register_buffer("template", torch.zeros(outputs))
    def forward(self, x):
        """Returns (output, template feature)."""
        feature = self.features(x)
        return self.template + self.head(feature), feature

# ---------------------------------------------------------------- the two objectives
def flow_view(x, shape):
    """What F sees of x: averaged down to F's size; the channels as they are, or their mean if F has one."""
    x = x.mean(1, keepdim=True) if shape[0] == 1 else x
    return nnf.adaptive_avg_pool2d(x.float(), shape[1])
def task_loss(output, y):
    """l_task per image (B,): squared error of landmarks y (B,34), eq. (1), cross-entropy of digits y (B,)."""
    if y.is_floating_point():
        return (output.float() - y).square().mean(1)
    return nnf.cross_entropy(output.float(), y, reduction="none")
def k_means(y, k):
    """k centres (k,34) of poses y (N,34); to start with, each is the pose farthest from those before it."""
    centres = y[:1]
    for _ in range(k - 1):
        centres = torch.cat([centres, y[torch.cdist(y, centres).amin(1).argmax()][None]])
    for _ in range(20):
        nearest = torch.cdist(y, centres).argmin(1)
        centres = torch.stack([y[nearest == i].mean(0) if i in nearest else centres[i] for i in range(k)])
    return centres

def ascend(x_src, objective, K, eta, blur):
    """K steps x <- clamp(x + eta g / rms(g)) from x_src, g = d objective / dx after a blur x blur mean;
    rms per image, so that eta, a number or (B,1,1,1), is in image units. No parameter receives a gradient."""
    x = x_src.detach()
    for _ in range(K):
        g, = torch.autograd.grad(objective(x.requires_grad_()), x)
        g = nnf.avg_pool2d(g, blur, 1, blur // 2, count_include_pad=False)
        x = (x.detach() + eta * g / g.square().mean((1, 2, 3), True).sqrt().clamp_min(1e-20)).clamp(0, 1)
    return x
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
    if o.flow_size > o.size or o.flow_size % 4:
        raise ValueError(f"--flow-size {o.flow_size}: not a multiple of 4 up to --size; choose another")
    outputs, classes = (10, 10) if o.task == "digits" else (34, o.classes)
    M = TaskNetwork(o.backbone, o.M_width, o.size, outputs)
    F = Flow(o.flow_channels, o.flow_size, classes, 2, o.flow_steps, lam=o.lam)
    F.register_buffer("poses", torch.zeros(classes, 34))  # those of hands; classes of digits are labels
    return M, F
def classes_of(y, F):
    """The class c that F is conditioned on: a digit itself, of landmarks the nearest of F's poses."""
    return torch.cdist(y, F.poses.to(y)).argmin(1) if y.is_floating_point() else y
